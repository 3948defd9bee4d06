"""Do scores depend on what else is in the file? ``python bench/invariance.py --json OUT``.

Random compositions (a subset, its order, the pack's token budget) of the same requests, by default and with
``deterministic``, where they must be bitwise the same; and what that costs, by turns on queries of ``nq_qa.jsonl``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from contenders import OURS
from environment import environment, one_line, write_json
from rounds import interleave, medians
from sharing_workload import keeping_share, qa_queries, sharing
from workload import TokenPair, Workload

from fastscore import Scorer
from fastscore.config import DEFAULT_MODEL

DETERMINISTIC = "deterministic"
BUDGETS = (256, 1024, 4096)


def short_requests(workload: Workload, count: int) -> list[TokenPair]:
    """The shortest pairs of queries that share passages."""
    return sorted(workload.pairs, key=lambda pair: len(pair[0]) + len(pair[1]))[:count]


def compositions(num_requests: int, count: int, largest: int, seed: int = 0) -> list[tuple[tuple[int, ...], int]]:
    """Which requests, in which order; and the budget."""
    draw = random.Random(seed)
    return [
        (tuple(draw.sample(range(num_requests), draw.randint(1, largest))), draw.choice(BUDGETS)) for _ in range(count)
    ]


def spread(scorer: Scorer, pairs: Sequence[TokenPair], drawn: Sequence[tuple[tuple[int, ...], int]]) -> dict[str, Any]:
    """Between the highest and the lowest log-probability that any two compositions gave an answer token, in nats."""
    lowest: dict[tuple[int, int], float] = {}
    highest: dict[tuple[int, int], float] = {}
    scored = 0
    for chosen, budget in drawn:
        scorer.load().max_batch_tokens = budget
        scores = scorer.score_tokens([pairs[index] for index in chosen])
        for index, score in zip(chosen, scores, strict=True):
            for place, logprob in enumerate(score.token_logprobs):
                token = (index, place)
                lowest[token] = min(lowest.get(token, logprob), logprob)
                highest[token] = max(highest.get(token, logprob), logprob)
                scored += 1
    spreads = [highest[token] - lowest[token] for token in lowest]
    return {
        "compositions": len(drawn),
        "answer_tokens": len(spreads),
        "times_scored": scored,
        "largest_spread": max(spreads),
        "mean_spread": sum(spreads) / len(spreads),
        "tokens_with_any_spread": sum(value > 0 for value in spreads),
    }


def make_scorers(model: str, dtype: str) -> dict[str, Scorer]:
    """By default and deterministic, each with weights of its own."""
    return {
        OURS: Scorer(model, dtype=dtype),  # type: ignore[arg-type]
        DETERMINISTIC: Scorer(model, dtype=dtype, deterministic=True),  # type: ignore[arg-type]
    }


def cost(scorers: dict[str, Scorer], pairs: Sequence[TokenPair], rounds: int) -> dict[str, Any]:
    """Times by turns, after a first run of each that is not timed."""
    for scorer in scorers.values():
        scorer.load().max_batch_tokens = max(BUDGETS)
    runs = {name: partial(scorer.score_tokens, pairs) for name, scorer in scorers.items()}
    interleave(runs, 1)
    seconds = interleave(runs, rounds)
    median = medians(seconds)
    return {
        "unique_tokens": sharing(pairs).unique_tokens,
        "seconds": seconds,
        "median_seconds": median,
        "deterministic_times_default": median[DETERMINISTIC] / median[OURS],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--compositions", type=int, default=100)
    parser.add_argument("--largest", type=int, default=25, help="requests in the largest composition")
    parser.add_argument("--cost-queries", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    scorers = make_scorers(options.model, options.dtype)
    whole = qa_queries(scorers[OURS].tokenizer)
    pairs = short_requests(keeping_share(whole, 20), options.requests)
    drawn = compositions(len(pairs), options.compositions, min(options.largest, len(pairs)))
    where = environment()
    print(one_line(where))
    report: dict[str, Any] = {
        "environment": where,
        "model": options.model,
        "dtype": options.dtype,
        "source": whole.source,
        "requests": len(pairs),
        "sharing_factor": sharing(pairs).factor,
        "budgets": BUDGETS,
        "spread_nats": {name: spread(scorer, pairs, drawn) for name, scorer in scorers.items()},
    }
    for name, values in report["spread_nats"].items():
        print(
            f"{options.dtype} {name}: {values['compositions']} compositions of {len(pairs)} requests: largest "
            f"difference {values['largest_spread']:.1e} nats, mean {values['mean_spread']:.1e}, "
            f"{values['tokens_with_any_spread']} of {values['answer_tokens']} answer tokens differ at all",
            flush=True,
        )
    report["cost"] = cost(scorers, keeping_share(whole, options.cost_queries).pairs, options.rounds)
    print(
        f"{options.dtype} {DETERMINISTIC} takes {report['cost']['deterministic_times_default']:.2f} times as long "
        f"over {report['cost']['unique_tokens']:,} tokens of {whole.source}"
    )
    if options.json is not None:
        write_json(options.json, report)
    return int(report["spread_nats"][DETERMINISTIC]["largest_spread"] != 0)


if __name__ == "__main__":
    sys.exit(main())
