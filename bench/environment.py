"""Where a figure was measured: machine, versions, commit. And the file that it is written to."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastscore.doctor import collect

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fastscore", "python", "torch", "transformers", "triton")


def environment() -> dict[str, Any]:
    """Plain values only; neither the machine's name nor any path."""
    report = collect()
    cpu, *gpus = report["devices"]
    commit, dirty = _commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu["name"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_native_bf16": cpu["bf16"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Threads that spin while they wait slow down whoever has most small steps, on a machine that is busy.
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "load_average": round(os.getloadavg()[0], 2),
        "memory_gib": cpu["memory_gib"],
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "versions": {name: report["versions"][name] for name in PACKAGES},
    }


def one_line(values: dict[str, Any]) -> str:
    """The environment as a line to print above figures."""
    versions = values["versions"]
    device = values["gpus"][0]["name"] if values["gpus"] else f"{values['cpu']}, {values['threads']} threads"
    commit = values["commit"][:10] + (" and uncommitted changes" if values["dirty"] else "")
    return (
        f"{device}; Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"fastscore {versions['fastscore']} at {commit}; {values['date']}"
    )


def write_json(path: str | Path, value: Any) -> None:
    """Write the value, indented, so that the file is whole at every moment; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(value, out, indent=2, allow_nan=False)
            out.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _commit() -> tuple[str, bool]:
    """The commit of this checkout, and whether the files that are measured differ from it.

    ``FASTSCORE_COMMIT`` names it for a copy of the tree without its history (whether that is dirty, nobody knows).
    """
    try:
        head = _git("rev-parse", "HEAD")
        return head, bool(_git("status", "--porcelain", "--untracked-files=no", "fastscore", "kernels", "bench"))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTSCORE_COMMIT", "unknown"), False


def _git(*arguments: str) -> str:
    result = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.strip()
