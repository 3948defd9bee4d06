"""Tasks: how a row becomes prompts and answers.

Built-in tasks, ``|`` being where the answer begins:

- ``qa``, ``convsearch``: ``Knowledge: {key}\\n\\nQuestion: {query}\\n\\nAnswer:| {answer}``, each value stripped
- ``icl``: ``{key}\\n{query}\\n|{answer}``
- ``chat``: ``{key}\\nSpeaker 1: {query}\\nSpeaker 2:| {answer}``, the candidates may stand in ``history``
- ``lrlm``: token ids, ``score_inputs[i] + context_inputs + query_inputs | answer_inputs``
- ``pairs``: ``{context}|{continuation}``
- ``choices``: ``{context}| {choice}`` for each of ``choices``; no space is added to a choice that begins with one
- ``preference``: ``{prompt}|{chosen}`` and ``{prompt}|{rejected}`` as TRL tokenises them (fastscore.preference)

A template of the user's own takes the place of the built-in ones (:func:`fastscore.templates.parse_template`). With
``chat_template`` the text before the answer goes through the tokenizer's chat template (:mod:`fastscore.chat`).

With ``target="query"`` the query is scored, and answers are not read: ``qa`` and ``convsearch`` become
``Passage: {key}. Please write a question based on this passage.| {query}`` (UPR), the others end with their query.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastscore.chat import ChatTemplate
from fastscore.config import NO_CHAT_TEMPLATE, TASKS, ScoreConfig, TaskConfig
from fastscore.definitions import QUERY_TEMPLATES, check_definition, without_passage
from fastscore.fields import Message, checked_messages, checked_text, describe, mistyped
from fastscore.preference import OUTPUTS, Preference, preference_pairs, read_preference
from fastscore.templates import Template, parse_template
from fastscore.types import Pair, Row, RowPairs

LRLM_FIELDS = ("query_inputs", "answer_inputs", "context_inputs", "score_inputs")
"""Fields of token ids that the ``lrlm`` task reads and leaves out of its output."""

TruncateKeys = Callable[[list[str]], list[str]]

_QA = parse_template("Knowledge: {key}\n\nQuestion: {query}\n\nAnswer: {answer}", strip=True)
_TEMPLATES = {
    "qa": _QA,
    "convsearch": _QA,
    "icl": parse_template("{key}\n{query}\n{answer}"),
    "chat": parse_template("{key}\nSpeaker 1: {query}\nSpeaker 2: {answer}"),
}


@dataclass(frozen=True, slots=True)
class Task:
    """The task of a row: one of ``TASKS``, or ``template``. ``template`` is None where no text is put together."""

    name: str
    template: Template | None = None


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A row whose every field was found to be right. ``build`` makes the pairs from the truncated ``keys``.

    candidate_field: the field whose list a row with fewer candidates would have; None where its pairs are not
        prompts of their own, but answers to one.
    read_fields: the others that such a row would need.
    conversation: stands before the answers in the place of their prompts, where the row's context is one.
    """

    num_candidates: int
    num_answers: int
    keys: list[str]
    build: Callable[[Sequence[str]], list[Pair]]
    num_baselines: int = 0
    candidate_field: str | None = None
    read_fields: tuple[str, ...] = ()
    conversation: list[Message] | None = None
    preference: Preference | None = None

    @property
    def num_pairs(self) -> int:
        """How many there will be."""
        return self.num_candidates * self.num_answers + self.num_baselines


def make_task(config: TaskConfig, row: Row) -> Task:
    """The task of a row: the configured template or task, or else what the row's ``task`` field names.

    Raises:
        InputError: the template is malformed, or there is no such task.
    """
    if config.template is not None:
        return Task("template", parse_template(config.template, target=config.score.target))
    name = config.task if config.task is not None else row.data.get("task")
    if name is None:
        raise row.error(f"missing; expected one of {', '.join(TASKS)} here or as --task", "task")
    if not isinstance(name, str) or name not in TASKS:
        raise row.error(f"expected one of {', '.join(TASKS)}, found {describe(name)}", "task")
    return Task(name, (QUERY_TEMPLATES if config.score.target == "query" else _TEMPLATES).get(name))


def validate_row(row: Row, config: TaskConfig) -> int:
    """Check every field that the task reads; the number of pairs the row makes. Needs no tokenizer.

    Raises:
        InputError: naming the row and the field.
    """
    return plan_row(row, config).num_pairs


def expand_row(row: Row, config: TaskConfig, truncate_keys: TruncateKeys, chat: ChatTemplate | None = None) -> RowPairs:
    """Check the row and make its pairs. ``truncate_keys`` is called once with all candidates' texts, if there are any.

    ``chat`` is needed for ``chat_template`` and for the task ``preference``.

    Raises:
        InputError: naming the row and the field.
    """
    plan = plan_row(row, config)
    return expand_plan(row, plan, config, truncate_keys(plan.keys) if plan.keys else [], chat)


def expand_plan(
    row: Row, plan: RowPlan, config: TaskConfig, keys: Sequence[str], chat: ChatTemplate | None = None
) -> RowPairs:
    """The same, once the row has been checked and its candidates' texts have been truncated to ``keys``."""
    if plan.preference is not None:
        assert chat is not None, "preference rows are tokenised here"
        pairs = preference_pairs(plan.preference, chat, config.max_length)
        return RowPairs(row, pairs, plan.num_candidates, plan.num_answers, summed=True)
    assert len(keys) == len(plan.keys), "truncating gives back every candidate"
    built = plan.build(keys)
    if row.numbers is not None:
        built = built[: len(row.numbers)]  # only one part of a row has its baseline
    if config.chat_template:
        assert chat is not None, "a chat template belongs to a tokenizer"
        built = chat.pairs(built, plan.conversation)
    return RowPairs(row, tuple(built), plan.num_candidates, plan.num_answers)


def output_row(
    row: Row,
    config: TaskConfig,
    teacher_scores: Sequence[float] | Sequence[Sequence[float]],
    teacher_raw: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The row to write: every field in its order, ``teacher_scores`` added or replaced, lrlm's token ids dropped.

    Preference rows get ``ref_chosen_logps`` and ``ref_rejected_logps`` instead. A ``teacher_raw`` that an earlier run
    left belongs to its scores, and goes with them.
    """
    if make_task(config, row).name == "preference":
        return row.data | dict(zip(OUTPUTS, teacher_scores, strict=True))
    added: dict[str, Any] = {
        "teacher_scores": [list(score) if isinstance(score, Sequence) else score for score in teacher_scores]
    }
    if teacher_raw is not None:
        added["teacher_raw"] = teacher_raw
    dropped = set(dropped_fields(row, config)) - set(added)
    return {name: value for name, value in row.data.items() if name not in dropped} | added


def dropped_fields(row: Row, config: TaskConfig) -> tuple[str, ...]:
    """The fields that a scored row does not keep: those of an earlier run, and lrlm's token ids."""
    task = make_task(config, row).name
    if task == "preference":
        return OUTPUTS
    earlier = ("teacher_scores", "teacher_raw")
    return (*earlier, *LRLM_FIELDS) if task == "lrlm" else earlier


def plan_row(row: Row, config: TaskConfig) -> RowPlan:
    """Check every field that the task reads, and see what pairs the row will make. Needs no tokenizer.

    Raises:
        InputError: naming the row and the field.
    """
    task = make_task(config, row)
    check_definition(row, task.name, task.template, config.score)
    if config.chat_template and task.name in NO_CHAT_TEMPLATE:
        raise row.error(f"chat_template is not for {task.name}: {NO_CHAT_TEMPLATE[task.name]}", "task")
    if task.template is not None:
        return _plan_template(row, task, task.template, config)
    if task.name == "lrlm":
        return _plan_lrlm(row, config.score)
    if task.name == "preference":
        return RowPlan(2, 1, [], lambda _: [], preference=read_preference(row))
    conversation = _conversation(row, config) if isinstance(row.data.get("context"), list) else None
    context = "" if conversation else _text(row, "context")
    if task.name == "pairs":
        continuation = _answer(row, row.data.get("continuation"), "continuation")
        return RowPlan(1, 1, [], lambda _: [Pair(context, continuation)], conversation=conversation)
    choices = _list(row, "choices", "a non-empty list of strings")
    if not choices:
        raise row.error("expected a non-empty list of strings, found []", "choices")
    answers = [_answer(row, choice, f"choices[{index}]") for index, choice in enumerate(choices)]
    joined = [choice if choice[0].isspace() else f" {choice}" for choice in answers]
    pairs = [Pair(context, answer) for answer in joined]
    return RowPlan(len(pairs), 1, [], lambda _: pairs, conversation=conversation)


def _conversation(row: Row, config: TaskConfig) -> list[Message]:
    """The context as messages, which only a chat template makes a text of."""
    messages = checked_messages(row, row.data["context"], "context")
    if not config.chat_template:
        raise row.error("a list of messages needs --chat-template; expected a string", "context")
    if config.system_prompt is not None and messages[0]["role"] == "system":
        raise row.error("the conversation has a system message of its own, and --system-prompt is another", "context")
    return messages


def _plan_template(row: Row, task: Task, template: Template, config: TaskConfig) -> RowPlan:
    values = {field: _text(row, field) for field in template.row_fields}
    keys = _candidates(row, task) if template.has_key else []
    if config.score.target == "query":
        answers = [_answer(row, row.data.get("query"), "query")]
    else:
        answers = _answers(row, config, list(values.values()))
    baseline = without_passage(template) if config.score.baseline != "none" else None

    def build(truncated: Sequence[str]) -> list[Pair]:
        candidates = [{**values, "key": key} for key in truncated] if template.has_key else [values]
        prompts = [template.prompt(candidate) for candidate in candidates]
        if baseline is not None:
            prompts.append(baseline.prompt(values))
        return [Pair(prompt, template.answer(answer)) for prompt in prompts for answer in answers]

    num_candidates = len(keys) if template.has_key else 1
    num_baselines = len(answers) if baseline is not None else 0
    field = None if not template.has_key else "history" if row.data.get("history") is not None else "pos"
    read = ("task", "query_id", "query", "answers", "answer", *template.row_fields)
    return RowPlan(num_candidates, len(answers), keys, build, num_baselines, field, read)


def _plan_lrlm(row: Row, score: ScoreConfig) -> RowPlan:
    if row.data.get("history") is not None:
        raise row.error("only the chat task takes its candidates from here; the task is 'lrlm'", "history")
    context = _token_ids(row, row.data.get("context_inputs"), "context_inputs")
    query = _token_ids(row, row.data.get("query_inputs"), "query_inputs")
    if score.target == "query":
        scored_field, before, answer = "query_inputs", context, query
    else:
        answer = _token_ids(row, row.data.get("answer_inputs"), "answer_inputs")
        scored_field, before = "answer_inputs", context + query
    if not answer:
        raise row.error(f"the {score.target} is empty: expected at least one token id", scored_field)
    score_inputs = _list(row, "score_inputs", "a non-empty list of lists of token ids")
    if not score_inputs:
        raise row.error("no candidates: expected a non-empty list of lists of token ids, found []", "score_inputs")
    prompts: list[tuple[int, ...]] = []
    for index, ids in enumerate(score_inputs):
        prompt = (*_token_ids(row, ids, f"score_inputs[{index}]"), *before)
        if not prompt:
            raise row.error(
                f"the prompt is empty: there is no token before the {score.target}", f"score_inputs[{index}]"
            )
        prompts.append(prompt)
    num_candidates, num_baselines = len(prompts), 0
    if score.baseline != "none":
        if not before:
            raise row.error(f"without a passage there is no token before the {score.target}", "context_inputs")
        prompts.append(before)
        num_baselines = 1
    given = [field for field in ("pos", "neg") if row.data.get(field) is not None]
    num_keys = sum(len(_list(row, field, "a list")) for field in given)
    if given and num_keys != num_candidates:
        raise row.error(
            f"expected one list for each of the {num_keys} candidates in {' + '.join(given)}, found {num_candidates}",
            "score_inputs",
        )
    pairs = [Pair(prompt, answer) for prompt in prompts]
    read = ("task", *LRLM_FIELDS[:3])
    return RowPlan(num_candidates, 1, [], lambda _: pairs, num_baselines, "score_inputs", read)


def _candidates(row: Row, task: Task) -> list[str]:
    if row.data.get("history") is not None:
        if task.name not in ("chat", "template"):
            raise row.error(f"only the chat task takes its candidates from here; the task is {task.name!r}", "history")
        fields = ["history"]
    else:
        fields = [field for field in ("pos", "neg") if row.data.get(field) is not None]
    keys = [
        checked_text(row, key, f"{field}[{index}]")
        for field in fields
        for index, key in enumerate(_list(row, field, "a list of strings"))
    ]
    if not keys:
        raise row.error(
            "no candidates: expected a non-empty list of strings in 'pos', 'neg' or (task chat) 'history'",
            fields[0] if fields else "pos",
        )
    return keys


def _answers(row: Row, config: TaskConfig, prompt_values: list[str]) -> list[str]:
    """The answers to score. All must be strings; only those that may be scored must have something in them."""
    field = "answers" if row.data.get("answers") is not None or row.data.get("answer") is None else "answer"
    found = row.data.get(field)
    if isinstance(found, str):
        return [_answer(row, found, field)]
    if field == "answer" or not isinstance(found, list) or not found:
        expected = "a string" if field == "answer" else "a non-empty list of strings"
        raise mistyped(row, field, expected, found)
    for index, answer in enumerate(found):
        if not isinstance(answer, str):
            raise row.error(f"expected a string, found {describe(answer)}", f"{field}[{index}]")
    candidates = found[:1] if config.answers == "first" else found
    checked = [_answer(row, answer, f"{field}[{index}]") for index, answer in enumerate(candidates)]
    if config.answers == "sample":
        # Drawn from what the row says, not from where it stands: order, shards and skipped rows don't change it.
        key = json.dumps([config.seed, row.data.get("query_id"), prompt_values, found], default=str)
        digest = hashlib.sha256(key.encode("utf-8")).digest()
        return [checked[int.from_bytes(digest[:8], "big") % len(checked)]]
    return checked


def _answer(row: Row, value: Any, field: str) -> str:
    text = checked_text(row, value, field)
    if not text.strip():
        raise row.error(f"the {'query' if field == 'query' else 'answer'} is empty, found {describe(text)}", field)
    return text


def _text(row: Row, field: str) -> str:
    return checked_text(row, row.data.get(field), field)


def _list(row: Row, field: str, expected: str) -> list[Any]:
    value = row.data.get(field)
    if not isinstance(value, list):
        raise mistyped(row, field, expected, value)
    return value


def _token_ids(row: Row, value: Any, field: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise mistyped(row, field, "a list of token ids", value)
    if not set(map(type, value)) <= {int} or (value and min(value) < 0):
        index = next(i for i, token in enumerate(value) if type(token) is not int or token < 0)
        raise row.error(f"expected a whole number of at least 0, found {describe(value[index])}", f"{field}[{index}]")
    return tuple(value)
