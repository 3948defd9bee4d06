"""``fastscore lm-eval``: the harness's program with our model filled in."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import lm_eval.utils
import pytest
from harness import LOGIQA, ROOT, hflm, read_own_tasks_once
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tiny_models import make_tiny_model

from fastscore.cli import main

TASKS = ["examples_choices", "examples_passages"]


@pytest.fixture(autouse=True)
def _as_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At the top of the checkout, with the harness's log not yet bound to an earlier test's stderr."""
    monkeypatch.chdir(ROOT)
    read_own_tasks_once(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
    logger = logging.getLogger("lm_eval")
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers.clear()
    yield
    logger.handlers[:], logger.propagate = handlers, propagate


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["lm-eval", *arguments])
    return int(stop.value.code or 0)


def test_the_examples_as_the_harness_runs_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_model(tmp_path / "llama")
    model = ["--model_args", f"pretrained={folder}", "dtype=float32", "--batch_size", "8"]
    tasks = ["--tasks", ",".join(TASKS), "--include_path", "examples/lm_eval", "--num_fewshot", "2", "--limit", "4"]
    output = ["--output_path", str(tmp_path / "found"), "--log_samples"]
    assert run([*model, *tasks, *output]) == 0
    told = capsys.readouterr()
    assert "examples_choices" in told.out
    assert "acc_norm" in told.out
    assert "batch_size has no meaning here" in told.err
    assert "fp32, packed, attention by" in told.err

    (results,) = (tmp_path / "found").rglob("results_*.json")
    found = json.loads(results.read_text(encoding="utf-8"))
    expected = simple_evaluate(
        model=hflm(str(folder)),
        tasks=TASKS,
        task_manager=TaskManager(include_path="examples/lm_eval", include_defaults=False),
        num_fewshot=2,
        limit=4,
        bootstrap_iters=0,
    )
    for task in TASKS:
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    assert found["config"]["model"] == "fastscore"
    assert found["config"]["fastscore"]["mode"] == "packed"
    (samples,) = (tmp_path / "found").rglob("samples_examples_choices_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert [row["acc"] for row in rows] == [sample["acc"] for sample in expected["samples"]["examples_choices"]]


@pytest.mark.slow
@pytest.mark.skipif(not LOGIQA.exists(), reason="needs shared/data/logiqa_mc.jsonl")
def test_a_task_file_over_real_questions_and_a_real_model(tmp_path: Path) -> None:
    task = (ROOT / "examples" / "lm_eval" / "choices.yaml").read_text("utf-8")
    task = task.replace("examples/choices.jsonl", str(LOGIQA)).replace("examples_choices", "logiqa_local")
    (tmp_path / "logiqa_local.yaml").write_text(task, "utf-8")
    settings = {"num_fewshot": 0, "limit": 6}
    model = ["--model_args", "pretrained=smollm2-135m,dtype=float32"]
    tasks = ["--tasks", "logiqa_local", "--include_path", str(tmp_path)]
    given = [f"--{name}={value}" for name, value in settings.items()]
    assert run([*model, *tasks, *given, "--output_path", str(tmp_path / "found"), "--log_samples"]) == 0
    (results,) = (tmp_path / "found").rglob("results_*.json")
    found = json.loads(results.read_text("utf-8"))
    expected = simple_evaluate(
        model=hflm(found["config"]["fastscore"]["model_path"]),
        tasks=["logiqa_local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        **settings,
    )
    assert found["results"]["logiqa_local"]["sample_len"] == 6
    for name in ("acc,none", "acc_norm,none"):
        assert found["results"]["logiqa_local"][name] == expected["results"]["logiqa_local"][name]
    (samples,) = (tmp_path / "found").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    for row, sample in zip(rows, expected["samples"]["logiqa_local"], strict=True):
        mine = [float(answer[0]) for answer in row["filtered_resps"]]
        assert mine == pytest.approx([answer[0] for answer in sample["filtered_resps"]], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tasks", "x", "--limit", "few"], "argument --limit/-L: invalid float value: 'few'"),
        (["run", "--tasks", "x", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (
            ["--model", "hf", "--tasks", "x"],
            "--model hf: here it is fastscore; lm_eval runs the other models",
        ),
        (["--config", "nowhere.yaml"], f"Config file not found: {ROOT / 'nowhere.yaml'}"),
        (
            ["--tasks", "examples/lm_eval/choices.yaml", "--model_args", "pretrained=./nowhere"],
            "model './nowhere': no such folder",
        ),
    ],
)
def test_bad_arguments(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == f"fastscore: {complaint}"
    assert "Traceback" not in told
    assert "usage:" not in told


@pytest.mark.parametrize(
    ("command", "flag"), [("run", "--fewshot_as_multiturn"), ("ls", "subtasks"), ("validate", "TASK1,TASK2")]
)
def test_the_harness_own_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert flag in capsys.readouterr().out


def test_help_and_a_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["--help"]) == 0
    assert "pretrained=NAME" in capsys.readouterr().out
    assert run(["--tasks", "x"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fastscore: lm-eval is needed (")
    assert told.endswith("): pip install 'fastscore[lm-eval]'\n")


def test_registered_by_import() -> None:
    program = "import fastscore.integrations.lm_eval; from lm_eval.api.registry import get_model as get; "
    program += "print(get('fastscore').__name__, get('hf').__name__)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout == "FastscoreLM HFLM\n"
