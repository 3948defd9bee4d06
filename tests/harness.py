"""lm-evaluation-harness in tests: requests, tasks over local files, and its own HFLM, which is the truth here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, _index

ROOT = Path(__file__).resolve().parent.parent
LOGIQA = ROOT.parent / "shared" / "data" / "logiqa_mc.jsonl"
NATS_PER_TOKEN = 1e-5


OWN_TASKS = Path(lm_eval.tasks.__file__).parent
load_yaml = _index.load_yaml


def read_own_tasks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness reads thousands of task files of its own, ten seconds long, at every command."""
    monkeypatch.setattr(_index, "load_yaml", _load_once)


def _load_once(path: Path, **options: Any) -> Any:
    return copy.deepcopy(_loaded(path, **options)) if OWN_TASKS in path.parents else load_yaml(path, **options)


@cache
def _loaded(path: Path, **options: Any) -> Any:
    return load_yaml(path, **options)


def hflm(model: Any, **options: Any) -> HFLM:
    """The harness's own model in fp32: a folder, or a transformers model (then its dtype)."""
    return HFLM(pretrained=model, **{"device": "cpu", "dtype": "float32", "batch_size": 4, **options})


def instances(kind: str, arguments: Sequence[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def choices(path: Path, **options: Any) -> dict[str, Any]:
    """A multiple-choice task over rows of ``context``, ``choices`` and ``gold``."""
    return {
        **_task("local_choices", path, options),
        "output_type": "multiple_choice",
        "fewshot_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def texts(path: Path, **options: Any) -> dict[str, Any]:
    """Perplexity of the whole of each row's ``context``."""
    return {
        **_task("local_texts", path, options),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    }


def _task(name: str, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return {"task": name, **files, "metadata": {"version": 1.0}, **options}


def evaluate(model: Any, tasks: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """What the harness finds: its results with every sample."""
    found = simple_evaluate(
        model=model,
        tasks=[dict(task) for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    return found


def assert_same_results(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal accuracies, perplexities to 1e-4, and every answer of the model within the tolerance of its tokens."""
    assert ours["results"].keys() == theirs["results"].keys()
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if name.startswith("acc"):
                assert ours["results"][task][name] == value, (task, name)
            elif isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            assert mine["doc_hash"] == other["doc_hash"]
            for args, (got,), (expected,) in zip(mine["arguments"], mine["resps"], other["resps"], strict=True):
                longest = len(str(args[-1]).encode()) + 1  # no tokenizer here makes more tokens than bytes
                if isinstance(expected, float):
                    assert got == pytest.approx(expected, abs=NATS_PER_TOKEN * longest)
                else:
                    assert got[0] == pytest.approx(expected[0], abs=NATS_PER_TOKEN * longest)
                    assert got[1] == expected[1]
