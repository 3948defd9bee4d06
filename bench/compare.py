"""The one way to compare contenders: first whether they agree, then their times by turns, beside the limit's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from contenders import OURS, Computed, Contender, FastScore, TokenLogprobs, dtype_name
from limits import UsefulWork, layer_gemms, useful_work
from rounds import interleave, medians, table
from transformers import PreTrainedModel
from workload import TokenPair, lengths

LIMIT = "GEMM limit"
OUT_OF_MEMORY, NO_NUMBERS = "out of memory", "scores that are no numbers"

MEAN_DIFFERENCE = {"fp32": 2e-5, "bf16": 0.1, "fp16": 0.02}
"""How far apart two contenders may be on average over answer tokens, in nats."""
MAX_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1}
"""And for any one answer token. A bf16 log-probability of -12 is only known to 0.03, and padded batches compute theirs
in bf16.
"""
MANY_TOKENS = 1000
MAX_DIFFERENCE_OF_MANY = {**MAX_DIFFERENCE, "bf16": 1.5}
"""As MAX_DIFFERENCE, for thousands of tokens: over all of nq_qa, bf16 scores of fastscore are up to 0.76 nats from the
fp32 truth and those of padded batches up to 0.69 (``fidelity.py``), so two of them may be that far apart together.
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """Absolute differences between two contenders' log-probabilities: nats per answer token, or per pair's mean."""

    mean: float
    max: float
    count: int
    per_token: bool = True

    def agrees(self, dtype: str) -> bool:
        """Whether rounding explains it."""
        furthest = (MAX_DIFFERENCE if self.count <= MANY_TOKENS else MAX_DIFFERENCE_OF_MANY)[dtype]
        return self.mean <= MEAN_DIFFERENCE[dtype] and self.max <= furthest


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that was measured on one set of pairs."""

    pair_tokens: int
    dtype: str
    work: UsefulWork
    gemm_flops: int
    gemm_seconds: dict[str, list[float]]
    """Per way to run the matrix products, and round; as measured, not scaled to the work."""
    differences: dict[str, Difference]
    """Of each peer from fastscore: the first run's, or those of the last round where they are larger on average."""
    seconds: dict[str, list[float]]
    """Per contender and round. One that disagrees is not timed."""
    computed: dict[str, Computed]
    settings: dict[str, dict[str, Any]]
    peak_bytes: dict[str, int]
    """GPU memory beyond the weights, per contender; empty on a CPU."""
    failed: dict[str, str]
    """Why a peer gave no scores to compare: it ran out of memory, or some were no numbers."""

    @property
    def gemm_rate(self) -> float:
        """Floating-point operations per second of the model's own matrix products, run the fastest way."""
        return self.gemm_flops / min(medians(self.gemm_seconds).values())

    @property
    def limit_seconds(self) -> float:
        """What the useful work would take at that rate."""
        return self.work.flops / self.gemm_rate

    @property
    def disagreeing(self) -> list[str]:
        """Names of those whose scores are not fastscore's."""
        apart = [name for name, difference in self.differences.items() if not difference.agrees(self.dtype)]
        return apart + [name for name, why in self.failed.items() if why == NO_NUMBERS]

    def report(self) -> dict[str, Any]:
        """Plain values, medians and ratios included."""
        return {
            "pair_tokens": self.pair_tokens,
            "dtype": self.dtype,
            "useful_work": {**asdict(self.work), "flops": self.work.flops},
            "gemm_tflops_per_s": self.gemm_rate / 1e12,
            "gemm_seconds": self.gemm_seconds,
            "limit_seconds": self.limit_seconds,
            "disagreeing": self.disagreeing,
            "contenders": self.contenders(),
        }

    def contenders(self) -> dict[str, dict[str, Any]]:
        """Of each its times, and what they are beside fastscore's and the limit's; or, untimed, how it disagrees."""
        median = medians(self.seconds)
        found: dict[str, dict[str, Any]] = {}
        for name in self.settings:
            entry = found[name] = {"settings": self.settings[name]}
            if name in self.failed:
                entry["failed"] = self.failed[name]
            if name in self.differences:
                entry["difference_from_fastscore"] = asdict(self.differences[name])
            if name in self.computed:
                entry |= {"tokens_computed": self.computed[name].tokens, "fill": self.computed[name].fill}
            if name in self.peak_bytes:
                entry["peak_bytes_beyond_weights"] = self.peak_bytes[name]
            if name in median:
                by_round = [a / b for a, b in zip(self.seconds[name], self.seconds[OURS], strict=True)]
                useful = self.limit_seconds / median[name]
                entry |= {
                    "seconds": self.seconds[name],
                    "median_seconds": median[name],
                    "times_fastscore": median[name] / median[OURS],
                    "times_fastscore_by_round": by_round,
                    "pair_tokens_per_s": self.pair_tokens / median[name],
                    "useful_flop_efficiency": useful,
                    "efficiency_without_skippable": useful * (1 - self.work.skippable_flops / self.work.flops),
                }
        return found


def compare(
    contenders: Sequence[Contender],
    pairs: Sequence[TokenPair],
    rounds: int,
    plain: PreTrainedModel,
    *,
    gemm_repeats: int = 2,
) -> Comparison:
    """Run everyone once for their scores, then those that agree by turns for their times.

    Args:
        contenders: fastscore first. A peer that runs out of a GPU's memory takes no further part.
        pairs: what everyone scores.
        rounds: timed rounds after the first run, which is not timed.
        plain: the weights in plain transformers, for the limit.
        gemm_repeats: decoder layers in the limit's measurement.
    """
    ours = contenders[0]
    assert isinstance(ours, FastScore)
    model = ours.scorer.load()
    dtype = dtype_name(model.dtype)
    peaks: dict[str, int] = {}
    computed: dict[str, Computed] = {}
    failed: dict[str, str] = {}
    for each in contenders:
        try:
            _score(each, pairs, peaks if model.device.type == "cuda" else None)
        except torch.OutOfMemoryError:
            if each is ours:
                raise
            failed[each.name] = OUT_OF_MEMORY
            continue
        if not _are_numbers(each):
            failed[each.name] = NO_NUMBERS
        if (count := each.computed(pairs)) is not None:
            computed[each.name] = count
    running = [each for each in contenders if each.name not in failed]
    peers = [each for each in running[1:] if not each.scores_nothing]
    differences = {each.name: difference(each.scores, ours.scores, sums_only=each.sums_only) for each in peers}
    timed = [each for each in running if each.name not in differences or differences[each.name].agrees(dtype)]

    gemms = layer_gemms(plain, model.max_batch_tokens, gemm_repeats)
    for run in gemms.runs.values():
        run()
    runs: dict[str, Callable[[], object]] = {each.name: partial(each.score, pairs) for each in timed}
    seconds = interleave({**runs, **gemms.runs}, rounds)
    for each in peers:
        if each in timed and not _are_numbers(each):
            failed[each.name] = NO_NUMBERS
            del differences[each.name], seconds[each.name]
        elif each in timed:
            again = difference(each.scores, ours.scores, sums_only=each.sums_only)
            differences[each.name] = max(again, differences[each.name], key=lambda found: found.mean)
    return Comparison(
        pair_tokens=sum(lengths(pairs)),
        dtype=dtype,
        work=useful_work(plain, pairs),
        gemm_flops=gemms.flops,
        gemm_seconds={name: seconds.pop(name) for name in gemms.runs},
        differences=differences,
        seconds=seconds,
        computed=computed,
        settings={each.name: each.settings() for each in contenders},
        peak_bytes=peaks,
        failed=failed,
    )


def difference(scores: TokenLogprobs, others: TokenLogprobs, *, sums_only: bool = False) -> Difference:
    """Over all answer tokens; where ``scores`` are sums only, over the pairs' means."""
    if sums_only:
        # The others' lengths say how many tokens a sum is over.
        both = [(sum(one) / len(other), sum(other) / len(other)) for one, other in zip(scores, others, strict=True)]
    else:
        both = [two for left, right in zip(scores, others, strict=True) for two in zip(left, right, strict=True)]
    values = [abs(a - b) for a, b in both]
    return Difference(sum(values) / len(values), max(values), len(values), per_token=not sums_only)


def time_cells(values: Mapping[str, Any]) -> list[str]:
    """Median seconds, tokens per second and ratio of a contender; of one that disagrees or failed, that."""
    if "failed" in values:
        return [f"FAILED: {values['failed']}", "", ""]
    if "median_seconds" not in values:
        return ["DISAGREES", "", ""]
    return [
        f"{values['median_seconds']:.3f}",
        f"{values['pair_tokens_per_s']:,.0f}",
        f"{values['times_fastscore']:.2f}",
    ]


def comparison_table(report: Mapping[str, Any]) -> str:
    """A comparison's report as text: a line for each contender and one for the limit."""
    rows = []
    for name, values in report["contenders"].items():
        apart = values.get("difference_from_fastscore")
        known = "median_seconds" in values
        rows.append(
            [
                name,
                *time_cells(values),
                _range(values["times_fastscore_by_round"]) if known else "",
                f"{values['useful_flop_efficiency']:.1%}" if known else "",
                f"{values['tokens_computed']:,}" if "tokens_computed" in values else "",
                f"{values['fill']:.0%}" if "fill" in values else "",
                f"{apart['mean']:.1e}" if apart else "",
                (f"{apart['max']:.1e}" + ("" if apart["per_token"] else "*")) if apart else "",
                f"{values['peak_bytes_beyond_weights'] / 2**30:.2f}" if "peak_bytes_beyond_weights" in values else "",
            ]
        )
    limit = report["limit_seconds"]
    rows.append([LIMIT, f"{limit:.3f}", f"{report['pair_tokens'] / limit:,.0f}", "", "", "100%", *[""] * 5])
    columns = ["", "median s", "tokens/s", f"x {OURS}", "by round", "of limit", "computed", "fill", "mean diff"]
    columns += ["max diff", "peak GiB"]
    used = [place for place in range(len(columns)) if place == 0 or any(row[place] for row in rows)]
    text = table([columns[place] for place in used], [[row[place] for place in used] for row in rows])
    return text + ("\n* of the pairs' means" if "*" in text else "")


def why_not_measured(cell: Mapping[str, Any]) -> str:
    """Of a cell among many that was skipped or failed, that; else ""."""
    return next((f"{how}: {cell[how]}" for how in ("skipped", "failed") if how in cell), "")


def ways(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What fastscore ran with in them: figures of a fallback are not those of what was meant."""
    told = [cell["contenders"][OURS]["settings"] for cell in cells if "contenders" in cell]
    return list(dict.fromkeys(f"attention {each['attention']}, {each['forward']}, {each['mode']}" for each in told))


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


def _are_numbers(contender: Contender) -> bool:
    """Its scores; fastscore sees to its own."""
    return contender.scores_nothing or all(map(math.isfinite, chain.from_iterable(contender.scores)))


def _score(contender: Contender, pairs: Sequence[TokenPair], peaks: dict[str, int] | None) -> None:
    if peaks is None:
        contender.score(pairs)
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.score(pairs)
    peaks[contender.name] = torch.cuda.max_memory_allocated() - before
