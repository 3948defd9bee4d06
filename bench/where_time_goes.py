"""Where does the time of a run go? ``python bench/where_time_goes.py --json OUT``.

Queries of ``nq_qa.jsonl`` that share about as much as the whole file, through fastscore's own forward pass, with a
clock around each of its steps. On CUDA the clock waits for the device before and after each, so that steps are told
apart and their sum is more than a run takes. Beside a step's share of the time stands its rate over that of GEMMs, for
the operations it cannot do without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import FastScore, load_both
from environment import environment, one_line, write_json
from limits import layer_gemms, useful_work
from rounds import interleave, medians, seconds_of, table
from sharing_workload import keeping_share, qa_queries

from fastscore import Scorer
from fastscore.answer_head import AnswerHead
from fastscore.config import DEFAULT_MODEL
from fastscore.decoder import OwnForward

STEPS = ("embed", "rotary_tables", "norm", "linear", "gated", "rotate", "attend", "add", "head")
PRODUCTS = ("linear", "gated")
REST = "everything else"


class Clock:
    """Seconds by step. A step inside another (a product inside the gate) counts for the outer one."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._busy = False
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def around(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return function(*args, **kwargs)
            self._busy = True
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[step] += self.now() - started
                self.calls[step] += 1
                self._busy = False

        return timed

    def now(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def put_clocks(scorer: Scorer, clock: Clock) -> None:
    """Around every step of the forward pass and around the LM head.

    Raises:
        ValueError: another forward pass than fastscore's own runs.
    """
    model = scorer.load()
    if not isinstance(model.forward, OwnForward):
        raise ValueError(f"the steps of {model.forward_name} are not known here")
    operators = model.forward.operators
    for step in STEPS:
        if hasattr(operators, step):
            setattr(operators, step, clock.around(step, getattr(operators, step)))
    model.forward = replace(model.forward, attend=clock.around("attend", model.forward.attend))
    AnswerHead.flush = clock.around("head", AnswerHead.flush)  # type: ignore[method-assign]


def measure(model: str, dtype: str, num_queries: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """One run after one that warms up, as plain values."""
    scorer, plain = load_both(model, dtype, **options)
    pairs = keeping_share(qa_queries(scorer.tokenizer), num_queries).pairs
    run = partial(scorer.score_tokens, pairs)
    run()
    clock = Clock(scorer.load().device)
    gemms = layer_gemms(plain, scorer.load().max_batch_tokens, len(plain.base_model.layers))
    interleave(gemms.runs, 1)
    rate = gemms.flops / min(medians(interleave(gemms.runs, 1)).values())
    undisturbed = seconds_of(run)
    put_clocks(scorer, clock)
    whole = seconds_of(run)
    work = useful_work(plain, pairs)
    clock.seconds[REST] = whole - sum(clock.seconds.values())
    return {
        "unique_tokens": work.unique_tokens,
        "seconds": whole,
        "undisturbed_seconds": undisturbed,
        "gemm_tflops_per_s": rate / 1e12,
        "useful_flop_efficiency": work.flops / undisturbed / rate,
        "settings": FastScore(scorer).settings(),
        "steps": {
            step: {"seconds": seconds, "calls": clock.calls[step], "us_per_token": seconds / work.unique_tokens * 1e6}
            for step, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])
        },
        "flops": {"products": work.linear_flops, "attend": work.attention_flops, "head": work.head_flops},
    }


def show(report: Mapping[str, Any]) -> str:
    """The report of :func:`measure` as text."""
    limit = report["gemm_tflops_per_s"] * 1e12
    flops = report["flops"]
    products = sum(report["steps"][step]["seconds"] for step in PRODUCTS if step in report["steps"])

    def share_of_limit(step: str, seconds: float) -> str:
        if step in flops:
            return f"{flops[step] / seconds / limit:.0%}"
        return f"{flops['products'] / products / limit:.0%}, all products" if step in PRODUCTS else ""

    rows = [
        [
            step,
            f"{values['seconds']:.3f}",
            f"{values['seconds'] / report['seconds']:.1%}",
            f"{values['us_per_token']:.1f}",
            f"{values['calls']:,}",
            share_of_limit(step, values["seconds"]),
        ]
        for step, values in report["steps"].items()
    ]
    return (
        f"{report['settings']['forward']}; attention by {report['settings']['attention']}; packs of "
        f"{report['settings']['max_batch_tokens']:,} tokens\n"
        f"{report['unique_tokens']:,} tokens in {report['undisturbed_seconds']:.2f} s, with clocks "
        f"{report['seconds']:.2f} s; GEMM {limit / 1e9:,.0f} GFLOP/s; useful-FLOP efficiency "
        f"{report['useful_flop_efficiency']:.1%}\n"
        + table(["", "s", "share", "us/token", "calls", "of GEMM rate"], rows)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--residual", default="auto", help="auto, fp32 or model")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    where = environment()
    print(one_line(where), flush=True)
    how = {
        "residual": options.residual,
        "compiled": options.compile,
        "max_batch_tokens": options.max_batch_tokens,
        "forward": "own",
    }
    report = measure(options.model, options.dtype, options.queries, how)
    print(show(report))
    if options.json is not None:
        write_json(options.json, {"environment": where, "model": options.model, **report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
