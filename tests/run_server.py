"""Runs of the command line to be killed: each in a process of its own, forked from one that has imported everything.

As a program it is that one: a line of JSON on stdin starts a run or waits for one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRESS = "progress"


@dataclass(frozen=True)
class Run:
    """A run that was started: what it says goes to ``log``; ``progress`` has (seconds, pairs) of every report."""

    server: RunServer
    pid: int
    log: Path

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """(exit status, negative for a signal; what was said)."""
        status = self.server.ask({"wait": self.pid})
        return status, self.log.read_text(encoding="utf-8")

    def progress(self) -> list[tuple[float, int]]:
        path = Path(f"{self.log}.{PROGRESS}")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [(float(line.split()[0]), int(line.split()[1])) for line in lines if line.endswith("\n")]

    def until_pairs(self, count: int, limit: float = 60) -> None:
        """Wait until so many pairs have been reported."""
        deadline = time.monotonic() + limit
        while not any(pairs >= count for _, pairs in self.progress()):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)


class RunServer:
    """The process that the runs are forked from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads do not live through a fork
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "FASTSCORE_CACHE": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, *arguments: str | Path, file_bytes: int = 0, patches: Mapping[str, Any] | None = None) -> Run:
        """``fastscore`` with these arguments; ``patches`` are values of names in modules, as ``fastscore.launch:X``."""
        self._count += 1
        log = self._folder / f"run-{self._count}.log"
        log.touch()  # one killed at once has not opened it yet
        command = {"arguments": [str(argument) for argument in arguments], "log": str(log)}
        return Run(self, self.ask({**command, "file_bytes": file_bytes, "patches": dict(patches or {})}), log)

    def run(self, *arguments: str | Path, **options: Any) -> tuple[int, str]:
        return self.start(*arguments, **options).wait()

    def ask(self, command: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def __enter__(self) -> RunServer:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    import torch

    import fastscore.scorer
    from fastscore.tokenization import PairTokenizer

    torch.set_num_threads(1)
    assert fastscore.scorer is not None
    assert PairTokenizer is not None
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if not pid:
            _run(command)
        print(pid, flush=True)


def _run(command: dict[str, Any]) -> None:
    """In the forked process; never returns."""
    status = 1
    try:
        out = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        if command["file_bytes"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_bytes"], resource.RLIM_INFINITY))
        _report_progress(f"{command['log']}.{PROGRESS}")
        for name, value in command["patches"].items():
            module, _, attribute = name.partition(":")
            setattr(sys.modules[module], attribute, value)
        from fastscore.cli import main

        main(command["arguments"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _report_progress(path: str) -> None:
    """The runs' own reports, into a file that outlives them."""
    from fastscore.terminal import Terminal

    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def progress(terminal: Terminal, stats: Any) -> None:
        os.write(out, f"{time.monotonic()} {stats.pairs}\n".encode())

    Terminal.progress = progress  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
