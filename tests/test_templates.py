"""Templates of the user's own: named fields, an answer at the end, and nothing evaluated."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastscore.config import TaskConfig
from fastscore.tasks import expand_row, make_task, validate_row
from fastscore.templates import parse_template
from fastscore.types import InputError, Row


def pairs(data: dict[str, Any], **config: Any) -> list[tuple[Any, Any]]:
    row, settings = Row(data), TaskConfig(**config)
    expanded = expand_row(row, settings, lambda keys: keys)
    assert validate_row(row, settings) == len(expanded.pairs)
    return [(pair.prompt, pair.answer) for pair in expanded.pairs]


def fault(data: dict[str, Any], template: str) -> InputError:
    with pytest.raises(InputError) as caught:
        validate_row(Row(data, "rows.jsonl", 7), TaskConfig(template=template))
    return caught.value


def row_fault(data: dict[str, Any], template: str) -> tuple[str | None, str]:
    error = fault(data, template)
    assert str(error).startswith("rows.jsonl:7: field '")
    return error.field, error.message


ROW = {"query": "who?", "title": "T {x}", "käse-name": "K", "answers": ["Bob"], "pos": ["p"], "neg": ["n {key}"]}


def test_template_with_candidates() -> None:
    assert pairs(ROW, template="Passage: {key}\nQ: {query}\nA:{answer}") == [
        ("Passage: p\nQ: who?\nA:", "Bob"),
        ("Passage: n {key}\nQ: who?\nA:", "Bob"),
    ]
    assert pairs({**ROW, "history": ["h"]}, template="{key}{key} {answer}") == [("hh", " Bob")]
    assert len(pairs(ROW, template="{key}: {answer}", answers="all")) == 2


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        ("Q: {query}\nA: {answer}", "Q: who?\nA:", " Bob"),
        ("A:  {answer}", "A: ", " Bob"),
        ("A:\n{answer}", "A:\n", "Bob"),
        ("{title}{answer}", "T {x}", "Bob"),
        ("{{{title}}} {{}} {{answer}} {answer}", "{T {x}} {} {answer}", " Bob"),
        ("{käse-name}\\n{query}{query}: {answer}", "K\\nwho?who?:", " Bob"),
        ("{answer}", "", "Bob"),
        (" {answer}", "", " Bob"),
    ],
)
def test_template_without_candidates_is_one_pair(template: str, prompt: str, answer: str) -> None:
    assert pairs(ROW, template=template) == [(prompt, answer)]
    assert expand_row(Row(ROW), TaskConfig(template=template), lambda keys: 1 / 0).num_candidates == 1  # not called


def test_template_fields_come_from_the_row() -> None:
    row = {**ROW, "key": "not the candidate", "year": 1999}
    assert pairs({**row, "neg": []}, template="{key} {answer}") == [("p", " Bob")]
    assert row_fault(row, template="{year} {answer}") == ("year", "expected a string, found 1999")
    assert row_fault(row, template="{gone} {answer}") == ("gone", "missing; expected a string")
    assert row_fault({**row, "title": "\0"}, template="{title} {answer}")[0] == "title"
    assert row_fault({"answers": ["a"]}, template="{key} {answer}") == (
        "pos",
        "no candidates: expected a non-empty list of strings in 'pos', 'neg' or (task chat) 'history'",
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "expected {answer} exactly once, found it 0 times"),
        ("Q: {query}", "expected {answer} exactly once, found it 0 times"),
        ("{{answer}}", "expected {answer} exactly once, found it 0 times"),
        ("{answer}{answer}", "expected {answer} exactly once, found it 2 times"),
        ("{answer} ", "expected {answer} at the very end"),
        ("{answer}\n", "expected {answer} at the very end"),
        ("{answer}{query}", "expected {answer} at the very end"),
        ("{answer}}}", "expected {answer} at the very end"),
        ("{query.__class__}{answer}", "'{query.__class__}' is not a field's name: attributes are not looked up"),
        ("{pos[0]}{answer}", "'{pos[0]}' is not a field's name: items are not looked up"),
        ("{query!r}{answer}", "'{query!r}' is not a field's name: conversions are not supported"),
        ("{query:>9}{answer}", "'{query:>9}' is not a field's name: format specifications are not supported"),
        ("{answer:}", "'{answer:}' is not a field's name: format specifications are not supported"),
        ("{}{answer}", "expected a field's name between the braces of '{}'"),
        ("{ query }{answer}", "expected a field's name between the braces of '{ query }'"),
        ("{query{answer}", "single '{' at character 0"),
        ("a } {answer}", "single '}' at character 2"),
        ("{answer}{", "single '{' at character 8"),
        ("{a{b}}{answer}", "single '{' at character 0"),
        ("\0{answer}", "contains a NUL character or a lone surrogate"),
        ("\ud800{answer}", "contains a NUL character or a lone surrogate"),
    ],
)
def test_bad_templates(template: str, message: str) -> None:
    error = fault(ROW, template=template)
    assert error.field == "template"
    assert error.message.startswith(message)
    assert repr(template) in error.message
    with pytest.raises(InputError):  # no row is needed to find out
        make_task(TaskConfig(template=template), Row({}))


@given(st.text(), st.text(), st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_braces_are_doubled_and_everything_else_is_literal(before: str, after: str, value: str) -> None:
    before, after = ("".join(c for c in text if c != "\0") for text in (before, after))
    doubled = [text.replace("{", "{{").replace("}", "}}") for text in (before, after)]
    template = parse_template(f"{doubled[0]}{{f}}{doubled[1]}|{{answer}}")
    assert template.prompt({"f": value}) == f"{before}{value}{after}|"
    assert template.answer(value) == value
