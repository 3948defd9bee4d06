"""One HTML file that needs nothing else: styles, script and charts stand in it.

Texts of the scored file reach the page through Jinja's escaping only, and its content policy lets no script run but
the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import fastscore
from fastscore.report import words
from fastscore.report.charts import Chart, length_chart, rank_chart, score_chart, token_chart
from fastscore.report.collect import NEGATIVE, POSITIVE, UNLABELLED, Collected, collect
from fastscore.report.definition import definitions, unit_of
from fastscore.report.figures import Figures, figures
from fastscore.report.headlines import headlines, kinds, lede, positive_best
from fastscore.report.run_facts import RunFacts, read_run_facts
from fastscore.report.texts import fold
from fastscore.rows import WholeFile, read_rows, refuse_same_file
from fastscore.types import InputError

DEFAULT_UPSETS = 20
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class FileReport:
    """A scored file as the page shows it."""

    name: str
    """The file's name, or its path where another file has the same name."""
    collected: Collected
    figures: Figures
    run: RunFacts
    scores: Chart
    margins: Chart | None
    leads: Chart | None
    lengths: Chart | None
    tokens: Chart | None


def write_report(scored: Sequence[Path], output: Path, max_upsets: int = DEFAULT_UPSETS) -> int:
    """Write a page on the scored files; its size in bytes. Of each file, ``max_upsets`` rows are shown in full.

    Raises:
        InputError: naming file, line and field; then nothing is written.
    """
    _check_extra()
    runs = [read_run_facts(path) for path in scored]
    refuse_same_file(output, [*scored, *(run.path for run in runs)])
    with WholeFile(output) as page:
        names = Counter(path.name for path in scored)
        reports = [
            file_report(path, path.name if names[path.name] == 1 else str(path), run, max_upsets)
            for path, run in zip(scored, runs, strict=True)
        ]
        html = render(reports).encode("utf-8")
        page.write_bytes(html)
    return len(html)


def _check_extra() -> None:
    if missing := [name for name in ("jinja2", "vl_convert") if find_spec(name) is None]:
        raise InputError(f"the report needs {' and '.join(missing)}: pip install 'fastscore[report]'")


def file_report(path: Path, name: str, run: RunFacts, max_upsets: int) -> FileReport:
    """Read a file once and draw it."""
    collected = collect(read_rows(path), run.task, max_upsets)
    numbers = figures(collected)
    unit = unit_of(run.task.score)
    return FileReport(
        name,
        collected,
        numbers,
        run,
        score_chart(numbers, unit),
        rank_chart(numbers.margins, "margin", unit, POSITIVE, collected.num_above) if numbers.margins else None,
        rank_chart(numbers.leads, "lead", unit, UNLABELLED) if numbers.leads else None,
        length_chart(numbers.lengths, unit) if numbers.lengths else None,
        token_chart(run.tokens) if run.tokens else None,
    )


def render(reports: Sequence[FileReport]) -> str:
    """The page as HTML."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "chart.js"))
    environment.filters |= {
        name: getattr(words, name) for name in ("number", "edge", "count", "share", "size", "label", "labels")
    }
    environment.globals |= {
        "NEGATIVE": NEGATIVE,
        "POSITIVE": POSITIVE,
        "fold": fold,
        "headlines": headlines,
        "kinds": kinds,
        "lede": lede,
        "positive_best": positive_best,
        "svg": Markup,  # drawn by this package from numbers
        "version": fastscore.__version__,
    }
    return environment.get_template("page.html.j2").render(
        reports=reports,
        definitions=definitions([(report.name, report.run.task.score, report.run.present) for report in reports]),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )
