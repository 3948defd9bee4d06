"""What a scored row is written as: ``--format``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastscore.config import FORMATS, Format, TaskConfig
from fastscore.tasks import describe, make_task, output_row
from fastscore.types import InputError, Row, ScoredRow

SCORES = "teacher_scores"
_RANKED = "one positive and one negative, and a score for each"


class OutputFormat:
    """``teacher``: the row with ``teacher_scores``. The other formats say what differs."""

    name: Format = "teacher"

    def added(self) -> dict[str, str]:
        """The columns that are not the row's own, with their types in Arrow's words."""
        return {SCORES: "list<double>"}

    def check(self, row: Row, config: TaskConfig) -> None:
        """See that a row which the task takes can be written, before anything is scored.

        Raises:
            InputError: naming the row and the field.
        """

    def kept(self, row: Row, config: TaskConfig) -> dict[str, Any]:
        """The row's own fields that are written."""
        data = output_row(row, config, ())
        return {name: value for name, value in data.items() if name not in (SCORES, *self.added())}

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        """What is written for a scored row."""
        yield output_row(scored.row, config, scored.teacher_scores)

    def describe(self) -> dict[str, Any]:
        """For the run's metadata."""
        return {"name": self.name}


class _Bge(OutputFormat):
    """``pos_scores`` and ``neg_scores`` beside ``pos`` and ``neg``, as FlagEmbedding's fine-tuning reads them.

    It draws one positive and several negatives of each row, so there must be some of both.
    """

    name = "bge"

    def added(self) -> dict[str, str]:
        return {"pos_scores": "list<double>", "neg_scores": "list<double>"}

    def check(self, row: Row, config: TaskConfig) -> None:
        _check_ranked(row, config, self.name)

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        num_pos = len(scored.row.data["pos"])
        scores = list(scored.teacher_scores)
        yield {**self.kept(scored.row, config), "pos_scores": scores[:num_pos], "neg_scores": scores[num_pos:]}


class _SentenceTransformers(OutputFormat):
    """``query``, ``positive``, ``negative_1`` to ``negative_n``, and ``label``, their scores as a list.

    One row for each positive. The columns are all a table may have besides: sentence-transformers takes every other
    one for a text. Without a number, n is that of the first row that is checked.
    """

    name = "sentence-transformers"

    def __init__(self, num_negatives: int | None = None) -> None:
        self._num_negatives = num_negatives
        self._asked = num_negatives is not None

    def added(self) -> dict[str, str]:
        texts = ("query", "positive", *self._names())
        return {**dict.fromkeys(texts, "string"), "label": "list<double>"}

    def check(self, row: Row, config: TaskConfig) -> None:
        _check_ranked(row, config, self.name)
        found = len(row.data["neg"])
        if self._num_negatives is None:
            self._num_negatives = found
        if found < self._num_negatives or (found > self._num_negatives and not self._asked):
            raise row.error(
                f"a table has the same columns in every row: {self._num_negatives} negatives "
                f"{'were asked for' if self._asked else 'in the first row'}, {found} here (--negatives N takes the "
                "first N of each row, --format sentence-transformers-triplets makes a row of each)",
                "neg",
            )

    def kept(self, row: Row, config: TaskConfig) -> dict[str, Any]:
        return {}

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        data, scores = scored.row.data, scored.teacher_scores
        num_pos, names = len(data["pos"]), self._names()
        negatives = dict(zip(names, data["neg"], strict=False))
        for positive, score in zip(data["pos"], scores, strict=False):
            label = [score, *scores[num_pos : num_pos + len(names)]]
            yield {"query": data["query"], "positive": positive, **negatives, "label": label}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "negatives": self._num_negatives}

    def _names(self) -> list[str]:
        count = self._num_negatives or 1
        return ["negative"] if count == 1 else [f"negative_{index}" for index in range(1, count + 1)]


class _SentenceTransformersTriplets(OutputFormat):
    """``query``, ``positive``, ``negative`` and ``label``, the two scores: a row for each positive with each negative.

    The same losses as for ``sentence-transformers`` take it, whatever the number of negatives in each row.
    """

    name = "sentence-transformers-triplets"

    def added(self) -> dict[str, str]:
        return {"query": "string", "positive": "string", "negative": "string", "label": "list<double>"}

    def check(self, row: Row, config: TaskConfig) -> None:
        _check_ranked(row, config, self.name)

    def kept(self, row: Row, config: TaskConfig) -> dict[str, Any]:
        return {}

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        data, scores = scored.row.data, scored.teacher_scores
        for positive, score in zip(data["pos"], scores, strict=False):
            for negative, other in zip(data["neg"], scores[len(data["pos"]) :], strict=True):
                yield {"query": data["query"], "positive": positive, "negative": negative, "label": [score, other]}


class _SentenceTransformersLists(OutputFormat):
    """``query``, ``docs`` and ``labels``: the candidates and their scores, for listwise losses of rerankers."""

    name = "sentence-transformers-lists"

    def added(self) -> dict[str, str]:
        return {"query": "string", "docs": "list<string>", "labels": "list<double>"}

    def check(self, row: Row, config: TaskConfig) -> None:
        _check_text(row, row.data.get("query"), "query", self.name)
        places = candidate_places(row, config)
        for field, index in places:
            if field not in ("pos", "neg", "history"):
                raise row.error(f"--format {self.name} needs candidates that are texts beside the query", field)
            _check_text(row, row.data[field][index], f"{field}[{index}]", self.name)

    def kept(self, row: Row, config: TaskConfig) -> dict[str, Any]:
        return {}

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        data = scored.row.data
        docs = [data[field][index] for field, index in candidate_places(scored.row, config) if field is not None]
        yield {"query": data["query"], "docs": docs, "labels": list(scored.teacher_scores)}


class _Pairs(OutputFormat):
    """One row for each pair that was scored, with what its log-probability may be divided by.

    ``num_bytes`` (UTF-8) and ``num_chars`` are those of the answer without the white space around it, which is the
    template's; where the answer is token ids they are null.
    """

    name = "pairs"

    def added(self) -> dict[str, str]:
        return {
            "file": "string",
            "row": "int64",
            "candidate": "int64",
            "field": "string",
            "index": "int64",
            "answer": "string",
            "logprob": "double",
            "mean_logprob": "double",
            "num_tokens": "int64",
            "num_bytes": "int64",
            "num_chars": "int64",
            "is_greedy": "bool",
        }

    def kept(self, row: Row, config: TaskConfig) -> dict[str, Any]:
        return {"query_id": row.data["query_id"]} if "query_id" in row.data else {}

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        row = scored.row
        places = candidate_places(row, config)
        num_answers = len(scored.pairs) // len(places)
        for number, (pair, score) in enumerate(zip(scored.pairs, scored.scores, strict=True)):
            candidate = number // num_answers
            field, index = places[candidate]
            answer = pair.answer.strip() if isinstance(pair.answer, str) else None
            yield {
                **self.kept(row, config),
                "file": row.path,
                "row": row.line,
                "candidate": candidate,
                "field": field,
                "index": index,
                "answer": answer,
                "logprob": score.logprob,
                "mean_logprob": score.mean_logprob,
                "num_tokens": score.num_tokens,
                "num_bytes": None if answer is None else len(answer.encode("utf-8")),
                "num_chars": None if answer is None else len(answer),
                "is_greedy": score.is_greedy,
            }


_FORMATS: dict[str, type[OutputFormat]] = {
    kind.name: kind
    for kind in (
        OutputFormat,
        _Bge,
        _SentenceTransformers,
        _SentenceTransformersTriplets,
        _SentenceTransformersLists,
        _Pairs,
    )
}


def make_format(name: str = "teacher", num_negatives: int | None = None) -> OutputFormat:
    """The format of that name; ``num_negatives`` is for ``sentence-transformers`` alone.

    Raises:
        InputError: there is no such format, or the number can't be.
    """
    if name not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; found {name!r}")
    if num_negatives is None:
        return _FORMATS[name]()
    if name != _SentenceTransformers.name:
        raise InputError(f"negatives belongs to format {_SentenceTransformers.name}, not to {name}")
    if num_negatives < 1:
        raise InputError(f"negatives must be a whole number of at least 1; found {num_negatives}")
    return _SentenceTransformers(num_negatives)


def candidate_places(row: Row, config: TaskConfig) -> list[tuple[str | None, int]]:
    """Where each candidate of a row that was checked stands: the field of the row, and the place in its list.

    The field is None where the row is its own only candidate.
    """
    task = make_task(config, row)
    if task.name == "pairs":
        return [("continuation", 0)]
    if task.template is not None and not task.template.has_key:
        return [(None, 0)]
    if task.name == "choices":
        fields = ["choices"]
    elif row.data.get("history") is not None:
        fields = ["history"]
    else:
        fields = [field for field in ("pos", "neg") if row.data.get(field) is not None] or ["score_inputs"]
    return [(field, index) for field in fields for index in range(len(row.data[field]))]


def _check_ranked(row: Row, config: TaskConfig, name: str) -> None:
    """See that the row has a query, and that its scores are those of positives and negatives, which are texts."""
    _check_text(row, row.data.get("query"), "query", name)
    places = candidate_places(row, config)
    for field in ("pos", "neg"):
        indices = [index for found, index in places if found == field]
        if not indices:
            raise row.error(f"--format {name} needs at least {_RANKED}", field)
        for index in indices:
            _check_text(row, row.data[field][index], f"{field}[{index}]", name)


def _check_text(row: Row, value: object, field: str, name: str) -> None:
    if not isinstance(value, str):
        raise row.error(f"--format {name} needs a string, found {describe(value)}", field)
