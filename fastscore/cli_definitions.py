"""Options that say what a score is; their fields are those of :class:`fastscore.config.ScoreConfig`."""

from __future__ import annotations

from typing import Annotated

import typer

from fastscore.cli_options import NO_VALUE, choices
from fastscore.config import Baseline, Normalize, Reduce, Target

SCORE = "What a score is"

TargetText = Annotated[
    str,
    typer.Option(
        metavar="WHAT",
        help=f"The text that is scored: {choices(Target)} (query likelihood: the answers are not read).",
        rich_help_panel=SCORE,
    ),
]
ReduceHow = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help=f"How the log-probabilities of its tokens become one number: {choices(Reduce)} (a list of them). byte and "
        "char are sums per UTF-8 byte and per character.",
        rich_help_panel=SCORE,
    ),
]
BaselineKind = Annotated[
    str,
    typer.Option(
        metavar="WHAT",
        help=f"What is taken off: {choices(Baseline)} (the score of the same text without the passage).",
        rich_help_panel=SCORE,
    ),
]
NormalizeHow = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help=f"Over the candidates of a row: {choices(Normalize)} (a distribution).",
        rich_help_panel=SCORE,
    ),
]
Temperature = Annotated[
    float, typer.Option(metavar="T", help="For --normalize softmax: scores are divided by it.", rich_help_panel=SCORE)
]
AppendEos = Annotated[
    bool,
    typer.Option(
        "--append-eos",
        metavar=NO_VALUE,
        help="The tokenizer's EOS token is scored as the last one of the text.",
        rich_help_panel=SCORE,
    ),
]
KeepRaw = Annotated[
    bool,
    typer.Option(
        "--keep-raw",
        metavar=NO_VALUE,
        help="Add teacher_raw to rows: sums and counts, from which the other definitions follow without a new run.",
        rich_help_panel=SCORE,
    ),
]
