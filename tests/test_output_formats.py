"""What ``--format`` writes, from the command line to the file; every score comes from a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import ROWS, names, read_rows, run, write_rows
from tiny_models import make_tiny_model
from truth import alone

# A column of a table has one type, and "extra" has two.
TABLE_ROWS = [{name: value for name, value in row.items() if name != "extra"} for row in ROWS]
CHOICE = {"query_id": "c", "context": "The river runs through", "choices": ["the town", " a café "], "task": "choices"}
LRLM = {
    "task": "lrlm",
    "query_inputs": [5],
    "answer_inputs": [6, 7],
    "context_inputs": [],
    "score_inputs": [[8], [9, 10]],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def score(capsys: pytest.CaptureFixture[str], model: Path, rows: list[Any], out: Path, *arguments: str | Path) -> None:
    given = write_rows(out.with_name("in.jsonl"), rows)
    status, err = run(capsys, "score", given, "-m", model, "--dtype", "fp32", "-o", out, *arguments)
    assert (status, err.partition("failed")[1]) == (0, "")


def teacher(capsys: pytest.CaptureFixture[str], model: Path, rows: list[Any], folder: Path) -> list[list[float]]:
    score(capsys, model, rows, folder / "teacher.jsonl", "-q")
    return [row["teacher_scores"] for row in read_rows(folder / "teacher.jsonl")]


def test_bge(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = {"teacher_scores": [7], "pos_scores": [8]}
    rows = [{**row, **stale, "pos": row["pos"] * (1 + index)} for index, row in enumerate(ROWS)]
    scores = teacher(capsys, model, rows, tmp_path)
    score(capsys, model, rows, tmp_path / "out.jsonl", "--format", "bge")
    written = read_rows(tmp_path / "out.jsonl")
    for row, before, expected in zip(written, rows, scores, strict=True):
        assert row["pos_scores"] == pytest.approx(expected[: len(before["pos"])], abs=1e-5)
        assert row["neg_scores"] == pytest.approx(expected[len(before["pos"]) :], abs=1e-5)
        assert {name: row[name] for name in ROWS[0]} == {name: before[name] for name in ROWS[0]}
        assert set(row) == {*ROWS[0], "pos_scores", "neg_scores"}
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["format"] == {"name": "bge"}
    status, err = run(capsys, "report", tmp_path / "out.jsonl", "-o", tmp_path / "page.html")
    assert (status, err.partition("wrote")[1]) == (0, "wrote")


def test_one_row_a_positive(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "pos": [*row["pos"], "Another."][: 1 + index % 2]} for index, row in enumerate(ROWS)]
    scores = teacher(capsys, model, rows, tmp_path)
    expected = [
        {
            "query": row["query"],
            "positive": positive,
            "negative_1": row["neg"][0],
            "negative_2": row["neg"][1],
            "label": pytest.approx([of_row[index], *of_row[len(row["pos"]) :]], abs=1e-5),
        }
        for row, of_row in zip(rows, scores, strict=True)
        for index, positive in enumerate(row["pos"])
    ]
    score(capsys, model, rows, tmp_path / "out.parquet", "--format", "sentence-transformers")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == expected
    meta = json.loads((tmp_path / "out.parquet.meta.json").read_text())
    assert meta["format"] == {"name": "sentence-transformers", "negatives": 2}
    score(capsys, model, rows, tmp_path / "one.jsonl", "--format", "sentence-transformers", "--negatives", "1")
    assert [(list(row), len(row["label"])) for row in read_rows(tmp_path / "one.jsonl")] == [
        (["query", "positive", "negative", "label"], 2)
    ] * 6


def test_triplets_and_lists_take_any_number(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "pos": row["pos"] * 2, "neg": row["neg"][: 1 + index % 2]} for index, row in enumerate(ROWS)]
    scores = teacher(capsys, model, rows, tmp_path)
    score(capsys, model, rows, tmp_path / "out.arrow", "--format", "sentence-transformers-triplets")
    written = pa.ipc.open_stream((tmp_path / "out.arrow").read_bytes()).read_all().to_pylist()
    assert written == [
        {
            "query": row["query"],
            "positive": row["pos"][p],
            "negative": row["neg"][n],
            "label": pytest.approx([of_row[p], of_row[2 + n]], abs=1e-5),
        }
        for row, of_row in zip(rows, scores, strict=True)
        for p in range(2)
        for n in range(len(row["neg"]))
    ]
    chat = {"query": "q", "answers": ["the old town"], "history": ["one", "two"], "task": "chat"}
    score(capsys, model, [*rows, chat], tmp_path / "out.jsonl", "--format", "sentence-transformers-lists")
    written = read_rows(tmp_path / "out.jsonl")
    assert [row["docs"] for row in written] == [*(row["pos"] + row["neg"] for row in rows), ["one", "two"]]
    assert [len(row["labels"]) for row in written] == [3, 4, 3, 4, 2]
    assert written[1]["labels"] == pytest.approx(scores[1], abs=1e-5)
    assert {tuple(row) for row in written} == {("query", "docs", "labels")}


def test_one_row_a_pair(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qa = {**ROWS[3], "answers": ["café", "the old town"], "query_id": 3}
    rows = [{**CHOICE, "query_id": 1}, LRLM, qa]
    out = tmp_path / "out.parquet"
    score(capsys, model, rows, out, "--format", "pairs", "--answers", "all")
    table = pq.read_table(out)
    written = table.to_pylist()
    assert [(row["query_id"], row["row"], row["candidate"], row["field"], row["index"]) for row in written] == [
        (1, 1, 0, "choices", 0),
        (1, 1, 1, "choices", 1),
        (None, 2, 0, "score_inputs", 0),
        (None, 2, 1, "score_inputs", 1),
        *((3, 3, c, f, i) for c, f, i in ((0, "pos", 0), (1, "neg", 0), (2, "neg", 1)) for _ in range(2)),
    ]
    assert [(row["answer"], row["num_bytes"], row["num_chars"]) for row in written] == [
        (" the town", 9, 9),
        (" a café ", 9, 8),
        (None, None, None),
        (None, None, None),
        *[(" café", 6, 5), (" the old town", 13, 13)] * 3,
    ]
    assert {row["file"] for row in written} == {str(tmp_path / "in.jsonl")}
    expected = alone(model, [([8, 5], [6, 7]), ([9, 10, 5], [6, 7])])
    for row, logprobs in zip(written[2:4], expected, strict=True):
        assert row["num_tokens"] == 2
        assert row["logprob"] == pytest.approx(sum(logprobs), abs=1e-4)
        assert row["mean_logprob"] == pytest.approx(sum(logprobs) / 2, abs=1e-5)
        assert row["is_greedy"] is False
    assert table.schema.field("query_id").type == pa.int64()
    score(capsys, model, [LRLM], tmp_path / "lrlm.parquet", "--format", "pairs")
    assert pq.read_table(tmp_path / "lrlm.parquet").schema.field("num_bytes").type == pa.int64()


def test_tables_in_and_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From Parquet, rows are scored as from JSON Lines, and columns that JSON can't hold stay what they are."""
    scores = teacher(capsys, model, ROWS, tmp_path)
    table = pa.Table.from_pylist(TABLE_ROWS).append_column("blob", pa.array([b"\xff", None, b"", b"x"]))
    (tmp_path / "set").mkdir()
    pq.write_table(table.slice(0, 3), tmp_path / "set" / "a.parquet")
    pq.write_table(table.slice(3), tmp_path / "set" / "b.parquet")
    status, _ = run(capsys, "score", tmp_path / "set", "-m", model, "--dtype", "fp32", "-q")
    assert status == 0
    written = pq.read_table(tmp_path / "set.scored.tiny-llama.parquet")
    assert written.drop_columns(["teacher_scores"]).to_pylist() == table.to_pylist()
    for found, expected in zip(written["teacher_scores"].to_pylist(), scores, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    status, err = run(capsys, "score", tmp_path / "set", "-m", "nowhere", "-o", tmp_path / "out.jsonl")
    assert status == 2
    assert err == (
        f"fastscore: {tmp_path / 'set' / 'a.parquet'}: field 'blob': JSON can't hold values of type binary: "
        "write Parquet or Arrow (-o NAME.parquet)\n"
    )
    # A format that leaves the column out has nothing to refuse.
    status, _ = run(
        capsys, "score", tmp_path / "set", "-m", model, "--format", "pairs", "-o", tmp_path / "out.jsonl", "-q"
    )
    assert (status, len(read_rows(tmp_path / "out.jsonl"))) == (0, 12)
    run(capsys, "report", tmp_path / "set.scored.tiny-llama.parquet", "-o", tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()


def test_bad_rows_of_a_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*TABLE_ROWS, {**TABLE_ROWS[0], "answers": []}]
    table = pa.Table.from_pylist(rows).append_column("blob", pa.array([b"x"] * 5))
    pq.write_table(table, tmp_path / "in.parquet")
    status, err = run(capsys, "score", tmp_path / "in.parquet", "-m", "nowhere", "-o", tmp_path / "out.parquet")
    assert status == 2
    assert f"{tmp_path / 'in.parquet'}: row 5: field 'answers': expected a non-empty list of strings, found []" in err
    assert names(tmp_path) == {"in.parquet"}
    command = ["score", tmp_path / "in.parquet", "-m", model, "-o", tmp_path / "out.parquet", "--on-error", "skip"]
    status, _ = run(capsys, *command)
    assert status == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 4
    [error] = read_rows(tmp_path / "out.parquet.errors.jsonl")
    assert (error["line"], error["field"], error["row"]["blob"]) == (5, "answers", "b'x'")


def test_rows_that_a_format_cannot_take_are_skipped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ROWS[0], {**ROWS[1], "neg": []}, ROWS[2]]
    score(capsys, model, rows, tmp_path / "out.jsonl", "--format", "bge", "--on-error", "skip")
    assert [row["query_id"] for row in read_rows(tmp_path / "out.jsonl")] == [0, 2]
    [error] = read_rows(tmp_path / "out.jsonl.errors.jsonl")
    assert (error["line"], error["field"]) == (2, "neg")


ROW = TABLE_ROWS[0]
BAD: list[tuple[list[dict[str, Any]], list[str], str]] = [
    (
        [{**ROW, "neg": []}],
        ["--format", "bge"],
        "in.jsonl:1: field 'neg': --format bge needs at least one positive",
    ),
    (
        [ROW, {**ROW, "pos": None}],
        ["--format", "bge"],
        "in.jsonl:2: field 'pos': --format bge needs at least",
    ),
    ([CHOICE], ["--format", "bge"], "in.jsonl:1: field 'query': --format bge needs a string, found null"),
    (
        [ROW],
        ["--format", "bge", "--template", "{query}{answer}"],
        "field 'pos': --format bge needs at least one",
    ),
    (
        [ROW, {**ROW, "neg": ["x"]}],
        ["--format", "sentence-transformers"],
        "in.jsonl:2: field 'neg': a table has the same columns in every row: 2 negatives in the first row, 1 here",
    ),
    ([ROW], ["--format", "sentence-transformers", "--negatives", "3"], "3 negatives were asked for, 2 here"),
    (
        [ROW],
        ["--format", "sentence-transformers", "--negatives", "0"],
        "negatives must be a whole number of at",
    ),
    (
        [ROW],
        ["--format", "pairs", "--negatives", "2"],
        "negatives belongs to format sentence-transformers, not to",
    ),
    ([ROW], ["--format", "csv"], "format must be one of teacher, bge, sentence-transformers, "),
    ([CHOICE | {"query": "q"}], ["--format", "sentence-transformers-lists"], "field 'choices': --format sentence-"),
    (
        [ROW, {**ROW, "answers": "one"}],
        ["-o", "out.parquet"],
        "in.jsonl:2: field 'answers': a column of a table",
    ),
    ([ROW], ["-o", "out.parquet.gz"], "out.parquet.gz: Parquet and Arrow files are not packed once more"),
]


@pytest.mark.parametrize(("rows", "arguments", "message"), BAD, ids=[message[-40:] for *_, message in BAD])
def test_refused_before_the_model_is_loaded(
    rows: list[dict[str, Any]],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("in.jsonl"), rows)
    status, err = run(capsys, "score", "in.jsonl", "-m", "nowhere", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert names(tmp_path) == {"in.jsonl"}


@pytest.mark.parametrize("name", ["pairs", "sentence-transformers"])
def test_the_report_says_what_it_reads(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(capsys, model, ROWS, tmp_path / "out.jsonl", "--format", name)
    status, err = run(capsys, "report", tmp_path / "out.jsonl", "-o", tmp_path / "page.html")
    assert status == 2
    assert "out.jsonl:1: field 'teacher_scores': missing; expected a list of scores: is this an output of" in err
    assert "with --format teacher or bge?" in err
