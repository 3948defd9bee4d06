"""Functions of the reference system's run_lm_score.py with its signatures: the rows tokenised, the scores collated."""

from __future__ import annotations

import io
import logging
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fastscore.config import TaskConfig
from fastscore.rows import RowWriter, read_rows, scored_path
from fastscore.tasks import expand_row, output_row
from fastscore.tokenization import PairTokenizer
from fastscore.types import InputError, Pair, Row, is_table

logger = logging.getLogger("fastscore")

IGNORED_LABEL = -100
Columns = dict[str, list[Any]]


def process_lm_scoring(tokenizer: Any, key_max_length: int = 512) -> Callable[..., Columns]:
    """A function for ``datasets.map(batched=True, with_indices=True)``: one sequence per candidate of each row.

    The function takes a batch of columns, or one row, and optionally the indices. It gives ``input_ids``,
    ``attention_mask``, ``labels`` (-100 outside the answer) and ``query_id``. Of several answers the first is taken.
    """
    config = TaskConfig(key_max_length=key_max_length)
    truncate = partial(PairTokenizer(tokenizer, vocab_size=len(tokenizer)).truncate_keys, max_length=key_max_length)

    def process(batch: Mapping[str, Any], indices: Any = None) -> Columns:
        columns: Columns = {"input_ids": [], "attention_mask": [], "labels": [], "query_id": []}
        for row in _rows(batch, indices):
            for pair in expand_row(row, config, truncate).pairs:
                input_ids, answer_length = _tokens(tokenizer, row, pair)
                start = max(len(input_ids) - answer_length, 0)
                columns["input_ids"].append(input_ids)
                columns["attention_mask"].append([1] * len(input_ids))
                columns["labels"].append([IGNORED_LABEL] * start + input_ids[start:])
                columns["query_id"].append(row.data.get("query_id"))
        return columns

    return process


def _rows(batch: Mapping[str, Any], indices: Any) -> Iterable[Row]:
    columns = dict(batch)
    if not all(isinstance(column, list) for column in columns.values()):  # one row: its task is a string
        return [Row(columns, "row", None if indices is None else int(indices) + 1)]
    count = len(next(iter(columns.values()), []))
    places = range(count) if indices is None else indices
    return [
        Row({name: column[i] for name, column in columns.items()}, "row", place + 1) for i, place in enumerate(places)
    ]


def _tokens(tokenizer: Any, row: Row, pair: Pair) -> tuple[list[int], int]:
    """The whole sequence, and how many tokens at its end are the answer by the reference system's own count."""
    if not isinstance(pair.prompt, str) or not isinstance(pair.answer, str):
        return [*pair.prompt, *pair.answer], len(pair.answer)  # type: ignore[list-item]
    input_ids = list(tokenizer(pair.prompt + pair.answer, return_token_type_ids=False)["input_ids"])
    if _adds_eos(tokenizer) and input_ids[-1:] == [tokenizer.eos_token_id]:
        input_ids.pop()
    encode = partial(tokenizer.encode, add_special_tokens=False)
    answer_length = len(encode(f"Answer: {_first_answer(row, pair).lstrip(' ')}")) - len(encode("Answer:"))
    if answer_length <= 0:
        raise row.error("the answer leaves no token to score", "answers")
    return input_ids, answer_length


def _adds_eos(tokenizer: Any) -> bool:
    return bool(tokenizer("test", return_special_tokens_mask=True)["special_tokens_mask"][-1])


def _first_answer(row: Row, pair: Pair) -> str:
    """The answer as it stands in the row: the count takes it before the template has stripped it."""
    for name in ("answers", "answer"):
        value = row.data.get(name)
        if value:
            return value if isinstance(value, str) else value[0]
    return str(pair.answer)


def collate_scores(eval_data: str | Path, save_name: str) -> Callable[[Iterable[Any], Iterable[Any]], None]:
    """A function that joins NLLs with the rows of a file into ``NAME.scored.SAVE_NAME.EXT`` beside it.

    The function takes one query id and one NLL per candidate, in the order of the file; a teacher score is minus the
    NLL. When they don't fit the rows, or the file can't be written, they are saved as a pickle and the error is
    raised again.
    """
    output = scored_path(eval_data, save_name)
    if is_table(output):
        raise InputError("saved scores are joined with the rows of a JSON file only", path=str(eval_data))

    def collate(query_ids: Iterable[Any], scores: Iterable[Any]) -> None:
        ids, nlls = _plain(query_ids), _plain(scores)
        try:
            _collate(Path(eval_data), output, ids, nlls)
        except BaseException:
            _save_scores(saved_path(eval_data, save_name), ids, nlls)
            raise
        logger.info("wrote %s", output)

    return collate


def _collate(eval_data: Path, output: Path, ids: Sequence[Any], nlls: Sequence[float]) -> None:
    if len(ids) != len(nlls):
        raise InputError(f"expected as many query ids as scores, found {len(ids)} and {len(nlls)}")
    config, start = TaskConfig(), 0
    with RowWriter(output) as out:
        for row in read_rows(eval_data):
            stop = start + _num_candidates(row)
            if stop > len(nlls):
                raise row.error(f"expected {stop - start} scores for its candidates, only {len(nlls) - start} are left")
            query_id = row.data.get("query_id")
            if wrong := [found for found in ids[start:stop] if found != query_id]:
                raise row.error(
                    f"the scores here belong to query id {wrong[0]!r}, the row's is {query_id!r}", "query_id"
                )
            if not all(isinstance(nll, int | float) and math.isfinite(nll) for nll in nlls[start:stop]):
                raise row.error(f"expected finite numbers as scores, found {nlls[start:stop]}")
            out.write(output_row(row, config, [0.0 - nll for nll in nlls[start:stop]]))
            start = stop
        if start < len(nlls):
            raise InputError(f"{len(nlls) - start} scores are left after its last row", path=str(eval_data))


def _num_candidates(row: Row) -> int:
    fields = ["history"] if row.data.get("history") is not None else ["pos", "neg"]
    found = [(name, value) for name in fields if (value := row.data.get(name)) is not None]
    for name, value in found:
        if not isinstance(value, list):
            raise row.error("expected a list", name)
    if count := sum(len(value) for _, value in found):
        return count
    raise row.error("no candidates: expected a list in 'pos', 'neg' or 'history'", fields[0])


def _plain(values: Any) -> list[Any]:
    """Python's own numbers, also from arrays and tensors: what a pickle may hold without running code."""
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    return [value.item() if hasattr(value, "item") else value for value in listed]


def saved_path(eval_data: str | Path, save_name: str) -> Path:
    """Where scores are saved that could not be collated."""
    path = Path(eval_data)
    return path.with_name(f"{path.stem}.{save_name}.pkl")


def _save_scores(path: Path, ids: list[Any], nlls: list[Any]) -> None:
    """Written beside and renamed. Called while an error is on its way up, so it only logs one of its own."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".fastscore-", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            pickle.dump((ids, nlls), file)
        os.replace(temporary, path)
    except OSError as error:
        logger.error("the scores could not be saved to %s: %s", path, error.strerror or error)
    else:
        logger.error("the scored file was not written; the scores are saved in %s", path)


class _PlainUnpickler(pickle.Unpickler):
    """Lists, tuples, numbers and strings need no names looked up; a pickle that looks one up may run code."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, and only plain numbers are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside it")


_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


def load_scores(eval_data: str | Path, save_name: str) -> tuple[list[Any], list[Any]]:
    """What ``collate_scores`` saved: query ids and NLLs.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    scored_path(eval_data, save_name)  # refuses a path in the name
    path = saved_path(eval_data, save_name)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"no saved scores: {getattr(error, 'strerror', None) or error}", path=str(path)) from error
    try:
        loaded = _PlainUnpickler(io.BytesIO(data)).load()
    except _BROKEN_PICKLE as error:
        raise InputError(f"not a file of saved scores: {error}", path=str(path)) from error
    if (
        not isinstance(loaded, tuple | list)
        or len(loaded) != 2
        or not all(isinstance(part, list) for part in loaded)
        or not all(type(query_id) in (int, str) for query_id in loaded[0])
        or not all(type(nll) in (int, float) for nll in loaded[1])
    ):
        raise InputError("not a file of saved scores: expected two lists, query ids and numbers", path=str(path))
    return loaded[0], loaded[1]
