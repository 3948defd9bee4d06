"""Texts of the scored file, cut for the page: what is seen at once, what unfolds, and where the answer stands."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

CLAMPED = 360
"""Characters that are seen before a text is unfolded."""
_SLACK = 120
"""A text that is longer by so little is shown whole."""
_BACK = 60
"""How far back a word's end is looked for."""
_STAY_TOGETHER = re.compile("[\u200d\ufe0e\ufe0f\U0001f3fb-\U0001f3ff\U0001f1e6-\U0001f1ff\ud800-\udfff]")

Parts = list[tuple[str, bool]]
"""A text in pieces; true where a piece is one of the answers."""


@dataclass(frozen=True, slots=True)
class FoldedText:
    """``rest`` is empty where the whole text is short."""

    seen: Parts
    rest: Parts
    has_answer: bool

    @property
    def rest_length(self) -> int:
        return sum(len(piece) for piece, _ in self.rest)


def fold(text: str, answers: Sequence[str] = ()) -> FoldedText:
    """Cut a text in two at a word's end, and mark the answers in it whatever their case."""
    at = _fold_at(text)
    spans = [match.span() for match in _answers(answers).finditer(text)] if any(map(str.strip, answers)) else []
    return FoldedText(_parts(text, 0, at, spans), _parts(text, at, len(text), spans), bool(spans))


def _fold_at(text: str) -> int:
    if len(text) <= CLAMPED + _SLACK:
        return len(text)
    space = max(text.rfind(" ", CLAMPED - _BACK, CLAMPED), text.rfind("\n", CLAMPED - _BACK, CLAMPED))
    if space > 0:
        return space + 1
    at = CLAMPED  # scripts without spaces: at least not inside what is drawn as one character
    while at > CLAMPED - _BACK and (_joins(text[at]) or text[at - 1] == "\u200d"):
        at -= 1
    return at


def _joins(character: str) -> bool:
    return unicodedata.category(character).startswith("M") or bool(_STAY_TOGETHER.match(character))


def _answers(answers: Sequence[str]) -> re.Pattern[str]:
    """Whole words only, where the answer begins or ends like a word of a script that has spaces."""
    stripped = sorted({answer.strip() for answer in answers} - {""}, key=len, reverse=True)
    words = [
        ("(?<![^\\W_])" if answer[0].isascii() else "")
        + re.escape(answer)
        + ("(?![^\\W_])" if answer[-1].isascii() else "")
        for answer in stripped
    ]
    return re.compile("|".join(words), re.IGNORECASE)


def _parts(text: str, start: int, stop: int, spans: Sequence[tuple[int, int]]) -> Parts:
    parts: Parts = []
    for low, high in spans:
        low, high = max(low, start), min(high, stop)
        if low < high:
            parts += [(text[start:low], False), (text[low:high], True)]
            start = high
    parts.append((text[start:stop], False))
    return [part for part in parts if part[0]]
