"""The examples do what examples/README.md says, by its own commands, with the real SmolLM2."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from truth import alone

from fastscore.cli import main
from fastscore.model_source import resolve_model

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
MODEL = "smollm2-135m"
NAMES = ("qa", "convsearch", "icl", "chat", "lrlm", "pairs", "choices", "template")
FILES = (*NAMES, "preference")
"""The last one has no candidates and no ``teacher_scores``."""
TOKEN_FIELDS = ("score_inputs", "context_inputs", "query_inputs", "answer_inputs")

pytestmark = pytest.mark.slow


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def candidates(row: dict[str, Any]) -> list[str]:
    return row.get("history") or row.get("choices") or [*row.get("pos", []), *row.get("neg", [])] or ["the row itself"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every ``fastscore score`` command of the README was run, in fp32."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("*.scored.*"))
    commands = re.findall(r"^fastscore (score .*)$", README, flags=re.MULTILINE)
    assert len(commands) == 3
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for command in commands:
            with pytest.raises(SystemExit) as ended:
                main([*shlex.split(command), "--dtype", "fp32", "--quiet"])
            assert ended.value.code == 0, command
    return folder / "examples"


def output_of(scored: Path, name: str) -> list[dict[str, Any]]:
    return read(scored / f"{name}.scored.{MODEL}.jsonl")


def test_every_file_is_in_the_readme_and_the_other_way_round() -> None:
    table = dict(re.findall(r"^\| `(\w+)\.jsonl` \| [^|]+ \| (\d+) \|", README, flags=re.MULTILINE))
    assert set(table) == set(FILES) == {p.stem for p in EXAMPLES.glob("*.jsonl") if ".scored." not in p.name}
    assert {name: int(count) for name, count in table.items()} == {
        name: len(read(EXAMPLES / f"{name}.jsonl")) for name in FILES
    }


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_kept_and_every_candidate_is_scored(scored: Path, name: str) -> None:
    before, after = read(EXAMPLES / f"{name}.jsonl"), output_of(scored, name)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        scores = new.pop("teacher_scores")
        assert new == {field: value for field, value in old.items() if field not in TOKEN_FIELDS}
        assert list(new) == [field for field in old if field not in TOKEN_FIELDS]
        assert len(scores) == len(candidates(old))
        assert all(math.isfinite(score) and score <= 0 for score in scores)


def test_the_chosen_answer_is_likelier_token_by_token(scored: Path) -> None:
    for old, new in zip(read(EXAMPLES / "preference.jsonl"), output_of(scored, "preference"), strict=True):
        chosen, rejected = new.pop("ref_chosen_logps"), new.pop("ref_rejected_logps")
        assert new == old
        words = [len(old[name][-1]["content"].split()) for name in ("chosen", "rejected")]
        assert 0 > chosen / words[0] > rejected / words[1]


def right_ones_that_win(rows: list[dict[str, Any]]) -> int:
    def best(row: dict[str, Any]) -> int:
        return max(range(len(row["teacher_scores"])), key=row["teacher_scores"].__getitem__)

    return sum(best(row) == row["gold"] if "gold" in row else best(row) < len(row["pos"]) for row in rows)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pairs"])
def test_right_candidates_win_as_often_as_the_readme_says(scored: Path, name: str) -> None:
    said = re.search(rf"(\d+) of\s+(\d+)(?:\s+rows)? of `{name}`", README)
    assert said is not None
    rows = output_of(scored, name)
    assert (right_ones_that_win(rows), len(rows)) == (int(said[1]), int(said[2]))


def test_the_better_continuation_wins(scored: Path) -> None:
    score = {(row["pair_id"], row["good"]): row["teacher_scores"][0] for row in output_of(scored, "pairs")}
    pairs = {pair for pair, _ in score}
    assert len(score) == 2 * len(pairs) == 10
    assert all(score[pair, True] > score[pair, False] for pair in pairs)


def test_first_candidates_score_what_plain_transformers_gives_their_written_out_text(scored: Path) -> None:
    # The prompts as the reference system formats them, put together by hand.
    row = {name: read(EXAMPLES / f"{name}.jsonl")[0] for name in NAMES}
    texts = {
        "qa": (f"Knowledge: {row['qa']['pos'][0]}\n\nQuestion: {row['qa']['query']}\n\nAnswer:", " carbon dioxide"),
        "convsearch": (
            f"Knowledge: {row['convsearch']['pos'][0]}\n\nQuestion: {row['convsearch']['query']}\n\nAnswer:",
            " eighteen",
        ),
        "icl": ("Country: Chile. Capital city:\nSantiago\nCountry: Peru. Capital city:\n", "Lima"),
        "chat": (
            f"{row['chat']['history'][0]}\nSpeaker 1: {row['chat']['query']}\nSpeaker 2:",
            " He is called Biscuit.",
        ),
        "pairs": ("The keys to the old cabinet", " are on the table."),
        "choices": ("Question: What do bees make from nectar?\nAnswer:", " silk"),
        "template": (
            f"Product: hiking boots\nReview: {row['template']['pos'][0]}\nQuestion: Are they waterproof?\nAnswer:",
            " Yes, they stay dry in streams.",
        ),
    }
    from transformers import AutoTokenizer

    folder = resolve_model(MODEL).name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    # SmolLM2's tokenizer adds no token of its own and splits before a space and after a line end, so that the ids of
    # the parts are the ids of the whole. That is checked, not believed.
    pairs = {name: (ids(prompt), ids(answer)) for name, (prompt, answer) in texts.items()}
    assert {name: [*prompt, *answer] for name, (prompt, answer) in pairs.items()} == {
        name: tokenizer(prompt + answer)["input_ids"] for name, (prompt, answer) in texts.items()
    }
    lrlm = row["lrlm"]
    assert lrlm["score_inputs"] == [ids(text) for text in [*lrlm["pos"], *lrlm["neg"]]]
    assert [lrlm[f"{part}_inputs"] for part in ("context", "query", "answer")] == [
        ids(lrlm[part]) for part in ("context", "query", "answer")
    ]
    pairs["lrlm"] = ([*lrlm["score_inputs"][0], *lrlm["context_inputs"], *lrlm["query_inputs"]], lrlm["answer_inputs"])

    truth = dict(zip(pairs, alone(folder, list(pairs.values())), strict=True))
    for name in NAMES:
        found = output_of(scored, name)[0]["teacher_scores"][0]
        assert found == pytest.approx(sum(truth[name]) / len(truth[name]), abs=1e-4), name


def show(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "show.py"), *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={**env, **environment})


def test_the_table_names_the_winner_of_every_row(scored: Path) -> None:
    shown = show(*(scored / f"{name}.scored.{MODEL}.jsonl" for name in NAMES))
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = [line.rstrip() for line in shown.stdout.splitlines()]
    assert max(len(line) for line in lines if not line.endswith(".jsonl")) <= 100
    assert "\x1b" not in shown.stdout
    assert sum(line == f"{MODEL}, float32, cpu, packed" for line in lines) == len(NAMES)
    text = " ".join(shown.stdout.split())
    assert re.findall(r"best in (\d+) of (\d+) rows", text) == [
        (str(right_ones_that_win(rows)), str(len(rows)))
        for rows in (output_of(scored, name) for name in NAMES if name != "pairs")
    ]
    assert re.findall(r"(right|wrong) +choices\[(\d)\]", text) == [
        ("right" if (best := scores.index(max(scores))) == row["gold"] else "wrong", str(best))
        for row in output_of(scored, "choices")
        for scores in [row["teacher_scores"]]
    ]
    for row in output_of(scored, "qa"):
        assert all(f"{score:.2f}" in text for score in row["teacher_scores"])
    assert "tungsten" in text
    assert "himself in the mirror." in text


def test_the_table_fits_a_narrow_terminal(scored: Path) -> None:
    shown = show(scored / f"qa.scored.{MODEL}.jsonl", COLUMNS="60")
    assert shown.returncode == 0
    assert max(len(line) for line in shown.stdout.splitlines()[2:]) <= 60
    for row in output_of(scored, "qa"):
        assert all(f"{score:.2f}" in shown.stdout for score in row["teacher_scores"])


def test_the_table_of_a_file_that_was_not_scored(tmp_path: Path) -> None:
    shown = show(EXAMPLES / "qa.jsonl")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == (
        f"show.py: {EXAMPLES / 'qa.jsonl'}:1: field 'teacher_scores': "
        "expected a list of scores; is this the output of fastscore score?\n"
    )
    missing = show(tmp_path / "none.jsonl")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
