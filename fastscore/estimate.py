"""What scoring files would cost: every token counted, and the model's speed measured on a sample of packs."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import fastscore
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.rows import read_rows
from fastscore.run_files import Reporter, check_readable_twice, check_rows
from fastscore.sampling import CONFIDENCE, Sample, cut_packs
from fastscore.types import InputError, Row, ScoringRequest

KEPT_PACKS = 128
"""Packs kept in memory for the sample, of all that a file has."""


class EstimateReporter(Reporter, Protocol):
    """Told how far an estimate is."""

    def preparing(self, pairs: int) -> None: ...
    def measuring(self, seconds: float, of_seconds: float) -> None: ...


@dataclass(slots=True)
class Counts:
    """What was read. Tokens are input tokens of the model."""

    rows: int = 0
    bad_rows: int = 0
    pairs: int = 0
    tokens: int = 0
    """Each pair counted alone."""
    tokens_computed: int = 0
    """A prefix that pairs of a window share counts once."""
    answer_tokens: int = 0
    packs: int = 0
    """Those the sample is drawn from."""
    seconds: float = 0.0
    """Reading, tokenising and planning."""
    first_window_seconds: float = 0.0
    is_part: bool = False
    """There are more rows than were read."""


def estimate(
    inputs: Sequence[Path],
    scorer_config: ScorerConfig,
    task_config: TaskConfig,
    *,
    reporter: EstimateReporter,
    seconds: float,
    max_rows: int | None = None,
    skip_bad_rows: bool = False,
) -> dict[str, Any]:
    """Plain values, for the screen or as JSON; nothing is written.

    The model runs for about ``seconds``, but for one pack at least (and one before it that does not count). With
    ``max_rows`` only the first rows are tokenised, and the others are taken to be like them.

    Raises:
        InputError: as a run would raise it; arguments that cannot be.
    """
    if not seconds > 0:
        raise InputError(f"seconds must be above 0; found {seconds!r}")
    if max_rows is not None and max_rows < 1:
        raise InputError(f"max_rows must be a whole number of at least 1; found {max_rows}")
    for path in inputs:
        check_readable_twice(path)
    started = time.perf_counter()
    total_pairs = check_rows(inputs, task_config, reporter, skip_bad_rows)
    checking = time.perf_counter() - started

    reporter.scoring(total_pairs)
    started = time.perf_counter()
    scorer = fastscore.Scorer.from_config(scorer_config)
    scorer.check_task(task_config)
    model = scorer.load()
    start_up = time.perf_counter() - started

    counts = Counts()
    packs = _read(inputs, scorer, task_config, counts, reporter, max_rows, skip_bad_rows)
    sample = _measure(packs, scorer, seconds, reporter)
    memory = _memory(model)
    # Rows that turn out bad when they are tokenised are among the total.
    whole = max(1.0, total_pairs / counts.pairs) if counts.is_part else 1.0
    return _report(scorer, inputs, counts, sample, memory, whole, start_up, checking)


def _read(
    inputs: Sequence[Path],
    scorer: Any,
    task_config: TaskConfig,
    counts: Counts,
    reporter: EstimateReporter,
    max_rows: int | None,
    skip_bad_rows: bool,
) -> list[list[ScoringRequest]]:
    """Count everything, and keep packs drawn at random, in random order."""

    def bad_text(error: InputError, _: str | None) -> None:
        counts.bad_rows += 1

    def bad_row(row: Row, error: InputError) -> None:
        counts.bad_rows += 1

    model = scorer.load()
    draw = random.Random(0)
    kept: list[list[ScoringRequest]] = []
    rows = chain.from_iterable(read_rows(path, bad_text if skip_bad_rows else None) for path in inputs)
    windows = scorer.plan_windows(islice(rows, max_rows), task_config, on_bad_row=bad_row if skip_bad_rows else None)
    while True:
        started = time.perf_counter()
        planned = next(windows, None)
        counts.seconds += time.perf_counter() - started
        if planned is None:
            break
        window, plan = planned
        counts.first_window_seconds = counts.first_window_seconds or counts.seconds
        counts.rows += len(window.rows)
        counts.pairs += len(window.requests)
        counts.tokens += sum(len(request.token_ids) for request in window.requests)
        counts.tokens_computed += plan.num_tokens
        counts.answer_tokens += len(plan.slots.slot)
        shares = plan.tree is not None and model.share_prefixes
        for pack in cut_packs(window.requests, model.max_batch_tokens, shares):
            counts.packs += 1
            # Reservoir sampling: every pack is among those kept with the same probability.
            place = len(kept) if len(kept) < KEPT_PACKS else draw.randrange(counts.packs)
            if place == len(kept):
                kept.append(pack)
            elif place < KEPT_PACKS:
                kept[place] = pack
        reporter.preparing(counts.pairs)
        del planned, window, plan
    counts.is_part = next(rows, None) is not None
    if not kept:
        raise InputError("no row can be scored", path=str(inputs[0]))
    draw.shuffle(kept)
    return kept


def _measure(packs: Sequence[list[ScoringRequest]], scorer: Any, seconds: float, reporter: EstimateReporter) -> Sample:
    model, sample = scorer.load(), Sample()
    if model.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(model.device)
    scorer.score_requests(packs[0])  # kernels are compiled and memory is taken the first time
    for pack in packs:
        plan = model.plan(pack)
        started = time.perf_counter()
        scorer.score_requests(pack, plan)
        sample.seconds.append(time.perf_counter() - started)
        sample.tokens.append(plan.num_tokens)
        reporter.measuring(sum(sample.seconds), seconds)
        if sum(sample.seconds) >= seconds:
            break
    return sample


def _memory(model: Any) -> dict[str, Any]:
    """Bytes of the weights, and the peak so far: of the device, or of this process where the host computes."""
    tensors = {tensor.data_ptr(): tensor for tensor in chain(model.model.parameters(), model.model.buffers())}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if model.device.type == "cuda":
        import torch

        return {"weights": weights, "peak": torch.cuda.max_memory_allocated(model.device), "of": "device"}
    try:
        import resource
    except ImportError:  # not on Windows
        return {"weights": weights, "peak": None, "of": "process"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"weights": weights, "peak": peak if sys.platform == "darwin" else peak * 1024, "of": "process"}


def _report(
    scorer: Any,
    inputs: Sequence[Path],
    counts: Counts,
    sample: Sample,
    memory: dict[str, Any],
    whole: float,
    start_up: float,
    checking: float,
) -> dict[str, Any]:
    from fastscore.pipeline import runs_beside_host  # with torch, which the checks before must not wait for

    described = scorer.describe()
    per_token, half = sample.seconds_per_token, sample.half_width(round(counts.packs * whole))
    tokens = counts.tokens_computed * whole
    bounds = None if half is None else (max(0.0, per_token - half), per_token + half)
    preparing = counts.seconds * whole
    beside = runs_beside_host(scorer.load().device)

    def total(model_seconds: float) -> float:
        if not beside:
            return start_up + checking + preparing + model_seconds
        # The first window is prepared while the model is loaded, the others while it is at work.
        rest = preparing - counts.first_window_seconds
        return max(start_up, counts.first_window_seconds) + checking + max(rest, model_seconds)

    return {
        "fastscore": fastscore.__version__,
        "inputs": [str(path) for path in inputs],
        **{name: described[name] for name in ("model", "device", "dtype", "mode", "attention", "max_batch_tokens")},
        "read": {"rows": counts.rows, "pairs": counts.pairs, "bad_rows": counts.bad_rows},
        "pairs": round(counts.pairs * whole),
        "tokens": round(counts.tokens * whole),
        "tokens_computed": round(tokens),
        "answer_tokens": round(counts.answer_tokens * whole),
        "sample": {
            "packs": len(sample.tokens),
            "of_packs": round(counts.packs * whole),
            "tokens": sum(sample.tokens),
            "seconds": sum(sample.seconds),
        },
        "tokens_per_second": 1 / per_token,
        "tokens_per_second_bounds": bounds and [1 / bounds[1], 1 / bounds[0] if bounds[0] else None],
        "confidence": CONFIDENCE,
        "seconds": {
            "start_up": start_up,
            "checking": checking,
            "preparing": preparing,
            "model": tokens * per_token,
            "total": total(tokens * per_token),
            "total_bounds": bounds and [total(tokens * bound) for bound in bounds],
        },
        "prepared_beside_the_device": beside,
        "memory_bytes": memory,
    }
