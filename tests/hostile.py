"""Hostile input in tests: the program in this process, what it may leave behind, and files made to do harm."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from fastscore.cli import main

disable_progress_bar()  # the program's own way works only before transformers is imported, as in a process

STATUSES = (0, 1, 2)


@dataclass(frozen=True)
class Ended:
    """How a run ended, and the seconds it took."""

    status: int
    out: str
    err: str
    seconds: float


class CreatesFile:
    """Unpickled, it creates a file: what a pickle that does harm would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """What is in a folder: a change to a file, a new one or a missing one shows."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {
        name: (entry.st_size, entry.st_mtime_ns) for name, entry in found.items() if not os.path.isdir(folder / name)
    }


def run(*arguments: str | Path) -> Ended:
    """The program in this process. SystemExit alone may come out of it."""
    out, err = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    status: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            status = stopped.code
    return Ended(status, out.getvalue(), err.getvalue(), time.perf_counter() - started)


def assert_ended_well(ended: Ended, statuses: Sequence[int] = STATUSES, seconds: float = 20) -> None:
    """An exit status that is documented, no traceback, errors of one line (usage errors are typer's box), in time."""
    assert ended.status in statuses, ended
    assert "Traceback" not in ended.err, ended.err
    assert ended.seconds < seconds
    if ended.status and not re.search("Usage: fastscore|─ Error ─", ended.err + ended.out):
        errors = [line for line in ended.err.splitlines() if line.startswith("fastscore: ")]
        assert len(errors) == ended.err.count("\n") == 1, ended.err
    assert "\x1b" not in ended.err
    if ended.status == 1:  # a run that failed: hostile input is status 2
        assert "failed: " in ended.err


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def bomb(path: Path, marker: Path) -> Path:
    """A pickle at ``path`` that creates ``marker`` when something loads it without a guard."""
    path.write_bytes(pickle.dumps({"weight": CreatesFile(marker)}))
    return path
