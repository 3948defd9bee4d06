"""A row of a scored file, checked: which candidate does each score belong to?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastscore.config import TaskConfig
from fastscore.fields import describe
from fastscore.templates import parse_template
from fastscore.types import Row

RANKED = "positives and negatives"
ONE_SIDED = "positives or negatives alone"
HISTORY = "history"
CHOICES = "choices"
ONE_SCORE = "one score"
NO_TEXTS = "candidates without texts"
KINDS = (RANKED, ONE_SIDED, HISTORY, CHOICES, ONE_SCORE, NO_TEXTS)
_LARGEST = 1e12
"""No log-probability is as large, and differences of larger ones could overflow."""


@dataclass(frozen=True, slots=True)
class ScoredCandidates:
    """The candidates of a row with their scores; the first ``num_pos`` are positives, the next ``num_neg`` negatives.

    ``texts`` is empty where the file doesn't hold the candidates' texts (``lrlm`` scores token ids).
    """

    row: Row
    kind: str
    scores: list[float]
    texts: list[str]
    num_pos: int = 0
    num_neg: int = 0

    def name(self, index: int) -> str:
        """The candidate's place in its row, for example ``neg[3]``."""
        if self.num_pos or self.num_neg:
            return f"pos[{index}]" if index < self.num_pos else f"neg[{index - self.num_pos}]"
        return f"{self.kind}[{index}]" if self.kind in (HISTORY, CHOICES) else f"teacher_scores[{index}]"

    @property
    def query(self) -> str:
        """What was asked, as far as a field says so."""
        return _first_text(self.row.data, "query", "context")

    @property
    def answers(self) -> list[str]:
        """The row's answers, whichever of them were scored."""
        for name in ("answers", "answer", "continuation"):
            found = self.row.data.get(name)
            if isinstance(found, str):
                return [found]
            if isinstance(found, list):
                return [answer for answer in found if isinstance(answer, str)]
        return []


def scored_candidates(row: Row, task: TaskConfig) -> ScoredCandidates:
    """Check a scored row. ``task`` is what the run was told; without metadata, the default.

    Raises:
        InputError: no scores, a score that is no finite number, another number of scores than of candidates, or
            candidates that are no texts.
    """
    scores = _scores(row)
    name = task.task if task.task is not None else row.data.get("task")
    given = {field for field in ("history", "pos", "neg", "choices", "continuation") if row.data.get(field) is not None}
    if task.template is not None and not parse_template(task.template, target=task.score.target).has_key:
        found = ScoredCandidates(row, ONE_SCORE, scores, [])
    elif name == "pairs" or (name is None and given == {"continuation"}):
        found = ScoredCandidates(row, ONE_SCORE, scores, [_text(row, "continuation")])
    elif name == "choices" or (name is None and not given & {"history", "pos", "neg"} and "choices" in given):
        found = ScoredCandidates(row, CHOICES, scores, _texts(row, "choices"))
    elif "history" in given:
        found = ScoredCandidates(row, HISTORY, scores, _texts(row, "history"))
    elif given & {"pos", "neg"}:
        pos, neg = _texts(row, "pos"), _texts(row, "neg")
        kind = RANKED if pos and neg else ONE_SIDED
        found = ScoredCandidates(row, kind, scores, pos + neg, len(pos), len(neg))
    else:
        return ScoredCandidates(row, NO_TEXTS, scores, [])
    expected = 1 if found.kind == ONE_SCORE else len(found.texts)
    if len(scores) != expected:
        whose = {RANKED: "pos + neg", ONE_SIDED: "pos + neg", ONE_SCORE: "the row"}.get(found.kind, found.kind)
        plural = "" if expected == 1 else "s"
        raise row.error(f"expected {expected} score{plural} for {whose}, found {len(scores)}", "teacher_scores")
    return found


def _scores(row: Row) -> list[float]:
    found = row.data.get("teacher_scores")
    if found is None and (by_field := [row.data.get("pos_scores"), row.data.get("neg_scores")]) != [None, None]:
        found = [score for scores in by_field if isinstance(scores, list) for score in scores]  # --format bge
    if not isinstance(found, list) or not found:
        what = "missing; expected" if "teacher_scores" not in row.data else f"found {describe(found)}, expected"
        raise row.error(
            f"{what} a list of scores: is this an output of fastscore score, with --format teacher or bge?",
            "teacher_scores",
        )
    if not all(map(_is_score, found)):
        index = next(i for i, score in enumerate(found) if not _is_score(score))
        raise row.error(
            f"expected a finite number (at most {_LARGEST:g} in size), found {describe(found[index])}",
            f"teacher_scores[{index}]",
        )
    return found


def _is_score(value: Any) -> bool:
    """False for NaN too, which compares with nothing."""
    return type(value) in (float, int) and -_LARGEST <= value <= _LARGEST


def _texts(row: Row, field: str) -> list[str]:
    found = row.data.get(field)
    if found is None:
        return []
    if not isinstance(found, list):
        raise row.error(f"expected a list of strings, found {describe(found)}", field)
    if not set(map(type, found)) <= {str}:
        index = next(i for i, text in enumerate(found) if type(text) is not str)
        raise row.error(f"expected a string, found {describe(found[index])}", f"{field}[{index}]")
    return found


def _text(row: Row, field: str) -> str:
    found = row.data.get(field)
    if not isinstance(found, str):
        raise row.error(f"expected a string, found {describe(found)}", field)
    return found


def _first_text(data: dict[str, Any], *fields: str) -> str:
    return next((data[field] for field in fields if isinstance(data.get(field), str)), "")
