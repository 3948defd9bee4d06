"""Rows, and processes as torchrun starts them, for tests of runs in several processes."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORDS = ["river", "town", "Straße", "42", "白", "house", "people", "café"]


def make_rows(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Rows of several candidates; neighbours share some of them."""
    draw = random.Random(seed)
    passages = [" ".join(draw.choices(WORDS, k=draw.randint(3, 20))) for _ in range(count // 3 + 4)]
    return [
        {
            "query_id": index,
            "query": f"where is number {index} ",
            "answers": [" ".join(draw.choices(WORDS, k=draw.randint(1, 4)))],
            "pos": [passages[index // 3]],
            "neg": passages[index // 3 + 1 : index // 3 + 1 + draw.randint(1, 3)],
            "task": "qa",
        }
        for index in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
    )
    return path


def read_scores(path: Path) -> list[list[float]]:
    return [json.loads(line)["teacher_scores"] for line in path.read_text("utf-8").splitlines()]


def environment(**more: str) -> dict[str, str]:
    """One thread in every process, so that sums are made in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@contextmanager
def ranks(count: int, *arguments: str | Path, module: str = "fastscore") -> Iterator[list[subprocess.Popen[str]]]:
    """The processes that torchrun would start, without the one that watches over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for_work(processes: Sequence[subprocess.Popen[str]], cache: Path, seconds: float) -> None:
    """Until the cache is there, and all have been at work for so long."""
    while not cache.exists():
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.1)
    time.sleep(seconds)


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str]]:
    """(status, stderr) of each; nothing of it on stdout."""
    found = [process.communicate(timeout=timeout) for process in processes]
    assert [out for out, _ in found] == [""] * len(found)
    return [(process.returncode, err) for process, (_, err) in zip(processes, found, strict=True)]


def run_ranks(count: int, *arguments: str | Path, module: str = "fastscore") -> list[tuple[int, str]]:
    with ranks(count, *arguments, module=module) as processes:
        return ended(processes)
