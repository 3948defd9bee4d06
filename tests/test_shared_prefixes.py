"""Scores with shared prefixes computed once, against each request alone: any requests, budget and window."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, make_tiny_model
from transformers import AutoTokenizer
from truth import alone_in, plain_model

from fastscore import Scorer, language_model, packed_forward
from fastscore.attention import PROVIDERS
from fastscore.decoder import OwnForward
from fastscore.types import InputError, Row

Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def truth(llama: Path) -> Callable[[Pairs], list[list[float]]]:
    model = plain_model(llama)
    return lambda pairs: alone_in(model, pairs)


def scorer_of(folder: Path, **options: Any) -> Scorer:
    return Scorer(str(folder), dtype="fp32", device="cpu", **options)


def check(scorer: Scorer, pairs: Pairs, truth: Callable[[Pairs], list[list[float]]]) -> None:
    scores = scorer.score_tokens(pairs)
    assert len(scores) == len(pairs)
    for score, expected in zip(scores, truth(pairs), strict=True):
        assert score.token_logprobs == pytest.approx(expected, abs=1e-5)


@st.composite
def token_pairs(draw: st.DrawFn) -> Pairs:
    """Sequences over few tokens and long common stems, cut anywhere into prompt and answer."""
    stems = draw(st.lists(st.lists(st.integers(3, 8), min_size=1, max_size=40), min_size=1, max_size=3))
    pairs = []
    for _ in range(draw(st.integers(1, 10))):
        parts = draw(st.lists(st.sampled_from(stems), min_size=1, max_size=3))
        tokens = [token for part in parts for token in part[: draw(st.integers(1, len(part)))]]
        tokens += draw(st.lists(st.integers(3, 8), min_size=1, max_size=4))
        cut = draw(st.integers(1, max(1, len(tokens) - 1)))
        pairs.append((tokens[:cut], tokens[cut:] or [5]))
    return pairs


@pytest.fixture(scope="module")
def scorers(llama: Path) -> list[Scorer]:
    return [
        scorer_of(llama),
        scorer_of(llama, attention="reference"),
        scorer_of(llama, share_prefixes=False),
        scorer_of(llama, deterministic=True),
    ]


@settings(max_examples=15, deadline=None)
@given(pairs=token_pairs(), budget=st.integers(1, 200))
def test_any_requests_and_budget(
    pairs: Pairs, budget: int, scorers: list[Scorer], truth: Callable[[Pairs], list[list[float]]]
) -> None:
    for scorer in scorers:
        scorer.load().max_batch_tokens = budget
        before = scorer.stats.pairs
        check(scorer, pairs, truth)
        assert scorer.stats.pairs - before == len(pairs)


def test_deeper_than_five(scorers: list[Scorer], truth: Callable[[Pairs], list[list[float]]]) -> None:
    line = [random.Random(1).randrange(3, VOCAB_SIZE) for _ in range(60)]
    pairs = [(line[:depth], [7, 8 + depth]) for depth in range(2, 60, 5)]
    pairs += [([*line[:depth], 11, 12], line[depth : depth + 3]) for depth in range(3, 55, 9)]
    for scorer in scorers:
        check(scorer, pairs, truth)


def test_answers_that_differ_in_their_last_token_share_the_row(
    llama: Path, truth: Callable[[Pairs], list[list[float]]]
) -> None:
    """Twenty one-token choices: more than a row's targets in one call of the head."""
    scorer = scorer_of(llama)
    pairs = [([5, 6, 7, 9], [choice]) for choice in range(3, 23)]
    check(scorer, pairs, truth)
    assert scorer.stats.tokens_computed == 4


def test_identical_requests_are_computed_once(llama: Path, truth: Callable[[Pairs], list[list[float]]]) -> None:
    scorer = scorer_of(llama)
    check(scorer, [([5, 6, 7], [8, 9])] * 50, truth)
    assert scorer.stats.tokens_computed == 4


def test_no_requests(llama: Path) -> None:
    assert scorer_of(llama).score_tokens([]) == []


def test_empty_answers_are_refused(llama: Path) -> None:
    with pytest.raises(InputError, match=r"pair 1: .*answer"):
        scorer_of(llama).score_tokens([([5], [6]), ([5, 6], [])])


def test_windows_only_bound_what_is_shared(llama: Path) -> None:
    """Rows in windows of any size: the same scores in the same order, fewer shared tokens in smaller windows."""
    rows = [
        {"query": f"which {word}", "answers": ["the river"], "pos": ["The river runs."], "neg": ["A town.", word]}
        for word in ("river", "town", "mountain", "street")
    ]
    results, computed = [], []
    for window in (1, 110, 1_000_000):
        scorer = scorer_of(llama, window_tokens=window)
        results.append([row["teacher_scores"] for row in scorer.score_rows(rows, task="qa")])
        computed.append(scorer.stats.tokens_computed)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one == pytest.approx(two, abs=1e-5)
    assert computed[0] > computed[1] > computed[2]


@settings(max_examples=15, deadline=None)
@given(
    pairs=token_pairs(),
    candidates=st.lists(st.lists(st.integers(3, 8), max_size=12), min_size=1, max_size=3),
    window=st.integers(1, 300),
    budget=st.integers(1, 200),
)
def test_any_rows_window_and_budget(
    pairs: Pairs,
    candidates: list[list[int]],
    window: int,
    budget: int,
    scorers: list[Scorer],
    truth: Callable[[Pairs], list[list[float]]],
) -> None:
    """Every row of a file is answered once, in its order, as if each of its pairs were alone."""
    rows = [
        {"query_inputs": prompt, "answer_inputs": answer, "context_inputs": [], "score_inputs": candidates}
        for prompt, answer in pairs
    ]
    expected = truth([(candidate + prompt, answer) for prompt, answer in pairs for candidate in candidates])
    for scorer in (scorers[0], scorers[-1]):
        scorer.load().max_batch_tokens = budget
        with mock.patch.object(scorer._rows, "_config", replace(scorer.config, window_tokens=window)):
            found = scorer.score_rows(rows, task="lrlm")
        means = iter([sum(each) / len(each) for each in expected])
        assert len(found) == len(rows)
        for row in found:
            assert row["teacher_scores"] == pytest.approx([next(means) for _ in candidates], abs=1e-5)


def test_rows_come_back_before_all_are_read(llama: Path) -> None:
    """A stream is read a window (and a tokenizer's portion) ahead, not whole."""
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for line in range(1, 10_000):
            read += 1
            yield Row({"context": f"some words {line}", "continuation": " more", "task": "pairs"}, line=line)

    from fastscore.config import TaskConfig

    stream = scorer_of(llama, window_tokens=500).stream_rows(rows(), TaskConfig())
    assert next(iter(stream)).row.line == 1
    assert read < 3000


def out_of_memory_above(limit: int, scorer: Scorer) -> list[int]:
    """Make attention fail as a full device does, for packs of more than ``limit`` tokens; lists what was tried."""
    tried: list[int] = []
    model = scorer.load()
    assert isinstance(model.forward, OwnForward)
    real = model.forward.attend

    def attend(query_THd: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        tried.append(len(query_THd))
        if len(query_THd) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(query_THd, *args, **options)

    model.forward = replace(model.forward, attend=attend)
    return tried


def long_pairs() -> Pairs:
    draw = random.Random(2)
    stem = [draw.randrange(3, VOCAB_SIZE) for _ in range(90)]
    return [(stem + [draw.randrange(3, VOCAB_SIZE) for _ in range(40)], [5, 6]) for _ in range(8)]


def test_out_of_memory_halves_the_budget_and_goes_on(
    llama: Path,
    truth: Callable[[Pairs], list[list[float]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    scorer = scorer_of(llama, max_batch_tokens=400)
    scorer.load()
    caplog.clear()
    tried = out_of_memory_above(70, scorer)
    with caplog.at_level(logging.WARNING, "fastscore"):
        check(scorer, long_pairs(), truth)
    assert max(tried) > 70, "it did fail"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2, "209 -> 104 -> 64 tokens, each said once"
    assert "ran out of memory" in warnings[0]
    assert scorer.load().max_batch_tokens <= 70
    tried.clear()
    check(scorer, long_pairs(), truth)
    assert max(tried) <= 70, "what was learned is kept"


@pytest.mark.parametrize("family", ["bloom", "t5"])
def test_out_of_memory_in_padded_batches(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is left is grouped again, the budget only falls, and it is said once for every time it does."""
    limit = 300
    folder = make_tiny_model(tmp_path / family, family)
    scorer = scorer_of(folder, max_batch_tokens=4096)
    tried: list[int] = []
    name = "seq2seq_hidden" if family == "t5" else "padded_hidden"
    real = getattr(packed_forward, name)

    def hidden(model: Any, batch: Any) -> torch.Tensor:
        tried.append(batch.num_tokens)
        if batch.num_tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        found: torch.Tensor = real(model, batch)
        return found

    scorer.load()
    caplog.clear()
    monkeypatch.setattr(packed_forward, name, hidden)
    pairs = [pair for prompt, answer in long_pairs() for pair in ((prompt, answer), (prompt[:20], answer))]
    with caplog.at_level(logging.WARNING, "fastscore"):
        scores = scorer.score_tokens(pairs)
    for score, expected in zip(scores, alone_in(plain_model(folder), pairs), strict=True):
        assert score.token_logprobs == pytest.approx(expected, abs=1e-5)
    budgets = [int(record.getMessage().split()[-1]) for record in caplog.records]
    assert len(budgets) == sum(tokens > limit for tokens in tried) > 1
    assert budgets == sorted(budgets, reverse=True)
    assert scorer.load().max_batch_tokens == budgets[-1] >= language_model.SMALLEST_BUDGET
    tried.clear()
    scorer.score_tokens(pairs)
    assert max(tried) <= limit, "what was learned is kept"


def test_out_of_memory_at_the_smallest_budget_ends_the_run(llama: Path) -> None:
    scorer = scorer_of(llama)
    tried = out_of_memory_above(0, scorer)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score_tokens(long_pairs())
    assert min(tried) <= language_model.SMALLEST_BUDGET


def test_provider_by_name(llama: Path) -> None:
    assert scorer_of(llama, attention="reference").describe()["attention"] == "reference"
    assert scorer_of(llama).describe()["attention"] == "dense"
    assert scorer_of(llama, deterministic=True).describe()["attention"] == "blocked"
    with pytest.raises(InputError, match="'flash-attn-2' cannot be used: it runs on CUDA, not on cpu"):
        scorer_of(llama, attention="flash-attn-2").load()


def test_a_provider_that_is_wrong_is_passed_over(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fastscore.attention import dense

    real = dense.attend
    monkeypatch.setattr(dense, "attend", lambda *args, **options: 1.1 * real(*args, **options))
    with caplog.at_level(logging.WARNING, "fastscore"):
        assert scorer_of(llama).describe()["attention"] == "reference"
    assert "attention by dense passed over: it is wrong" in caplog.text
    with pytest.raises(InputError, match="'dense' cannot be used: it is wrong"):
        scorer_of(llama, attention="dense").load()


def test_a_provider_whose_library_is_broken_is_passed_over(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is there, so that it was chosen, and importing it fails."""
    monkeypatch.delitem(sys.modules, "fastscore.attention.dense", raising=False)
    monkeypatch.setitem(sys.modules, "fastscore.attention.batches", None)
    with caplog.at_level(logging.WARNING, "fastscore"):
        assert scorer_of(llama).describe()["attention"] == "reference"
    assert "attention by dense passed over: importing it fails (ModuleNotFoundError: " in caplog.text
    with pytest.raises(InputError, match="'dense' cannot be used: importing it fails"):
        scorer_of(llama, attention="dense").load()


def test_deterministic_packs_are_counted_by_their_own_size(llama: Path) -> None:
    scorer = scorer_of(llama, deterministic=True, max_batch_tokens=50_000)
    scorer.score_tokens(long_pairs())
    assert scorer.stats.pack_tokens == scorer.stats.packs * language_model.DETERMINISTIC_TOKENS > 0


def test_deterministic_needs_packs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="deterministic scores need packs"):
        scorer_of(make_tiny_model(tmp_path / "bloom", "bloom"), deterministic=True).load()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mixtral"])
def test_deterministic_scores_are_bitwise_the_same(family: str, tmp_path: Path) -> None:
    """Whatever the order, budget, window and neighbours; in the default mode within rounding."""
    folder = make_tiny_model(tmp_path / family, family)
    draw = random.Random(3)
    stems = [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (30, 90, 150)]
    pairs = [
        ([*draw.choice(stems)[: draw.randint(1, 150)], draw.randrange(3, VOCAB_SIZE)], [draw.randrange(3, VOCAB_SIZE)])
        for _ in range(24)
    ]
    exact, rounded = (scorer_of(folder, deterministic=choice) for choice in (True, False))
    first = {choice: scorer.score_tokens(pairs) for choice, scorer in ((True, exact), (False, rounded))}
    for _ in range(4):
        chosen = draw.sample(range(len(pairs)), draw.randint(1, len(pairs)))
        exact.load().max_batch_tokens = rounded.load().max_batch_tokens = draw.randint(1, 400)
        together = [pairs[index] for index in chosen]
        for index, score in zip(chosen, exact.score_tokens(together), strict=True):
            assert score == first[True][index]
        for index, score in zip(chosen, rounded.score_tokens(together), strict=True):
            assert score.token_logprobs == pytest.approx(first[False][index].token_logprobs, abs=1e-5)


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_has_a_module_with_attend(name: str) -> None:
    """Those whose library is not installed say so by its name; the others load."""
    if name.startswith("flash-attn") and find_spec("flash_attn") is None and find_spec("flash_attn_interface") is None:
        with pytest.raises(ImportError, match="flash_attn"):
            PROVIDERS[name].load()
    else:
        assert callable(PROVIDERS[name].load())


def test_from_model_takes_the_same_options(llama: Path, truth: Callable[[Pairs], list[list[float]]]) -> None:
    scorer = Scorer.from_model(
        plain_model(llama), AutoTokenizer.from_pretrained(llama), deterministic=True, window_tokens=100
    )
    assert scorer.describe()["deterministic"]
    check(scorer, long_pairs(), truth)
