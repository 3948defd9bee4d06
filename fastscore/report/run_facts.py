"""What a run's own description (``OUTPUT.meta.json``) says, checked and put in order for the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fastscore.config import ScoreConfig, TaskConfig
from fastscore.fields import describe
from fastscore.report.definition import said
from fastscore.report.words import count, duration, share, size
from fastscore.rows import read_rows
from fastscore.run_files import FileJob
from fastscore.templates import parse_template
from fastscore.types import Row

Facts = list[tuple[str, str]]
"""What is told, and what is said of it."""

COMPUTED, ALONE, PADDED = "computed", "each pair by itself", "padded batches of four"
_TOKENS = {COMPUTED: "tokens_computed", ALONE: "tokens_unpadded", PADDED: "tokens_padded"}


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run as the page tells it; empty where there is no description, and never more than that says."""

    path: Path
    present: bool = False
    task: TaskConfig = field(default_factory=TaskConfig)
    answers: str = ""
    """Which of a row's answers were scored: ``first``, ``all`` or ``sample``."""
    rows: int | None = None
    headline: Facts = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens computed, and what other ways of batching would have computed."""
    speed: str = ""
    timings: Facts = field(default_factory=list)
    setup: Facts = field(default_factory=list)
    everything: Facts = field(default_factory=list)

    @property
    def saved(self) -> int | None:
        """Tokens that padded batches of four would have computed beyond those computed."""
        return self.tokens[PADDED] - self.tokens[COMPUTED] if {COMPUTED, PADDED} <= self.tokens.keys() else None


def read_run_facts(scored: Path) -> RunFacts:
    """The description beside a scored file. That it is not there is no error.

    Raises:
        InputError: the file is there but can't be read, or a value in it is not of its kind.
    """
    path = FileJob((), scored).meta
    if not path.exists():
        return RunFacts(path)
    meta = _Meta(next(read_rows(path)))
    rows = meta.number("rows")
    # None where all scores came from the cache: nothing was computed, and nothing is to be compared.
    tokens = {said: found for said, name in _TOKENS.items() if (found := meta.number("stats", name))}
    speed, timings = _timings(meta)
    return RunFacts(
        path,
        True,
        meta.task(),
        meta.text("task", "answers"),
        None if rows is None else int(rows),
        _some(
            ("model", meta.text("scorer", "model")),
            ("adapter", meta.text("scorer", "adapter")),
            ("dtype", meta.text("scorer", "dtype")),
            ("device", meta.text("scorer", "device")),
            ("scored", _day(meta.text("started"))),
        ),
        {what: int(found) for what, found in tokens.items()},
        speed,
        timings,
        _setup(meta),
        list(_flat(meta.row.data)),
    )


class _Meta:
    """The description's values, each checked when it is asked for."""

    def __init__(self, row: Row) -> None:
        self.row = Row(row.data, row.path)  # it is one object: a line would say nothing

    def text(self, *keys: str) -> str:
        """A text, a list's items side by side, or nothing where there is none."""
        found = self._find(keys)
        if isinstance(found, list):
            return ", ".join(map(_plain, found))
        return "" if found is None else _plain(found)

    def number(self, *keys: str) -> float | None:
        found = self._find(keys)
        if found is None:
            return None
        if type(found) not in (int, float) or not 0 <= found < 1e18:
            raise self.row.error(f"expected a number of at least 0, found {describe(found)}", ".".join(keys))
        return found  # type: ignore[no-any-return]

    def task(self) -> TaskConfig:
        """What the run was told of its task, as far as the page needs it."""
        name, template = (self._find(("task", field)) for field in ("task", "template"))
        try:
            score = ScoreConfig(**(self._find(("task", "score")) or {}))
            if template is not None:
                parse_template(template, target=score.target)
            config = TaskConfig(task=name, template=template, score=score)
        except (ValueError, TypeError) as error:
            raise self.row.error(f"names no task that this version knows: {error}", "task") from error
        if score.reduce == "none":
            raise self.row.error("the scores are lists of tokens, and a report needs numbers", "task.score.reduce")
        return config

    def _find(self, keys: tuple[str, ...]) -> Any:
        found: Any = self.row.data
        for depth, key in enumerate(keys):
            if found is None:
                return None
            if not isinstance(found, dict):
                raise self.row.error(f"expected an object, found {describe(found)}", ".".join(keys[:depth]))
            found = found.get(key)
        return found


def _timings(meta: _Meta) -> tuple[str, Facts]:
    seconds, computed, answers, pairs, packs, room = (
        meta.number("stats", name)
        for name in ("seconds", "tokens_computed", "answer_tokens", "pairs", "packs", "pack_tokens")
    )
    cached = meta.number("stats", "cached")
    pairs = None if pairs is None else pairs - (cached or 0)
    speed = f"{size(computed / seconds)} tokens/s" if computed and seconds else ""
    facts = _some(
        ("time in the model", duration(seconds) if seconds is not None else ""),
        ("from start to end", _elapsed(meta)),
        ("tokens computed", speed and f"{count(int(computed or 0))}, {speed}"),
        ("answer tokens", f"{count(int(answers))}, {size(answers / seconds)} a second" if answers and seconds else ""),
        ("pairs computed", f"{count(int(pairs))}, {size(pairs / seconds)} a second" if pairs and seconds else ""),
        ("pairs from the cache", count(int(cached)) if cached else ""),
        ("packs", f"{count(int(packs))}, filled to {share(computed, room)}" if packs and computed and room else ""),
    )
    return speed, facts


def _setup(meta: _Meta) -> Facts:
    mode, why = meta.text("scorer", "mode"), meta.text("scorer", "mode_reason")
    versions = meta._find(("scorer", "versions"))
    packages = [f"{name} {_plain(version)}" for name, version in versions.items()] if isinstance(versions, dict) else []
    fastscore = meta.text("fastscore")
    return _some(
        ("model", meta.text("scorer", "model")),
        ("loaded from", meta.text("scorer", "model_path")),
        ("commit", meta.text("scorer", "commit")),
        ("adapter", meta.text("scorer", "adapter")),
        ("architecture", meta.text("scorer", "architecture")),
        ("device", meta.text("scorer", "device")),
        ("dtype", meta.text("scorer", "dtype")),
        ("batches", f"{mode} ({why})" if why else mode),
        ("attention", meta.text("scorer", "attention")),
        ("answer NLL", meta.text("scorer", "answer_nll")),
        ("task", meta.text("task", "task") or meta.text("task", "template") or "each row's own"),
        ("answers", _answers(meta)),
        ("scores", said(meta.task().score)),
        ("versions", ", ".join([*([f"fastscore {fastscore}"] if fastscore else []), *packages])),
        ("started", _moment(meta.text("started"))),
        ("finished", _moment(meta.text("finished"))),
        ("input", meta.text("inputs")),
        ("output", meta.text("output")),
    )


def _answers(meta: _Meta) -> str:
    which = meta.text("task", "answers")
    return f"{which}, combined by {meta.text('task', 'combine')}" if which == "all" else which


def _elapsed(meta: _Meta) -> str:
    started, finished = (_parsed(meta.text(name)) for name in ("started", "finished"))
    if started is None or finished is None or (started.tzinfo is None) != (finished.tzinfo is None):
        return ""
    return duration(max((finished - started).total_seconds(), 0))


def _parsed(moment: str) -> datetime | None:
    try:
        return datetime.fromisoformat(moment)
    except ValueError:  # shown as it stands
        return None


def _day(moment: str) -> str:
    parsed = _parsed(moment)
    return moment if parsed is None else parsed.date().isoformat()


def _moment(moment: str) -> str:
    parsed = _parsed(moment)
    return moment if parsed is None else f"{parsed:%Y-%m-%d %H:%M:%S} {parsed.tzname() or ''}".strip()


def _some(*facts: tuple[str, str]) -> Facts:
    return [(name, said) for name, said in facts if said]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every value with its path."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, _plain(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
