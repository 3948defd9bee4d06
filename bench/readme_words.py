"""What the README's measured sections have in common: files of results, and how machines and ratios are told."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """A file of results; None where it is absent."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def machine(where: Mapping[str, Any]) -> str:
    """What it was measured on."""
    versions = where["versions"]
    device = where["gpus"][0]["name"] if where["gpus"] else _cpu(where)
    # One that waits for its threads is counted, too: less than one process for each core is a machine at rest.
    busy = f", load average {where['load_average']:.1f} at the beginning" if "load_average" in where else ""
    commit = where["commit"][:10] + (" with changes" if where["dirty"] else "")
    return (
        f"{device}{busy}, torch {versions['torch']}, transformers {versions['transformers']}, commit {commit}, "
        f"{where['date'][:10]}"
    )


def _cpu(where: Mapping[str, Any]) -> str:
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    return f"{where['cpu']} ({where['cpu_capability']}), {threads}"


def emulated(report: Mapping[str, Any], dtype: str) -> str:
    """A sentence on a comparison in which fastscore widened its weights; else ""."""
    settings = [found.get("settings", {}) for found in report["contenders"].values()]
    if not any("products in float32" in str(each.get("forward")) for each in settings):
        return ""
    return (
        f" This CPU has no instructions for {dtype}: fastscore widens weights to fp32 as it multiplies them; its peers "
        f"compute in {dtype} as PyTorch does there, at a fraction of fp32's rate. On such a CPU the ratios in fp32 are "
        "those to go by."
    )


def file_name(task: Mapping[str, Any]) -> str:
    """A file of the shared data in words."""
    return task["source"].replace("nq_qa.jsonl", "Natural Questions").replace("logiqa_mc.jsonl", "LogiQA")


def amount(task: Mapping[str, Any]) -> str:
    """How much of a file."""
    return f"{task['queries']} queries of {file_name(task)} ({task['pairs']} pairs)"


def ratio(values: Mapping[str, Any]) -> str:
    """How many times fastscore's time, by medians and, of several rounds, (from, to) by rounds."""
    if "failed" in values:
        return f"failed: {values['failed']}"
    if "times_fastscore" not in values:
        return "not timed: its scores differ"
    by_round = values["times_fastscore_by_round"]
    if min(by_round) == max(by_round) == 1:
        return "1"
    median = f"{values['times_fastscore']:.3g}"
    return median if len(by_round) == 1 else f"{median} ({min(by_round):.3g}-{max(by_round):.3g})"


def rounds_told(rounds: int, of: str = "") -> str:
    """What the ratios of ``ratio`` are, after so many rounds; ``of`` says of what."""
    if rounds == 1:
        return f"one round{of}"
    return f"medians of {rounds} rounds{of}, in brackets the lowest and highest ratio of a round"


def wrapped(text: str) -> str:
    """As a paragraph of the README."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def link(name: str, top: str = "") -> str:
    """To a file of results, from a document to which the top of the checkout is ``top``."""
    return f"[{name}]({top}bench/results/{name})"
