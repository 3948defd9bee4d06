"""What people see on stderr: log lines, a progress bar, the summary; and errors as one line with an exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import ROUNDED
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastscore.interrupts import Interrupted, ended_by_signals
from fastscore.run_files import FileJob, Tally
from fastscore.run_stats import RunStats
from fastscore.types import InputError

BAD_INPUT, FAILED, SIGNALLED = 2, 1, 128


def exit_status(run: Callable[[], None]) -> int:
    """Run; 0, or the exit status of what went wrong, which is told in one line.

    A traceback is shown as well when ``FASTSCORE_TRACEBACK`` is 1.
    """
    try:
        with ended_by_signals():
            run()
    except InputError as error:
        return _tell(str(error), BAD_INPUT)
    except KeyboardInterrupt as error:
        hint, number = (error.hint, error.signum) if isinstance(error, Interrupted) else ("", signal.SIGINT)
        return _tell(f"interrupted; {hint}" if hint else "interrupted", SIGNALLED + number)
    except Exception as error:  # noqa: BLE001 - the edge of the program: whatever fails is told here
        lines = str(error).strip().splitlines()
        name = type(error).__name__
        return _tell(f"failed: {name}: {lines[0].strip()}" if lines else f"failed: {name}", FAILED)
    return 0


def _tell(message: str, status: int) -> int:
    if os.environ.get("FASTSCORE_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"fastscore: {one_line(message)}", file=sys.stderr)
    return status


def one_line(text: str) -> str:
    """Line ends and terminal controls, which names of files and fields may hold, are shown and not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Terminal:
    """A run's reporter. The bar and the spinner appear on a terminal only; ``quiet`` leaves warnings and errors."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
            expand=True,
        )
        self._task = self._progress.add_task("checking rows", total=None, speed="")

    @contextmanager
    def live(self) -> Iterator[Terminal]:
        """Show log lines, and the bar, until the block is left."""
        # Bars of the libraries beneath would be drawn across this one, and into logs.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        # What is wrong with a model is told in one line, not in a report of many.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # A hub that can't be reached is told once, by the error, and not at each of its retries.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        logger, handler = logging.getLogger("fastscore"), _ConsoleHandler(self._console)
        level, propagate = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if self._quiet else logging.INFO)
        logger.propagate = False
        try:
            with self._progress:
                yield self
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate

    def checking(self, rows: int) -> None:
        self._progress.update(self._task, completed=rows)

    def scoring(self, total_pairs: int) -> None:
        self._progress.reset(self._task, total=total_pairs, description="loading the model")

    def preparing(self, pairs: int) -> None:
        self._progress.update(self._task, completed=pairs, description="pairs tokenised")

    def measuring(self, seconds: float, of_seconds: float) -> None:
        self._progress.update(
            self._task, completed=int(seconds), total=max(1, int(of_seconds)), description="seconds measured"
        )

    def progress(self, stats: RunStats) -> None:
        speed = f"{stats.answer_tokens / max(stats.seconds, 1e-9):,.0f} answer tok/s"
        self._progress.update(self._task, completed=stats.pairs, speed=speed, description="pairs")

    def summary(self, tally: Tally, jobs: Sequence[FileJob]) -> None:
        """The figures of a finished run."""
        if not self._quiet:
            self._console.print(_summary(tally, jobs))


class _ConsoleHandler(logging.Handler):
    """Log lines through the console that draws the bar, so that neither spoils the other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(Text(f"fastscore: {one_line(record.getMessage())}", style), soft_wrap=True)


def _summary(tally: Tally, jobs: Sequence[FileJob]) -> Table:
    stats = tally.stats
    table = Table(show_header=False, box=ROUNDED)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("rows", f"{tally.rows:,}")
    if tally.skipped:
        recorded = ", ".join(str(job.errors) for job in jobs if job.errors.exists())
        table.add_row("bad rows skipped", Text(f"{tally.skipped:,}, recorded in {recorded}", "yellow"))
    table.add_row("pairs", f"{stats.pairs:,}")
    if stats.cached:
        table.add_row("pairs from cache", f"{stats.cached:,}")
    table.add_row("tokens computed", f"{stats.tokens_computed:,}")
    if stats.tokens_computed:
        table.add_row("tokens saved", _saved(stats))
        seconds = max(stats.seconds, 1e-9)
        speed = f"{stats.tokens_computed / seconds:,.0f} tokens/s, {stats.answer_tokens / seconds:,.0f} answer tokens/s"
        table.add_row("speed", speed)
    if tally.ranked_rows:
        share = tally.positive_best / tally.ranked_rows
        table.add_row("positive is best", f"{tally.positive_best:,} of {tally.ranked_rows:,} rows ({share:.1%})")
    table.add_row("output", Text("\n".join(str(job.output) for job in jobs), "bold"))
    if tally.caches:
        table.add_row("cache", Text("\n".join(dict.fromkeys(map(str, tally.caches))), "dim"))
    return table


def _saved(stats: RunStats) -> str:
    saved = stats.tokens_padded - stats.tokens_computed
    share = f" ({abs(saved) / stats.tokens_padded:.1%})" if stats.tokens_padded else ""
    against = "padded batches of four"
    return f"{saved:,}{share} against {against}" if saved >= 0 else f"none: {-saved:,}{share} more than {against}"
