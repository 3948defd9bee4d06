"""Where the candidates of a row stand, and whether they are of the kind that a format needs."""

from __future__ import annotations

from fastscore.config import TaskConfig
from fastscore.fields import describe
from fastscore.tasks import make_task
from fastscore.types import Row

_RANKED = "one positive and one negative, and a score for each"


def candidate_places(row: Row, config: TaskConfig) -> list[tuple[str | None, int]]:
    """Where each candidate of a row that was checked stands: the field of the row, and the place in its list.

    The field is None where the row is its own only candidate.
    """
    task = make_task(config, row)
    if task.name == "pairs":
        return [("continuation", 0)]
    if task.name == "preference":
        return [("chosen", 0), ("rejected", 0)]
    if task.template is not None and not task.template.has_key:
        return [(None, 0)]
    if task.name == "choices":
        fields = ["choices"]
    elif row.data.get("history") is not None:
        fields = ["history"]
    else:
        fields = [field for field in ("pos", "neg") if row.data.get(field) is not None] or ["score_inputs"]
    return [(field, index) for field in fields for index in range(len(row.data[field]))]


def check_ranked(row: Row, config: TaskConfig, name: str) -> None:
    """See that the row has a query, and that its scores are those of positives and negatives, which are texts."""
    check_candidates(row, config, name)
    check_text(row, row.data.get("query"), "query", name)
    places = candidate_places(row, config)
    for field in ("pos", "neg"):
        indices = [index for found, index in places if found == field]
        if not indices:
            raise row.error(f"--format {name} needs at least {_RANKED}", field)
        for index in indices:
            check_text(row, row.data[field][index], f"{field}[{index}]", name)


def check_candidates(row: Row, config: TaskConfig, name: str) -> None:
    """See that the row's task has candidates that a query can be put beside."""
    if make_task(config, row).name == "preference":
        raise row.error(f"--format {name} needs candidates, and the task 'preference' has none", "task")


def check_text(row: Row, value: object, field: str, name: str) -> None:
    if not isinstance(value, str):
        raise row.error(f"--format {name} needs a string, found {describe(value)}", field)
