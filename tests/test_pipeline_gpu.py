"""What only a GPU can show of the pipeline: that nothing in the loop waits for the device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import CHOICES, rows
from test_read_ahead import threads
from tiny_models import VOCAB_SIZE, make_tiny_model
from truth import alone

from fastscore import Scorer
from fastscore.kept_scores import Work
from fastscore.launch import Launch
from fastscore.run_stats import RunStats
from fastscore.transfer import HostCopy, to_device
from fastscore.types import ScoringRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


def test_copies_both_ways_wait_for_nothing() -> None:
    device = torch.device("cuda")
    for shape in ((0,), (5,), (3, 1 << 20)):
        host = torch.arange(torch.Size(shape).numel()).reshape(shape)
        to_device(host, device)  # pinned memory is made the first time
        with waiting_is_an_error():
            there = to_device(host, device)
            back = HostCopy([there, there.int() * 2])
        whole, twice = back.wait()
        assert torch.equal(torch.from_numpy(whole), host)
        assert torch.equal(torch.from_numpy(twice), host.int() * 2)


@pytest.mark.parametrize("forward", ["auto", "model"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_queueing_a_window_waits_for_nothing(dtype: str, forward: str, llama: Path) -> None:
    """Prompts that share beginnings, in packs that carry keys into one another; answers that share their row."""
    draw = random.Random(6)
    stems = [[draw.randrange(3, VOCAB_SIZE) for _ in range(60)] for _ in range(3)]
    pairs = [
        ([*draw.choice(stems)[: draw.randint(20, 60)], draw.randrange(3, VOCAB_SIZE)], [5, draw.randrange(3, 40)])
        for _ in range(60)
    ]
    requests = [ScoringRequest((*prompt, *answer), len(prompt)) for prompt, answer in pairs]
    options: dict[str, Any] = {"dtype": dtype, "forward": forward}
    scorer = Scorer(str(llama), device="cuda", max_batch_tokens=128, **options)
    model = scorer.load()
    plan = model.plan(requests)
    first = scorer.score_requests(requests)  # kernels are compiled and memory is reserved
    launch = Launch(model, Work(plan, requests), RunStats())
    with waiting_is_an_error():
        launch.queue()
    scores = launch.scores("pair {}".format)
    for score, before, truth in zip(scores, first, alone(llama, pairs), strict=True):
        assert score == before
        assert score.token_logprobs == pytest.approx(truth, abs=1e-4 if dtype == "fp32" else 0.5)


def test_windows_beside_the_device_give_what_a_cpu_gives(llama: Path) -> None:
    options = {"dtype": "fp32", "window_tokens": 60, "max_batch_tokens": 25}
    expected = list(Scorer(str(llama), device="cpu", **options).stream_rows(rows(), CHOICES))  # type: ignore[arg-type]
    found = list(Scorer(str(llama), device="cuda", **options).stream_rows(rows(), CHOICES))  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        assert one.row == other.row
        assert one.teacher_scores == pytest.approx(other.teacher_scores, abs=1e-4)
    assert threads() == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(llama: Path) -> None:
    pairs = [((5, 6, 7, 8), (9, 10)), ((5, 6, 7, 11), (12,))]
    expected = Scorer(str(llama), dtype="fp32", device="cuda:0").score_tokens(pairs)
    found = Scorer(str(llama), dtype="fp32", device="cuda:1").score_tokens(pairs)
    assert torch.cuda.current_device() == 0
    for score, other in zip(found, expected, strict=True):
        assert score.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)
