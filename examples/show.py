"""Show scored rows as a table: python examples/show.py SCORED.jsonl..."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastscore.config import ScoreConfig
from fastscore.rows import read_rows
from fastscore.types import InputError, Row

PIPED_WIDTH = 100
NARROW = 76


@dataclass(frozen=True)
class Scored:
    """A row as it is shown. ``right``: indices of the candidates that should win, empty where nobody said."""

    query: str
    answer: str
    candidates: list[tuple[str, str]]
    right: frozenset[int]
    scores: list[float]

    @property
    def best(self) -> int:
        return max(range(len(self.scores)), key=self.scores.__getitem__)

    @property
    def ranked(self) -> bool:
        """Whether there is a right candidate and a wrong one."""
        return 0 < len(self.right) < len(self.scores)

    @property
    def won(self) -> bool:
        return self.best in self.right


def parse(row: Row) -> Scored:
    """Names and texts of the candidates, in the order of their scores.

    Raises:
        InputError: the row has no scores, or another number of them than of candidates.
    """
    data = row.data
    scores = data.get("teacher_scores")
    if not isinstance(scores, list) or not scores or not all(isinstance(score, int | float) for score in scores):
        raise row.error("expected a list of scores; is this the output of fastscore score?", "teacher_scores")
    fields = ["history"] if data.get("history") else ["choices"] if data.get("choices") else ["pos", "neg"]
    candidates = [(f"{name}[{i}]", str(text)) for name in fields for i, text in enumerate(data.get(name) or [])]
    if not candidates and len(scores) == 1:
        candidates = [("", str(data.get("continuation", "")))]
    if len(candidates) != len(scores):
        raise row.error(f"expected one score for each of the {len(candidates)} candidates", "teacher_scores")
    right = frozenset(range(len(data["pos"]))) if fields == ["pos", "neg"] and data.get("pos") else frozenset[int]()
    if isinstance(gold := data.get("gold"), int):
        right = frozenset({gold})
    answers = data.get("answers", data.get("answer", ""))
    answer = answers[0] if isinstance(answers, list) and answers else answers
    return Scored(str(data.get("query", data.get("context", ""))), str(answer), candidates, right, scores)


def query_cell(scored: Scored) -> Text:
    cell = Text(" ".join(scored.query.split()))
    return cell.append(f"\n{scored.answer.strip()}", "cyan") if scored.answer else cell


def best_cell(scored: Scored) -> Text:
    name, text = scored.candidates[scored.best]
    cell = Text()
    if scored.ranked:
        cell.append("right  " if scored.won else "wrong  ", "bold green" if scored.won else "bold yellow")
    return cell.append(f"{name}\n" if name else "", "dim").append(" ".join(text.split()))


def scores_cell(scored: Scored) -> Text:
    shown = [
        Text(f"[{score:.2f}]" if i in scored.right else f"{score:.2f}", "bold" if i == scored.best else "")
        for i, score in enumerate(scored.scores)
    ]
    return Text(" ").join(shown)


def shown_table(rows: list[Scored], narrow: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True, header_style="dim")
    table.add_column("query, answer" if any(row.answer for row in rows) else "query", ratio=4)
    # Only the beginning of a candidate: two lines, so that a row stays a row.
    table.add_column("best candidate", ratio=3 if narrow else 5, no_wrap=True, overflow="ellipsis")
    table.add_column("scores", ratio=3 if narrow else 4)
    for row in rows:
        table.add_row(query_cell(row), best_cell(row), scores_cell(row))
        table.add_row()
    return table


def read_meta(path: Path) -> dict[str, Any]:
    """The run's own description, if it lies beside the file."""
    meta = path.with_name(f"{path.name}.meta.json")
    return json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}


def model_line(meta: dict[str, Any]) -> str:
    if not meta:
        return ""
    return ", ".join(str(meta["scorer"][name]) for name in ("model", "dtype", "device", "mode")) + "\n"


def scores_line(meta: dict[str, Any]) -> str:
    """What the scores are, which is not always the mean log-probability."""
    usual = ScoreConfig()
    asked = meta.get("task", {}).get("score", {})
    other = [f"{name} {value}" for name, value in asked.items() if value != getattr(usual, name) and name != "keep_raw"]
    if other:
        return f"Scores with {', '.join(other)}: higher is better."
    return "Mean log-probability of the answer's tokens, in nats: at most 0, higher is better."


def show(path: Path, console: Console) -> None:
    rows = [parse(row) for row in read_rows(path)]
    ranked = [row for row in rows if row.ranked]
    console.print(Text(f"\n{path}", "bold"), soft_wrap=True)
    meta = read_meta(path)
    console.print(Text(model_line(meta), "dim"))
    console.print(shown_table(rows, console.width < NARROW))
    said = scores_line(meta)
    if ranked:
        won = sum(row.won for row in ranked)
        said += f" [Brackets]: candidates that should win. One of them is best in {won} of {len(ranked)} rows."
    console.print(Text(said))


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # rows hold any character, the console's encoding may not
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    console = Console(highlight=False, width=width)
    try:
        for path in arguments:
            show(Path(path), console)
    except InputError as error:
        print(f"show.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
