"""Files in, scored files out: every input is checked before the model is loaded, every output is whole or not there."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import fastscore
from fastscore.cache_file import SUFFIX, CacheAt, check_cache
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.interrupts import Interrupted
from fastscore.output_formats import OutputFormat, make_format
from fastscore.outputs import Output
from fastscore.rows import RowWriter, read_rows, refuse_same_file, scored_path
from fastscore.run_stats import RunStats
from fastscore.tasks import validate_row
from fastscore.types import InputError, Row, ScoredRow

OpenScorer = Callable[[ScorerConfig], Any]
"""Makes what scores: a Scorer, or several that look like one."""
_REPORT_EVERY_ROWS = 1000


@dataclass(frozen=True, slots=True)
class FileJob:
    """The rows of the inputs, one file after another, go to one output."""

    inputs: tuple[Path, ...]
    output: Path
    cache: CacheAt | None = None

    @property
    def errors(self) -> Path:
        """Where bad rows are recorded."""
        return self.output.with_name(f"{self.output.name}.errors.jsonl")

    @property
    def meta(self) -> Path:
        """Where the run is described."""
        return self.output.with_name(f"{self.output.name}.meta.json")


class Reporter(Protocol):
    """Told how far a run is."""

    def checking(self, rows: int) -> None: ...
    def scoring(self, total_pairs: int) -> None: ...
    def progress(self, stats: RunStats) -> None: ...


@dataclass(slots=True)
class Tally:
    """What came of a job, or of several."""

    rows: int = 0
    skipped: int = 0
    ranked_rows: int = 0
    """Rows with both positives and negatives, and a number for each."""
    positive_best: int = 0
    """Ranked rows whose best score is a positive's."""
    stats: RunStats = field(default_factory=RunStats)
    caches: tuple[Path, ...] = ()
    """Files in which scores were kept."""

    def count(self, scored: ScoredRow) -> None:
        self.rows += 1
        num_pos, num_neg = (_length(scored.row.data.get(name)) for name in ("pos", "neg"))
        scores = scored.teacher_scores
        has_numbers = not any(isinstance(score, tuple) for score in scores)  # lists of tokens have no order
        if has_numbers and num_pos and num_neg and num_pos + num_neg == len(scores):
            self.ranked_rows += 1
            self.positive_best += max(range(len(scores)), key=scores.__getitem__) < num_pos


def plan_jobs(
    inputs: Sequence[Path], output: Path | None, save_name: str, *, cache: Path | None = None, no_cache: bool = False
) -> list[FileJob]:
    """One job for all inputs when there is an output, otherwise one job for each.

    Scores are kept in ``cache``, by default beside each output.

    Raises:
        InputError: an input that is no regular file, an output that would replace an input or another output, a cache
            that would be one of these files.
    """
    if cache is not None and no_cache:
        raise InputError("--cache and --no-cache exclude each other")
    for path in inputs:
        check_readable_twice(path)
    if output is not None:
        jobs = [FileJob(tuple(inputs), output)]
    else:
        jobs = [FileJob((path,), scored_path(path, save_name)) for path in inputs]
    written: set[str] = set()
    for job in jobs:
        for path in (job.output, job.errors, job.meta):
            refuse_same_file(path, inputs)
        if (name := os.path.realpath(job.output)) in written:
            raise InputError("two inputs would be written here; name another output with -o", path=str(job.output))
        written.add(name)
    if cache is not None:
        for job in jobs:
            refuse_same_file(cache, [*inputs, job.output, job.errors, job.meta], "the cache would be the file")
    return jobs if no_cache else [replace(job, cache=_cache_of(job, cache)) for job in jobs]


def _cache_of(job: FileJob, asked_for: Path | None) -> CacheAt:
    if asked_for is not None:
        return CacheAt(asked_for)
    return CacheAt(job.output.with_name(job.output.name + SUFFIX), is_asked_for=False)


def run_files(
    jobs: Sequence[FileJob],
    scorer_config: ScorerConfig,
    task_config: TaskConfig,
    *,
    reporter: Reporter,
    skip_bad_rows: bool = False,
    options: Mapping[str, Any] | None = None,
    on_row: Callable[[Row], None] | None = None,
    open_scorer: OpenScorer | None = None,
    output_format: OutputFormat | None = None,
) -> Tally:
    """Run the jobs one after another with one model; rows are written in the ``output_format`` (``teacher``).

    Outputs are seen to be writable and all rows to be valid before torch is imported. A job's output appears when it
    is whole, and stays when a later job fails. ``options`` go into the metadata; ``on_row`` sees every valid row of
    the first pass.

    Raises:
        InputError: naming file, line and field.
    """
    started = _now()
    output_format = make_format() if output_format is None else output_format
    outputs = [Output(job.output, output_format, task_config) for job in jobs]
    for job in jobs:
        for path in (job.output, job.errors, job.meta):
            _check_writable(path)
    inputs = [path for job in jobs for path in job.inputs]
    output_of = {path: output for job, output in zip(jobs, outputs, strict=True) for path in job.inputs}
    total_pairs = check_rows(inputs, task_config, reporter, skip_bad_rows, on_row, output_of)
    for output in outputs:
        output.settle()

    for job in jobs:
        if job.cache is not None and job.cache.is_asked_for:
            check_cache(job.cache.path)

    reporter.scoring(total_pairs)

    scorer = (open_scorer or fastscore.Scorer.from_config)(scorer_config)
    total = Tally(stats=scorer.stats)
    for job, output in zip(jobs, outputs, strict=True):
        tally = _run_job(job, output, scorer, task_config, reporter, skip_bad_rows)
        meta = {
            "fastscore": fastscore.__version__,
            "started": started,
            "finished": _now(),
            "inputs": [str(path) for path in job.inputs],
            "output": str(job.output),
            "cache": next(map(str, tally.caches), None),
            "options": dict(options or {}),
            "task": asdict(task_config),
            "format": output_format.describe(),
            "scorer": scorer.describe(),
            "rows": tally.rows,
            "skipped": tally.skipped,
            "ranked_rows": tally.ranked_rows,
            "positive_best": tally.positive_best,
            "stats": tally.stats.counters(),
        }
        with RowWriter(job.meta, escapes=True) as out:
            out.write(meta)
        for name in ("rows", "skipped", "ranked_rows", "positive_best", "caches"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
    return total


def check_rows(
    inputs: Sequence[Path],
    task_config: TaskConfig,
    reporter: Reporter,
    skip_bad_rows: bool = False,
    on_row: Callable[[Row], None] | None = None,
    outputs: Mapping[Path, Output] | None = None,
) -> int:
    """The first pass: the number of pairs in all inputs. It needs no model, and no torch.

    Where ``outputs`` say what the rows of each input are written as, it is seen that they can be.

    Raises:
        InputError: a bad row, where they are not skipped; no row that can be scored.
    """
    pairs = rows = 0
    bad: list[InputError] = []

    def on_error(error: InputError, _: str | None) -> None:
        bad.append(error)

    for path in inputs:
        output = None if outputs is None else outputs[path]
        for row in read_rows(path, on_error if skip_bad_rows else None):
            try:
                num_pairs = validate_row(row, task_config)
                if output is not None:
                    output.check(row)
            except InputError as error:
                if not skip_bad_rows:
                    raise
                bad.append(error)
            else:
                pairs += num_pairs
                if output is not None:
                    output.expect(row)
                if on_row is not None:
                    on_row(row)
            del bad[1:]  # the first is enough to be named
            rows += 1
            if rows % _REPORT_EVERY_ROWS == 0:
                reporter.checking(rows)
    if bad and pairs == 0:
        raise InputError(f"no row can be scored; the first: {bad[0]}")
    return pairs


def _run_job(
    job: FileJob, output: Output, scorer: Any, task_config: TaskConfig, reporter: Reporter, skip_bad_rows: bool
) -> Tally:
    before = replace(scorer.stats)
    tally = Tally()
    cache = scorer.cache_at(job.cache)
    # The bad rows' file appears after the output: where that can't be finished, neither is new.
    with closing(cache), BadRows(job.errors) as bad, output.writer() as out, _resumable(cache):
        rows = chain.from_iterable(read_rows(path, bad.add_text if skip_bad_rows else None) for path in job.inputs)
        on_bad_row = bad.add_row if skip_bad_rows else None
        writable = _writable_rows(rows, task_config, output, bad) if skip_bad_rows else rows
        stream = scorer.stream_rows(
            writable, task_config, on_bad_row=on_bad_row, on_progress=reporter.progress, cache=cache
        )
        with closing(stream):  # it may read in a thread of its own, which must not outlast the files
            for scored in stream:
                output.write(scored, out)
                tally.count(scored)
    scorer.stats.flush_padded()
    tally.skipped = bad.count
    tally.caches = () if cache.path is None else (cache.path,)
    tally.stats = scorer.stats.minus(before)
    return tally


@contextmanager
def _resumable(cache: Any) -> Iterator[None]:
    """Says of a run that a signal ends how to go on."""
    try:
        yield
    except Interrupted as stop:
        if cache.path is not None:
            stop.hint = f"what was scored is kept in {cache.path}: the same command goes on from there"
        else:
            stop.hint = "nothing of it is kept" if cache.place is None else "nothing has been scored yet"
        raise


def _writable_rows(rows: Iterable[Row], task_config: TaskConfig, output: Output, bad: BadRows) -> Iterator[Row]:
    """Those that can be scored and written; the others are recorded, as the first pass found them."""
    for row in rows:
        try:
            validate_row(row, task_config)
            output.check(row)
        except InputError as error:
            bad.add_row(row, error)
        else:
            yield row


class BadRows:
    """Records bad rows in a side file that is there only if there were any; one of an earlier run is removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._writer: RowWriter | None = None

    def __enter__(self) -> BadRows:
        return self

    def add_text(self, error: InputError, text: str | None) -> None:
        """A record that is no row; its text stands in for it."""
        self._add(error, text)

    def add_row(self, row: Row, error: InputError) -> None:
        self._add(error, row.data)

    def _add(self, error: InputError, row: Any) -> None:
        if self._writer is None:
            # A bad row may hold what JSON or UTF-8 can't.
            self._writer = RowWriter(self.path, default=str, escapes=True).__enter__()
        self.count += 1
        place = {"path": error.path, "line": error.line, "field": error.field}
        self._writer.write({**place, "error": error.message, "row": row})

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(exc_type, exc, traceback)
        elif exc_type is None:
            self.path.unlink(missing_ok=True)


class _GiveUp(Exception):
    """Leaves a RowWriter's block so that nothing is written."""


def _check_writable(path: Path) -> None:
    try:
        with RowWriter(path):
            raise _GiveUp
    except _GiveUp:
        return


def check_readable_twice(path: Path) -> None:
    """Raise InputError for what is there and is no regular file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # reading it says what is wrong
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError("expected a regular file: rows are checked first and scored after", path=str(path))


def _length(value: object) -> int:
    return len(value) if isinstance(value, list) else 0


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
