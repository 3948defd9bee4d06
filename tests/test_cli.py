"""The command line as a person meets it: exit statuses, files, and what is said."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model
from truth import alone

from fastscore import __version__
from fastscore.cli import main
from fastscore.cli_options import unescape
from fastscore.cli_score import file_safe

ROWS: list[dict[str, Any]] = [
    {
        "query_id": index,
        "query": f"where does the river run, number {index} ",
        "answers": [answer],
        "pos": [f"The river runs through {answer}."],
        "neg": ["42 houses 👩‍🚀", "naïve café, Straße"],
        "task": "qa",
        "extra": {"kept": ["白", None, 1.5]},
    }
    for index, answer in enumerate(["the old town", "Ελληνικά", "1990 people in 42 houses", "café"])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the program's own way works only before transformers is imported, as in a process
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def write_rows(path: Path, rows: list[Any]) -> Path:
    text = "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fastscore(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastscore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, stdin=subprocess.DEVNULL)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The program in this process, for the many cases that need no process of their own: (status, stderr)."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.err


def true_scores(model: Path, row: dict[str, Any]) -> list[float]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = []
    for key in row["pos"] + row["neg"]:
        prompt = f"Knowledge: {key.strip()}\n\nQuestion: {row['query'].strip()}\n\nAnswer:"
        prompt_ids, answer_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {row['answers'][0].strip()}")
        )
        assert tokenizer(f"{prompt} {row['answers'][0].strip()}")["input_ids"] == prompt_ids + answer_ids
        pairs.append((prompt_ids, answer_ids))
    return [sum(logprobs) / len(logprobs) for logprobs in alone(model, pairs)]


@pytest.mark.parametrize("command", [[], ["score"], ["bench"]], ids=" ".join)
def test_help_imports_no_model_library_and_is_quick(command: list[str]) -> None:
    code = (
        "import sys, time\n"
        "from fastscore.cli import main\n"
        f"try: main([*{command}, '--help'])\n"
        "except SystemExit as stopped: print('status', stopped.code)\n"
        "print('heavy', sorted({'torch', 'transformers', 'numpy', 'tokenizers'} & sys.modules.keys()))\n"
    )
    packages = "import time, typer, typer.rich_utils, rich.markdown\n"  # what any help of Typer's needs

    def run(code: str) -> tuple[float, str]:
        code += "print('cpu', time.process_time())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return float(done.stdout.rsplit("cpu ", 1)[1]), done.stdout

    # By turns, since machines slow down for minutes; bench/startup.py measures the half second of the clock.
    rounds = [(run(code), run(packages)) for _ in range(3)]
    out = rounds[0][0][1]
    assert f"Usage: {' '.join(['fastscore', *command])}" in out
    assert "status 0" in out
    assert "heavy []" in out
    ours, theirs = (min(seconds for seconds, _ in each) for each in zip(*rounds, strict=True))
    assert ours < max(0.5, 4 * theirs), (ours, theirs)


def test_no_arguments_show_help_and_both_programs_are_one() -> None:
    script = Path(sys.executable).with_name("fastscore")
    by_module = fastscore()
    by_script = subprocess.run([script], capture_output=True, text=True)
    assert (by_module.returncode, by_module.stdout) == (by_script.returncode, by_script.stdout)
    assert by_module.returncode == 0
    assert "doctor" in by_module.stdout
    assert fastscore("--version").stdout == f"fastscore {__version__}\n"


def test_help_of_score_names_every_option() -> None:
    done = fastscore("score", "--help")
    assert done.returncode == 0
    options = """
        --model --adapter --revision --dtype --device --device-map --trust-remote-code --attention --max-batch-tokens
        --task --template --answers --combine --seed --key-max-length --overflow --on-error --save-name --output
        --cache-dir --quiet --target --reduce --baseline --normalize --temperature --append-eos --keep-raw
    """
    for option in options.split():
        assert f" {option} " in done.stdout, option
    assert " --tensor-parallel " in done.stdout
    # bench has the same but for those about what is written.
    bench = fastscore("bench", "--help").stdout
    for option in options.replace("--save-name --output", "--seconds --max-rows --json").split():
        assert f" {option} " in bench, option
    assert "[default: smollm2-135m]" in done.stdout
    assert "fastscore score train.jsonl --task qa" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_whole_run_in_a_process(tmp_path: Path, model: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl.gz", [ROWS[0], "{broken\n", ROWS[1]])
    second = tmp_path / "second.json"
    second.write_text(json.dumps([ROWS[2], {**ROWS[3], "answers": []}, ROWS[3]], indent=1), encoding="utf-8")
    before = first.read_bytes(), second.read_bytes()
    out = write_rows(tmp_path / "out.jsonl", ["an old one"])

    done = fastscore("score", first, second, "-o", out, "-m", model, "--dtype", "fp32", "--on-error", "skip")

    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (first.read_bytes(), second.read_bytes()) == before
    beside = {f"{out.name}.{kind}" for kind in ("errors.jsonl", "meta.json", "cache.sqlite")}
    assert names(tmp_path) == {first.name, second.name, out.name, *beside}
    assert "\x1b" not in done.stderr
    assert "━" not in done.stderr, "a bar though stderr is no terminal"
    assert done.stderr.splitlines()[0] == "fastscore: cpu, fp32, packed, attention by dense"
    for said in ("positive is best", "tokens saved", "2, recorded in"):
        assert said in done.stderr

    scored = read_rows(out)
    assert [{k: v for k, v in row.items() if k != "teacher_scores"} for row in scored] == ROWS
    for row in scored:
        assert row["teacher_scores"] == pytest.approx(true_scores(model, row), abs=1e-5)

    errors = read_rows(Path(f"{out}.errors.jsonl"))
    assert [(error["path"], error["line"], error["field"]) for error in errors] == [
        (str(first), 2, None),
        (str(second), errors[1]["line"], "answers"),
    ]
    assert second.read_text(encoding="utf-8").splitlines()[errors[1]["line"] - 1].strip() == "{"
    assert errors[0]["row"] == "{broken"
    assert errors[1]["row"] == {**ROWS[3], "answers": []}
    assert errors[1]["error"] == "expected a non-empty list of strings, found []"

    meta = json.loads(Path(f"{out}.meta.json").read_text(encoding="utf-8"))
    best = sum(max(row["teacher_scores"]) == row["teacher_scores"][0] for row in scored)
    assert (meta["rows"], meta["skipped"], meta["ranked_rows"], meta["positive_best"]) == (4, 2, 4, best)
    assert (meta["stats"]["pairs"], meta["stats"]["tokens_padded"] > 0) == (12, True)
    assert (meta["fastscore"], meta["scorer"]["dtype"], meta["scorer"]["mode"]) == (__version__, "float32", "packed")
    assert meta["options"]["on_error"] == "skip"
    assert meta["task"]["key_max_length"] == 512
    assert meta["started"] <= meta["finished"]


def test_each_input_gets_its_own_output(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("a b.jsonl"), ROWS[:1])
    write_rows(Path("ü.jsonl.gz"), ROWS[1:3])
    stale = write_rows(Path("a b.scored.tiny-llama.jsonl.errors.jsonl"), ["{}\n"])
    status, err = run(capsys, "score", "a b.jsonl", "ü.jsonl.gz", "-m", model)
    assert status == 0
    assert not stale.exists(), "the errors of an earlier run stand beside a run without any"
    assert len(read_rows(Path("a b.scored.tiny-llama.jsonl"))) == 1
    with gzip.open("ü.scored.tiny-llama.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [json.loads(line)["query_id"] for line in file] == [1, 2]
    metas = [
        json.loads(Path(f"{name}.meta.json").read_text())
        for name in ("a b.scored.tiny-llama.jsonl", "ü.scored.tiny-llama.jsonl.gz")
    ]
    assert [meta["stats"]["pairs"] for meta in metas] == [3, 6], "each file's own figures"
    assert "│ pairs            │ 9 " in err


def test_templates_quiet_and_combined_answers(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [{"query": "where", "answers": ["the town", "houses"]}])
    scores = {}
    for answers, combine in (("first", "max"), ("all", "max"), ("all", "min"), ("all", "mean")):
        out = tmp_path / "o.jsonl"
        options = ("-m", model, "-o", out, "--dtype", "fp32", "--quiet", "--answers", answers, "--combine", combine)
        assert run(capsys, "score", rows, "--template", r"Q: {query}\nA: {answer}", *options) == (0, "")
        scores[answers, combine] = read_rows(out)[0]["teacher_scores"][0]
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(model).encode
    truths = alone(model, [(encode("Q: where\nA:"), encode(f" {answer}")) for answer in ("the town", "houses")])
    first, second = (sum(logprobs) / len(logprobs) for logprobs in truths)
    expected = {
        ("first", "max"): first,
        ("all", "max"): max(first, second),
        ("all", "min"): min(first, second),
        ("all", "mean"): (first + second) / 2,
    }
    assert scores == pytest.approx(expected, abs=1e-5)


def test_definitions_of_a_score(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "r.jsonl", ROWS)
    usual = ("-m", model, "--dtype", "fp32")
    options = ("--target", "query", "--reduce", "byte", "--baseline", "no-context", "--append-eos", "--keep-raw")
    softmax = ("--normalize", "softmax", "--temperature", "0.5")
    status, err = run(capsys, "score", rows, *usual, "-o", tmp_path / "o.jsonl", *options, *softmax)
    assert status == 0
    assert "positive is best" in err
    meta = json.loads((tmp_path / "o.jsonl.meta.json").read_text())
    definition = {"target": "query", "reduce": "byte", "baseline": "no-context", "append_eos": True, "keep_raw": True}
    assert meta["task"]["score"] == {**definition, "normalize": "softmax", "temperature": 0.5}
    assert meta["stats"]["pairs"] == 4 * (3 + 1)
    for row, scored in zip(ROWS, read_rows(tmp_path / "o.jsonl"), strict=True):
        raw = scored["teacher_raw"]
        num_bytes = len(f" {row['query'].strip()}".encode())
        assert raw["num_bytes"] == [[num_bytes]] * 3
        gains = [(logprob - raw["baseline_logprob"][0]) / num_bytes for [logprob] in raw["logprob"]]
        weights = [math.exp(gain / 0.5) for gain in gains]
        assert scored["teacher_scores"] == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-12)
    # A list of tokens has no order: nothing is said of the best one, in the summary or in the metadata.
    status, err = run(capsys, "score", rows, *usual, "-o", tmp_path / "t.jsonl", "--reduce", "none")
    assert (status, "positive is best" in err) == (0, False)
    meta = json.loads((tmp_path / "t.jsonl.meta.json").read_text())
    assert (meta["ranked_rows"], meta["positive_best"]) == (0, 0)
    for row, scored in zip(ROWS, read_rows(tmp_path / "t.jsonl"), strict=True):
        means = [sum(tokens) / len(tokens) for tokens in scored["teacher_scores"]]
        assert means == pytest.approx(true_scores(model, row), abs=1e-5)


BAD_ROWS = {
    "malformed": ('{"query": 1\n', "r.jsonl:5: not valid JSON: "),
    "missing-field": ({"task": "qa", "pos": ["x"], "answers": ["y"]}, "r.jsonl:5: field 'query': missing; expected "),
    "empty-answer": ({**ROWS[0], "answers": [" "]}, "r.jsonl:5: field 'answers[0]': the answer is empty"),
    "no-candidates": ({**ROWS[0], "pos": [], "neg": []}, "r.jsonl:5: field 'pos': no candidates: "),
    "unknown-task": ({**ROWS[0], "task": "a\nb"}, "r.jsonl:5: field 'task': expected one of qa, "),
    "nul": ({**ROWS[0], "query": "a\0b"}, "r.jsonl:5: field 'query': contains a NUL character"),
    "lone-surrogate": (json.dumps({**ROWS[0], "query": "a\ud800"}), "r.jsonl:5: field 'query': contains the lone surr"),
    "hostile-name": ('{"\\u001b[31m\\ud800": 1}', "r.jsonl:5: field '\\x1b[31m\\ud800': contains the lone surrogate"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_last_row_is_refused_before_the_model_is_looked_for(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, expected = BAD_ROWS[case]
    monkeypatch.chdir(tmp_path)
    rows = write_rows(Path("r.jsonl"), [*ROWS, bad])
    before = rows.read_bytes()
    status, err = run(capsys, "score", rows, "-m", "./no-such-model")
    assert status == 2
    assert err.startswith(f"fastscore: {expected}")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert rows.read_bytes() == before
    assert names(tmp_path) == {"r.jsonl"}


BAD_OPTIONS = {
    "dtype": (["--dtype", "int8"], "dtype must be one of auto, fp32, bf16, fp16; found 'int8'"),
    "answers": (["--answers", "some"], "answers must be one of first, all, sample; found 'some'"),
    "combine": (["--combine", "x"], "combine must be one of"),
    "overflow": (["--overflow", "x"], "overflow must be one of error, truncate-left"),
    "on-error": (["--on-error", "ignore"], "on_error must be one of fail, skip; found 'ignore'"),
    "task": (["--task", "QA"], "task must be one of qa, "),
    "template": (["--template", "{query.__class__} {answer}"], "field 'template': "),
    "target": (["--target", "x"], "target must be one of answer, query; found 'x'"),
    "target-template": (["--target", "query", "--template", "{key} {answer}"], "field 'template': expected {query} "),
    "target-answers": (
        ["--target", "query", "--answers", "all"],
        "target query scores the query: answers are not read",
    ),
    "temperature": (["--normalize", "softmax", "--temperature", "0"], "temperature must be a finite number above 0"),
    "reduce-none": (["--reduce", "none", "--normalize", "softmax"], "reduce none gives lists of tokens"),
    "baseline": (
        ["--template", "{query} {answer}", "--baseline", "no-context"],
        "r.jsonl:1: field 'template': a templa",
    ),
    "both": (["--task", "qa", "--template", "{answer}"], "task and template exclude each other"),
    "key-length": (["--key-max-length", "0"], "key_max_length must be a whole number of at least 1"),
    "batch": (["--max-batch-tokens", "-1"], "max_batch_tokens must be a whole number of at least 1"),
    "save-name": (["--save-name", "../x"], "field 'save_name': expected a part of a file name"),
    "model": (["-m", "./none"], "model './none': no such folder"),
    "empty-model": (["-m", ""], "model must be a name or a path; found ''"),
    "same-file": (["-o", "r.jsonl"], "r.jsonl: the output would replace the input r.jsonl"),
    "same-by-link": (["-o", "link.jsonl"], "link.jsonl: the output would replace the input r.jsonl"),
    "meta-is-input": (["-o", "m", "m.meta.json"], "m.meta.json: the output would replace the input m.meta.json"),
    "output-folder": (["-o", "folder"], "folder: cannot be written: it is a directory"),
    "output-nowhere": (["-o", "none/o.jsonl"], "none/o.jsonl: cannot be written: No such file or directory"),
    "input-missing": (["none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
    "input-twice": (["./r.jsonl", "-m", "x"], "r.scored.x.jsonl: two inputs would be written here"),
    "input-empty": (["empty.jsonl"], "empty.jsonl: no rows"),
    "input-pipe": (["pipe"], "pipe: expected a regular file"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_one_line_and_status_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, expected = BAD_OPTIONS[case]
    monkeypatch.chdir(tmp_path)
    write_rows(Path("r.jsonl"), ROWS)
    write_rows(Path("m.meta.json"), ROWS)
    Path("link.jsonl").symlink_to("r.jsonl")
    Path("folder").mkdir()
    Path("empty.jsonl").touch()
    os.mkfifo("pipe")
    before = names(tmp_path), Path("r.jsonl").read_bytes()
    status, err = run(capsys, "score", "r.jsonl", *options)
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith(f"fastscore: {expected}")
    assert (names(tmp_path), Path("r.jsonl").read_bytes()) == before


def test_usage_errors_have_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["score"], ["score", "x", "--bogus"], ["score", "x", "--seed", "one"], ["bogus"], ["--bogus"]):
        status, err = run(capsys, *arguments)
        assert status == 2, arguments
        assert "Usage: fastscore" in err


def test_bars_of_the_libraries_beneath_are_not_drawn() -> None:
    bar = "from tqdm.auto import tqdm; list(tqdm(range(3), desc='Converting'))"
    ours = f"from fastscore.terminal import Terminal\nwith Terminal().live(): {bar}"
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}  # runs in this process set it
    command = [sys.executable, "-c"]
    shown = [subprocess.run([*command, code], capture_output=True, text=True, env=env) for code in (bar, ours)]
    assert [(done.returncode, "Converting" in done.stderr) for done in shown] == [(0, True), (0, False)]


def test_what_reading_gguf_needs_is_named_with_the_command_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSCORE_CACHE", str(tmp_path / "cache"))
    from fastscore import model_source

    # As if it were not installed: transformers itself trips over any other way to hide it.
    monkeypatch.setattr(model_source, "find_spec", lambda name: None if name == "accelerate" else find_spec(name))
    status, err = run(capsys, "score", write_rows(tmp_path / "r.jsonl", ROWS))
    assert (status, err) == (
        2,
        "fastscore: reading GGUF files needs accelerate: pip install 'fastscore[gguf]'\n",
    )
    assert names(tmp_path) == {"r.jsonl"}


def test_a_hub_that_cannot_be_reached_is_told_without_its_retries(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", ROWS)
    hub = {"HF_ENDPOINT": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path / "hub")}
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    done = subprocess.run(
        [sys.executable, "-m", "fastscore", "score", str(rows), "-m", "nobody/no-such-model"],
        capture_output=True,
        text=True,
        env={**environment, **hub},
        timeout=20,  # the retries of its client alone take 23 s
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 2), done.stderr
    there, model = done.stderr.splitlines()
    assert there.startswith("fastscore: http://127.0.0.1:1 does not answer: what was fetched before is taken (")
    assert model.startswith("fastscore: model 'nobody/no-such-model' cannot be loaded: ")


def test_a_prompt_too_long_is_told_cut_or_skipped(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = {**ROWS[0], "query": "where " * 300}
    write_rows(Path("r.jsonl"), [ROWS[1], long])
    status, err = run(capsys, "score", "r.jsonl", "-m", model)
    assert status == 2
    assert re.search(r"^fastscore: r\.jsonl:2: \d+ prompt and \d+ answer tokens do not fit .* of 256 ", err)
    assert names(tmp_path) == {"r.jsonl"}

    assert run(capsys, "score", "r.jsonl", "-m", model, "-o", "cut.jsonl", "--overflow", "truncate-left")[0] == 0
    assert [len(row["teacher_scores"]) for row in read_rows(Path("cut.jsonl"))] == [3, 3]
    assert run(capsys, "score", "r.jsonl", "-m", model, "-o", "skip.jsonl", "--on-error", "skip")[0] == 0
    assert [row["query_id"] for row in read_rows(Path("skip.jsonl"))] == [1]
    assert [(e["line"], e["row"]) for e in read_rows(Path("skip.jsonl.errors.jsonl"))] == [(2, long)]


def test_nothing_is_written_when_every_row_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "r.jsonl", ["7\n", {"task": "qa"}])
    status, err = run(capsys, "score", rows, "--on-error", "skip")
    assert (status, names(tmp_path)) == (2, {"r.jsonl"})
    assert err.startswith(f"fastscore: no row can be scored; the first: {rows}:1: ")


def test_a_run_that_fails_has_status_1(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [{**ROWS[0], "pad": "x" * 200_000}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a disk that fills up
    try:
        status, err = run(capsys, "score", rows, "-m", model, "--quiet")
        monkeypatch.setenv("FASTSCORE_TRACEBACK", "1")
        with pytest.raises(SystemExit):
            main(["score", str(rows), "-m", str(model)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, err) == (1, "fastscore: failed: OSError: [Errno 27] File too large\n")
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert names(tmp_path) == {"r.jsonl", "r.scored.tiny-llama.jsonl.cache.sqlite"}


@pytest.mark.slow
def test_interrupted_runs_leave_nothing(tmp_path: Path, model: Path) -> None:
    folders = {signal.SIGINT: tmp_path / "int", signal.SIGTERM: tmp_path / "term"}
    runs = {}
    for number, folder in folders.items():
        folder.mkdir()
        # No two passages begin alike: shared prefixes would make this a matter of milliseconds.
        negs = [[f"{line} {place} {'many words ' * 25}" for place in range(40)] for line in range(300)]
        rows = write_rows(folder / "r.jsonl", [{**ROWS[0], "neg": neg} for neg in negs])
        command = [sys.executable, "-m", "fastscore", "score", str(rows), "-m", str(model)]
        runs[number] = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for number, process in runs.items():
            assert process.stderr is not None
            assert "packed" in process.stderr.readline()
            time.sleep(0.3)
            assert {path.suffix for path in folders[number].iterdir()} >= {".jsonl", ".tmp"}, "not in the midst of it"
            process.send_signal(number)
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            out, err = runs[number].communicate(timeout=60)
            assert (runs[number].returncode, out) == (status, "")
            assert err.startswith("fastscore: interrupted; ")
            assert names(folders[number]) - {"r.scored.tiny-llama.jsonl.cache.sqlite"} == {"r.jsonl"}
    finally:
        for process in runs.values():
            process.kill()


def test_escapes_and_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unescape(r"a\nb\tc\\n\d") == "a\nb\tc\\n\\d"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    expected = {
        "meta-llama/Llama-2-7b-chat-hf": "Llama-2-7b-chat-hf",
        "models/q4.gguf": "q4",
        "./a b:c/": "a_b_c",
        ".": "here",
        "..hidden": "hidden",
    }
    assert {name: file_safe(name) for name in expected} == expected
