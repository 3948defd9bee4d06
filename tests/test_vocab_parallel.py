"""The NLL over a vocabulary split between two real processes, against the whole vocabulary in one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastscore_kernels.answer_nll import answer_nll, answer_nll_partials
from fastscore_kernels.partials import combine_partials, nll_from_partials
from fastscore_kernels.vocab_parallel import vocab_parallel_answer_nll

VOCAB, HIDDEN = 101, 24


def case(seed: int, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_AD": torch.randn(13, HIDDEN, generator=generator),
        "weight_VD": torch.randn(VOCAB, HIDDEN, generator=generator),
        "target": torch.randint(VOCAB, (13, 2), generator=generator),
        "bias": torch.randn(VOCAB, generator=generator),
        **options,
    }


def tied() -> dict[str, Any]:
    """Every logit is a small whole number, so that the best one occurs in both shards."""
    generator = torch.Generator().manual_seed(9)
    return {
        "hidden_AD": torch.randint(-1, 2, (40, 4), generator=generator).float(),
        "weight_VD": torch.randint(-1, 2, (VOCAB, 4), generator=generator).float(),
        "target": torch.randint(VOCAB, (40,), generator=generator),
        "bias": torch.zeros(VOCAB),
    }


def one_shard_of_minus_infinity() -> dict[str, Any]:
    result = case(3)
    result["bias"][:37] = -torch.inf
    result["target"] = result["target"].clamp_min(40)
    return result


CASES = {
    "plain": case(0),
    "scaled-and-capped": case(1, logit_scale=0.5, logit_softcap=4.0),
    "one-target": case(2, target=torch.arange(13)),
    "targets-in-the-first-shard": case(4, target=torch.zeros(13, dtype=torch.int64)),
    "targets-in-the-last-shard": case(5, target=torch.full((13,), VOCAB - 1)),
    "ties-across-the-border": tied(),
    "one-shard-of-minus-infinity": one_shard_of_minus_infinity(),
    "no-rows": case(6, hidden_AD=torch.zeros(0, HIDDEN), target=torch.zeros(0, dtype=torch.int64)),
}
BORDERS = (0, 37, VOCAB)


def arguments(name: str, first: int = 0, last: int = VOCAB) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    options = dict(CASES[name])
    tensors = options.pop("hidden_AD"), options.pop("weight_VD")[first:last], options.pop("target")
    return tensors, {**options, "bias": options["bias"][first:last]}


def rank_main(rank: int, folder: str) -> None:
    """One process: its shard of every case; what it got goes to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name in CASES:
        tensors, options = arguments(name, BORDERS[rank], BORDERS[rank + 1])
        results[name] = vocab_parallel_answer_nll(*tensors, vocab_start=BORDERS[rank], **options)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(rank_main, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(
    name: str, ranks: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]
) -> None:
    tensors, options = arguments(name)
    doubles = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    truth, top1 = answer_nll(tensors[0].double(), tensors[1].double(), tensors[2], **doubles)
    whole, _ = answer_nll(*tensors, **options)
    for nll, best in (ranks[0][name], ranks[1][name]):
        assert nll.shape == tensors[2].shape
        bound = (whole.double() - truth).abs() + torch.finfo(torch.float32).eps * truth.abs().clamp_min(1)
        assert ((nll.double() - truth).abs() <= bound).all()
        assert torch.equal(best, top1)
    assert torch.equal(ranks[0][name][0], ranks[1][name][0]), "every rank has the same bits"


def test_ties_are_there() -> None:
    """The case above would not show a wrong order if the best logit were unique."""
    (hidden_AD, weight_VD, _), _ = arguments("ties-across-the-border")
    logits = hidden_AD @ weight_VD.T
    best = logits == logits.amax(dim=1, keepdim=True)
    assert (best[:, :37].any(dim=1) & best[:, 37:].any(dim=1)).sum() > 10


def test_parts_combine_in_any_grouping() -> None:
    """Seven shards at once, or pair by pair."""
    tensors, options = arguments("plain")
    borders = [0, 1, 20, 21, 50, 51, 90, VOCAB]
    parts = []
    for first, last in itertools.pairwise(borders):
        shard, shard_options = arguments("plain", first, last)
        parts.append(answer_nll_partials(*shard, vocab_start=first, **shard_options))
    whole, top1 = answer_nll(*tensors, **options)
    together = combine_partials(parts)
    in_turn = parts[0]
    for part in parts[1:]:
        in_turn = combine_partials([in_turn, part])
    for combined in (together, in_turn):
        torch.testing.assert_close(nll_from_partials(combined), whole, rtol=1e-6, atol=1e-6)
        assert torch.equal(combined.top1_A, top1)
    with pytest.raises(ValueError, match="at least one part"):
        combine_partials([])


def test_a_target_in_no_shard() -> None:
    (hidden_AD, weight_VD, _), _ = arguments("plain")
    partials = answer_nll_partials(hidden_AD, weight_VD, torch.full((13,), VOCAB + 5))
    assert (nll_from_partials(partials) == torch.inf).all()
