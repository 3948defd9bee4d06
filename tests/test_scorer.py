"""Pairs in, scores out: against each pair alone in plain transformers, and against one another."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, VOCAB_SIZE, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from truth import alone, alone_in, plain_model

from fastscore import AnswerScore, InputError, Scorer
from fastscore.config import TaskConfig
from fastscore.types import Row

TEXT_PAIRS = [
    ("Question: where does the river run\n\nAnswer:", " the old town"),
    ("Question: where does the river run\n\nAnswer:", " 42 houses, naïve café 👩‍🚀"),
    ("Knowledge: 白 術\n\nAnswer:", " Ελληνικά"),
    ("a", "b"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def scorer(llama: Path) -> Scorer:
    return Scorer(str(llama), dtype="fp32", max_batch_tokens=100)


def token_pairs(count: int, seed: int = 1) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]

    return [(ids(draw.randint(1, 60)), ids(draw.randint(1, 6))) for _ in range(count)]


def assert_equal_scores(
    found: Sequence[AnswerScore], truth: Sequence[Sequence[float]], tolerance: float = 1e-5
) -> None:
    for score, expected in zip(found, truth, strict=True):
        assert score.token_logprobs == pytest.approx(expected, abs=tolerance)


def test_text_tokens_and_rows_agree(scorer: Scorer) -> None:
    texts = scorer.score(TEXT_PAIRS)
    encoded = []
    for prompt, answer in TEXT_PAIRS:
        ids, count = scorer.tokenizer(prompt + answer)["input_ids"], len(scorer.tokenizer(answer)["input_ids"])
        encoded.append((ids[:-count], ids[-count:]))
    assert scorer.score_tokens(encoded) == texts
    rows = [{"context": prompt, "continuation": answer} for prompt, answer in TEXT_PAIRS]
    assert [row["teacher_scores"] for row in scorer.score_rows(rows, "pairs")] == [[s.mean_logprob] for s in texts]
    assert_equal_scores(texts, alone(scorer.model_path, encoded))


def test_what_a_score_says(scorer: Scorer, llama: Path) -> None:
    pairs = token_pairs(12)
    for score, truth, (_, answer) in zip(scorer.score_tokens(pairs), alone(llama, pairs), pairs, strict=True):
        assert score.num_tokens == len(answer) == len(score.token_logprobs)
        assert score.logprob == pytest.approx(math.fsum(truth), abs=1e-4)
        assert score.mean_logprob == pytest.approx(math.fsum(truth) / len(truth), abs=1e-5)
        assert all(type(value) is float and value <= 0 for value in score.token_logprobs)


def test_is_greedy_is_what_the_model_would_have_said(scorer: Scorer, llama: Path) -> None:
    model = plain_model(llama)
    for prompt, _ in token_pairs(5):
        said: list[int] = []
        for _ in range(6):
            with torch.inference_mode():
                said.append(int(model(input_ids=torch.tensor([prompt + said])).logits[0, -1].argmax()))
        other = [said[0], said[1] ^ 1, *said[2:]]
        greedy, wrong, shorter = scorer.score_tokens([(prompt, said), (prompt, other), (prompt, said[:3])])
        assert (greedy.is_greedy, wrong.is_greedy, shorter.is_greedy) == (True, False, True)


def test_order_and_company_do_not_matter(scorer: Scorer) -> None:
    pairs = token_pairs(20)
    scores = scorer.score_tokens(pairs)
    order = random.Random(2).sample(range(20), 20)
    for place, score in zip(order, scorer.score_tokens([pairs[i] for i in order]), strict=True):
        assert score.token_logprobs == pytest.approx(scores[place].token_logprobs, abs=1e-5)
    assert_equal_scores(scorer.score_tokens(pairs[:1]), [scores[0].token_logprobs])


def test_nothing_gives_nothing(scorer: Scorer) -> None:
    assert scorer.score([]) == scorer.score_tokens([]) == scorer.score_rows([]) == []
    assert list(scorer.stream_rows(iter(()), TaskConfig())) == []


def test_ids_may_be_arrays_tensors_and_generators(scorer: Scorer) -> None:
    plain = scorer.score_tokens([([5, 6, 7], [8, 9])])
    assert scorer.score_tokens([(np.array([5, 6, 7]), np.array([8, 9]))]) == plain
    assert scorer.score_tokens([(torch.tensor([5, 6, 7]), torch.tensor([8, 9]))]) == plain
    assert scorer.score_tokens(pair for pair in [((5, 6, 7), range(8, 10))]) == plain
    with pytest.raises(InputError, match=r"^pair 0: token id 5\.0 in the prompt is not a whole number"):
        scorer.score_tokens([(np.array([5.0]), [8])])


@pytest.mark.parametrize("budget", [1, 7, 10_000])
def test_a_request_longer_than_the_budget(budget: int, llama: Path) -> None:
    pairs = [*token_pairs(3), (list(range(3, 63)), [7, 8, 9])]
    scorer = Scorer(str(llama), dtype="fp32", max_batch_tokens=budget)
    assert_equal_scores(scorer.score_tokens(pairs), alone(llama, pairs))


def test_prompts_beyond_the_context(llama: Path) -> None:
    prompt, answer = [draw % 500 + 3 for draw in range(CONTEXT + 40)], [7, 8, 9]
    with pytest.raises(InputError, match=f"^pair 1: 296 prompt and 3 answer tokens do not fit .* of {CONTEXT} "):
        Scorer(str(llama)).score_tokens([([5], [6]), (prompt, answer)])
    cutting = Scorer(str(llama), dtype="fp32", overflow="truncate-left")
    # The last answer token is never an input.
    kept = prompt[-(CONTEXT + 1 - len(answer)) :]
    assert_equal_scores(cutting.score_tokens([(prompt, answer)]), alone(llama, [(kept, answer)]))


@pytest.fixture(scope="module")
def with_hole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding of "a" is no number: any text with that token has no score."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "hole")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[AutoTokenizer.from_pretrained(folder).encode("a")] = math.nan
    model.save_pretrained(folder)
    return folder


def test_a_score_that_is_no_number_names_its_pair(with_hole: Path) -> None:
    scorer = Scorer(str(with_hole), dtype="fp32")
    pairs = [("b c", " d"), ("b c", " d e"), ("b a", " d"), ("x", "y")]
    nan = "the model gave a log-probability of nan for answer token"
    with pytest.raises(RuntimeError, match=rf"^pair 2: {nan} 0; a wider dtype \(--dtype"):
        scorer.score(pairs)
    rows = [
        Row({"context": "b", "choices": ["c", choice, "d"]}, "r.jsonl", line) for line, choice in ((3, "x"), (4, "ad"))
    ]
    with pytest.raises(RuntimeError, match=rf"^r\.jsonl:4: candidate 1: {nan} \d;"):
        list(scorer.stream_rows(rows, TaskConfig("choices")))


def distinct_inputs(pairs: Sequence[tuple[list[int], list[int]]]) -> int:
    """Tokens read when every shared prefix is read once."""
    inputs = [tuple(prompt + answer)[:-1] for prompt, answer in pairs]
    return len({ids[:length] for ids in inputs for length in range(1, len(ids) + 1)})


def test_the_numbers_add_up(llama: Path) -> None:
    pairs = token_pairs(18)
    pairs += [(prompt, [answer[0], 5]) for prompt, answer in pairs[:7]]
    scorer = Scorer(str(llama), dtype="fp32", max_batch_tokens=64)
    scorer.score_tokens(pairs)
    scorer.stats.flush_padded()
    stats, lengths = scorer.stats, [len(prompt) + len(answer) for prompt, answer in pairs]
    assert stats.pairs == 25
    assert stats.answer_tokens == sum(len(answer) for _, answer in pairs)
    assert stats.tokens_unpadded == sum(lengths)
    assert stats.tokens_padded == sum(max(lengths[i : i + 4]) * len(lengths[i : i + 4]) for i in range(0, 25, 4))
    assert stats.tokens_computed == distinct_inputs(pairs)
    assert stats.packs == math.ceil(stats.tokens_computed / 64)
    assert stats.pack_tokens == 64 * stats.packs
    assert stats.seconds > 0
    once = stats.tokens_computed
    scorer.score_tokens(pairs)
    assert (scorer.stats.pairs, scorer.stats.tokens_computed) == (50, 2 * once)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, fp32, bf16, fp16; found 'int8'"),
        ({"overflow": "wrap"}, "overflow must be one of error, truncate-left"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be a whole number of at least 1"),
        ({"max_batch_tokens": 1.5}, "max_batch_tokens must be a whole number"),
        ({"model": " "}, "model must be a name or a path"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Scorer(**{"model": "/no/such/folder", **options})


def test_weights_are_read_when_first_needed(llama: Path, tmp_path: Path) -> None:
    for path in llama.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    scorer = Scorer(str(tmp_path))
    with pytest.raises(InputError, match=r"^pair 0: the answer is empty"):
        scorer.score([("a", "")])
    with pytest.raises(InputError, match="cannot be loaded"):
        scorer.score([("a", "b")])


def test_one_long_request_costs_about_what_it_costs_alone(tmp_path: Path) -> None:
    """3,000 tokens in packs of 512 and in one: at most four times the CPU seconds of plain transformers."""
    folder = make_tiny_model(
        tmp_path, hidden_size=256, intermediate_size=512, head_dim=64, max_position_embeddings=8192
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = random.Random(4)
    pair = ([draw.randrange(3, VOCAB_SIZE) for _ in range(3000)], [5, 6, 7])
    scorers = [Scorer(str(folder), dtype="fp32", max_batch_tokens=budget) for budget in (512, 8192)]
    calls = [lambda: alone_in(model, [pair]), *(partial(scorer.score_tokens, [pair]) for scorer in scorers)]
    seconds: list[list[float]] = [[], [], []]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another count as busy
    try:
        for _ in range(4):
            for times, call in zip(seconds, calls, strict=True):
                started = time.process_time()
                call()
                times.append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    alone_seconds, *ours = (min(times) for times in seconds)
    assert max(ours) < 4 * alone_seconds, (alone_seconds, ours)
