"""``fastscore bench``: its counts against a run's, its time against a run's, its errors those of ``score``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_cli import BAD_OPTIONS, BAD_ROWS, ROWS, names, read_rows, write_rows
from tiny_models import make_tiny_model

from fastscore import Scorer
from fastscore.cli import main
from fastscore.cli_bench import _duration, _size

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "qa.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.out, captured.err


def bench(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    status, out, err = run(capsys, "bench", *arguments, "--json", "--quiet")
    assert (status, err if "not packed" not in err else "") == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def scored(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str | Path) -> dict[str, Any]:
    """The statistics of a real run."""
    out = folder / "scored.jsonl"
    assert run(capsys, "score", *arguments, "-o", out, "--quiet")[0] == 0
    stats: dict[str, Any] = read_rows(Path(f"{out}.meta.json"))[0]["stats"]
    return stats


def many_rows(count: int) -> list[dict[str, Any]]:
    return [{**ROWS[i % 4], "query": f"where is {i} of the {i * i} houses"} for i in range(count)]


@pytest.mark.slow
@pytest.mark.usefixtures("model")  # it silences progress bars
def test_counts_and_time_of_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A third of the packs or more is measured; both runs take turns with whatever else the machine does."""
    rows = tmp_path / "r.jsonl"
    rows.write_text("\n".join(EXAMPLES.read_text(encoding="utf-8").splitlines()[:2]))
    options = (rows, "--max-batch-tokens", "128", "--dtype", "fp32")
    before = scored(capsys, tmp_path, *options)
    found = bench(capsys, *options, "--seconds", str(before["seconds"] / 3))
    after = scored(capsys, tmp_path, *options)
    for name in ("pairs", "tokens_computed", "answer_tokens"):
        assert found[name] == before[name], name
    assert found["tokens"] == before["tokens_unpadded"]
    assert 1 <= found["sample"]["packs"] <= found["sample"]["of_packs"]
    real = sorted((before["seconds"], after["seconds"]))
    assert real[0] / 2 < found["seconds"]["model"] < real[1] * 2
    assert found["seconds"]["total"] > found["seconds"]["model"]
    scorer = Scorer("smollm2-135m", dtype="fp32")
    weights = sum(p.numel() * p.element_size() for p in scorer.load().model.parameters())
    assert weights <= found["memory_bytes"]["weights"] < 1.01 * weights
    assert found["memory_bytes"]["peak"] > weights


@pytest.mark.parametrize("window", ["100", "4000000"])
@pytest.mark.parametrize("family", ["llama", "bloom", "t5"])
def test_counts_are_those_of_a_run(
    family: str, window: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model if family == "llama" else make_tiny_model(tmp_path / family, family, add_eos=family == "t5")
    rows = write_rows(tmp_path / "r.jsonl.gz", [*many_rows(20), "{broken\n", {**ROWS[0], "answers": []}])
    options = (rows, "-m", folder, "--window-tokens", window, "--max-batch-tokens", "200", "--on-error", "skip")
    found = bench(capsys, *options)
    stats = scored(capsys, tmp_path, *options)
    for name in ("pairs", "tokens_computed", "answer_tokens"):
        assert found[name] == stats[name], name
    assert found["tokens"] == stats["tokens_unpadded"]
    assert found["read"] == {"rows": 20, "pairs": 60, "bad_rows": 2}
    assert found["sample"]["packs"] == found["sample"]["of_packs"], "so little is measured whole"
    speed = found["tokens_per_second"]
    assert found["tokens_per_second_bounds"] == pytest.approx([speed, speed])
    assert found["mode"] == {"llama": "packed", "bloom": "padded", "t5": "encoder-decoder"}[family]


def test_counts_of_another_definition(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "r.jsonl", many_rows(5))
    definition = ("--target", "query", "--baseline", "no-context", "--append-eos", "--normalize", "softmax")
    found = bench(capsys, rows, "-m", model, *definition)
    stats = scored(capsys, tmp_path, rows, "-m", model, *definition)
    assert found["pairs"] == stats["pairs"] == 5 * (3 + 1)
    assert (found["answer_tokens"], found["tokens"]) == (stats["answer_tokens"], stats["tokens_unpadded"])


def test_a_part_stands_for_the_whole(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "r.jsonl", many_rows(60))
    options = (rows, "-m", model, "--max-batch-tokens", "100")
    whole, part = bench(capsys, *options), bench(capsys, *options, "--max-rows", "20", "--seconds", "0.001")
    assert part["read"] == {"rows": 20, "pairs": 60, "bad_rows": 0}
    assert (part["pairs"], part["sample"]["packs"]) == (whole["pairs"], 1) == (180, 1)
    assert part["tokens"] == pytest.approx(whole["tokens"], rel=0.1)
    assert part["tokens_computed"] == pytest.approx(whole["tokens_computed"], rel=0.1)
    assert part["tokens_per_second_bounds"] is None
    assert part["seconds"]["model"] == pytest.approx(part["tokens_computed"] / part["tokens_per_second"], rel=0.01)
    assert bench(capsys, *options, "--max-rows", "60")["tokens"] == whole["tokens"]


def test_what_it_shows(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "r.jsonl", many_rows(30))
    options = ("bench", rows, "-m", model, "--max-batch-tokens", "100", "--dtype", "fp32")
    status, out, err = run(capsys, *options)
    assert (status, err) == (0, "fastscore: cpu, fp32, packed, attention by dense\n")
    for said in ("float32", "90", "tokens/s", "weights 0.", "peak of the process", "about "):
        assert said in out
    assert "too few packs" in run(capsys, *options, "--seconds", "0.0001")[1]
    assert names(tmp_path) == {"r.jsonl"}, "nothing is written"


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_told_as_score_tells_them(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(Path("r.jsonl"), [*ROWS, BAD_ROWS[case][0]])
    assert run(capsys, "bench", rows, "-m", "./none") == run(capsys, "score", rows, "-m", "./none")


@pytest.mark.parametrize(
    "case", [case for case, (options, _) in BAD_OPTIONS.items() if not {"-o", "--save-name"} & {*options}]
)
def test_bad_options_are_told_as_score_tells_them(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if case == "input-twice":
        pytest.skip("it is an output that would be written twice")
    write_rows(Path("r.jsonl"), ROWS)
    Path("empty.jsonl").touch()
    os.mkfifo("pipe")
    options, expected = BAD_OPTIONS[case]
    status, out, err = run(capsys, "bench", "r.jsonl", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"fastscore: {expected}")
    assert err == run(capsys, "score", "r.jsonl", *options)[2]


def test_its_own_options_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "r.jsonl", ROWS)
    for options, expected in (
        (("--seconds", "0"), "seconds must be above 0; found 0.0"),
        (("--seconds", "nan"), "seconds must be above 0; found nan"),
        (("--max-rows", "0"), "max_rows must be a whole number of at least 1; found 0"),
    ):
        assert run(capsys, "bench", rows, *options) == (2, "", f"fastscore: {expected}\n")


def test_a_prompt_too_long_is_told_or_left_out(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(Path("r.jsonl"), [ROWS[1], {**ROWS[0], "query": "where " * 300}])
    status, out, err = run(capsys, "bench", rows, "-m", model, "--quiet")
    assert (status, out) == (2, "")
    assert (status, out, err) == run(capsys, "score", rows, "-m", model, "--quiet")
    assert bench(capsys, rows, "-m", model, "--on-error", "skip")["read"] == {"rows": 1, "pairs": 3, "bad_rows": 1}
    only = write_rows(Path("only.jsonl"), [{**ROWS[0], "query": "where " * 300}])
    status, _, err = run(capsys, "bench", only, "-m", model, "--on-error", "skip", "--quiet")
    assert (status, err) == (2, "fastscore: only.jsonl: no row can be scored\n")


def test_durations_and_sizes_in_words() -> None:
    said = {0.0123: "0.012 s", 9.94: "9.9 s", 9.96: "10 s", 59.4: "59 s", 90: "1.5 min", 3599: "1 h 0 min"}
    said |= {754: "13 min", 5_400: "1 h 30 min", 400_000: "4.6 days"}
    assert {seconds: _duration(seconds) for seconds in said} == said
    assert (_size(269e6), _size(5e5), _size(16.06e9)) == ("0.27 GB", "0.50 MB", "16.06 GB")
