"""The reference system's script: its command line, its files and its functions."""

from __future__ import annotations

import json
import os
import pickle
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_models import make_tiny_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastscore.cli import main as fastscore_main
from fastscore.run_lm_score import collate_scores, main, process_lm_scoring

QA = {
    "query_id": 7,
    "query": " where does the river run ",
    "answers": ["  the old town"],
    "pos": ["The river runs through the old town. "],
    "neg": ["42 houses", "naïve café 👩‍🚀"],
    "task": "qa",
}
ROWS: list[dict[str, Any]] = [
    QA,
    {**QA, "query": "how many live there", "answers": ["1990 people", "many"], "task": "convsearch"},
    {**QA, "query_id": 8, "task": "icl", "answers": ["白 术"], "neg": []},
    {"query_id": 9, "query": "hi", "answers": ["Straße"], "history": ["Speaker 1: a", "b"], "task": "chat", "x": None},
    {
        "query_id": 10,
        "query": "q",
        "answers": ["a"],
        "pos": ["p"],
        "neg": ["n"],
        "task": "lrlm",
        "score_inputs": [[5, 6, 7], [300, 8]],
        "context_inputs": [9, 10],
        "query_inputs": [11],
        "answer_inputs": [12, 13],
    },
]
TEMPLATES = {
    "qa": "Knowledge: {0}\n\nQuestion: {1}\n\nAnswer: {2}",
    "convsearch": "Knowledge: {0}\n\nQuestion: {1}\n\nAnswer: {2}",
    "icl": "{0}\n{1}\n{2}",
    "chat": "{0}\nSpeaker 1: {1}\nSpeaker 2: {2}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the program's own way works only before transformers is imported, as in a process
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", add_bos=True, add_eos=True)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    try:
        main([str(argument) for argument in arguments])
        status: Any = 0
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return status, captured.err


def expected_sequences(folder: Path, rows: list[dict[str, Any]], key_max_length: int) -> list[tuple[Any, ...]]:
    """(ids, labels, query id) of every candidate, written from the reference system's description alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = {"add_special_tokens": False}
    sequences = []
    for row in rows:
        for i, key in enumerate(row.get("history") or row["pos"] + row["neg"]):
            if row["task"] == "lrlm":
                ids = row["score_inputs"][i] + row["context_inputs"] + row["query_inputs"] + row["answer_inputs"]
                count = len(row["answer_inputs"])
            else:
                answer, query = row["answers"][0], row["query"]
                key = tokenizer.decode(tokenizer(key, **plain)["input_ids"][:key_max_length])
                values = key, query, answer
                if row["task"] in ("qa", "convsearch"):
                    values = key.strip(), query.strip(), answer.strip()
                text = TEMPLATES[row["task"]].format(*values)
                ids = [tokenizer.bos_token_id, *tokenizer(text, **plain)["input_ids"]]
                count = len(tokenizer("Answer: " + answer.lstrip(" "), **plain)["input_ids"])
                count -= len(tokenizer("Answer:", **plain)["input_ids"])
            sequences.append((ids, [-100] * (len(ids) - count) + ids[-count:], row["query_id"]))
    return sequences


@torch.inference_mode()
def true_nlls(folder: Path, columns: dict[str, list[Any]]) -> list[float]:
    """What the reference system makes of the columns: the model's own mean loss over the labels, one by one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [
        float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)
        for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
    ]


def test_sequences_are_the_reference_systems(model: Path) -> None:
    process = process_lm_scoring(AutoTokenizer.from_pretrained(model), key_max_length=4)
    names = dict.fromkeys(name for row in ROWS for name in row)
    batch = {name: [row.get(name) for row in ROWS] for name in names}
    columns = process(batch, list(range(len(ROWS))))
    found = list(zip(columns["input_ids"], columns["labels"], columns["query_id"], strict=True))
    assert found == expected_sequences(model, ROWS, 4)
    assert [len(mask) for mask in columns["attention_mask"]] == [len(ids) for ids, *_ in found]
    assert {one for mask in columns["attention_mask"] for one in mask} == {1}
    alone = [process(row) for row in ROWS]
    assert {name: [v for one in alone for v in one[name]] for name in columns} == columns


def test_in_datasets_map(model: Path, tmp_path: Path) -> None:
    rows = [{**QA, "query_id": index} for index in range(5)]
    dataset = datasets.Dataset.from_list(rows)
    process = process_lm_scoring(tokenizer=AutoTokenizer.from_pretrained(model), key_max_length=512)
    options = {"remove_columns": dataset.column_names, "batched": True, "batch_size": 2, "with_indices": True}
    mapped = dataset.map(process, **options, num_proc=2, cache_file_name=str(tmp_path / "c.arrow"))
    found = list(zip(mapped["input_ids"], mapped["labels"], mapped["query_id"], strict=True))
    assert found == expected_sequences(model, rows, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": ["x"]}, "row:3: field 'history': only the chat task"),
        ({"task": "nope"}, "row:3: field 'task': expected one of qa, "),
        ({"answers": []}, "row:3: field 'answers': "),
        ({"pos": None, "neg": None}, "row:3: field 'pos': no candidates"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    process = process_lm_scoring(make_tokenizer(tmp_path))
    row = {**QA, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        process({name: [value] for name, value in row.items()}, [2])


def test_the_command_line_unchanged_in_a_terminal(model: Path, tmp_path: Path) -> None:
    (tmp_path / "qa").mkdir()
    (tmp_path / "lms").mkdir()
    (tmp_path / "lms" / "tiny").symlink_to(model)
    # The reference system counts an answer's tokens after "Answer: ", which is not what stands before it in icl: its
    # count is off wherever a space changes the tokens. "old" is the same with and without.
    rows = [{**row, "answers": ["old"]} if row["task"] == "icl" else row for row in ROWS]
    data = write_lines(tmp_path / "qa" / "dev.json", rows)
    before = data.read_bytes()
    command = (
        "--eval_data llm-embedder:qa/dev.json --model_name_or_path llm-embedder:lms/tiny --lm_dtype float --cpu "
        f"--data_root={tmp_path} --lm_batch_size=8 --padding-side left --add_position_ids False --save_name s "
        "--load_score False --key-max-length 16 --metrics mrr recall"
    )
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastscore", *command.split()],
        stderr=terminal,
        stdout=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100", "TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(controller, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            break
    os.close(controller)
    assert process.stdout is not None
    assert (process.wait(timeout=60), process.stdout.read()) == (0, b""), shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "━" in text, "no bar on a terminal"
    assert "11/11" in text
    ignored = "--lm_batch_size, --padding_side, --add_position_ids, --metrics"
    assert text.count(f"fastscore: accepted, but without meaning here: {ignored}") == 1
    assert text.count("rows have several answers: the first is scored") == 1
    assert "Loading weights" not in text

    scored_file = tmp_path / "qa" / "dev.scored.s.json"
    assert {path.name for path in data.parent.iterdir()} == {
        data.name,
        scored_file.name,
        f"{scored_file.name}.meta.json",
        f"{scored_file.name}.cache.sqlite",
    }
    assert data.read_bytes() == before
    scored = read_lines(scored_file)
    dropped = ("score_inputs", "context_inputs", "query_inputs", "answer_inputs")
    kept = [{k: v for k, v in row.items() if k not in dropped} for row in rows]
    assert [{k: v for k, v in row.items() if k != "teacher_scores"} for row in scored] == kept
    assert [list(row)[-1] for row in scored] == ["teacher_scores"] * len(rows)
    process_rows = process_lm_scoring(AutoTokenizer.from_pretrained(model), key_max_length=16)
    columns = [process_rows(row) for row in rows]
    truth = true_nlls(model, {name: [v for one in columns for v in one[name]] for name in columns[0]})
    found = [score for row in scored for score in row["teacher_scores"]]
    assert found == pytest.approx([-nll for nll in truth], abs=1e-5)


def test_collated_scores_and_what_is_saved_when_they_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**QA, "query_id": 1}, {**QA, "query_id": 1, "query": "the same id again"}, ROWS[3], ROWS[4]]
    data = write_lines(tmp_path / "d.jsonl", rows)
    ids = [1] * 6 + [9] * 2 + [10] * 2
    nlls = [0.5 + index for index in range(10)]
    scored, saved = tmp_path / "d.scored.x.jsonl", tmp_path / "d.x.pkl"
    collate_scores(str(data), "x")(torch.tensor(ids), torch.tensor(nlls))
    assert [row["teacher_scores"] for row in read_lines(scored)] == [
        [-0.5, -1.5, -2.5],
        [-3.5, -4.5, -5.5],
        [-6.5, -7.5],
        [-8.5, -9.5],
    ]
    assert "score_inputs" not in read_lines(scored)[3]
    whole = scored.read_bytes()
    scored.unlink()

    faults: list[tuple[list[Any], list[Any], str]] = [
        (ids[:-1], nlls[:-1], ":4: expected 2 scores for its candidates, only 1 are left"),
        ([*ids, 11], [*nlls, 1.0], ": 1 scores are left after its last row"),
        ([*ids[:7], 2, *ids[8:]], nlls, ":3: field 'query_id': the scores here belong to query id 2, the row's is 9"),
        (ids, [*nlls[:3], float("nan"), *nlls[4:]], ":2: expected finite numbers as scores"),
        (ids, nlls[:-1], "expected as many query ids as scores, found 10 and 9"),
    ]
    for bad_ids, bad_nlls, message in faults:
        saved.unlink(missing_ok=True)
        with pytest.raises(ValueError, match=re.escape(message)):
            collate_scores(str(data), "x")(bad_ids, bad_nlls)
        assert {path.name for path in tmp_path.iterdir()} == {data.name, saved.name}
        assert repr(pickle.loads(saved.read_bytes())) == repr((bad_ids, bad_nlls))

    # The data is mended, and the scores saved are put to it without the model.
    saved.write_bytes(pickle.dumps((ids, nlls), protocol=2))
    options = ("--save_name", "x", "--load_score", "True", "--model_name_or_path", "./no-such-model")
    status, err = run(capsys, "--eval_data", data, *options)
    assert (status, err) == (0, f"fastscore: wrote {scored}\n")
    assert scored.read_bytes() == whole
    data.write_text(data.read_text() + json.dumps(QA) + "\n")
    status, err = run(capsys, "--eval_data", data, *options)
    assert status == 2
    assert f"fastscore: {data}:5: expected 3 scores for its candidates, only 0 are left\n" in err
    assert pickle.loads(saved.read_bytes()) == (ids, nlls)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_saved_scores_that_are_no_scores_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "d.jsonl", [QA])
    saved, trap = tmp_path / "d.x.pkl", tmp_path / "trap"
    hostile = [pickle.dumps(([7], [RunsCode(trap)]), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    shapes: list[Any] = [[[7], [1.0], []], ([7], (1.0,)), ([7], ["1"]), ([True], [1.0]), ([7], [[1.0]]), 7, {}]
    damaged = [b"", b"\x80", b"not a pickle", pickle.dumps(([7], [1.0]))[:-3], b"\x80\x04Px\n.", b"cposix\nsystem\n."]
    for content in [*hostile, *map(pickle.dumps, shapes), *damaged]:
        saved.write_bytes(content)
        status, err = run(capsys, "--eval_data", data, "--save_name", "x", "--load_score")
        assert (status, err.count("\n")) == (2, 1), (content, err)
        assert err.startswith(f"fastscore: {saved}: not a file of saved scores: ")
        assert {path.name for path in tmp_path.iterdir()} == {data.name, saved.name}
    assert not trap.exists()
    saved.unlink()
    status, err = run(capsys, "--eval_data", data, "--save_name", "x", "--load_score")
    assert (status, err) == (2, f"fastscore: {saved}: no saved scores: No such file or directory\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_dat", "x"], "the following arguments are required: --eval_data"),
        (
            ["--eval_data", "d.jsonl", "--lm_batchsize", "4"],
            "unknown flag --lm_batchsize; did you mean --lm_batch_size?",
        ),
        (["--eval_data", "d.jsonl", "--cpu", "maybe"], "argument --cpu: expected True or False, found 'maybe'"),
        (
            ["--eval_data", "d.jsonl", "--key_max_length", "x"],
            "argument --key_max_length/--key-max-length: invalid int",
        ),
        (["--eval_data", "d.jsonl", "--key_max_length", "0"], "key_max_length must be a whole number of at least 1"),
        (["--eval_data", "d.jsonl", "--save_name", "a/b"], "field 'save_name': expected a part of a file name"),
        (["--eval_data", "none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["--eval_data", "d.jsonl", "--model_name_or_path", "./none"], "model './none': no such folder"),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("d.jsonl"), [QA])
    status, err = run(capsys, *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"fastscore: {message}")
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl"}


def test_the_program_itself_hands_over_and_only_when_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status, said in (
        (["--eval-data=none.json", "--bogus"], 2, "fastscore: unknown flag --bogus"),
        (["--cpu", "False", "--eval_data", "none.json"], 2, "fastscore: none.json: cannot be read"),
        (["score", "--eval_data", "none.json"], 2, "Usage: fastscore score"),
        (["--version"], 0, ""),
    ):
        with pytest.raises(SystemExit) as stopped:
            fastscore_main(arguments)
        assert stopped.value.code == status
        assert capsys.readouterr().err.startswith(said)
