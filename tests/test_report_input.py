"""The report's command: what it writes, what it refuses, what it costs; and how texts are cut."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_pages import META, random_rows, report_on, write_rows

from fastscore.cli import main
from fastscore.report import page as report_page
from fastscore.report.texts import CLAMPED, fold

ROW: dict[str, Any] = {"query": "q", "answers": ["a"], "pos": ["p"], "neg": ["n", "m"], "teacher_scores": [-1, -2, -3]}


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.err


BAD_ROWS: list[tuple[str, str]] = [
    ('{"query": "q"}', "'teacher_scores': missing; expected a list of scores: is this an output of fastscore score"),
    ('{"teacher_scores": []}', "'teacher_scores': found [], expected a list of scores"),
    ('{"teacher_scores": "-1"}', "'teacher_scores': found '-1', expected a list of scores"),
    (
        '{"pos": ["p"], "neg": ["n"], "teacher_scores": [-1]}',
        "'teacher_scores': expected 2 scores for pos + neg, found 1",
    ),
    ('{"neg": ["n"], "teacher_scores": [-1, -2]}', "'teacher_scores': expected 1 score for pos + neg, found 2"),
    ('{"history": ["h"], "teacher_scores": [-1, -2]}', "'teacher_scores': expected 1 score for history, found 2"),
    ('{"choices": ["a", "b"], "teacher_scores": [-1]}', "'teacher_scores': expected 2 scores for choices, found 1"),
    (
        '{"task": "pairs", "continuation": "c", "teacher_scores": [-1, -2]}',
        "'teacher_scores': expected 1 score for the row, found 2",
    ),
    ('{"pos": ["p"], "teacher_scores": [NaN]}', "'teacher_scores[0]': expected a finite number"),
    ('{"pos": ["p", "q"], "teacher_scores": [-1, -Infinity]}', "'teacher_scores[1]': expected a finite number"),
    (
        '{"pos": ["p"], "teacher_scores": [null]}',
        "'teacher_scores[0]': expected a finite number (at most 1e+12 in size)",
    ),
    ('{"pos": ["p"], "teacher_scores": [true]}', "'teacher_scores[0]': expected a finite number"),
    (f'{{"pos": ["p"], "teacher_scores": [-1{"0" * 400}]}}', "'teacher_scores[0]': expected a finite number"),
    ('{"pos": "p", "teacher_scores": [-1]}', "'pos': expected a list of strings, found 'p'"),
    ('{"pos": ["p"], "neg": [7], "teacher_scores": [-1, -2]}', "'neg[0]': expected a string, found 7"),
    ('{"task": "pairs", "teacher_scores": [-1]}', "'continuation': expected a string, found null"),
    ("[1]", "expected a JSON object, found a list"),
    ("{broken", "not valid JSON"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=[str(i) for i in range(len(BAD_ROWS))])
def test_a_bad_row_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, message: str
) -> None:
    path = tmp_path / "scored.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{bad}\n", encoding="utf-8")
    kept = tmp_path / "report.html"
    kept.write_text("an earlier page")
    status, err = run(capsys, path, "-o", kept)
    assert status == 2
    field = "field " if message.startswith("'") else ""
    assert err.startswith(f"fastscore: {path}:2: {field}{message}")
    assert err.count("\n") == 1
    assert kept.read_text() == "an earlier page"
    assert {item.name for item in tmp_path.iterdir()} == {"scored.jsonl", "report.html"}


BAD_META: list[tuple[Any, str]] = [
    ("{", "not valid JSON"),
    ("[]", "no rows: the file holds no record"),
    ({**META, "stats": {**META["stats"], "seconds": "long"}}, "field 'stats.seconds': expected a number of at least 0"),
    ({**META, "rows": -1}, "field 'rows': expected a number of at least 0, found -1"),
    ({**META, "stats": []}, "field 'stats': expected an object, found []"),
    ({**META, "task": {"task": "qaa"}}, "field 'task': names no task that this version knows: task must be one of qa,"),
    ({**META, "task": {"score": {"reduce": "x"}}}, "names no task that this version knows: reduce must be one of mean"),
    ({**META, "task": {"score": {"new": 1}}}, "field 'task': names no task that this version knows: "),
    ({**META, "task": {"score": {"reduce": "none"}}}, "field 'task.score.reduce': the scores are lists of tokens, and"),
]


@pytest.mark.parametrize(("meta", "message"), BAD_META, ids=[str(i) for i in range(len(BAD_META))])
def test_a_bad_description_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meta: Any, message: str
) -> None:
    path = write_rows(tmp_path / "scored.jsonl", [ROW])
    about = tmp_path / "scored.jsonl.meta.json"
    about.write_text(meta if isinstance(meta, str) else json.dumps(meta))
    status, err = run(capsys, path, "-o", tmp_path / "report.html")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"fastscore: {about}:")
    assert message in err
    assert not (tmp_path / "report.html").exists()


def test_the_page_never_replaces_what_it_is_made_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "scored.jsonl", [ROW], META)
    for output in (path, tmp_path / "scored.jsonl.meta.json"):
        before = output.read_bytes()
        status, err = run(capsys, path, "-o", output)
        assert (status, output.read_bytes()) == (2, before)
        assert "the output would replace the input" in err
    status, err = run(capsys, path, "-o", tmp_path / "nowhere" / "report.html")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be written: No such file or directory" in err
    assert run(capsys, tmp_path / "none.jsonl", "-o", tmp_path / "report.html")[0] == 2


def test_a_missing_extra_is_named_before_the_file_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = report_page.find_spec
    monkeypatch.setattr(report_page, "find_spec", lambda name: None if name == "vl_convert" else found(name))
    status, err = run(capsys, tmp_path / "none.jsonl", "-o", tmp_path / "report.html")
    assert (status, err) == (2, "fastscore: the report needs vl_convert: pip install 'fastscore[report]'\n")


def test_a_run_in_a_process_needs_no_torch(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "scored.jsonl", random_rows(5), META)
    code = (
        "import sys\nfrom fastscore.cli import main\n"
        f"try: main(['report', {str(path)!r}, '-o', {str(tmp_path / 'report.html')!r}])\n"
        "except SystemExit as stopped: print(stopped.code, sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0 []\n"
    size = (tmp_path / "report.html").stat().st_size
    assert done.stderr == f"fastscore: wrote {tmp_path / 'report.html'} ({size / 1000:,.0f} kB)\n"


@pytest.mark.slow
def test_a_large_file_costs_numbers_not_texts(tmp_path: Path) -> None:
    passage = "a passage of some length, the same in every row of this file " * 4
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom fastscore.report.page import write_report\n"
        "write_report([Path(sys.argv[1])], Path(sys.argv[1] + '.html'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for count in (1_000, 100_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as out:
            for index in range(count):
                scores = [-1 - index * 7 % 1000 / 500, *(-2 - index * step % 1000 / 400 for step in (3, 11, 13, 17))]
                row = {**ROW, "query": f"q {index}", "pos": [f"{passage}{index}"], "neg": [passage] * 4}
                out.write(json.dumps({**row, "teacher_scores": scores}) + "\n")
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
        assert f"{count:,}" in path.with_name(f"{path.name}.html").read_text(encoding="utf-8")
    # 100,000 rows of 5 candidates: 8 MB in flat arrays, some copies of which the figures need; 124 MB of text.
    assert path.stat().st_size > 120e6
    assert peaks[1] - peaks[0] < 60


def test_huge_texts_are_cut_and_long_ones_fold(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(200))
    row = {**ROW, "pos": [words], "neg": ["x" * 3_000_000, "m"], "teacher_scores": [-3, -1, -2], "query": "q" * 50_000}
    row["answers"] = ["z" * 9_000]
    page = report_on(write_rows(tmp_path / "scored.jsonl", [row]))
    assert len(page.html) < 200_000
    text = page.sections["upsets"].words
    assert "2,980,000 further characters of this text left out of the page." in text
    shown = "".join(text.split()).replace(f"…{fold(words).rest_length:,}morecharacters", "")
    assert "".join(words.split()) in shown


@pytest.mark.parametrize(
    "text",
    [
        "short",
        "word " * 500,
        "x" * 5_000,
        "👩‍🚀" * 400,
        "e\u0301" * 800,
        "🇩🇪" * 600,
        "日本語" * 400,
        "עברית ערבית " * 100,
        "a" * (CLAMPED - 30) + "\n" + "b" * 1000,
    ],
    ids=["short", "words", "one-word", "zwj", "accents", "flags", "cjk", "rtl", "line-end"],
)
def test_folding_loses_nothing_and_splits_no_drawn_character(text: str) -> None:
    folded = fold(text)
    seen, rest = ("".join(piece for piece, _ in parts) for parts in (folded.seen, folded.rest))
    assert seen + rest == text
    assert len(seen) <= max(CLAMPED, len(text) * (not rest))
    if rest:
        assert rest[0] not in "\u200d\u0301\ufe0f"
        assert seen[-1] != "\u200d"
        if " " in text:
            assert seen[-1].isspace()


@pytest.mark.parametrize(
    ("text", "answers", "marked"),
    [
        ("The Cat sat. cats, CAT!", ["cat"], ["Cat", "CAT"]),
        ("1990 and 990", ["990"], ["990"]),
        ("New York City, New York", ["York", "New York"], ["New York", "New York"]),
        ("a (b) c", ["(b)"], ["(b)"]),
        ("東京は日本の首都", ["東京"], ["東京"]),
        ("nothing", ["", "  "], []),
        ("x" * (CLAMPED - 4) + " right here " + "y " * 200, ["right here"], ["right here"]),
    ],
)
def test_answers_are_marked(text: str, answers: list[str], marked: list[str]) -> None:
    folded = fold(text, answers)
    found = [piece for piece, is_answer in [*folded.seen, *folded.rest] if is_answer]
    assert "".join(found) == "".join(marked)
    assert folded.has_answer == bool(marked)


def test_help_is_short_and_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(option in out for option in ("--output", "-o", "--cases", "SCORED"))
    assert max(map(len, out.splitlines())) <= 80


def test_the_commands_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    for name in ("examples/qa.scored.jsonl", "small.scored.jsonl", "large.scored.jsonl.gz"):
        write_rows(tmp_path / name, random_rows(3))
    commands = re.findall(r"^fastscore (report .*)$", guide, re.MULTILINE)
    pages = [Path(re.findall(r"-o (\S+)", command)[0]) for command in commands]
    assert len(commands) == 2
    for command, page in zip(commands, pages, strict=True):
        with pytest.raises(SystemExit) as stopped:
            main(shlex.split(command))
        assert stopped.value.code == 0
        assert page.is_file()
    [code] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    pages[0].unlink()
    exec(compile(code, "docs/report.md", "exec"), {})  # noqa: S102 - our own document
    assert pages[0].is_file()
