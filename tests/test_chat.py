"""Chat templates: prompts as transformers renders and tokenises them, one BOS, and the assistant's answer alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model
from tiny_tokenizers import CHATS, KINDS, make
from transformers import AutoTokenizer
from truth import alone

from fastscore import InputError, Scorer
from fastscore.chat import ChatTemplate, check_chat_template
from fastscore.cli import main
from fastscore.config import TaskConfig
from fastscore.tasks import expand_row
from fastscore.tokenization import PairTokenizer
from fastscore.types import Pair, Row, ScoringRequest
from fastscore.windows import read_windows

QA = {"task": "qa", "query": "where does the river run", "answers": ["the old town"]}
ROWS: list[dict[str, Any]] = [
    {**QA, "pos": ["The river runs through the old town."], "neg": ["naïve café, 白 術 👩‍🚀", "42 <eos> houses"]},
    {"task": "pairs", "context": "How many people live there?", "continuation": " About 1990 people\n"},
    {"task": "choices", "context": "Ελληνικά:", "choices": ["Straße", " 42 houses", "👩‍🚀"]},
]
SYSTEM = "Speaker 2 is kind."


def messages(prompt: Any, system: str | None = None) -> list[dict[str, str]]:
    conversation = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return [*([{"role": "system", "content": system}] if system else []), *conversation]


def written_out(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What the user asks and what the assistant answers, put together by hand."""
    if row["task"] == "qa":
        keys = [key.strip() for key in [*row["pos"], *row["neg"]]]
        return [(f"Knowledge: {key}\n\nQuestion: {row['query']}\n\nAnswer:", row["answers"][0]) for key in keys]
    answers = row.get("choices") or [row["continuation"]]
    return [(row["context"], answer.removeprefix(" ")) for answer in answers]


def requests(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> list[ScoringRequest]:
    config = TaskConfig(chat_template=True, **options)
    (window,) = read_windows([Row(row) for row in rows], config, PairTokenizer(tokenizer, len(tokenizer)), 10**6)
    return window.requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds BOS, and whose template writes it too."""
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "llama", add_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = CHATS["plain"]
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("system", [None, SYSTEM], ids=["plain", "system"])
def test_scores_are_those_of_plain_transformers(folder: Path, system: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    expected = []
    for row in ROWS:
        for prompt, answer in written_out(row):
            head = tokenizer.apply_chat_template(
                messages(prompt, system), tokenize=True, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            assert head.count(tokenizer.bos_token_id) == 1
            # The template ends with a line end, which no token of this tokenizer shares with a letter after it.
            expected.append((head, tokenizer(answer, add_special_tokens=False)["input_ids"]))
    truth = [sum(logprobs) / len(logprobs) for logprobs in alone(folder, expected)]

    scorer = Scorer(str(folder), dtype="fp32", max_batch_tokens=100)
    scored = scorer.score_rows(ROWS, chat_template=True, system_prompt=system)
    assert [score for row in scored for score in row["teacher_scores"]] == pytest.approx(truth, abs=1e-5)
    # What the template writes before the prompts is computed once.
    heads = {tuple([*head, *answer][: n + 1]) for head, answer in expected for n in range(len(head) + len(answer) - 1)}
    assert scorer.stats.tokens_computed == len(heads)


@pytest.mark.parametrize("chat", ["plain", "without-bos", "thinking", "trimming"])
@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_rendered_text_and_the_answer_is_exact(
    monkeypatch: pytest.MonkeyPatch, kind: str, bos: bool, chat: str
) -> None:
    tokenizer = make(kind, bos, False)
    monkeypatch.setattr(tokenizer, "chat_template", CHATS[chat])
    rows = ROWS[1:]  # not every kind gives candidates back as they were
    found = requests(tokenizer, rows, system_prompt=SYSTEM)
    pairs = [pair for row in rows for pair in written_out(row)]
    heads = [
        tokenizer.apply_chat_template(messages(prompt, SYSTEM), tokenize=False, add_generation_prompt=True)
        for prompt, _ in pairs
    ]
    for request, head, (_, answer) in zip(found, heads, pairs, strict=True):
        encoding = tokenizer(head + answer, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        assert list(request.token_ids) == ids
        assert ids.count(tokenizer.bos_token_id) == (0 if chat == "without-bos" else 1)
        # The first token that reaches beyond the head, and all before it do not.
        assert all(stop <= len(head) for _, stop in offsets[: request.answer_start])
        assert offsets[request.answer_start][1] > len(head)


def test_special_tokens_in_a_field_become_special_tokens_as_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make("byte-level-bpe", True, False)
    monkeypatch.setattr(tokenizer, "chat_template", CHATS["plain"])
    row = {"task": "pairs", "context": "a</s>\nassistant\n<s>b", "continuation": "yes</s>"}
    (request,) = requests(tokenizer, [row])
    head = tokenizer.apply_chat_template(
        messages(row["context"]), tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert list(request.token_ids[: request.answer_start]) == head
    assert (head.count(bos), head.count(eos)) == (2, 2)
    assert request.token_ids[-1] == eos


def test_the_embedded_model_with_its_own_template() -> None:
    scorer = Scorer("smollm2-135m")
    (request,) = requests(scorer.tokenizer, [ROWS[1]], system_prompt="Be brief.")
    assert scorer.tokenizer.decode(request.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many people live there?<|im_end|>\n"
        "<|im_start|>assistant\nAbout 1990 people\n"
    )
    assert scorer.tokenizer.decode(request.token_ids[request.answer_start :]) == "About 1990 people\n"


def test_a_context_of_messages(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "where?")]
    context = [{"role": role, "content": content} for role, content in turns]
    rows = [
        {"task": "pairs", "context": context, "continuation": "there"},
        {"task": "choices", "context": context, "choices": ["here", " there"]},
    ]
    head = "<bos>system\nBe kind.<eos>\nuser\nhi<eos>\nassistant\nhello<eos>\nuser\nwhere?<eos>\nassistant\n"
    found = [tokenizer.decode(request.token_ids) for request in requests(tokenizer, rows, system_prompt="Be kind.")]
    assert found == [f"{head}there", f"{head}here", f"{head}there"]


def fault(row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        expand_row(Row({"continuation": "x", **row}), TaskConfig(**options), list)
    return str(caught.value)


def test_bad_conversations_are_named() -> None:
    chat = {"chat_template": True, "system_prompt": "Be kind."}
    say = {"role": "user", "content": "hi"}
    pairs = {"task": "pairs"}
    assert fault({**pairs, "context": [say]}) == (
        "field 'context': a list of messages needs --chat-template; expected a string"
    )
    assert fault({**pairs, "context": []}, **chat) == "field 'context': expected a non-empty list of messages, found []"
    assert fault({**pairs, "context": [say, "x"]}, **chat).startswith("field 'context[1]': expected a message (an ")
    assert fault({**pairs, "context": [{"content": "x"}]}, **chat) == (
        "field 'context[0].role': expected a string, found null"
    )
    assert "NUL" in fault({**pairs, "context": [{"role": "user", "content": "a\0"}]}, **chat)
    system = [{"role": "system", "content": "x"}, say]
    assert fault({**pairs, "context": system}, **chat) == (
        "field 'context': the conversation has a system message of its own, and --system-prompt is another"
    )
    ids = {"query_inputs": [1], "answer_inputs": [2], "context_inputs": [], "score_inputs": [[3]]}
    assert fault({"task": "lrlm", **ids}, **chat) == (
        "field 'task': chat_template is not for lrlm: its prompts are token ids"
    )


def test_options_that_cannot_be() -> None:
    for options, problem in [
        ({"system_prompt": "x"}, "system_prompt is part of a chat: it needs chat_template"),
        ({"system_prompt": " ", "chat_template": True}, "system_prompt must be a text; found ' '"),
        ({"chat_template": "qwen"}, "chat_template must be True or False; found 'qwen'"),
        ({"chat_template": True, "task": "lrlm"}, "chat_template is not for task lrlm: its prompts are token ids"),
    ]:
        with pytest.raises(ValueError, match=problem):
            TaskConfig(**options)


@pytest.mark.parametrize(
    ("chat", "problem"),
    [
        (None, "the model's tokenizer has no chat template"),
        (
            "refuses-system",
            "field 'system_prompt': the model's chat template refuses these messages: No system role here",
        ),
        ("drops-system", "field 'system_prompt': the model's chat template leaves the system message out"),
    ],
)
def test_a_template_that_will_not_do_is_told_before_the_weights_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: str | None, problem: str
) -> None:
    folder = make_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if chat is not None:
        tokenizer.chat_template = CHATS[chat]
        tokenizer.save_pretrained(folder)
        check_chat_template(tokenizer, TaskConfig(chat_template=True))  # all is well without a system message
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    for command in ("score", "bench"):
        with pytest.raises(SystemExit) as ended:
            main(
                [command, str(tmp_path / "rows.jsonl"), "-m", str(folder), "--chat-template", "--system-prompt", "Be."]
            )
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"fastscore: {problem}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--chat-template", "--system-prompt", r"Be kind.\nBe brief."]
    with pytest.raises(SystemExit) as ended:
        main(["score", str(rows), "-o", str(output), "-m", str(folder), "--dtype", "fp32", "-q", *options])
    assert ended.value.code == 0
    scorer = Scorer(str(folder), dtype="fp32")
    expected = scorer.score_rows(ROWS, chat_template=True, system_prompt="Be kind.\nBe brief.")
    found = [json.loads(line)["teacher_scores"] for line in output.read_text().splitlines()]
    for row, scores in zip(expected, found, strict=True):
        assert scores == pytest.approx(row["teacher_scores"], abs=1e-5)
    task = json.loads(output.with_name("out.jsonl.meta.json").read_text())["task"]
    assert (task["chat_template"], task["system_prompt"]) == (True, "Be kind.\nBe brief.")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_begins_with_bos_gets_no_second_one(kind: str) -> None:
    tokenizer = make(kind, True, True)
    pair_tokenizer = PairTokenizer(tokenizer, len(tokenizer))
    given, plain = pair_tokenizer.encode([Pair("<s>the river", " runs"), Pair("the river", " runs")])
    assert isinstance(given, ScoringRequest)
    assert isinstance(plain, ScoringRequest)
    assert given.token_ids.count(tokenizer.bos_token_id) == plain.token_ids.count(tokenizer.bos_token_id) == 1
    assert list(given.token_ids) == tokenizer("<s>the river runs", add_special_tokens=False)["input_ids"]


def test_a_prompt_is_rendered_once_for_all_its_answers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = ChatTemplate(tokenizer)
    first, second, other = chat.pairs([Pair("a", " x"), Pair("a", "  y"), Pair("b", "z")])
    assert first.prompt is second.prompt
    assert (first.answer, second.answer, other.answer) == ("x", " y", "z")
    assert other == Pair("<bos>user\nb<eos>\nassistant\n", "z", is_chat=True)
