"""Preference rows: tokens and sums are those of TRL's own DPO trainer for the same rows, and training reads them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model
from tiny_tokenizers import CHATS
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastscore import InputError, Scorer
from fastscore.chat import ChatTemplate
from fastscore.cli import main
from fastscore.config import TaskConfig
from fastscore.preference import preference_pairs, read_preference
from fastscore.tasks import validate_row
from fastscore.types import Row

TRL_SCRIPT = Path(__file__).parents[1] / "examples" / "train_dpo.py"
RIVER = "Question: where does the river run\n\nAnswer:"


def say(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = {"system": ["system", "user", "assistant"], "user": ["user", "assistant"], "assistant": ["assistant"]}
    return [{"role": roles[first][i % 3 % len(roles[first])], "content": text} for i, text in enumerate(contents)]


ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [
        {"prompt": RIVER, "chosen": " the old town", "rejected": " naïve café, 白 術 👩‍🚀"},
        {"prompt": RIVER, "chosen": " the old house", "rejected": " the old house"},
        # Tokens merge across the end of the prompt, and differently in the two.
        {"prompt": "How many peo", "chosen": "ple", "rejected": ", 42"},
        {"prompt": "<bos>two of them", "chosen": "ended<eos>", "rejected": ""},
    ],
    "text without a prompt": [
        {"chosen": f"{RIVER} the old town", "rejected": f"{RIVER} the new town"},
        {"chosen": f"{RIVER} 1990", "rejected": f"{RIVER} 1990 people"},
        {"chosen": f"{RIVER} in 1990", "rejected": f"{RIVER} in 1994"},
    ],
    "conversations": [
        {
            "prompt": say("Be kind.", "How many people live there?", first="system"),
            "chosen": say("About 1990 people, in 42 houses.", first="assistant"),
            "rejected": say("👩‍🚀 <eos> Straße", first="assistant"),
        },
        {
            "prompt": say("hi", "hello", "where does the river run"),
            "chosen": say("the old town", first="assistant"),
            "rejected": say("the old", first="assistant"),
        },
    ],
    "conversations without a prompt": [
        {"chosen": say("hi", "hello", "where?", "there"), "rejected": say("hi", "hello", "where?", "in the town")},
        {"chosen": say("hi", "hello"), "rejected": say("hi", "hello")},
    ],
}
CUT = {"text": 12, "text without a prompt": 13, "conversations": 40, "conversations without a prompt": 20}
"""Of each kind, so many tokens leave out a row or two and cut an answer of another."""


@pytest.fixture(scope="module", params=["plain", "thinking"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds BOS. With the template that thinks, an answer begins before its prompt's end."""
    path = make_tiny_model(tmp_path_factory.mktemp("models") / request.param, add_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHATS[request.param]
    tokenizer.save_pretrained(path)
    return path


def trl_dataset(folder: Path, rows: list[dict[str, Any]], max_length: int | None, output: Path) -> Any:
    """The rows as TRL's trainer has them: its tokens, and the log-probabilities that it computes itself."""
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(output),
        precompute_ref_log_probs=True,
        max_length=max_length,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list(rows)
    return DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer).train_dataset


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("kind", ROWS)
def test_tokens_and_sums_are_those_of_trl(folder: Path, tmp_path: Path, kind: str, cut: bool) -> None:
    rows, max_length = ROWS[kind], CUT[kind] if cut else None
    expected = list(trl_dataset(folder, rows, max_length, tmp_path))
    scorer = Scorer(str(folder), dtype="fp32", max_batch_tokens=64)
    chat = ChatTemplate(scorer.tokenizer)

    whole = [(row, preference_pairs(read_preference(Row(row)), chat)) for row in rows]
    if max_length is None:
        kept = whole
    else:
        kept = []
        for row, pairs in whole:
            if len(pairs[0].prompt) < max_length:
                kept.append((row, preference_pairs(read_preference(Row(row)), chat, max_length)))
                continue
            with pytest.raises(InputError, match="leaves none of the answers"):
                preference_pairs(read_preference(Row(row)), chat, max_length)
        assert len(kept) < len(whole)
        assert {len(pair.prompt) + len(pair.answer) for _, pairs in kept for pair in pairs} >= {max_length}
    assert len(kept) == len(expected) > 0
    for (row, pairs), theirs in zip(kept, expected, strict=True):
        answers = [theirs["chosen_ids"], theirs["rejected_ids"]]
        for pair, answer in zip(pairs, answers, strict=True):
            ids = [*theirs["prompt_ids"], *answer][:max_length]
            assert [*pair.prompt, *pair.answer] == ids
            assert len(pair.prompt) == len(theirs["prompt_ids"])
        before = scorer.stats.tokens_computed
        (scored,) = scorer.score_rows([row], task="preference", max_length=max_length)
        assert {name: value for name, value in scored.items() if not name.startswith("ref_")} == row
        for name, pair in zip(("chosen", "rejected"), pairs, strict=True):
            tolerance = 1e-5 * len(pair.answer)
            assert scored[f"ref_{name}_logps"] == pytest.approx(theirs[f"ref_{name}_logps"], abs=tolerance)
        # Every token of the prompt once, and of the answers what they do not share; the last ones are never inputs.
        inputs = [[*pair.prompt, *pair.answer][:-1] for pair in pairs]
        distinct = {tuple(ids[: length + 1]) for ids in inputs for length in range(len(ids))}
        assert scorer.stats.tokens_computed - before == len(distinct)


def test_training_starts_from_the_reference(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    monkeypatch.syspath_prepend(TRL_SCRIPT.parent)
    rows, scored = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS["conversations"]))
    options = ["--task", "preference", "--max-length", "64", "-m", str(folder), "--dtype", "fp32", "-q"]
    with pytest.raises(SystemExit) as ended:
        main(["score", str(rows), "-o", str(scored), *options])
    assert ended.value.code == 0
    meta = json.loads((tmp_path / "scored.jsonl.meta.json").read_text())
    assert meta["task"]["max_length"] == 64

    monkeypatch.delitem(sys.modules, "train_dpo", raising=False)
    from train_dpo import trainer

    training = trainer(scored, tmp_path / "trained", bf16=False, report_to="none", max_steps=1, logging_steps=1)
    assert training.ref_model is None
    training.train()
    (first,) = [entry for entry in training.state.log_history if "loss" in entry]
    # Before its first step the model is its own reference: both rewards are nothing, and the loss is log 2.
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)

    command = [sys.executable, str(TRL_SCRIPT), str(scored), str(tmp_path / "by the script")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "by the script").glob("checkpoint-*/model.safetensors"))


def test_tools_and_template_arguments_reach_the_template(folder: Path) -> None:
    chat = ChatTemplate(AutoTokenizer.from_pretrained(folder))
    chat.tokenizer.chat_template = "{{ tools | length }}{{ mood }}" + CHATS["plain"]
    tool = {"type": "function", "function": {"name": "f"}}
    row = {**ROWS["conversations"][1], "chat_template_kwargs": {"mood": "calm"}}
    for tools in ([tool], json.dumps([tool])):
        pair, _ = preference_pairs(read_preference(Row({**row, "tools": tools})), chat)
        assert chat.tokenizer.decode(pair.prompt).startswith("1calm<bos>user\nhi")


def fault(config: TaskConfig = TaskConfig("preference"), /, **row: Any) -> str:  # noqa: B008 - frozen
    with pytest.raises(InputError) as caught:
        validate_row(Row(row, "rows.jsonl", 7), config)
    assert str(caught.value).startswith("rows.jsonl:7: field '")
    return str(caught.value).removeprefix("rows.jsonl:7: field ")


def test_bad_rows_are_named() -> None:
    either = "a string or a list of messages"
    user, assistant = say("hi"), say("hello", first="assistant")
    assert fault(prompt="a", chosen="b") == f"'rejected': missing; expected {either}"
    assert fault(prompt=3, chosen="b", rejected="c") == f"'prompt': expected {either}, found 3"
    assert fault(prompt="a", chosen=assistant, rejected=assistant).startswith(
        "'prompt': expected a list of messages, as in 'chosen', found a string; leave it out where"
    )
    assert fault(prompt=user, chosen="b", rejected="c") == "'prompt': expected a string, found a list of 1"
    assert fault(prompt="a", chosen="b", rejected=assistant) == "'rejected': expected a string, found a list of 1"
    assert fault(prompt=[], chosen=assistant, rejected=assistant) == (
        "'prompt': expected a non-empty list of messages, found []"
    )
    assert fault(prompt=user, chosen=assistant, rejected=[{"content": "x"}]) == (
        "'rejected[0].role': expected a string, found null"
    )
    for chosen, rejected in [("a", "b"), (" a", " b"), ("", "b"), (user, assistant)]:
        assert fault(chosen=chosen, rejected=rejected) == (
            "'prompt': missing, and 'chosen' and 'rejected' have no beginning in common"
        )
    conversation = {"prompt": user, "chosen": assistant, "rejected": assistant}
    assert fault(**conversation, tools="[").startswith("'tools': not valid JSON: ")
    assert fault(**conversation, tools={}) == "'tools': expected a list, found an object"
    assert fault(**conversation, chat_template_kwargs=[]) == "'chat_template_kwargs': expected an object, found []"
    for name in ("chat_template", "messages", "add_generation_prompt"):
        assert fault(**conversation, chat_template_kwargs={"mood": "calm", name: "x"}) == (
            f"'chat_template_kwargs': {name!r} is no variable of a chat template, and not for a row to say"
        )
    assert "NUL" in fault(prompt="a", chosen="b\0", rejected="c")
    assert fault(TaskConfig(chat_template=True), task="preference", prompt="a", chosen="b", rejected="c") == (
        "'task': chat_template is not for preference: its conversations go through the template by themselves"
    )


def test_what_the_tokenizer_cannot_do_is_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")  # adds no BOS, has no template
    scorer = Scorer(str(folder), dtype="fp32")

    def problem(row: dict[str, Any], **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            scorer.score_rows([{"task": "preference", **row}], **options)
        return str(caught.value)

    assert problem(ROWS["conversations"][0]) == "1: the model's tokenizer has no chat template"
    assert problem({"prompt": "", "chosen": "a", "rejected": "b"}) == (
        "1: field 'prompt': makes no token that the answers could follow (this tokenizer adds no BOS token)"
    )
    assert problem({"prompt": "abc", "chosen": "a", "rejected": "b"}, max_length=2) == (
        "1: field 'prompt': has 3 tokens: max_length 2 leaves none of the answers"
    )
    scorer.tokenizer.eos_token = None
    assert problem({"prompt": "a", "chosen": "b", "rejected": "c"}) == (
        "1: the model's tokenizer has no EOS token, which ends an answer in plain text"
    )
    assert "_model" not in vars(scorer)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    scorer = Scorer(str(make_tiny_model(tmp_path / "t5", "t5")), dtype="fp32")
    with pytest.raises(InputError, match="needs a causal model"):
        scorer.score_rows(ROWS["text"], task="preference")


def test_max_length_is_for_this_task_only() -> None:
    for options in ({"task": "qa"}, {"template": "{answer}"}):
        with pytest.raises(ValueError, match="max_length belongs to the task preference"):
            TaskConfig(**options, max_length=5)
    with pytest.raises(ValueError, match="max_length must be a whole number"):
        TaskConfig("preference", max_length=0)
