"""What a scored row is written as: ``--format``."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from fastscore.candidates import candidate_places, check_candidates, check_ranked, check_text
from fastscore.config import FORMATS, Format, TaskConfig
from fastscore.preference import OUTPUTS
from fastscore.tasks import dropped_fields, make_task, output_row
from fastscore.types import ColumnType, InputError, Row, ScoredRow

SCORES = "teacher_scores"
RAW = "teacher_raw"


class OutputFormat:
    """``teacher``: the row with ``teacher_scores``. The other formats say what differs."""

    name: Format = "teacher"

    def added(self, config: TaskConfig, tasks: Set[str]) -> dict[str, ColumnType]:
        """The columns that are not the rows' own, with their types, for rows of the ``tasks``."""
        sums: dict[str, ColumnType] = dict.fromkeys(OUTPUTS, "double") if "preference" in tasks else {}
        return sums if tasks == {"preference"} else {SCORES: f"list<{_score_type(config)}>", **_raw(config), **sums}

    def check_scores(self, config: TaskConfig) -> None:
        """See that scores can be written as the run defines them.

        Raises:
            InputError: they can't.
        """

    def check(self, row: Row, config: TaskConfig) -> None:
        """See that a row which the task takes can be written, before anything is scored.

        Raises:
            InputError: naming the row and the field.
        """

    def kept(self, row: Row, config: TaskConfig) -> dict[str, Any]:
        """The row's own fields that are written."""
        dropped = {*dropped_fields(row, config), *self.added(config, {make_task(config, row).name})}
        return {name: value for name, value in row.data.items() if name not in dropped}

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        """What is written for a scored row."""
        yield output_row(scored.row, config, scored.teacher_scores, scored.teacher_raw)

    def describe(self) -> dict[str, Any]:
        """For the run's metadata."""
        return {"name": self.name}


class _Bge(OutputFormat):
    """``pos_scores`` and ``neg_scores`` beside ``pos`` and ``neg``, as FlagEmbedding's fine-tuning reads them.

    It draws one positive and several negatives of each row, so there must be some of both.
    """

    name = "bge"

    def added(self, config: TaskConfig, tasks: Set[str]) -> dict[str, ColumnType]:
        return {"pos_scores": "list<double>", "neg_scores": "list<double>", **_raw(config)}

    def check_scores(self, config: TaskConfig) -> None:
        _check_numbers(config, self.name)

    def check(self, row: Row, config: TaskConfig) -> None:
        check_ranked(row, config, self.name)

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        num_pos = len(scored.row.data["pos"])
        scores = list(scored.teacher_scores)
        raw = {} if scored.teacher_raw is None else {RAW: scored.teacher_raw}
        yield {**self.kept(scored.row, config), "pos_scores": scores[:num_pos], "neg_scores": scores[num_pos:], **raw}


class _Texts(OutputFormat):
    """What the formats of sentence-transformers have in common: nothing but texts and their scores."""

    def check_scores(self, config: TaskConfig) -> None:
        _check_numbers(config, self.name)
        if config.score.keep_raw:
            raise InputError(f"format {self.name} has texts and scores alone, and no place for keep_raw")

    def kept(self, row: Row, config: TaskConfig) -> dict[str, Any]:
        return {}


class _SentenceTransformers(_Texts):
    """``query``, ``positive``, ``negative_1`` to ``negative_n``, and ``label``, their scores as a list.

    One row for each positive. The columns are all a table may have besides: sentence-transformers takes every other
    one for a text. Without a number, n is that of the first row that is checked.
    """

    name = "sentence-transformers"

    def __init__(self, num_negatives: int | None = None) -> None:
        self._num_negatives = num_negatives
        self._asked = num_negatives is not None

    def added(self, config: TaskConfig, tasks: Set[str]) -> dict[str, ColumnType]:
        texts = ("query", "positive", *self._names())
        return {**dict.fromkeys(texts, "string"), "label": "list<double>"}

    def check(self, row: Row, config: TaskConfig) -> None:
        check_ranked(row, config, self.name)
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


class _SentenceTransformersTriplets(_Texts):
    """``query``, ``positive``, ``negative`` and ``label``, the two scores: a row for each positive with each negative.

    The same losses as for ``sentence-transformers`` take it, whatever the number of negatives in each row.
    """

    name = "sentence-transformers-triplets"

    def added(self, config: TaskConfig, tasks: Set[str]) -> dict[str, ColumnType]:
        return {"query": "string", "positive": "string", "negative": "string", "label": "list<double>"}

    def check(self, row: Row, config: TaskConfig) -> None:
        check_ranked(row, config, self.name)

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        data, scores = scored.row.data, scored.teacher_scores
        for positive, score in zip(data["pos"], scores, strict=False):
            for negative, other in zip(data["neg"], scores[len(data["pos"]) :], strict=True):
                yield {"query": data["query"], "positive": positive, "negative": negative, "label": [score, other]}


class _SentenceTransformersLists(_Texts):
    """``query``, ``docs`` and ``labels``: the candidates and their scores, for listwise losses of rerankers."""

    name = "sentence-transformers-lists"

    def added(self, config: TaskConfig, tasks: Set[str]) -> dict[str, ColumnType]:
        return {"query": "string", "docs": "list<string>", "labels": "list<double>"}

    def check(self, row: Row, config: TaskConfig) -> None:
        check_candidates(row, config, self.name)
        check_text(row, row.data.get("query"), "query", self.name)
        places = candidate_places(row, config)
        for field, index in places:
            if field not in ("pos", "neg", "history"):
                raise row.error(f"--format {self.name} needs candidates that are texts beside the query", field)
            check_text(row, row.data[field][index], f"{field}[{index}]", self.name)

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        data = scored.row.data
        docs = [data[field][index] for field, index in candidate_places(scored.row, config) if field is not None]
        yield {"query": data["query"], "docs": docs, "labels": list(scored.teacher_scores)}


class _Pairs(OutputFormat):
    """One row for each pair that was scored, with what its log-probability may be divided by.

    ``score`` is that of its candidate, as the run defines it. A pair without a passage, the baseline, has no candidate.
    ``answer`` is the text as it is scored, and ``num_bytes`` and ``num_chars`` are its sizes; null for token ids.
    """

    name = "pairs"

    def added(self, config: TaskConfig, tasks: Set[str]) -> dict[str, ColumnType]:
        return {
            "file": "string",
            "row": "int64",
            "candidate": "int64",
            "field": "string",
            "index": "int64",
            "answer": "string",
            "score": _score_type(config),
            "logprob": "double",
            "mean_logprob": "double",
            "num_tokens": "int64",
            "num_bytes": "int64",
            "num_chars": "int64",
            "is_greedy": "bool",
        }

    def check(self, row: Row, config: TaskConfig) -> None:
        try:
            str(row.path).encode()
        except UnicodeEncodeError as error:
            raise row.error("each pair is written with the name of its file, and this one is no UTF-8") from error

    def kept(self, row: Row, config: TaskConfig) -> dict[str, Any]:
        return {"query_id": row.data["query_id"]} if "query_id" in row.data else {}

    def rows(self, scored: ScoredRow, config: TaskConfig) -> Iterator[dict[str, Any]]:
        row = scored.row
        places = candidate_places(row, config)
        num_answers = len(scored.pairs) // (len(places) + (config.score.baseline != "none"))
        for number, (pair, score) in enumerate(zip(scored.pairs, scored.scores, strict=True)):
            candidate = number // num_answers
            has_candidate = candidate < len(places)
            field, index = places[candidate] if has_candidate else (None, None)
            yield {
                **self.kept(row, config),
                "file": row.path,
                "row": row.line,
                "candidate": candidate if has_candidate else None,
                "field": field,
                "index": index,
                "answer": pair.answer if isinstance(pair.answer, str) else None,
                "score": scored.teacher_scores[candidate] if has_candidate else None,
                "logprob": score.logprob,
                "mean_logprob": score.mean_logprob,
                "num_tokens": score.num_tokens,
                "num_bytes": pair.num_bytes,
                "num_chars": pair.num_chars,
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


def _score_type(config: TaskConfig) -> str:
    return "list<double>" if config.score.reduce == "none" else "double"


def _raw(config: TaskConfig) -> dict[str, ColumnType]:
    """The column of raw counts, if they are kept."""
    if not config.score.keep_raw:
        return {}
    counts = dict.fromkeys(("num_tokens", "num_bytes", "num_chars"), "list<list<int64>>")
    baseline = {"baseline_logprob": "list<double>", "baseline_num_tokens": "list<int64>"}
    return {RAW: {"logprob": "list<list<double>>", **counts, **(baseline if config.score.baseline != "none" else {})}}


def _check_numbers(config: TaskConfig, name: str) -> None:
    if config.score.reduce == "none":
        raise InputError(f"format {name} takes one number for each candidate, and reduce none gives a list of tokens")
