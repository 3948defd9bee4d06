"""What is scored beside the task's own answer: the query, and the same text without a passage."""

from __future__ import annotations

from fastscore.config import ScoreConfig
from fastscore.templates import Template, parse_template
from fastscore.types import InputError, Row

_UPR = parse_template(
    "Passage: {key}. Please write a question based on this passage. {query}", strip=True, target="query"
)
_UPR_BASELINE = parse_template("Please write a question. {query}", strip=True, target="query")
QUERY_TEMPLATES = {
    "qa": _UPR,
    "convsearch": _UPR,
    "icl": parse_template("{key}\n{query}", target="query"),
    "chat": parse_template("{key}\nSpeaker 1: {query}", target="query"),
}
"""With target query: UPR's prompt (Sachan et al., 2022), or the task's own text as far as the query."""


def without_passage(template: Template) -> Template:
    """The prompt of the baseline."""
    return _UPR_BASELINE if template == _UPR else template.without_key()


def check_definition(row: Row, task: str, template: Template | None, score: ScoreConfig) -> None:
    """Whether the definition of the score has a meaning for the task.

    Raises:
        InputError: it has none.
    """
    if task == "preference":
        _check_preference(row, score)
    is_lrlm = task == "lrlm"
    has_candidates = is_lrlm if template is None else template.has_key
    if score.target == "query" and template is None and not is_lrlm:
        raise _no(row, task, "query to score (--target query)")
    if score.baseline != "none" and not has_candidates:
        raise _no(row, task, "passage to leave out (--baseline no-context)")
    if score.normalize != "none" and not (has_candidates or task == "choices"):
        raise _no(row, task, "candidates to share a distribution (--normalize softmax)")
    if score.reduce in ("byte", "char") and is_lrlm:
        raise _no(row, task, f"{score.reduce}s to count (--reduce {score.reduce}): it scores token ids")


def _no(row: Row, task: str, what: str) -> InputError:
    if task == "template":
        return row.error(f"a template without {{key}} has no {what}", "template")
    return row.error(f"the task {task!r} has no {what}", "task")


def _check_preference(row: Row, score: ScoreConfig) -> None:
    asked = {
        f"--target {score.target}": score.target != "answer",
        f"--reduce {score.reduce}": score.reduce not in ("mean", "sum"),
        f"--baseline {score.baseline}": score.baseline != "none",
        f"--normalize {score.normalize}": score.normalize != "none",
        "--append-eos": score.append_eos,
        "--keep-raw": score.keep_raw,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise row.error(f"the task 'preference' has no {option}: its scores are sums over TRL's tokens", "task")
