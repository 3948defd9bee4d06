"""``fastscore report``: its options, and from them the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = """[bold]Examples[/bold]

  [cyan]fastscore report scored.jsonl -o report.html[/cyan]

  [cyan]fastscore report small.scored.jsonl large.scored.jsonl.gz -o both.html[/cyan]
"""


def report(
    scored: Annotated[
        list[Path],
        typer.Argument(metavar="SCORED", help="Outputs of fastscore score, plain or gzip.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Write the page here.", show_default=False),
    ],
    cases: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Of the rows in which a negative beats the positives, show the N worst in full."
        ),
    ] = 20,
) -> None:
    """Show what came of a run on one HTML page that needs no network.

    Scores of positives and negatives, the margin of every row, where a negative beats the positives, ties, lengths \
against scores, and what was run on what (from OUTPUT.meta.json). Needs the extra report.
    """
    # Not before --help has been printed.
    from fastscore.report.page import write_report
    from fastscore.terminal import exit_status

    def run() -> None:
        size = write_report(scored, output, cases)
        typer.echo(f"fastscore: wrote {output} ({size / 1000:,.0f} kB)", err=True)

    raise typer.Exit(exit_status(run))
