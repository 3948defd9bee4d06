"""How far from the truth are low-precision scores? ``python bench/fidelity.py --queries N --json OUT``

The truth: each pair alone, unpadded, plain transformers in fp32. Against it, over the same token ids: fastscore in
fp32, in bf16 as it runs by default (residual stream in fp32), with the residual stream in bf16, with the model's own
layers, and in int8 where torchao is installed; and padded batches of four in bf16, once with the cross entropy in bf16
as the reference system computes it and once with the logits upcast to fp32. ``--contenders`` takes some of them.
Results are written after every few queries.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, environment, one_line, write_json
from padded import PairScore, answer_scores, padded_logits
from rounds import table
from transformers import AutoModelForCausalLM, PreTrainedModel
from workload import TokenPair, Workload, load_workload

from fastscore import Scorer
from fastscore.devices import choose_device
from fastscore.model_source import resolve_model

sys.path.append(str(ROOT / "tests"))  # the tests' own truth, which uses nothing of fastscore
from truth import alone

FAST_FP32, FAST_BF16 = "fastscore fp32 packed", "fastscore bf16 packed"
FAST_NARROW, FAST_MODEL, FAST_INT8 = "fastscore bf16, residual bf16", "fastscore bf16, model's layers", "fastscore int8"
PADDED_BF16, PADDED_UPCAST = "padded bf16", "padded bf16, fp32 logits"
OURS: dict[str, dict[str, Any]] = {
    FAST_FP32: {"dtype": "fp32"},
    FAST_BF16: {"dtype": "bf16"},
    FAST_NARROW: {"dtype": "bf16", "residual": "model"},
    FAST_MODEL: {"dtype": "bf16", "forward": "model"},
    FAST_INT8: {"dtype": "bf16", "quantize": "int8"},
}
"""Options of :class:`fastscore.Scorer` by contender."""
PEERS = (PADDED_BF16, PADDED_UPCAST)
BLOCK_QUERIES = 4


@dataclass(slots=True)
class Distance:
    """What has been collected about one contender."""

    token_differences: list[float] = field(default_factory=list)
    pair_differences: list[float] = field(default_factory=list)
    query_differences: list[float] = field(default_factory=list)
    """Mean of each query's pair differences."""
    taus: list[float] = field(default_factory=list)
    best_changed: int = 0

    def add_query(self, scores: Sequence[PairScore], truth: Sequence[Sequence[float]]) -> None:
        for score, true in zip(scores, truth, strict=True):
            self.token_differences += [abs(a - b) for a, b in zip(score.token_logprobs, true, strict=True)]
        true_means = [sum(true) / len(true) for true in truth]
        means = [score.mean_logprob for score in scores]
        differences = [abs(a - b) for a, b in zip(means, true_means, strict=True)]
        self.pair_differences += differences
        self.query_differences.append(sum(differences) / len(differences))
        self.taus.append(kendall_tau(means, true_means))
        self.best_changed += means.index(max(means)) != true_means.index(max(true_means))

    def summary(self) -> dict[str, Any]:
        return {
            "nats_per_answer_token": spread(self.token_differences),
            "nats_per_pair": spread(self.pair_differences),
            "kendall_tau": {"mean": sum(self.taus) / len(self.taus), "min": min(self.taus)},
            "best_candidate_changed": self.best_changed,
            "queries": len(self.taus),
            "per_query": {"mean_nats_per_pair": self.query_differences, "kendall_tau": self.taus},
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, 99th percentile (linear interpolation) and maximum."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {
        "mean": float(ordered.mean()),
        "p99": float(ordered.quantile(0.99)),
        "max": float(ordered.max()),
        "count": len(values),
    }


def kendall_tau(left: Sequence[float], right: Sequence[float]) -> float:
    """Kendall's tau-b: agreement of two rankings of the same candidates, corrected for ties; 1 when neither ranks."""
    concordance = ties_left = ties_right = total = 0
    for i, j in combinations(range(len(left)), 2):
        sign_left, sign_right = _sign(left[i] - left[j]), _sign(right[i] - right[j])
        concordance += sign_left * sign_right
        ties_left += sign_left == 0
        ties_right += sign_right == 0
        total += 1
    ranked = (total - ties_left) * (total - ties_right)
    return concordance / ranked**0.5 if ranked else float(ties_left == ties_right)


def excess(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean of (our distance - their distance) over queries, with its standard error. Below zero is nearer.

    A query's pairs have an answer in common and are not independent: queries are what is counted.
    """
    difference = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    error = float(difference.std() / len(ours) ** 0.5) if len(ours) > 1 else 0.0
    return {"mean": float(difference.mean()), "standard_error": error}


def measure(
    model: str,
    workload: Workload,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
    contenders: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score block after block; ``save`` is given the results so far after each. The last ones come back.

    contenders: by name; without them, all that can take part.
    """
    names = [*OURS, *PEERS] if contenders is None else contenders
    scorers = {
        name: Scorer(model, **OURS[name])
        for name in names
        if name in OURS and (contenders is not None or takes_part(OURS[name]))
    }
    folder = resolve_model(model).name_or_path
    peers = [name for name in names if name in PEERS]
    device = choose_device("auto")
    padded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device) if peers else None
    distances = {name: Distance() for name in (*scorers, *peers)}
    results: dict[str, Any] = {}
    for first in range(0, len(workload.queries), BLOCK_QUERIES):
        block = workload.queries[first : first + BLOCK_QUERIES]
        pairs = [pair for query in block for pair in query]
        truth = alone(folder, pairs)
        scores = {name: _fastscore(scorer, pairs) for name, scorer in scorers.items()}
        if padded is not None:
            scores |= _padded(padded, pairs)
        start = 0
        for query in block:
            part = slice(start, start + len(query))
            start = part.stop
            for name, distance in distances.items():
                distance.add_query(scores[name][part], truth[part])
        results = {
            "workload": workload.describe(),
            "queries_done": first + len(block),
            "complete": first + len(block) == len(workload.queries),
            "device": str(device),
            "runs": {
                name: {key: scorer.describe()[key] for key in ("attention", "forward")}
                for name, scorer in scorers.items()
            },
            **_results(distances),
        }
        save(results)
        print(f"{first + len(block)} of {len(workload.queries)} queries", flush=True)
    return results


def takes_part(options: Mapping[str, Any]) -> bool:
    """Whether what the options ask for is installed."""
    return "quantize" not in options or find_spec("torchao") is not None


def show(results: Mapping[str, Any]) -> str:
    """The table of all contenders and the verdict."""
    rows = []
    for name, summary in results["contenders"].items():
        token, pair = summary["nats_per_answer_token"], summary["nats_per_pair"]
        figures = [f"{value[key]:.2e}" for value in (token, pair) for key in ("mean", "p99", "max")]
        tau = summary["kendall_tau"]
        changed = f"{summary['best_candidate_changed']}/{summary['queries']}"
        rows.append([name, *figures, f"{tau['mean']:.4f}", f"{tau['min']:.4f}", changed])
    columns = ["", "token mean", "p99", "max", "pair mean", "p99", "max", "tau", "min tau", "best changed"]
    lines = [table(columns, rows)]
    for peer, value in results["bf16_packed_minus"].items():
        figures = f"{value['mean']:+.2e} +- {value['standard_error']:.1e}"
        lines.append(f"mean distance per pair, fastscore bf16 minus {peer}: {figures}")
    return "\n".join(lines)


def _results(distances: Mapping[str, Distance]) -> dict[str, Any]:
    found: dict[str, Any] = {"contenders": {name: distance.summary() for name, distance in distances.items()}}
    found["bf16_packed_minus"] = {
        name: excess(distances[FAST_BF16].query_differences, distance.query_differences)
        for name, distance in distances.items()
        if FAST_BF16 in distances and name not in (FAST_FP32, FAST_BF16)
    }
    return found


def _fastscore(scorer: Scorer, pairs: Sequence[TokenPair]) -> list[PairScore]:
    return [PairScore(list(score.token_logprobs), score.mean_logprob) for score in scorer.score_tokens(pairs)]


def _padded(model: PreTrainedModel, pairs: Sequence[TokenPair]) -> dict[str, list[PairScore]]:
    """Both rows from the same logits."""
    scores: dict[str, list[PairScore]] = {PADDED_BF16: [], PADDED_UPCAST: []}
    for logits_BLV, labels_BL in padded_logits(model, pairs):
        scores[PADDED_BF16] += answer_scores(logits_BLV, labels_BL)
        scores[PADDED_UPCAST] += answer_scores(logits_BLV.float(), labels_BL)
    return scores


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--queries", type=int, default=40, help="the first so many of nq_qa.jsonl")
    parser.add_argument("--contenders", nargs="+", choices=[*OURS, *PEERS], metavar="NAME", help="default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    where = environment()
    started = time.perf_counter()

    def save(results: dict[str, Any]) -> None:
        if options.json is not None:
            seconds = round(time.perf_counter() - started, 1)
            write_json(options.json, {"environment": where, "model": options.model, "seconds": seconds, **results})

    workload = load_workload(Scorer(options.model, dtype="fp32").tokenizer, options.queries)
    print(f"{one_line(where)}\n{options.model}, first {options.queries} queries: {workload.describe()}", flush=True)
    print(show(measure(options.model, workload, save, options.contenders)))


if __name__ == "__main__":
    main()
