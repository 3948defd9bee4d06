"""Tasks: the exact text of every prompt and answer, and a clear word for every bad row."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import pytest

from fastscore.config import TASKS, TaskConfig
from fastscore.tasks import LRLM_FIELDS, expand_row, make_task, output_row, validate_row
from fastscore.types import InputError, Pair, Row

NQ = Path(__file__).parents[2] / "shared" / "data" / "nq_qa.jsonl"


def same(keys: list[str]) -> list[str]:
    return keys


def never(keys: list[str]) -> list[str]:
    raise AssertionError("nothing to truncate here")


def pairs(data: dict[str, Any], **config: Any) -> list[tuple[Any, Any]]:
    row, settings = Row(data, "rows.jsonl", 7), TaskConfig(**config)
    expanded = expand_row(row, settings, same)
    assert validate_row(row, settings) == len(expanded.pairs) == expanded.num_candidates * expanded.num_answers
    assert expanded.row is row
    return [(pair.prompt, pair.answer) for pair in expanded.pairs]


def fault(data: dict[str, Any], **config: Any) -> InputError:
    """The error of a row, the same from both passes, with its place."""
    row, settings = Row(data, "rows.jsonl", 7), TaskConfig(**config)
    with pytest.raises(InputError) as first:
        validate_row(row, settings)
    with pytest.raises(InputError) as second:
        expand_row(row, settings, never)
    assert str(first.value) == str(second.value)
    error = first.value
    assert "\n" not in str(error)
    str(error).encode("utf-8")
    return error


def row_fault(data: dict[str, Any], **config: Any) -> tuple[str | None, str]:
    error = fault(data, **config)
    assert str(error).startswith("rows.jsonl:7: field '")
    return error.field, error.message


QA = {"task": "qa", "query": " who?\n", "answers": [" Bob ", "Al"], "pos": [" P1 "], "neg": ["N1\t", "日本"]}


@pytest.mark.parametrize("task", ["qa", "convsearch"])
def test_qa(task: str) -> None:
    assert pairs({**QA, "task": task}) == [
        ("Knowledge: P1\n\nQuestion: who?\n\nAnswer:", " Bob"),
        ("Knowledge: N1\n\nQuestion: who?\n\nAnswer:", " Bob"),
        ("Knowledge: 日本\n\nQuestion: who?\n\nAnswer:", " Bob"),
    ]


def test_icl() -> None:
    row = {"task": "icl", "query": " q ", "answers": [" yes\n"], "pos": [" in\nout "], "neg": [""]}
    assert pairs(row) == [(" in\nout \n q \n", " yes\n"), ("\n q \n", " yes\n")]


def test_chat() -> None:
    row = {"task": "chat", "query": "hi ", "answers": [" hey "], "history": ["Speaker 1: a", "b "], "pos": ["ignored"]}
    assert pairs(row) == [
        ("Speaker 1: a\nSpeaker 1: hi \nSpeaker 2:", "  hey "),
        ("b \nSpeaker 1: hi \nSpeaker 2:", "  hey "),
    ]
    assert pairs({**row, "history": None}) == [("ignored\nSpeaker 1: hi \nSpeaker 2:", "  hey ")]


LRLM = {
    "task": "lrlm",
    "query": "unused",
    "answers": [],
    "query_inputs": [5, 6],
    "answer_inputs": [7, 0],
    "context_inputs": [3],
    "score_inputs": [[1, 2], [], [9]],
    "pos": ["a"],
    "neg": ["b", "c"],
}


def test_lrlm() -> None:
    row, config = Row(LRLM), TaskConfig()
    expanded = expand_row(row, config, never)
    assert expanded.pairs == (
        Pair((1, 2, 3, 5, 6), (7, 0)),
        Pair((3, 5, 6), (7, 0)),
        Pair((9, 3, 5, 6), (7, 0)),
    )
    assert validate_row(row, config) == 3
    assert len(pairs({**LRLM, "pos": None, "neg": None})) == 3
    assert len(pairs({name: LRLM[name] for name in LRLM_FIELDS}, task="lrlm")) == 3


def test_pairs_task() -> None:
    row = Row({"context": "The sky is", "continuation": " blue", "pos": ["x"], "history": ["unused"]})
    assert expand_row(row, TaskConfig("pairs"), never).pairs == (Pair("The sky is", " blue"),)


def test_choices() -> None:
    row = Row({"task": "choices", "context": "2+2 is", "choices": ["4", " 5", "\nsix", "\u3000七"], "gold": 0})
    expanded = expand_row(row, TaskConfig(answers="all"), never)
    assert [pair.answer for pair in expanded.pairs] == [" 4", " 5", "\nsix", "\u3000七"]
    assert {pair.prompt for pair in expanded.pairs} == {"2+2 is"}
    assert (expanded.num_candidates, expanded.num_answers) == (4, 1)


@pytest.mark.parametrize("task", ["qa", "icl", "chat"])
def test_prompt_and_answer_make_up_the_reference_text(task: str) -> None:
    rng = random.Random(task)

    def text() -> str:
        return "".join(rng.choices("ab \n\t{}'\"\\é😀", k=rng.randint(0, 9)))

    for _ in range(300):
        query, answer, keys = text(), text() + "x" + text(), [text(), text()]
        row = {"task": task, "query": query, "answers": [answer], "pos": keys[:1], "neg": keys[1:]}
        for key, (prompt, scored) in zip(keys, pairs(row), strict=True):
            if task == "qa":
                expected = f"Knowledge: {key.strip()}\n\nQuestion: {query.strip()}\n\nAnswer: {answer.strip()}"
            elif task == "icl":
                expected = f"{key}\n{query}\n{answer}"
            else:
                expected = f"{key}\nSpeaker 1: {query}\nSpeaker 2: {answer}"
            assert prompt + scored == expected
            assert scored in (answer, f" {answer}", f" {answer.strip()}")


def test_candidates_are_truncated_once_per_row_and_before_the_task_strips_them() -> None:
    calls: list[list[str]] = []

    def truncate(keys: list[str]) -> list[str]:
        calls.append(list(keys))
        return [key[:3] for key in keys]

    expanded = expand_row(Row(QA), TaskConfig(), truncate)
    assert calls == [[" P1 ", "N1\t", "日本"]]
    assert expanded.pairs[0].prompt == "Knowledge: P1\n\nQuestion: who?\n\nAnswer:"
    expand_row(Row({**QA, "pos": ["ab cd"], "neg": []}), TaskConfig(), truncate)
    assert calls[1:] == [["ab cd"]]


@pytest.mark.parametrize("empty", [{}, {"neg": []}, {"neg": None}])
def test_either_list_of_candidates_may_be_missing(empty: dict[str, Any]) -> None:
    rest = {name: value for name, value in QA.items() if name not in ("pos", "neg")}
    assert len(pairs({**rest, "pos": ["a", "b"], **empty})) == 2
    swapped = {"pos" if name == "neg" else name: value for name, value in empty.items()}
    assert len(pairs({**rest, "neg": ["a", "b"], **swapped})) == 2


def test_answers_first_all_and_single() -> None:
    assert {answer for _, answer in pairs(QA, answers="first")} == {" Bob"}
    assert pairs({**QA, "neg": []}, answers="all") == [
        ("Knowledge: P1\n\nQuestion: who?\n\nAnswer:", " Bob"),
        ("Knowledge: P1\n\nQuestion: who?\n\nAnswer:", " Al"),
    ]
    assert [answer for _, answer in pairs(QA, answers="all")] == [" Bob", " Al"] * 3
    assert expand_row(Row(QA), TaskConfig(answers="all"), same).num_answers == 2
    assert {answer for _, answer in pairs({**QA, "answers": "Cy"}, answers="all")} == {" Cy"}
    single = {name: value for name, value in QA.items() if name != "answers"} | {"answer": "Di"}
    assert {answer for _, answer in pairs(single)} == {" Di"}
    assert {answer for _, answer in pairs({**QA, "answer": "Di"})} == {" Bob"}
    assert {answer for _, answer in pairs({**single, "answers": None}, answers="sample")} == {" Di"}


def drawn(row: dict[str, Any], seed: int = 0) -> str:
    (answer,) = {answer for _, answer in pairs(row, answers="sample", seed=seed)}
    return str(answer)


def test_sample_depends_on_the_row_and_the_seed_only() -> None:
    rows = [{**QA, "query_id": number, "answers": list(string.ascii_lowercase)} for number in range(400)]
    draws = [drawn(row) for row in rows]
    random.seed(1)
    assert [drawn(row) for row in reversed(rows)] == draws[::-1]
    assert [drawn({**row, "pos": ["other"], "teacher_scores": [1.0]}) for row in rows] == draws
    assert sum(a == b for a, b in zip(draws, [drawn(row, seed=1) for row in rows], strict=True)) < 40
    counts = [draws.count(f" {letter}") for letter in string.ascii_lowercase]
    assert min(counts) >= 3
    assert max(counts) <= 40
    without_id = [drawn({**QA, "query": f"q{number}", "answers": ["a", "b"]}) for number in range(100)]
    assert 30 <= without_id.count(" a") <= 70


def test_sample_is_the_same_in_every_version() -> None:
    row = {**QA, "query_id": 663, "answers": list(string.ascii_lowercase)}
    assert [drawn(row, seed) for seed in range(6)] == [" s", " v", " p", " c", " x", " z"]


def test_the_configured_task_goes_before_the_rows() -> None:
    assert make_task(TaskConfig("icl"), Row(QA)).name == "icl"
    assert make_task(TaskConfig(), Row(QA)).name == "qa"
    assert make_task(TaskConfig(template="{answer}"), Row(QA)).name == "template"
    assert pairs({**QA, "task": "nonsense", "neg": []}, task="icl") == [(" P1 \n who?\n\n", " Bob ")]


@pytest.mark.parametrize(("task", "found"), [("QA", "'QA'"), ("", "''"), (3, "3"), (["qa"], "a list of 1")])
def test_unknown_task(task: object, found: str) -> None:
    assert row_fault({**QA, "task": task}) == ("task", f"expected one of {', '.join(TASKS)}, found {found}")


@pytest.mark.parametrize("row", [{}, {"task": None}])
def test_missing_task(row: dict[str, Any]) -> None:
    field, message = row_fault(row)
    assert field == "task"
    assert message.startswith("missing; expected one of qa, convsearch, icl, chat, lrlm, pairs, choices, preference")


NO_CANDIDATES = "no candidates: expected a non-empty list of strings in 'pos', 'neg' or (task chat) 'history'"
TEXT_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"query": ...}, "query", "missing; expected a string"),
    ({"query": None}, "query", "expected a string, found null"),
    ({"query": 5}, "query", "expected a string, found 5"),
    ({"query": ["q"]}, "query", "expected a string, found a list of 1"),
    ({"query": "a\0b"}, "query", "contains a NUL character at character 1"),
    ({"query": "ab\ud83d"}, "query", "contains the lone surrogate U+D83D at character 2"),
    ({"answers": ...}, "answers", "missing; expected a non-empty list of strings"),
    ({"answers": None}, "answers", "expected a non-empty list of strings, found null"),
    ({"answers": []}, "answers", "expected a non-empty list of strings, found []"),
    ({"answers": {}}, "answers", "expected a non-empty list of strings, found an object"),
    ({"answers": True}, "answers", "expected a non-empty list of strings, found true"),
    ({"answers": ["a", None]}, "answers[1]", "expected a string, found null"),
    ({"answers": ["a", 1.5]}, "answers[1]", "expected a string, found 1.5"),
    ({"answers": [""]}, "answers[0]", "the answer is empty, found ''"),
    (
        {"answers": ["a"], "pos": [], "neg": ["x", "\udc00"]},
        "neg[1]",
        "contains the lone surrogate U+DC00 at character 0",
    ),
    ({"answers": [" \n\u3000"]}, "answers[0]", "the answer is empty, found ' \\n\\u3000'"),
    ({"answers": "\t"}, "answers", "the answer is empty, found '\\t'"),
    ({"answers": ["a\0"]}, "answers[0]", "contains a NUL character at character 1"),
    ({"answers": ..., "answer": 3}, "answer", "expected a string, found 3"),
    ({"answers": ..., "answer": ["x"]}, "answer", "expected a string, found a list of 1"),
    ({"answers": ..., "answer": " "}, "answer", "the answer is empty, found ' '"),
    ({"pos": ..., "neg": ...}, "pos", NO_CANDIDATES),
    ({"pos": [], "neg": None}, "pos", NO_CANDIDATES),
    ({"pos": ..., "neg": []}, "neg", NO_CANDIDATES),
    ({"pos": "text"}, "pos", "expected a list of strings, found 'text'"),
    ({"neg": {"a": 1}}, "neg", "expected a list of strings, found an object"),
    ({"pos": ["a", "b", 3]}, "pos[2]", "expected a string, found 3"),
    ({"pos": [None]}, "pos[0]", "expected a string, found null"),
    ({"neg": ["a", ["b"]]}, "neg[1]", "expected a string, found a list of 1"),
    ({"neg": ["ok\0"]}, "neg[0]", "contains a NUL character at character 2"),
    ({"query": 10**60}, "query", f"expected a string, found {str(10**60)[:40]}…"),
    ({"pos": "x" * 1000}, "pos", f"expected a list of strings, found '{'x' * 40}…'"),
]


def changed(row: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**row, **change}.items() if value is not ...}


@pytest.mark.parametrize("task", ["qa", "convsearch", "icl", "chat"])
@pytest.mark.parametrize(("change", "field", "message"), TEXT_FAULTS)
def test_bad_text_rows(task: str, change: dict[str, Any], field: str, message: str) -> None:
    assert row_fault(changed({**QA, "task": task}, change)) == (field, message)


@pytest.mark.parametrize("task", ["qa", "convsearch", "icl", "lrlm"])
@pytest.mark.parametrize("history", [["a"], [], "a"])
def test_history_is_for_chat(task: str, history: object) -> None:
    field, message = row_fault({**LRLM, **QA, "task": task, "history": history})
    assert field == "history"
    assert message == f"only the chat task takes its candidates from here; the task is '{task}'"
    pairs({**LRLM, **QA, "task": task, "history": None})


def test_bad_history() -> None:
    chat = {**QA, "task": "chat"}
    assert row_fault({**chat, "history": []}) == ("history", NO_CANDIDATES)
    assert row_fault({**chat, "history": "x"}) == ("history", "expected a list of strings, found 'x'")
    assert row_fault({**chat, "history": ["x", 1]}) == ("history[1]", "expected a string, found 1")


def test_only_answers_that_may_be_scored_must_be_good() -> None:
    row = {**QA, "answers": ["good", " "]}
    assert len(pairs(row)) == 3
    for which in ("all", "sample"):
        assert row_fault(row, answers=which) == ("answers[1]", "the answer is empty, found ' '")


LRLM_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    *(({name: ...}, name, "missing; expected a list of token ids") for name in LRLM_FIELDS if name != "score_inputs"),
    ({"score_inputs": ...}, "score_inputs", "missing; expected a non-empty list of lists of token ids"),
    ({"score_inputs": 3}, "score_inputs", "expected a non-empty list of lists of token ids, found 3"),
    ({"score_inputs": []}, "score_inputs", "no candidates: expected a non-empty list of lists of token ids, found []"),
    ({"score_inputs": [[1], [2], 3]}, "score_inputs[2]", "expected a list of token ids, found 3"),
    ({"score_inputs": [[1], None, [3]]}, "score_inputs[1]", "expected a list of token ids, found null"),
    ({"score_inputs": [[1], [2], [3, -1]]}, "score_inputs[2][1]", "expected a whole number of at least 0, found -1"),
    ({"score_inputs": [[1], [True]]}, "score_inputs[1][0]", "expected a whole number of at least 0, found true"),
    ({"query_inputs": [1.0]}, "query_inputs[0]", "expected a whole number of at least 0, found 1.0"),
    ({"query_inputs": "12"}, "query_inputs", "expected a list of token ids, found '12'"),
    ({"context_inputs": [1, "2"]}, "context_inputs[1]", "expected a whole number of at least 0, found '2'"),
    ({"context_inputs": [1, None]}, "context_inputs[1]", "expected a whole number of at least 0, found null"),
    ({"answer_inputs": []}, "answer_inputs", "the answer is empty: expected at least one token id"),
    ({"answer_inputs": [[1]]}, "answer_inputs[0]", "expected a whole number of at least 0, found a list of 1"),
    ({"pos": "abc"}, "pos", "expected a list, found 'abc'"),
    (
        {"context_inputs": [], "query_inputs": []},
        "score_inputs[1]",
        "the prompt is empty: there is no token before the answer",
    ),
    (
        {"pos": []},
        "score_inputs",
        "expected one list for each of the 2 candidates in pos + neg, found 3",
    ),
    ({"pos": ...}, "score_inputs", "expected one list for each of the 2 candidates in neg, found 3"),
]


@pytest.mark.parametrize(("change", "field", "message"), LRLM_FAULTS)
def test_bad_lrlm_rows(change: dict[str, Any], field: str, message: str) -> None:
    assert row_fault(changed(LRLM, change)) == (field, message)


CHOICES = {"task": "choices", "context": "c", "choices": ["a", "b"]}
PAIRS = {"task": "pairs", "context": "c", "continuation": " d"}
OTHER_FAULTS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (CHOICES, {"choices": ...}, "choices", "missing; expected a non-empty list of strings"),
    (CHOICES, {"choices": []}, "choices", "expected a non-empty list of strings, found []"),
    (CHOICES, {"choices": "ab"}, "choices", "expected a non-empty list of strings, found 'ab'"),
    (CHOICES, {"choices": ["a", 2]}, "choices[1]", "expected a string, found 2"),
    (CHOICES, {"choices": ["a", " "]}, "choices[1]", "the answer is empty, found ' '"),
    (CHOICES, {"choices": ["a", "\0"]}, "choices[1]", "contains a NUL character at character 0"),
    (CHOICES, {"context": ...}, "context", "missing; expected a string"),
    (PAIRS, {"context": 1}, "context", "expected a string, found 1"),
    (PAIRS, {"context": "\udfff"}, "context", "contains the lone surrogate U+DFFF at character 0"),
    (PAIRS, {"continuation": ...}, "continuation", "missing; expected a string"),
    (PAIRS, {"continuation": ""}, "continuation", "the answer is empty, found ''"),
    (PAIRS, {"continuation": [" d"]}, "continuation", "expected a string, found a list of 1"),
]


@pytest.mark.parametrize(("row", "change", "field", "message"), OTHER_FAULTS)
def test_bad_pairs_and_choices(row: dict[str, Any], change: dict[str, Any], field: str, message: str) -> None:
    assert row_fault(changed(row, change)) == (field, message)


def test_unused_fields_are_nobodys_business() -> None:
    assert len(pairs({**QA, "history": None, "other": "\0\ud800", "query_id": ["any"], "context": 3})) == 3


def test_output_keeps_every_field_in_order() -> None:
    data = {"z": 1, **QA, "teacher_scores": [9.0], "score_inputs": [[1]], "big": 10**30}
    out = output_row(Row(data), TaskConfig(), (-1.5, -2.0, -0.0))
    assert list(out) == list(data)
    assert out == {**data, "teacher_scores": [-1.5, -2.0, 0.0]}
    assert list(output_row(Row(QA), TaskConfig(), [0.0])) == [*QA, "teacher_scores"]
    assert "teacher_scores" not in QA


def test_output_of_lrlm_drops_the_token_ids() -> None:
    for row, config in ((LRLM, TaskConfig()), ({**LRLM, "task": "qa"}, TaskConfig("lrlm"))):
        out = output_row(Row(row), config, [-1.0, -2.0, -3.0])
        assert list(out) == ["task", "query", "answers", "pos", "neg", "teacher_scores"]
    assert set(LRLM_FIELDS) == {"query_inputs", "answer_inputs", "context_inputs", "score_inputs"}
    assert set(LRLM_FIELDS) < set(output_row(Row(LRLM), TaskConfig("qa"), [-1.0]))


@pytest.mark.skipif(not NQ.exists(), reason="the real data is not here")
def test_real_rows() -> None:
    rows = [json.loads(line) for line in NQ.read_text(encoding="utf-8").splitlines()]
    assert sum(len(pairs(row)) for row in rows) == 1600
    for row in rows:
        for key, (prompt, answer) in zip(row["pos"] + row["neg"], pairs(row), strict=True):
            assert prompt == f"Knowledge: {key.strip()}\n\nQuestion: {row['query'].strip()}\n\nAnswer:"
            assert answer == f" {row['answers'][0].strip()}"
