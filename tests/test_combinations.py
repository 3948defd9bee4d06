"""Options of one kind with another: definitions of a score, chat templates, preference rows, formats and tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import ROWS, names, read_rows, run, write_rows
from test_output_formats import LRLM, TABLE_ROWS
from tiny_models import make_tiny_model
from tiny_tokenizers import CHATS
from transformers import AutoTokenizer
from truth import alone

from fastscore.config import ScoreConfig, TaskConfig
from fastscore.tokenization import PairTokenizer
from fastscore.types import Row, ScoringRequest
from fastscore.windows import read_windows

PREFERENCE = {"task": "preference", "prompt": "the river runs", "chosen": " through the town", "rejected": " café"}
KEPT = {"teacher_scores": [7], "teacher_raw": {"logprob": [[7]]}}
"""What an earlier run may have left."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template, and a tokenizer that adds BOS."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", add_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATS["plain"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def score(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def score(rows: list[Any] | Path, out: str, *arguments: str) -> Any:
        """The rows as they are written, or the table."""
        path, given = tmp_path / out, rows
        if isinstance(rows, list):
            given = write_rows(tmp_path / "in.jsonl", rows)
        status, err = run(capsys, "score", given, "-m", model, "--dtype", "fp32", "-q", "-o", path, *arguments)
        assert (status, err) == (0, "")
        return pq.read_table(path) if path.suffix == ".parquet" else read_rows(path)

    return score


def test_pairs_per_byte_through_a_chat_template(score: Any, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [{**ROWS[0], "answers": ["café"]}, {"task": "pairs", "context": "where?", "continuation": " the old town"}]
    written = score(rows, "out.jsonl", "--format", "pairs", "--chat-template", "--reduce", "byte")
    answers = ["café"] * 3 + ["the old town"]
    assert [row["answer"] for row in written] == answers, "as it is scored: no space joins it to the prompt"
    assert [(row["num_bytes"], row["num_chars"]) for row in written] == [(5, 4)] * 3 + [(12, 12)]
    keys = [*rows[0]["pos"], *rows[0]["neg"]]
    prompts = [f"Knowledge: {key}\n\nQuestion: {rows[0]['query'].strip()}\n\nAnswer:" for key in keys] + ["where?"]
    heads = [f"<bos>user\n{prompt}<eos>\nassistant\n" for prompt in prompts]
    ids = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        for texts in zip(heads, answers, strict=True)
    ]
    for row, logprobs in zip(written, alone(model, [(head, answer) for head, answer in ids]), strict=True):
        assert row["logprob"] == pytest.approx(sum(logprobs), abs=1e-5 * len(logprobs))
        assert row["score"] == pytest.approx(sum(logprobs) / len(row["answer"].encode()), abs=1e-5)
        assert row["mean_logprob"] == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-5)


def test_eos_follows_the_answer_of_the_assistant(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = TaskConfig("pairs", chat_template=True, score=ScoreConfig(append_eos=True))
    row = Row({"context": "where?", "continuation": " there"})
    (window,) = read_windows([row], config, PairTokenizer(tokenizer, len(tokenizer)), 10**6)
    (request,) = window.requests
    assert isinstance(request, ScoringRequest)
    assert tokenizer.decode(request.token_ids) == "<bos>user\nwhere?<eos>\nassistant\nthere<eos>"
    assert tokenizer.decode(request.token_ids[request.answer_start :]) == "there<eos>"


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_bge_with_raw_counts(name: str, score: Any) -> None:
    rows = [{**row, **KEPT} for row in TABLE_ROWS]
    found = score(rows, name, "--format", "bge", "--keep-raw", "--answers", "all")
    written = found.to_pylist() if isinstance(found, pa.Table) else found
    plain = score(rows, "teacher.jsonl", "--keep-raw", "--answers", "all")
    for row, teacher, before in zip(written, plain, TABLE_ROWS, strict=True):
        assert {field: row[field] for field in before} == before
        assert set(row) == {*before, "pos_scores", "neg_scores", "teacher_raw"}
        assert row["teacher_raw"] == teacher["teacher_raw"]
        counts = zip(row["teacher_raw"]["logprob"], row["teacher_raw"]["num_tokens"], strict=True)
        scores = [max(x / n for x, n in zip(*answers, strict=True)) for answers in counts]
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(scores, abs=1e-12)


def test_raw_counts_of_texts_and_of_token_ids_in_one_table(score: Any) -> None:
    rows = [{**row, **KEPT} for row in [LRLM, TABLE_ROWS[0]]]
    options = ["--keep-raw", "--baseline", "no-context"]
    table, plain = score(rows, "out.parquet", *options), score(rows, "out.jsonl", *options)
    assert table["teacher_raw"].to_pylist() == [row["teacher_raw"] for row in plain]
    assert table["teacher_raw"].to_pylist()[0]["num_bytes"] is None
    counts = pa.list_(pa.list_(pa.int64()))
    assert table.schema.field("teacher_raw").type.field("num_bytes").type == counts


def test_lists_of_tokens_in_a_table_and_as_pairs(score: Any) -> None:
    table = score(TABLE_ROWS, "out.parquet", "--reduce", "none")
    assert table.schema.field("teacher_scores").type == pa.list_(pa.list_(pa.float64()))
    lists = table["teacher_scores"].to_pylist()
    means = score(TABLE_ROWS, "means.jsonl")
    for row, tokens in zip(means, lists, strict=True):
        assert row["teacher_scores"] == pytest.approx([sum(one) / len(one) for one in tokens], abs=1e-12)
    pairs = score(TABLE_ROWS, "pairs.parquet", "--reduce", "none", "--format", "pairs")
    assert pairs["score"].to_pylist() == [tokens for row in lists for tokens in row]


def test_pairs_of_the_baseline_have_no_candidate(score: Any) -> None:
    row = {**TABLE_ROWS[0], "answers": ["the old town", "café"]}
    options = ["--baseline", "no-context", "--answers", "all", "--combine", "mean"]
    written = score([row], "out.parquet", "--format", "pairs", *options).to_pylist()
    [teacher] = score([row], "out.jsonl", *options)
    assert [found["candidate"] for found in written] == [0, 0, 1, 1, 2, 2, None, None]
    assert [found["answer"] for found in written] == [" the old town", " café"] * 4
    *candidates, baseline = (written[start : start + 2] for start in range(0, 8, 2))
    assert all(found[name] is None for found in baseline for name in ("field", "index", "score"))
    for of_candidate, expected in zip(candidates, teacher["teacher_scores"], strict=True):
        gains = [one["mean_logprob"] - other["mean_logprob"] for one, other in zip(of_candidate, baseline, strict=True)]
        assert sum(gains) / 2 == pytest.approx(expected, abs=1e-12)
        assert [found["score"] for found in of_candidate] == [expected] * 2


def test_preference_rows_as_pairs_and_in_tables(score: Any) -> None:
    rows = [{**PREFERENCE, "ref_chosen_logps": 7, "teacher_scores": [7]}]
    [sums] = score(rows, "out.jsonl")
    assert sums == {**rows[0], **{name: sums[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}}
    chosen, rejected = score(rows, "pairs.jsonl", "--format", "pairs")
    for pair, field in ((chosen, "chosen"), (rejected, "rejected")):
        assert (pair["field"], pair["index"], pair["answer"], pair["num_bytes"]) == (field, 0, None, None)
        assert pair["score"] == pair["logprob"] == sums[f"ref_{field}_logps"]
        assert pair["mean_logprob"] == pytest.approx(pair["logprob"] / pair["num_tokens"], abs=1e-12)
    table = score([PREFERENCE], "out.parquet", "--reduce", "sum")
    assert table.schema.names == [*PREFERENCE, "ref_chosen_logps", "ref_rejected_logps"]
    assert table.to_pylist() == [{name: sums[name] for name in table.schema.names}]
    mixed = score([TABLE_ROWS[0], PREFERENCE], "mixed.parquet").to_pylist()
    assert (mixed[0]["ref_chosen_logps"], mixed[1]["teacher_scores"]) == (None, None)
    assert mixed[1]["ref_chosen_logps"] == pytest.approx(sums["ref_chosen_logps"], abs=1e-5)
    assert len(mixed[0]["teacher_scores"]) == 3


def test_distributions_from_parquet_to_parquet(score: Any, tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{**row, "teacher_scores": [1]} for row in TABLE_ROWS]), tmp_path / "in.parquet"
    )
    table = score(tmp_path / "in.parquet", "out.parquet", "--normalize", "softmax", "--temperature", "0.5")
    assert table.schema.field("teacher_scores").type == pa.list_(pa.float64())
    assert table.drop_columns(["teacher_scores"]).to_pylist() == TABLE_ROWS
    for shares, row in zip(table["teacher_scores"].to_pylist(), score(TABLE_ROWS, "plain.jsonl"), strict=True):
        weights = [math.exp(value / 0.5) for value in row["teacher_scores"]]
        assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-4)
        assert sum(shares) == pytest.approx(1, abs=1e-12)


QA = TABLE_ROWS[0]
NO_LISTS = "takes one number for each candidate, and reduce none gives a list of tokens"
REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "bge-tokens": (QA, ["--format", "bge", "--reduce", "none"], f"format bge {NO_LISTS}"),
    "texts-tokens": (QA, ["--format", "sentence-transformers", "--reduce", "none"], NO_LISTS),
    "lists-tokens": (QA, ["--format", "sentence-transformers-lists", "--reduce", "none"], NO_LISTS),
    "texts-raw": (QA, ["--format", "sentence-transformers-triplets", "--keep-raw"], "no place for keep_raw"),
    **{
        f"preference-{name}": (PREFERENCE, ["--format", name], f"in.jsonl:1: field 'task': --format {name} needs cand")
        for name in ("bge", "sentence-transformers", "sentence-transformers-triplets", "sentence-transformers-lists")
    },
    **{
        f"preference{'-'.join(option)}": (PREFERENCE, option, f"field 'task': the task 'preference' has no {said}")
        for option in (
            ["--target", "query"],
            ["--reduce", "byte"],
            ["--reduce", "none"],
            ["--baseline", "no-context"],
            ["--normalize", "softmax"],
            ["--append-eos"],
            ["--keep-raw"],
        )
        for said in [" ".join(option)]
    },
    "preference-chat": (PREFERENCE, ["--chat-template"], "chat_template is not for preference"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_is_loaded(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, arguments, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    write_rows(Path("in.jsonl"), [row])
    status, err = run(capsys, "score", "in.jsonl", "-m", "nowhere", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert names(tmp_path) == {"in.jsonl"}
