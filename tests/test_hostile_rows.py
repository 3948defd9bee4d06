"""Rows, files, templates and options made to do harm: one line, a known status, nothing written elsewhere, in time."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hostile import assert_ended_well, run, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny_model

from fastscore.config import TASKS

HARMLESS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
OUTPUTS = {"out", "out.meta.json", "out.errors.jsonl"}
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -0.0])
ANY_TEXT = st.text(st.characters(), max_size=12)  # surrogates and NUL among them
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, 10**400, -1]) | NOT_FINITE | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["the town", "白 👩‍🚀", " ", "", "\u2028\u0085", "{answer}", "<eos>", "a" * 2000]
)
TOKEN_IDS = st.lists(st.integers(0, 511), min_size=1, max_size=6)
RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "query": TEXTS,
    "context": TEXTS,
    "continuation": TEXTS,
    **dict.fromkeys(("prompt", "chosen", "rejected"), TEXTS),
    "answer": TEXTS,
    **dict.fromkeys(("answers", "pos", "neg", "history", "choices"), st.lists(TEXTS, min_size=1, max_size=3)),
    **dict.fromkeys(("query_inputs", "context_inputs", "answer_inputs"), TOKEN_IDS),
    "score_inputs": st.lists(TOKEN_IDS, min_size=1, max_size=3),
    "teacher_scores": ANY_JSON,
    "query_id": ANY_JSON,
}
FIELDS = {
    "qa": ("query", "answers", "pos", "neg"),
    "convsearch": ("query", "answers", "pos"),
    "icl": ("query", "answer", "neg"),
    "chat": ("query", "answers", "history"),
    "lrlm": ("score_inputs", "context_inputs", "query_inputs", "answer_inputs"),
    "pairs": ("context", "continuation"),
    "choices": ("context", "choices"),
    "preference": ("prompt", "chosen", "rejected"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Names of models come from a random generator here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("FASTSCORE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program is run: two folders deep, so that a path that climbs out of it is seen."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def score(place: Path, data: bytes, *options: str | Path, seconds: float = 20) -> tuple[int, list[Any], list[Any]]:
    """Score the bytes as a file: the status, the rows that came out and those that were recorded as bad."""
    top = place.parent.parent
    (place / "rows").write_bytes(data)
    before = tree(top)
    ended = run("score", "rows", "-o", "out", "-q", "--no-cache", "--dtype", "fp32", *options)
    assert_ended_well(ended, (0, 2), seconds)
    after = tree(top)
    new = {name for name in after if before.get(name) != after[name]}
    allowed = {str((place / name).relative_to(top)) for name in OUTPUTS} if ended.status == 0 else set()
    assert new <= allowed, new
    assert before.keys() <= after.keys()
    rows, errors = (read(place / name) for name in ("out", "out.errors.jsonl"))
    for row in rows:
        scores = row.get("teacher_scores") or [row["ref_chosen_logps"], row["ref_rejected_logps"]]
        assert all(type(score) is float and score <= 0 for score in scores)
    for name in OUTPUTS:
        (place / name).unlink(missing_ok=True)
    return ended.status, rows, errors


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] if path.exists() else []


def lines(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@st.composite
def rows_of(draw: st.DrawFn, task: str) -> dict[str, Any]:
    """A row of the task, right in most of its fields."""
    row: dict[str, Any] = {name: draw(RIGHT[name]) for name in FIELDS[task]}
    for name in draw(st.lists(st.sampled_from([*RIGHT, "task", "", "a.b"]), max_size=2)):
        row[name] = draw(ANY_JSON if name not in RIGHT or draw(st.booleans()) else RIGHT[name])
    return row


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_every_task(task: str, model: Path, place: Path) -> None:
    @settings(HARMLESS, max_examples=10)
    @given(rows=st.lists(rows_of(task) | ANY_JSON, min_size=1, max_size=4), how=st.sampled_from(["fail", "skip"]))
    def check(rows: list[Any], how: str) -> None:
        status, scored, bad = score(place, lines(rows), "-m", model, "--task", task, "--on-error", how)
        if status == 0:
            assert len(scored) + len(bad) == len(rows)
            assert how == "skip" or not bad

    check()


@settings(HARMLESS, max_examples=40)
@given(data=st.data())
def test_bytes_that_are_no_rows(data: st.DataObject, place: Path, model: Path) -> None:
    whole = lines([{"query": "where", "answers": ["the town"], "pos": ["The old town."], "task": "qa"}] * 3)
    kinds = {
        "anything": st.binary(max_size=60),
        "cut": st.integers(1, len(whole) - 1).map(whole.__getitem__).map(lambda _: whole)
        | st.integers(1, len(whole) - 1).map(lambda at: whole[:at]),
        "patched": st.tuples(st.integers(0, len(whole)), st.binary(max_size=3)).map(
            lambda at: whole[: at[0]] + at[1] + whole[at[0] :]
        ),
        "array": st.lists(st.sampled_from([b"[", b"]", b",", b"{}", b'"', b"\\", b"1", b" ", b"\n"]), max_size=8).map(
            lambda parts: b"[" + b"".join(parts)
        ),
        "encoded": st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-7"]).map(whole.decode().encode),
        "gzip": st.integers(2, len(gzip.compress(whole))).map(lambda at: gzip.compress(whole)[:at]),
        "gzip-patched": st.tuples(st.integers(3, 40), st.binary(min_size=1, max_size=2)).map(
            lambda at: gzip.compress(whole)[: at[0]] + at[1] + gzip.compress(whole)[at[0] + len(at[1]) :]
        ),
    }
    drawn = data.draw(st.sampled_from(list(kinds)).flatmap(kinds.__getitem__))
    how = data.draw(st.sampled_from(["fail", "skip"]))
    score(place, drawn, "-m", model, "--on-error", how)


ROW = '"query": "where", "answers": ["the town"], "pos": ["The old town."], "task": "qa"'
EXTREMES = {
    "nested-lists": (b"[" * 100_000, 2),
    "nested-in-a-row": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + ROW.encode() + b"}", 2),
    "nested-objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 2),
    "nested-array": (b"[" + b"[" * 100_000 + b"]" * 100_000 + b"]", 2),
    "long-number": (b'{"x": ' + b"9" * 1_000_000 + b", " + ROW.encode() + b"}", 2),
    "long-fraction": (b'{"x": 0.' + b"9" * 1_000_000 + b", " + ROW.encode() + b"}", 0),
    "long-exponent": (b'{"x": 1e' + b"9" * 4_000 + b", " + ROW.encode() + b"}", 0),
    "not-a-number": (b'{"x": [NaN, Infinity, -Infinity], ' + ROW.encode() + b"}", 0),
    "the-same-key-twice": (b'{"query": 7, "pos": [], ' + ROW.encode() + b"}", 0),
    "many-keys": (b"{" + b", ".join(b'"k%d": %d' % (i, i) for i in range(100_000)) + b", " + ROW.encode() + b"}", 0),
    "a-long-line": (b'{"x": "' + b"x" * 20_000_000 + b'", ' + ROW.encode() + b"}", 0),
    "a-long-escaped-line": (b'{"x": "' + b"\\u00e9" * 2_000_000 + b'", ' + ROW.encode() + b"}", 0),
    "a-line-without-end": (b"x" * 20_000_000, 2),
    "backslashes": (b'["' + b"\\" * 5_000_000, 2),
    "quotes": (b"[" + b'"' * 2_000_001, 2),
    "blank": (b"\n \t\r" * 1_000_000, 2),
    "zeros": (bytes(1_000_000), 2),
    "a-gzip-of-zeros": (gzip.compress(bytes(300_000_000), 1), 2),
    "gzip-in-gzip": (gzip.compress(gzip.compress(b"{}")), 2),
    "an-empty-gzip": (gzip.compress(b""), 2),
    "byte-order-mark": (b"\xef\xbb\xbf{" + ROW.encode() + b"}", 0),
    "two-byte-order-marks": (b"\xef\xbb\xbf" * 2 + b"{" + ROW.encode() + b"}", 2),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_extremes(case: str, place: Path, model: Path) -> None:
    data, status = EXTREMES[case]
    for how in ("fail", "skip"):
        assert score(place, data, "-m", model, "--on-error", how, seconds=10)[0] == status


@HARMLESS
@given(
    template=ANY_TEXT
    | st.lists(
        st.sampled_from(["{", "}", "{{", "}}", "{key}", "{answer}", "{query}", " ", "\\n", "{query!r}", "{a.b}", "\0"])
        | st.text(max_size=3),
        max_size=6,
    ).map("".join)
)
def test_templates(template: str, place: Path, model: Path) -> None:
    row = {"query": "where", "answer": "the town", "pos": ["The old town."], "": "x", "a.b": "x"}
    status, scored, _ = score(place, lines([row]), "-m", model, f"--template={template}")
    if status == 0:
        assert template.endswith("{answer}")
        assert len(scored) == 1
    hostile = {**row, "query": template}  # what stands in a row is a text, whatever it looks like
    score(place, lines([hostile]), "-m", model, "--template", "{query} {key} {answer}")


OPTIONS = {
    **dict.fromkeys(("--dtype", "--quantize", "--device", "--attention", "--forward", "--residual"), ANY_TEXT),
    **dict.fromkeys(("--answers", "--combine", "--overflow", "--on-error", "--task", "--revision"), ANY_TEXT),
    **dict.fromkeys(("--adapter", "--model", "-m", "--device-map", "--save-name"), ANY_TEXT),
    **dict.fromkeys(("--target", "--reduce", "--baseline", "--normalize", "--format", "--system-prompt"), ANY_TEXT),
    **dict.fromkeys(
        ("--seed", "--key-max-length", "--max-batch-tokens", "--window-tokens", "--temperature", "--max-length"),
        st.integers().map(str) | st.sampled_from(["1", str(2**63), str(10**30), "1e3", "-0", "０", "0x10"]) | ANY_TEXT,
    ),
    "-o": st.sampled_from(
        ["../o", "o/../o", "none/o", ".", "..", "/", "rows", "o" * 300, "o\0", "o\n", "~", "-", "o.gz"]
    ),
    "--negatives": st.integers().map(str),
    "--cache": st.sampled_from(["../c", "none/c", ".", "/", "rows", "c" * 300, "c\0", "~", "", "c", "/dev/null"]),
}
KNOWN = {
    "--device": ["cpu", "cuda", "cuda:99", "meta", "mps", "xpu", "cpu:7", ""],
    "--device-map": ["auto", "disk", "cpu", "{}", "sequential"],
    "--dtype": ["fp16", "bf16", "auto"],
    "--answers": ["sample", "all"],
    "--combine": ["logsumexp", "min"],
    "--model": ["../x", "/etc", "/etc/passwd", "/dev/zero", "a/b", "a//b", "..", "/", "https://x.invalid/y", "x.gguf"],
    "--adapter": ["../x", "/etc", "a/b", ""],
    "--quantize": ["fp8"],
    "--attention": ["dense", "reference", "flash-attn-2"],
    "--forward": ["own", "model"],
    "--residual": ["fp32", "model"],
    "--overflow": ["truncate-left"],
    "--target": ["query"],
    "--reduce": ["sum", "none", "byte"],
    "--baseline": ["no-context"],
    "--normalize": ["softmax"],
    "--temperature": ["nan", "inf", "1e-300", "1e308", "-1", "0"],
    "--format": ["bge", "pairs", "sentence-transformers-triplets", "sentence-transformers-lists"],
    "--save-name": ["../x", "..", "a/b", "x" * 300],
}


FLAGS = ["--deterministic", "--trust-remote-code", "--allow-pickle", "--append-eos", "--keep-raw", "--no-cache"]
FLAGS += ["--chat-template", "rows"]


@settings(HARMLESS, max_examples=50)
@given(data=st.data())
def test_options(data: st.DataObject, place: Path, model: Path) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), min_size=1, max_size=3))
    arguments: list[str] = []
    for name in names:
        values = OPTIONS[name]
        if name in KNOWN and data.draw(st.booleans()):
            values = st.sampled_from(KNOWN[name])
        arguments += [name, data.draw(values)]
    arguments += data.draw(st.lists(st.sampled_from(FLAGS)))
    row = {"query": "where", "answers": ["the town", "42"], "pos": ["The old town."], "neg": ["42"], "task": "qa"}
    (place / "rows").write_bytes(lines([row]))
    top = place.parent.parent
    before = tree(top)
    ended = run("score", "rows", "-m", model, "-q", *arguments)
    assert_ended_well(ended)
    after = tree(top)
    new = {name for name in after if before.get(name) != after[name]}
    assert before.keys() <= after.keys()
    assert after["a/b/rows"] == before["a/b/rows"]
    if ended.status != 0:
        assert {name for name in new if "cache.sqlite" not in name and not name.endswith("/c")} == set()
    elif not {"-o", "--cache"} & set(names):
        assert len(new) == (2 if "--no-cache" in arguments else 3), new
        assert all(name.startswith("a/b/rows.scored.") for name in new)
    for name in new:
        (top / name).unlink()


COMMANDS = [
    "score",
    "bench",
    "report",
    "doctor",
    "cache",
    "cache info",
    "cache prune",
    "--eval_data",
    "--version",
    "-h",
]


@settings(HARMLESS, max_examples=40)
@given(
    command=st.sampled_from(COMMANDS),
    arguments=st.lists(
        st.sampled_from(["rows", "-o", "out", "--seconds", "--json", "--model_name_or_path", "--", "-"]) | ANY_TEXT,
        max_size=4,
    ),
)
def test_commands(command: str, arguments: list[str], place: Path) -> None:
    if command == "doctor" and not arguments:
        return  # it answers in many lines, and is tested elsewhere
    (place / "rows").write_bytes(lines([{"query": 7}]))
    before = tree(place.parent.parent)
    ended = run(*command.split(), *arguments)
    assert_ended_well(ended, (0, 2))
    assert tree(place.parent.parent) == before
