"""Runs benchmarks from a checkout that is not installed, with peers from wheels that were carried along."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def use_checkout() -> None:
    """Make ``fastscore`` and ``fastscore_kernels`` importable where they are not installed."""
    if find_spec("fastscore") is None:
        sys.path.append(str(ROOT))
    if find_spec("fastscore_kernels") is None:
        # What setup.py's package_dir does: the folder is called kernels, the package fastscore_kernels.
        package = ModuleType("fastscore_kernels")
        package.__path__ = [str(ROOT / "kernels")]
        sys.modules[package.__name__] = package


def use_wheels(folder: Path) -> None:
    """Install the folder's wheels beside the environment and put them last on the path: they replace nothing."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"no wheels in {folder}")
    target = tempfile.mkdtemp(prefix="wheels-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target]
    subprocess.run([*command, *wheels], check=True)
    sys.path.append(target)
