"""Scored files for the tests of the report, and a reader of its pages that knows nothing of how they are made."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fastscore.report.page import write_report

META: dict[str, Any] = {
    "fastscore": "0.1.0",
    "started": "2026-03-01T10:00:00+00:00",
    "finished": "2026-03-01T10:01:30+00:00",
    "inputs": ["train.jsonl"],
    "output": "scored.jsonl",
    "options": {"model": "tiny/model", "quiet": False},
    "task": {"task": "qa", "template": None, "answers": "first", "combine": "max", "seed": 0, "key_max_length": 512},
    "scorer": {
        "model": "tiny/model",
        "model_path": "/models/tiny",
        "commit": "abc123",
        "adapter": None,
        "architecture": "LlamaForCausalLM",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "mode": "padded",
        "mode_reason": "neighbours change each other",
        "attention": "flash-attn-2",
        "answer_nll": "triton",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    },
    "rows": 40,
    "stats": {
        "pairs": 240,
        "answer_tokens": 800,
        "tokens_computed": 60_000,
        "tokens_unpadded": 90_000,
        "tokens_padded": 120_000,
        "pack_tokens": 80_000,
        "packs": 5,
        "seconds": 40.0,
    },
}


def random_rows(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with several positives and negatives, lengths of all sizes, ties and upsets."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        pos = [f"pos {index} " + "p" * rng.randrange(300) for _ in range(rng.choice((1, 1, 2, 3)))]
        neg = [f"neg {index} " + "n" * rng.randrange(300) for _ in range(rng.randrange(1, 6))]
        scores = [round(rng.gauss(-2, 1), 1) for _ in pos] + [round(rng.gauss(-3, 1.3), 1) for _ in neg]
        if index % 9 == 0 and len(neg) > 1:
            neg[-1], scores[-1] = neg[-2], scores[-2]
        if index % 13 == 4:
            scores[len(pos) :] = [max(scores[: len(pos)]), *(min(score, -5.0) for score in scores[len(pos) + 1 :])]
        rows.append(
            {
                "query_id": 100 + index,
                "query": f"question {index}?",
                "answers": [f"answer {index}", "another"],
                "pos": pos,
                "neg": neg,
                "task": "qa",
                "teacher_scores": scores,
            }
        )
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], meta: Mapping[str, Any] | None = None) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if meta is not None:
        path.with_name(f"{path.name}.meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return path


def report_on(*paths: Path, **options: Any) -> Page:
    output = paths[0].with_name("report.html")
    size = write_report(paths, output, **options)
    assert size == output.stat().st_size
    return Page(output.read_text(encoding="utf-8"))


class Page(HTMLParser):
    """Sections by their heading's id, each with its text, tables (rows of cells), facts, and labels of marks."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.sections: dict[str, Section] = {"": Section()}
        self.scripts: list[str] = []
        self.title = ""
        self._section = self.sections[""]
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], f"elements that are not closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert not any(name.startswith("on") for name in given), f"an event handler on {tag}"
        assert not given.keys() & {"src", "href"} or (given.get("href") or "").startswith("#"), f"{tag} loads {given}"
        if tag in ("h2", "h3") and given.get("id"):
            self._section = self.sections[str(given["id"])] = Section()
        section = self._section
        if tag == "table":
            section.tables.append([])
        elif tag == "tr":
            section.tables[-1].append([])
        elif tag in ("td", "th"):
            section.tables[-1][-1].append("")
        elif tag == "dt":
            section.facts.append(("", ""))
        elif tag == "article":
            section.articles.append("")
        elif tag == "script":
            self.scripts.append("")
        if given.get("role") == "img":
            section.labels.append(str(given["aria-label"]))
        if given.get("aria-roledescription") == "value":
            section.marks.append(str(given["aria-label"]))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"{tag} is closed but not open"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
            return
        if "style" in self._open or "svg" in self._open:
            return
        section = self._section
        section.text += data
        if "title" in self._open:
            self.title += data
        if "td" in self._open or "th" in self._open:
            section.tables[-1][-1][-1] += data
        elif section.facts and "dt" in self._open:
            name, said = section.facts[-1]
            section.facts[-1] = (name + data, said)
        elif section.facts and "dd" in self._open:
            name, said = section.facts[-1]
            section.facts[-1] = (name, said + data)
        if section.articles and "article" in self._open:
            section.articles[-1] += data


class Section:
    """What stands under one heading."""

    def __init__(self) -> None:
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.facts: list[tuple[str, str]] = []
        self.articles: list[str] = []
        self.labels: list[str] = []
        self.marks: list[str] = []

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def plain(text: str) -> float:
    """A figure of the page as a number."""
    return float(text.replace("−", "-").replace(",", "").rstrip("%"))
