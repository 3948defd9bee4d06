"""What becomes of measured figures: baselines that a slower fastscore does not pass, the README's tables, pictures."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import end_to_end  # noqa: E402
import linear  # noqa: E402
import plot  # noqa: E402
import readme_table  # noqa: E402
import regression  # noqa: E402
import startup  # noqa: E402
from compare import LIMIT  # noqa: E402
from contenders import OURS, PADDED, TUNED  # noqa: E402
from processes import Failed, run_python  # noqa: E402
from workload import EXAMPLE, read_workload  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("records") / "llama", max_position_embeddings=4096)


SLOW_TREES = """
import time
import fastscore.prefix_tree
quick = fastscore.prefix_tree.build_prefix_tree
def build_prefix_tree(*arguments, **options):
    time.sleep(0.1)
    return quick(*arguments, **options)
fastscore.prefix_tree.build_prefix_tree = build_prefix_tree
"""


@pytest.fixture(scope="module")
def run_suite(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs the planning part of ``make bench`` and gives the path of its record; ``plugin`` is loaded first."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "slow_trees.py").write_text(SLOW_TREES, "utf-8")

    def run(name: str, *plugin: str) -> Path:
        record = folder / name
        options = [*plugin, "-q", "-p", "no:cacheprovider", f"--benchmark-json={record}", "-k", "qa"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "bench/test_planning.py"],
            cwd=ROOT,
            env={**environment, "FASTSCORE_BENCH_MODEL": str(llama), "FASTSCORE_BENCH_ROUNDS": "3"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return record

    return run


@pytest.fixture(scope="module")
def record(run_suite: Callable[..., Path]) -> Path:
    return run_suite("run.json")


TREE = "planning, qa: prefix tree / trie in plain Python"
PACKS = "planning, qa: packs / trie in plain Python"


def test_a_real_regression_fails(
    record: Path, run_suite: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "baseline.json"
    options = ["--baseline", str(baseline)]
    assert regression.main(["baseline", str(record), *options]) == 0
    assert regression.main(["compare", str(record), *options]) == 0
    capsys.readouterr()
    slower = run_suite("slower.json", "-p", "slow_trees")
    assert regression.main(["compare", str(slower), *options]) == 1
    printed = capsys.readouterr()
    [line] = [line for line in printed.out.splitlines() if line.startswith(TREE)]
    assert line.split()[-1] == "WORSE"
    assert "are worse than the baseline allows" in printed.err


def changed(run: dict[str, Any], name: str, factor: float) -> dict[str, Any]:
    """The record with one ratio that many times as large."""
    other = copy.deepcopy(run)
    for benchmark in other["benchmarks"]:
        ratios = benchmark["extra_info"]["ratios"]
        if name in ratios:
            ratios[name] *= factor
    return other


def test_noise_within_the_tolerance_passes(record: Path) -> None:
    run = json.loads(record.read_text("utf-8"))
    baseline = regression.make_baseline(run)
    assert baseline["tolerance"] == 0.15
    assert set(baseline["ratios"]) == {TREE, PACKS}

    def verdicts(now: dict[str, Any], of: dict[str, Any] = baseline) -> dict[str, tuple[str, bool]]:
        return {each.name: (each.verdict, each.failed) for each in regression.compare_ratios(now, of)}

    for factor in (0.9, 1.0, 1.14):
        assert verdicts(changed(run, TREE, factor)) == {TREE: ("ok", False), PACKS: ("ok", False)}
    assert verdicts(changed(run, TREE, 1.16)) == {TREE: ("WORSE", True), PACKS: ("ok", False)}
    assert verdicts(changed(run, TREE, 0.5))[TREE] == ("better: worth a new baseline", False)

    # A ratio may have a tolerance of its own, and keeps it when the baseline is made anew.
    wide = copy.deepcopy(baseline)
    wide["ratios"][TREE]["tolerance"] = 0.4
    wide["tolerance"] = 0.2
    assert verdicts(changed(run, TREE, 1.39), wide)[TREE] == ("ok", False)
    assert verdicts(changed(run, PACKS, 1.21), wide)[PACKS] == ("WORSE", True)
    again = regression.make_baseline(changed(run, TREE, 2), wide)
    assert again["tolerance"] == 0.2
    assert again["ratios"][TREE]["tolerance"] == 0.4
    assert again["ratios"][TREE]["ratio"] == 2 * wide["ratios"][TREE]["ratio"]

    # What the baseline has and the run has not, or of another task, is no pass.
    missing = copy.deepcopy(run)
    missing["benchmarks"] = [each for each in run["benchmarks"] if TREE not in each["extra_info"]["ratios"]]
    assert verdicts(missing)[TREE] == ("not measured", True)
    other = copy.deepcopy(run)
    for each in other["benchmarks"]:
        each["extra_info"]["task"] = "another file"
    assert verdicts(other)[TREE][1]
    assert verdicts(run, regression.make_baseline(missing))[TREE] == ("not in the baseline", False)
    assert "+15%" in regression.show(regression.compare_ratios(run, baseline))


def test_a_file_that_is_no_record_is_refused(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent, empty, text = tmp_path / "absent.json", tmp_path / "empty.json", tmp_path / "text.json"
    empty.write_text("{}", "utf-8")
    text.write_text("no JSON", "utf-8")
    for run, baseline, complaint in (
        (absent, empty, f"{absent}: cannot be read"),
        (text, empty, f"{text}: cannot be read"),
        (record, empty, "the baseline has no ratios"),
        (record, absent, f"{absent}: cannot be read"),
    ):
        assert regression.main(["compare", str(run), "--baseline", str(baseline)]) == 2
        assert capsys.readouterr().err.startswith(complaint)
    assert regression.main(["baseline", str(empty), "--baseline", str(absent)]) == 2
    assert "the run has no ratios" in capsys.readouterr().err
    assert not absent.exists()


def test_the_stored_baseline_can_be_compared_with() -> None:
    if not regression.BASELINE.exists():
        pytest.skip("no baseline is stored yet: make bench-baseline")
    baseline = json.loads(regression.BASELINE.read_text("utf-8"))
    assert 0 < baseline["tolerance"] <= 0.25
    parts = {name.split(":")[0].split(",")[0] for name in baseline["ratios"]}
    assert parts == {"end to end", "shared prefixes", "planning", "CPU attention", "kernel"}


def test_the_readme_says_what_the_files_say() -> None:
    text = readme_table.README.read_text("utf-8")
    assert readme_table.rewritten(text) == text, "run: python bench/readme_table.py"
    for document, sections in readme_table.DOCUMENTS.items():
        guide = document.read_text("utf-8")
        assert readme_table.rewritten(guide, sections=sections) == guide, "run: python bench/readme_table.py"
    with pytest.raises(ValueError, match="once each"):
        readme_table.rewritten(text.replace("<!-- measured: costs -->", ""))


@pytest.fixture(scope="module")
def results(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results, measured with a tiny model."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "qa_queries", lambda tokenizer: read_workload(EXAMPLE, tokenizer, 3))
        options = ["--model", str(llama), "--dtype", "fp32", "--rounds", "2", "--peers", PADDED, TUNED]
        assert end_to_end.main([*options, "--json", str(folder / readme_table.END_TO_END["fp32"])]) == 0
    options = ["--model", str(llama), "--dtype", "fp32", "--json"]
    growth = ["--queries", "1", "--copies", "1", "3", "--layers", "1"]
    assert linear.main([*options, str(folder / readme_table.LINEAR), *growth]) == 0
    assert startup.main([*options, str(folder / readme_table.STARTUP), "--rounds", "1"]) == 0
    return folder


def test_tables_show_the_figures_of_their_files(results: Path) -> None:
    markers = "".join(f"<!-- measured: {n} -->\nold\n<!-- end of measured: {n} -->\n" for n in readme_table.SECTIONS)
    text = readme_table.rewritten(f"before\n{markers}after\n", results)
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert readme_table.rewritten(text, results) == text
    assert "Not yet measured on a GPU." in text
    assert "What sharing brings has not been measured yet" in text

    report = json.loads((results / readme_table.END_TO_END["fp32"]).read_text("utf-8"))
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in text.splitlines()) if len(cells) == 8}
    for name, values in report["contenders"].items():
        cells = rows[readme_table.MEANING.get(name, name)]
        assert cells[2].strip() == f"{values['median_seconds']:.1f}"
        assert cells[5].strip() == f"{values['useful_flop_efficiency']:.0%}"
    where = report["environment"]
    said = " ".join(text.split())
    threads = f"({where['cpu_capability']}), {where['threads']} thread"
    for fact in (where["cpu"], where["commit"][:10], where["versions"]["torch"], threads):
        assert fact in said

    growth = json.loads((results / readme_table.LINEAR).read_text("utf-8"))
    for file in growth["files"]:
        told = rf"\| {file['pairs']:,} \| {file['tokens_computed']:,} \| {file['median_seconds']:.1f} \|"
        assert re.search(told, text)


def test_growth_and_start_are_measured_in_processes_of_their_own(results: Path) -> None:
    growth = json.loads((results / readme_table.LINEAR).read_text("utf-8"))
    first, second = growth["files"]
    assert second["pairs"] == 3 * first["pairs"] > 0
    # Copies share nothing with one another: three times the tokens, but for the digits of their numbers.
    assert second["tokens_computed"] == pytest.approx(3 * first["tokens_computed"], rel=0.01)
    for file in growth["files"]:
        assert file["peak_bytes"] > 100 * 2**20
        assert file["median_seconds"] > 0.5
    start = json.loads((results / readme_table.STARTUP).read_text("utf-8"))
    median = start["median_seconds"]
    assert 0 < median[startup.NOTHING] < median[startup.HELP] < median[startup.FIRST_SCORE]
    assert sum(start["first_score_parts"].values()) < median[startup.FIRST_SCORE]
    assert linear.show(growth)
    assert startup.show(start)


def test_programs_are_measured() -> None:
    size = 50 * 2**20
    ended = run_python("-c", f"import time; block = b'x' * {size}; time.sleep(0.2); print(len(block))")
    assert ended.lines == [str(size)]
    # Not the memory of the process that these tests run in.
    assert size < ended.peak_bytes < 2 * size < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 0.2 < ended.seconds < 60
    with pytest.raises(Failed, match="ended with 3: last words"):
        run_python("-c", "print('last words'); raise SystemExit(3)")


def test_the_picture_has_a_bar_for_each(results: Path, tmp_path: Path) -> None:
    result = json.loads((results / readme_table.END_TO_END["fp32"]).read_text("utf-8"))
    [panel] = plot.plot_end_to_end(result).axes
    widths = sorted(patch.get_width() for patch in panel.patches)
    seconds = [values["median_seconds"] for values in result["contenders"].values()]
    assert widths == pytest.approx(sorted([*seconds, result["limit_seconds"]]))
    labels = [text.get_text() for text in panel.texts]
    for name in (OURS, PADDED, TUNED, LIMIT):
        assert plot.BAR_LABELS[name] in labels
    # A contender that disagreed has no time, and no bar.
    del result["contenders"][PADDED]["median_seconds"]
    [panel] = plot.plot_end_to_end(result).axes
    assert len(panel.patches) == len(widths) - 1
    picture = tmp_path / "picture.svg"
    assert plot.main(["end-to-end", str(results / readme_table.END_TO_END["fp32"]), str(picture)]) == 0
    assert "</svg>" in picture.read_text("utf-8")
