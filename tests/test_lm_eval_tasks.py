"""Whole evaluations by lm-evaluation-harness, with its own HFLM and with ours: the same results."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import datasets
import pytest
from harness import LOGIQA, ROOT, assert_same_results, choices, evaluate, hflm, instances, texts
from tiny_models import make_tiny_model
from transformers import AutoTokenizer

from fastscore import InputError
from fastscore.integrations.lm_eval import FastscoreLM

CHOICES = ROOT / "examples" / "choices.jsonl"
TURNS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
TEMPLATE = "{{ bos_token }}" + TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


@pytest.fixture(autouse=True)
def _datasets_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("lm_eval_tasks") / "llama", add_bos=True)


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """Rows as LogiQA's, in several scripts, with a question asked twice and choices of one letter."""
    rows = [
        {"context": "Question: Ποιο είναι ζώο;\nAnswer:", "choices": ["γάτα 🐈", "πέτρα", "νερό", "νύχτα"], "gold": 0},
        {"context": "A baby cat is called a ", "choices": ["kitten", "calf", "lamb", "pup"], "gold": 0},
        {"context": "A baby cat is called a ", "choices": ["kitten", "calf", "lamb", "pup"], "gold": 0},
        {"context": "白 is a colour: A. yes B. no\nAnswer:", "choices": ["A", "B", "C", "D"], "gold": 0},
        {"context": "Straße means", "choices": ["street", "straight", "strange", "naïve café"], "gold": 0},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("add_bos", [None, True, False], ids="add_bos_token={}".format)
def test_a_file_of_several_scripts(folder: Path, own_file: Path, add_bos: bool | None) -> None:
    tasks = [choices(own_file, num_fewshot=1), texts(own_file)]
    ours, theirs = (make(str(folder), add_bos_token=add_bos) for make in (FastscoreLM, hflm))
    found = evaluate(ours, tasks)
    assert_same_results(found, evaluate(theirs, tasks))
    assert {"acc,none", "acc_norm,none"} <= found["results"]["local_choices"].keys()


def test_what_was_run_is_in_the_results(folder: Path) -> None:
    options = {"pretrained": str(folder), "max_batch_tokens": 128}
    found = evaluate("fastscore", [choices(CHOICES)], model_args=options, batch_size=8, limit=2)
    config = found["config"]
    theirs = hflm(str(folder)).get_model_info()
    assert {name: config[name] for name in theirs} == theirs
    run = config["fastscore"]
    assert (run["mode"], run["dtype"], run["max_batch_tokens"]) == ("packed", "float32", 128)
    assert run["model"] == config["model_args"]["pretrained"] == str(folder)


@pytest.mark.skipif(not LOGIQA.exists(), reason="needs shared/data/logiqa_mc.jsonl")
def test_logiqa_five_shot(folder: Path) -> None:
    # 5 shots do not fit the tiny model's context: most prompts are cut on the left.
    tasks = [choices(LOGIQA, num_fewshot=5), texts(LOGIQA)]
    ours, theirs = (make(str(folder)) for make in (FastscoreLM, hflm))
    assert_same_results(evaluate(ours, tasks, limit=10), evaluate(theirs, tasks, limit=10))


@pytest.mark.slow
def test_smollm2() -> None:
    ours = FastscoreLM("smollm2-135m", dtype="float32")
    theirs = hflm(ours.scorer.model_path)
    tasks = [choices(CHOICES), texts(CHOICES)]
    assert_same_results(evaluate(ours, tasks), evaluate(theirs, tasks))
    chat: dict[str, Any] = {"apply_chat_template": True, "fewshot_as_multiturn": True, "limit": 1}
    chat["system_instruction"] = "Answer with one of the choices."
    tasks = [choices(CHOICES, num_fewshot=2)]
    found = evaluate(ours, tasks, **chat)
    assert_same_results(found, evaluate(theirs, tasks, **chat))
    prompt = found["samples"]["local_choices"][0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>system\nAnswer with one of the choices.<|im_end|>\n<|im_start|>user\n")
    assert prompt.count("<|im_start|>assistant\n") == 3


@pytest.mark.parametrize("multiturn", [True, False], ids=["multiturn", "one-turn"])
@pytest.mark.parametrize(("template", "system"), [(TEMPLATE, True), (NO_SYSTEM, False)], ids=["system", "no-system"])
def test_chat_templates(folder: Path, tmp_path: Path, template: str, system: bool, multiturn: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": str(tmp_path / "tokenizer")}
    run = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": "Be brief."}
    tasks = [choices(CHOICES, num_fewshot=2)]
    ours, theirs = (make(str(folder), **options) for make in (FastscoreLM, hflm))
    found = evaluate(ours, tasks, **run)
    assert_same_results(found, evaluate(theirs, tasks, **run))
    prompt, choice = found["samples"]["local_choices"][0]["arguments"][0]
    start = "<bos><system>Be brief.\n<user>" if system else "<bos><user>"
    assert prompt.startswith(start)
    assert prompt.count("<assistant>") == (3 if multiturn else 1)
    # The tokenizer adds BOS by itself, the template has written it: it stands there once.
    context_ids, choice_ids = ours._encode_pair(prompt, choice)
    assert (context_ids + choice_ids).count(tokenizer.bos_token_id) == 1
    assert context_ids[0] == tokenizer.bos_token_id
    assert ours.chat_template(True) == theirs.chat_template(True) == template


def test_the_harness_caches_answers(folder: Path, own_file: Path, tmp_path: Path) -> None:
    tasks = [choices(own_file), texts(own_file)]
    cache = str(tmp_path / "cache" / "answers")
    ours = FastscoreLM(str(folder))
    first = evaluate(ours, tasks, use_cache=cache, limit=1)
    scored = ours.scorer.stats.pairs
    assert scored > 0
    again = evaluate(ours, tasks, use_cache=cache, limit=1)
    assert ours.scorer.stats.pairs == scored
    assert again["samples"] == first["samples"]


def test_answers_are_cached_portion_by_portion(folder: Path, tmp_path: Path) -> None:
    # Token id 9999 is no token of the model's: the last of the sorted portions fails, and the others are kept.
    from lm_eval.api.model import CachingLM

    ours = FastscoreLM(str(folder), window_tokens=8)
    CachingLM(ours, str(tmp_path / "answers.db"))
    good = [((f"context {number}", " yes"), [number, 5, 6, 7], [8, 9]) for number in range(10, 14)]
    with pytest.raises(InputError, match="token id 9999"):
        ours._loglikelihood_tokens([(("bad", "bad"), [9999], [8]), *good])
    ours.cache_hook.dbdict.commit(blocking=True)
    with sqlite3.connect(tmp_path / "answers.db") as database:
        assert database.execute("select count(*) from unnamed").fetchone() == (4,)


def test_tasks_that_generate_are_refused(folder: Path) -> None:
    task = {**choices(CHOICES), "task": "writing", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    task |= {"doc_to_choice": None, "generation_kwargs": {"until": ["\n"]}, "metric_list": [{"metric": "bypass"}]}
    with pytest.raises(InputError, match=r"writing generates text \(generate_until\), and fastscore only scores"):
        evaluate(FastscoreLM(str(folder)), [task], limit=1)


def test_a_scorer_from_elsewhere(folder: Path) -> None:
    from fastscore import Scorer

    scorer = Scorer(str(folder), dtype="fp32")
    before = scorer.score([("The river", " runs")])[0].logprob
    ours = FastscoreLM(scorer)
    assert ours.loglikelihood(instances("loglikelihood", [("The river", " runs")]))[0][0] == pytest.approx(before)
    assert scorer.score([("The river", " runs")])[0].logprob == before
