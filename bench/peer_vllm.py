"""The peers ``vllm`` and ``vllm, prefill only``: vLLM in an environment of its own, spoken to over pipes.

``bench/README.md`` says how to make that environment. Its interpreter is named by ``--vllm-python`` or by
FASTSCORE_VLLM_PYTHON.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, TokenLogprobs, Unavailable
from rounds import Timed
from workload import TokenPair

VLLM, VLLM_PREFILL = "vllm", "vllm, prefill only"
PYTHON_VARIABLE = "FASTSCORE_VLLM_PYTHON"
WORKER = Path(__file__).with_name("vllm_worker.py")
LOAD_SECONDS = 600.0
ANSWER_SECONDS = 3600.0
END_SECONDS = 60.0


class VllmWorker:
    """A process that has the model loaded in vLLM, and sleeps while it is not asked.

    Raises:
        Unavailable: no interpreter is named, or vLLM does not come up in its environment.
    """

    def __init__(self, python: str | None, folder: str, dtype: torch.dtype) -> None:
        python = python or os.environ.get(PYTHON_VARIABLE)
        if not python:
            raise Unavailable(f"no environment named: --vllm-python or {PYTHON_VARIABLE} (see bench/README.md)")
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-worker-", suffix=".log", encoding="utf-8")  # noqa: SIM115 - closed by close()
        command = [python, "-P", str(WORKER), folder, str(dtype).removeprefix("torch.")]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=worker_environment(Path(python)),
                start_new_session=True,  # so that it can be ended with all that it started
            )
        except OSError as error:
            raise Unavailable(f"{python} cannot be run: {error.strerror}") from error
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.idle_cpu_seconds: list[float] = []
        try:
            self.ready = self._next(LOAD_SECONDS)
        except RuntimeError as error:
            self.close()
            raise Unavailable(str(error)) from error

    def ask(self, mode: str, pairs: Sequence[TokenPair]) -> tuple[float, TokenLogprobs | None]:
        """Seconds in vLLM, and what it gave.

        Raises:
            RuntimeError: the process ended, with the last line it logged.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"mode": mode, "pairs": pairs}) + "\n")
        self._process.stdin.flush()
        reply = self._next(ANSWER_SECONDS)
        self.idle_cpu_seconds.append(reply["idle_cpu_seconds"])
        return reply["seconds"], reply["logprobs"]

    def close(self) -> None:
        """End it, and all that it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise RuntimeError(f"vLLM said nothing for {seconds:.0f} s") from None
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)  # its last words come after its last line
            self._log.seek(0)
            said = [text for text in self._log.read().splitlines() if text.strip()]
            raise RuntimeError(f"vLLM's process ended: {said[-1] if said else 'it said nothing'}")
        return json.loads(line)


class Vllm(Contender):
    """Log-probabilities of every prompt token, of which the answer's are kept."""

    name = VLLM
    mode = "prompt_logprobs"

    def __init__(self, worker: VllmWorker) -> None:
        super().__init__()
        self.worker = worker

    def score(self, pairs: Sequence[TokenPair]) -> Timed:
        seconds, scores = self.worker.ask(self.mode, pairs)
        self.scores = scores or []
        return Timed(seconds)

    def settings(self) -> dict[str, Any]:
        """``idle_cpu_seconds``: the largest processor time spent in between, while others had their turn."""
        return {**self.worker.ready, "mode": self.mode, "idle_cpu_seconds": max(self.worker.idle_cpu_seconds)}


class VllmPrefill(Vllm):
    """The same tokens through the model, one new token each, no log-probabilities: what vLLM could reach at most."""

    name = VLLM_PREFILL
    mode = "prefill"
    scores_nothing = True


def worker_environment(python: Path) -> dict[str, str]:
    """As many threads as here, on the processors that are this process's; and nothing of this environment's Python.

    What vLLM's documentation says to preload on a CPU is preloaded where it is found: a tenth faster here.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    processors = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
    libraries = python.parent.parent / "lib"
    openmp, allocator = libraries / "libiomp5.so", libraries / "libtcmalloc_minimal.so.4"
    found = [
        str(allocator) if allocator.exists() else ctypes.util.find_library("tcmalloc_minimal"),
        str(openmp) if openmp.exists() else None,
    ]
    return {
        "LD_PRELOAD": ":".join(filter(None, found)),
        **kept,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
