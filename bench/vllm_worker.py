"""vLLM's side of a comparison: run by the interpreter of an environment that has vLLM, never by fastscore's.

    python -P bench/vllm_worker.py MODEL_FOLDER DTYPE

Speaks JSON lines. The first line out says that the model is loaded. Then each line in is ``{"mode": ..., "pairs":
[[prompt ids, answer ids], ...]}`` with mode ``prompt_logprobs`` or ``prefill``, and each line out ``{"seconds": ...,
"logprobs": [[...], ...] or null, "idle_cpu_seconds": ...}``: the time from token ids to the answers' log-probabilities,
and the processor time that vLLM's processes have spent since they fell idle after the last request. Ends with its
input. ``peer_vllm.py`` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

IDLE_SHARE = 0.05
"""Processes that use less of one core than this wait for work."""
IDLE_PROBE_SECONDS = 0.25
IDLE_WAIT_SECONDS = 10.0


def main() -> None:
    folder, dtype = sys.argv[1:]
    # Whatever vLLM or a library of its prints must not come between the lines of the protocol.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        import torch
        import vllm

        started = time.perf_counter()
        llm = vllm.LLM(model=folder, dtype=dtype, enforce_eager=True, disable_log_stats=True)
        versions = {"vllm": vllm.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
        preloaded = [os.path.basename(each) for each in os.environ.get("LD_PRELOAD", "").split(":") if each]
        _say(out, {"load_seconds": time.perf_counter() - started, "versions": versions, "preloaded": preloaded})
        idle_since = _wait_until_idle()
        for line in sys.stdin:
            request = json.loads(line)
            idle_cpu_seconds = _cpu_seconds() - idle_since
            llm.reset_prefix_cache()  # a round must not find what the one before computed
            reply = answer(llm, request["mode"], request["pairs"])
            idle_since = _wait_until_idle()  # vLLM's processes spin for a second after their work
            _say(out, {**reply, "idle_cpu_seconds": idle_cpu_seconds})


def answer(llm: Any, mode: str, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Seconds, and in mode ``prompt_logprobs`` the log-probability of every answer token in nats."""
    from vllm import SamplingParams

    wanted = {"prompt_logprobs": {"prompt_logprobs": 0, "flat_logprobs": True}, "prefill": {}}[mode]
    sampling = SamplingParams(detokenize=False, max_tokens=1, temperature=0.0, **wanted)
    started = time.perf_counter()
    prompts = [{"prompt_token_ids": [*prompt, *answer]} for prompt, answer in pairs]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    logprobs = None
    if wanted:
        logprobs = [_answer_logprobs(output, len(answer)) for output, (_, answer) in zip(outputs, pairs, strict=True)]
    return {"seconds": time.perf_counter() - started, "logprobs": logprobs}


def _answer_logprobs(output: Any, count: int) -> list[float]:
    """The last ``count`` of a prompt's. With prompt_logprobs=0 each place holds its own token's alone."""
    flat = output.prompt_logprobs
    own = flat.logprobs[-count:]
    if flat.token_ids[-count:] != output.prompt_token_ids[-count:]:
        raise RuntimeError("vLLM gave log-probabilities of other tokens than the prompt's")
    return own


def _cpu_seconds() -> float:
    """Of this process and those it started."""
    import psutil

    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def _wait_until_idle() -> float:
    """Processor time at the moment when nothing spins any more, or when waiting for that has no end."""
    give_up = time.perf_counter() + IDLE_WAIT_SECONDS
    before = _cpu_seconds()
    while True:
        time.sleep(IDLE_PROBE_SECONDS)
        now = _cpu_seconds()
        if now - before < IDLE_SHARE * IDLE_PROBE_SECONDS or time.perf_counter() > give_up:
            return now
        before = now


def _say(out: Any, value: dict[str, Any]) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
