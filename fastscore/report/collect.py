"""One pass over a scored file: numbers of every candidate in flat arrays, texts of the few rows that are shown.

Shapes: C candidates of all rows, R rows with positives and negatives, U rows with several unlabelled candidates. A
candidate takes 13 bytes, a row 16, whatever its texts are.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastscore.config import TaskConfig
from fastscore.report.scored_row import RANKED, ScoredCandidates, scored_candidates
from fastscore.types import Row

NEGATIVE, POSITIVE, UNLABELLED = 0, 1, 2
NO_LENGTH = -1
MAX_TIES = 20
MAX_ANSWERS = 10
MAX_DRAWN = 100
"""Scores of one kind that are drawn of one row."""
MAX_TEXT = 20_000
"""Characters of one text on the page: a file may hold whole books."""


@dataclass(frozen=True, slots=True)
class ShownText:
    """A candidate as it stands on the page; ``left_out`` counts the characters that don't."""

    name: str
    score: float
    text: str
    left_out: int


@dataclass(frozen=True, slots=True)
class Upset:
    """A row whose best negative has a higher score than its best positive."""

    line: int
    query_id: str
    query: str
    answers: list[str]
    margin: float
    positive: ShownText
    negative: ShownText
    num_pos: int
    num_neg: int
    num_above: int
    """Negatives above the best positive."""
    pos_scores: list[float]
    neg_scores: list[float]
    """The scores that are drawn: of many, some evenly picked from the lowest to the highest."""

    @property
    def low(self) -> float:
        return min(*self.pos_scores, *self.neg_scores)

    @property
    def high(self) -> float:
        return max(self.neg_scores)


@dataclass(frozen=True, slots=True)
class Tie:
    """Candidates of one row with the same score."""

    line: int
    query: str
    score: float
    names: list[str]
    same_text: bool
    decides: bool
    """The best positive and the best negative are among them."""


@dataclass(slots=True)
class Ties:
    """Every tie counted; of those shown, the ones that decide a row come first."""

    rows: int = 0
    candidates: int = 0
    groups: int = 0
    same_text: int = 0
    _deciding: list[Tie] = field(default_factory=list)
    _others: list[Tie] = field(default_factory=list)

    def shown(self) -> list[Tie]:
        return [*self._deciding, *self._others][:MAX_TIES]

    def add(self, row: ScoredCandidates, line: int, best_of_both: float | None) -> None:
        """Look for equal scores; ``best_of_both`` is the row's best one where a positive and a negative share it."""
        counts = Counter(row.scores)
        if len(counts) == len(row.scores):
            return
        self.rows += 1
        for score, count in counts.items():
            if count == 1:
                continue
            places = [index for index, found in enumerate(row.scores) if found == score]
            same_text = bool(row.texts) and len({row.texts[index] for index in places}) == 1
            self.groups += 1
            self.candidates += count
            self.same_text += same_text
            decides = score == best_of_both
            kept = self._deciding if decides else self._others
            if len(kept) < MAX_TIES:
                names = [row.name(index) for index in places]
                kept.append(Tie(line, _cut(row.query)[0], score, names, same_text, decides))


@dataclass(slots=True)
class Collected:
    """What a pass over a file leaves. ``max_upsets`` bounds the rows whose texts are kept."""

    max_upsets: int
    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    num_above: int = 0
    """Rows in which a negative has the best score."""
    num_level: int = 0
    """Rows in which the best positive and the best negative have the same score."""
    score_C: array[float] = field(default_factory=lambda: array("d"))
    length_C: array[int] = field(default_factory=lambda: array("i"))
    label_C: array[int] = field(default_factory=lambda: array("b"))
    margin_R: array[float] = field(default_factory=lambda: array("d"))
    line_R: array[int] = field(default_factory=lambda: array("q"))
    lead_U: array[float] = field(default_factory=lambda: array("d"))
    line_U: array[int] = field(default_factory=lambda: array("q"))
    ties: Ties = field(default_factory=Ties)
    _upsets: list[tuple[float, int, Upset]] = field(default_factory=list)

    def upsets(self) -> list[Upset]:
        """The worst first; of equal margins, the earlier line."""
        return [upset for *_, upset in sorted(self._upsets, key=lambda entry: entry[:2], reverse=True)]

    def add(self, row: ScoredCandidates) -> None:
        self.rows += 1
        self.kinds[row.kind] += 1
        line = row.row.line or self.rows
        scores, num_pos, num_neg = row.scores, row.num_pos, row.num_neg
        self.score_C.extend(scores)
        self.length_C.extend(map(len, row.texts) if row.texts else [NO_LENGTH] * len(scores))
        self.label_C.extend(
            [POSITIVE] * num_pos + [NEGATIVE] * num_neg if num_pos or num_neg else [UNLABELLED] * len(scores)
        )
        best_of_both = None
        if row.kind == RANKED:
            best_pos, best_neg = max(scores[:num_pos]), max(scores[num_pos:])
            margin = best_pos - best_neg
            self.margin_R.append(margin)
            self.line_R.append(line)
            if best_pos == best_neg:
                self.num_level += 1
                best_of_both = best_pos
            elif best_neg > best_pos:
                self.num_above += 1
                self._keep_upset(row, line, margin)
        elif len(scores) > 1 and not (num_pos or num_neg):
            first, second = heapq.nlargest(2, scores)
            self.lead_U.append(first - second)
            self.line_U.append(line)
        self.ties.add(row, line, best_of_both)

    def _keep_upset(self, row: ScoredCandidates, line: int, margin: float) -> None:
        """Keep the row if it is among the worst. The heap's first entry is the least bad, the latest of equals."""
        key = (-margin, -self.rows)
        if self.max_upsets == 0 or (len(self._upsets) == self.max_upsets and key < self._upsets[0][:2]):
            return
        entry = (*key, _upset(row, line, margin))
        if len(self._upsets) < self.max_upsets:
            heapq.heappush(self._upsets, entry)
        else:
            heapq.heapreplace(self._upsets, entry)


def collect(rows: Iterable[Row], task: TaskConfig, max_upsets: int) -> Collected:
    """Check every row and count it.

    Raises:
        InputError: naming the row and the field.
    """
    collected = Collected(max_upsets)
    for row in rows:
        collected.add(scored_candidates(row, task))
    return collected


def _upset(row: ScoredCandidates, line: int, margin: float) -> Upset:
    scores, num_pos = row.scores, row.num_pos
    positive = max(range(num_pos), key=scores.__getitem__)
    negative = max(range(num_pos, len(scores)), key=scores.__getitem__)
    query_id = row.row.data.get("query_id")
    return Upset(
        line,
        _cut(str(query_id))[0] if isinstance(query_id, str | int) else "",
        _cut(row.query)[0],
        [_cut(answer)[0] for answer in row.answers[:MAX_ANSWERS]],
        margin,
        _shown(row, positive),
        _shown(row, negative),
        num_pos,
        row.num_neg,
        sum(score > scores[positive] for score in scores[num_pos:]),
        _thinned(scores[:num_pos]),
        _thinned(scores[num_pos:]),
    )


def _thinned(scores: list[float]) -> list[float]:
    ordered, last = sorted(scores), len(scores) - 1
    if len(ordered) <= MAX_DRAWN:
        return ordered
    return [ordered[round(index * last / (MAX_DRAWN - 1))] for index in range(MAX_DRAWN)]


def _shown(row: ScoredCandidates, index: int) -> ShownText:
    return ShownText(row.name(index), row.scores[index], *_cut(row.texts[index]))


def _cut(text: str) -> tuple[str, Any]:
    return text[:MAX_TEXT], max(len(text) - MAX_TEXT, 0)
