"""fastscore and its peers on the same pairs: first whether they agree, then their times, then the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from limits import LayerGemms, UsefulWork, layer_gemms, useful_work
from padded import BATCH_SIZES, pick_batch_size, score_padded, score_padded_tuned
from rounds import interleave, medians, table
from transformers import PreTrainedModel
from workload import TokenPair, spread_sample

from fastscore import Scorer

OURS, PADDED, TUNED, GEMM = "fastscore", "padded", "padded-tuned", "GEMM limit"

MAX_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.5, "fp16": 0.1}
"""How far apart two contenders may be for any one answer token, in nats; they agree within this and the mean below.

A bf16 log-probability of -12 is only known to 0.03, and padded batches compute theirs in bf16.
"""
MEAN_DIFFERENCE = {"fp32": 2e-5, "bf16": 0.1, "fp16": 0.02}

TokenLogprobs = list[list[float]]
Contender = Callable[[], TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Difference:
    """Absolute differences between two contenders' log-probabilities, nats per answer token."""

    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that was measured on one set of pairs."""

    pair_tokens: int
    work: UsefulWork
    gemm_flops: int
    batch_size: int
    """Of ``padded-tuned``."""
    batch_size_seconds: dict[int, float]
    """What it was chosen from; empty when it was given."""
    differences: dict[str, Difference]
    """Of each peer from fastscore."""
    peak_bytes: dict[str, int]
    """GPU memory beyond the weights, per contender; empty on a CPU."""
    seconds: dict[str, list[float]]
    """Per contender and round; the GEMMs as measured, not yet scaled to the work."""

    @property
    def gemm_rate(self) -> float:
        """Floating-point operations per second of the model's own matrix products."""
        return self.gemm_flops / medians(self.seconds)[GEMM]

    def report(self) -> dict[str, Any]:
        """Plain values, medians and ratios included."""
        return {
            "pair_tokens": self.pair_tokens,
            "useful_work": {**asdict(self.work), "flops": self.work.flops},
            "gemm_tflops_per_s": self.gemm_rate / 1e12,
            "tuned_batch_size": self.batch_size,
            "batch_size_seconds": {str(size): value for size, value in self.batch_size_seconds.items()},
            "differences_from_fastscore": {name: asdict(value) for name, value in self.differences.items()},
            "peak_bytes_beyond_weights": self.peak_bytes,
            "seconds": self.seconds,
            "contenders": self.contenders(),
        }

    def contenders(self) -> dict[str, dict[str, float]]:
        """Median seconds, tokens per second, ratio to fastscore and share of the limit of each."""
        median = medians(self.seconds)
        limit = self.work.flops / self.gemm_rate
        return {
            name: {
                "median_seconds": median[name],
                "pair_tokens_per_s": self.pair_tokens / median[name],
                "times_fastscore": median[name] / median[OURS],
                "useful_flop_efficiency": limit / median[name],
            }
            for name in median
            if name != GEMM
        }

    def table(self) -> str:
        rows = [
            [
                name,
                f"{values['median_seconds']:.3f}",
                f"{values['pair_tokens_per_s']:,.0f}",
                f"{values['times_fastscore']:.2f}",
                f"{values['useful_flop_efficiency']:.0%}",
                f"{self.differences[name].max:.1e}" if name in self.differences else "",
                f"{self.peak_bytes[name] / 2**30:.2f}" if self.peak_bytes else "",
            ]
            for name, values in self.contenders().items()
        ]
        limit = self.work.flops / self.gemm_rate
        rows.append([GEMM, f"{limit:.3f}", f"{self.pair_tokens / limit:,.0f}", "", "100%", "", ""])
        columns = ["", "median s", "tokens/s", "x fastscore", "of limit", "max diff", "peak GiB"]
        shown = len(columns) if self.peak_bytes else len(columns) - 1
        return table(columns[:shown], [row[:shown] for row in rows])


def compare(
    scorer: Scorer,
    plain: PreTrainedModel,
    pairs: Sequence[TokenPair],
    rounds: int,
    *,
    batch_size: int | None = None,
    gemm_repeats: int = 2,
) -> Comparison:
    """Run all contenders once for their scores, then by turns for their times.

    Args:
        scorer: fastscore's side, loaded.
        plain: the same weights in plain transformers, for the peers and the limit.
        pairs: what everyone scores.
        rounds: timed rounds after the first run, which is not timed.
        batch_size: of ``padded-tuned``; picked by measurement when None.
        gemm_repeats: decoder layers in the limit's measurement.
    """
    batch_size_seconds: dict[int, float] = {}
    if batch_size is None:
        batch_size, batch_size_seconds = pick_batch_size(plain, spread_sample(pairs, max(BATCH_SIZES)))
    contenders = make_contenders(scorer, plain, pairs, batch_size)
    scores: dict[str, TokenLogprobs] = {}
    peaks: dict[str, int] = {}
    for name, run in contenders.items():
        scores[name] = _with_peak(name, run, peaks) if plain.device.type == "cuda" else run()
    work = useful_work(plain, pairs)
    gemms: LayerGemms = layer_gemms(plain, scorer.load().max_batch_tokens, gemm_repeats)
    gemms.run()
    seconds = interleave({**contenders, GEMM: gemms.run}, rounds)
    return Comparison(
        pair_tokens=sum(len(prompt) + len(answer) for prompt, answer in pairs),
        work=work,
        gemm_flops=gemms.flops,
        batch_size=batch_size,
        batch_size_seconds=batch_size_seconds,
        differences={name: difference(scores[name], scores[OURS]) for name in (PADDED, TUNED)},
        peak_bytes=peaks,
        seconds=seconds,
    )


def make_contenders(
    scorer: Scorer, plain: PreTrainedModel, pairs: Sequence[TokenPair], batch_size: int
) -> Mapping[str, Contender]:
    """fastscore and its two peers in plain transformers, as functions without arguments."""
    return {
        OURS: lambda: [list(score.token_logprobs) for score in scorer.score_tokens(pairs)],
        PADDED: lambda: [score.token_logprobs for score in score_padded(plain, pairs)],
        TUNED: lambda: [score.token_logprobs for score in score_padded_tuned(plain, pairs, batch_size)],
    }


def difference(scores: TokenLogprobs, others: TokenLogprobs) -> Difference:
    """Over all answer tokens."""
    values = [abs(a - b) for left, right in zip(scores, others, strict=True) for a, b in zip(left, right, strict=True)]
    return Difference(sum(values) / len(values), max(values))


def _with_peak(name: str, run: Contender, peaks: dict[str, int]) -> TokenLogprobs:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = run()
    peaks[name] = torch.cuda.max_memory_allocated() - before
    return scores
