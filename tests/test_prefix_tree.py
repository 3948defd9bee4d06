"""The prefix tree against a plain set of prefixes, and the packs cut from it against the chains they stand for."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore.packing import cut_pack, pack_size
from fastscore.prefix_tree import PrefixTree, build_prefix_tree
from fastscore.types import ScoringRequest

SHARED = Path(__file__).parents[2] / "shared" / "data"


@st.composite
def requests(draw: st.DrawFn, max_requests: int = 12, max_length: int = 10) -> list[ScoringRequest]:
    """Few different tokens, so that prefixes are shared at every depth and duplicates are common."""
    sequences = draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=max_length), min_size=1, max_size=12))
    return [ScoringRequest(tuple(tokens), draw(st.integers(1, len(tokens) - 1))) for tokens in sequences[:max_requests]]


def chains(tree: PrefixTree) -> list[list[int]]:
    """For every token of the stream the stream indices of its whole prefix, itself last; written without numpy."""
    starts = [*tree.segment_start_S.tolist(), tree.num_tokens]
    result: list[list[int]] = []
    for segment, (start, stop) in enumerate(itertools.pairwise(starts)):
        chain: list[int] = []
        for piece in range(tree.piece_offset_S[segment], tree.piece_offset_S[segment + 1]):
            first = int(tree.piece_start_P[piece])
            chain += range(first, first + int(tree.piece_length_P[piece]))
        for token in range(start, stop):
            chain = [*chain, token]
            result.append(chain)
    return result


def check_tree(tree: PrefixTree, batch: Sequence[ScoringRequest]) -> None:
    prefixes = {request.token_ids[:stop] for request in batch for stop in range(1, len(request.token_ids))}
    assert tree.num_tokens == len(prefixes)
    of_token = chains(tree)
    texts = [tuple(int(tree.token_ids_U[place]) for place in chain) for chain in of_token]
    assert set(texts) == prefixes
    assert tree.position_U.tolist() == [len(chain) - 1 for chain in of_token]
    assert all(chain == sorted(chain) for chain in of_token), "ancestors come first"
    for index, request in enumerate(batch):
        slots = tree.request_slot[tree.request_offset_R[index] : tree.request_offset_R[index + 1]]
        assert len(slots) == request.num_answer_tokens
        for place, slot in enumerate(slots, start=request.answer_start):
            assert texts[tree.slot_row_Q[slot]] == request.token_ids[:place]
            assert tree.slot_target_Q[slot] == request.token_ids[place]
    pairs = list(zip(tree.slot_row_Q.tolist(), tree.slot_target_Q.tolist(), strict=True))
    assert pairs == sorted(set(pairs)), "every (row, target) once, by row"


@settings(max_examples=300, deadline=None)
@given(requests())
def test_every_prefix_token_once(batch: list[ScoringRequest]) -> None:
    check_tree(build_prefix_tree(batch), batch)


@settings(max_examples=50, deadline=None)
@given(requests())
def test_without_sharing_every_request_has_its_own(batch: list[ScoringRequest]) -> None:
    tree = build_prefix_tree(batch, share=False)
    assert tree.num_tokens == sum(len(request.token_ids) - 1 for request in batch)
    assert len(tree.segment_start_S) == len(batch)
    assert len(tree.piece_start_P) == 0


def test_depth_and_duplicates() -> None:
    line = tuple(range(40))
    batch = [ScoringRequest((*line[: 2 + depth], 99), 1) for depth in range(30)] * 2
    tree = build_prefix_tree(batch)
    check_tree(tree, batch)
    assert tree.num_tokens == 31, "the longest prefix holds all others"


def test_a_comb_of_branches_on_a_long_stem() -> None:
    stem = tuple(range(100, 160))
    batch = [ScoringRequest((*stem[:depth], 7, depth, 8), depth + 1) for depth in range(1, 60)]
    check_tree(build_prefix_tree(batch), batch)


def test_one_request() -> None:
    batch = [ScoringRequest((5, 6), 1)]
    check_tree(build_prefix_tree(batch), batch)


def test_a_prefix_that_ends_inside_the_answer_of_another() -> None:
    batch = [ScoringRequest((1, 2, 3, 4, 5, 6), 2), ScoringRequest((1, 2, 3, 4, 9), 4), ScoringRequest((1, 2, 3, 4), 3)]
    tree = build_prefix_tree(batch)
    check_tree(tree, batch)
    assert tree.num_tokens == 5


def test_last_answer_token_alone_differs() -> None:
    batch = [ScoringRequest((1, 2, 3, token), 3) for token in (4, 5, 6, 7)]
    tree = build_prefix_tree(batch)
    check_tree(tree, batch)
    assert (tree.num_tokens, len(set(tree.slot_row_Q.tolist())), len(tree.slot_row_Q)) == (3, 1, 4)


def test_large_token_ids_sort_as_numbers() -> None:
    batch = [ScoringRequest((token, 1, 2), 1) for token in (255, 256, 65535, 65536, 2**31 - 1)]
    check_tree(build_prefix_tree(batch), batch)


def test_longest_chains_first() -> None:
    batch = [ScoringRequest(tuple(range(first, first + length)), 1) for first, length in ((10, 4), (50, 9), (90, 6))]
    tree = build_prefix_tree(batch)
    assert tree.token_ids_U[tree.segment_start_S].tolist() == [50, 90, 10]


def test_longest_chains_first_behind_what_all_share() -> None:
    """As a template's first words are; two templates, and the requests of each by length."""
    kinds = (((1, 2), 10, 4), ((1, 2), 50, 9), ((1, 2), 90, 6), ((3,), 10, 20), ((3,), 40, 2), ((3,), 70, 5))
    batch = [ScoringRequest((*stem, *range(first, first + length)), 1) for stem, first, length in kinds]
    tree = build_prefix_tree(batch)
    check_tree(tree, batch)
    firsts = tree.token_ids_U[tree.segment_start_S].tolist()
    assert firsts == [3, 70, 40, 1, 90, 10]
    assert tree.num_tokens == 2 + 1 + sum((3, 8, 5, 19, 1, 4))


@settings(max_examples=300, deadline=None)
@given(requests(max_length=14), st.integers(1, 20))
def test_packs_see_exactly_their_chains(batch: list[ScoringRequest], budget: int) -> None:
    tree = build_prefix_tree(batch)
    of_token = chains(tree)
    carried: list[int] = []
    start = answered = 0
    while start < tree.num_tokens:
        size = pack_size(tree.num_tokens - start, budget)
        assert 1 <= size <= budget
        pack = cut_pack(tree, start, size)
        # Stream indices stand for keys and travel from pack to pack as keys do.
        keys = np.array([*(carried if pack.num_carried else []), *range(start, start + size)])
        assert pack.num_carried in (0, len(carried))
        bounds = [*pack.query_start_S.tolist(), size]
        assert pack.cu_seqlens_q.tolist() == bounds
        for segment, (first, stop) in enumerate(itertools.pairwise(bounds)):
            runs = range(pack.key_runs.offset_S[segment], pack.key_runs.offset_S[segment + 1])
            rows = [
                row
                for run in runs
                for row in range(
                    int(pack.key_runs.start_P[run]), int(pack.key_runs.start_P[run] + pack.key_runs.length_P[run])
                )
            ]
            assert keys[rows].tolist() == of_token[start + stop - 1], "the chain of its last token"
            assert len(rows) == pack.cu_seqlens_k[segment + 1] - pack.cu_seqlens_k[segment]
            assert rows[-(stop - first) :] == list(range(pack.num_carried + first, pack.num_carried + stop))
        rows = start + pack.answer_row_A.numpy()[pack.slot_row_Q]
        assert rows.tolist() == tree.slot_row_Q[pack.slot_Q].tolist()
        assert pack.target_Q.tolist() == tree.slot_target_Q[pack.slot_Q].tolist()
        assert pack.token_ids_T.tolist() == tree.token_ids_U[start : start + size].tolist()
        answered += len(pack.slot_Q)
        carried = keys[pack.carry_rows.numpy()].tolist()
        start += size
    assert answered == len(tree.slot_row_Q)
    assert carried == []


def test_pack_of_a_fixed_size() -> None:
    tree = build_prefix_tree([ScoringRequest((1, 2, 3, 4), 1)])
    pack = cut_pack(tree, 0, 3, padded_to=8)
    assert pack.token_ids_T.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert pack.num_tokens == 3
    assert pack.cu_seqlens_q.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("left", "budget", "size"), [(10, 4, 4), (9, 4, 3), (4, 4, 4), (1, 100, 1), (8193, 4096, 2731)]
)
def test_packs_are_of_even_size(left: int, budget: int, size: int) -> None:
    assert pack_size(left, budget) == size


def tokenised(texts: Sequence[tuple[str, str]]) -> list[ScoringRequest]:
    from transformers import AutoTokenizer

    from fastscore.model_source import resolve_model
    from fastscore.tokenization import PairTokenizer
    from fastscore.types import Pair

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m").name_or_path)
    encoded = PairTokenizer(tokenizer, vocab_size=len(tokenizer)).encode([Pair(*text) for text in texts])
    assert all(isinstance(request, ScoringRequest) for request in encoded)
    return encoded  # type: ignore[return-value]


@pytest.mark.skipif(not SHARED.exists(), reason="shared/data is not here")
def test_counted_tokens_of_real_files() -> None:
    """Inputs leave out each request's last token; figures of the whole sequences are those of the design."""
    qa = []
    for line in (SHARED / "nq_qa.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in row["pos"] + row["neg"]:
            prompt = f"Knowledge: {key.strip()}\n\nQuestion: {row['query'].strip()}\n\nAnswer:"
            qa.append((prompt, f" {row['answers'][0].strip()}"))
    rows = [json.loads(line) for line in (SHARED / "logiqa_mc.jsonl").read_text(encoding="utf-8").splitlines()]
    header = "".join(f"{row['context']} {row['choices'][row['gold']]}\n\n" for row in rows[:5])
    choices = [(header + row["context"], f" {choice}") for row in rows[10:] for choice in row["choices"]]
    for texts, whole, shared in ((qa, 228_903, 155_897), (choices, 292_455, 16_520)):
        batch = tokenised(texts)
        assert sum(len(request.token_ids) for request in batch) == whole
        sequences = {request.token_ids[:stop] for request in batch for stop in range(1, len(request.token_ids) + 1)}
        assert len(sequences) == shared
        inputs = {request.token_ids[:stop] for request in batch for stop in range(1, len(request.token_ids))}
        assert build_prefix_tree(batch).num_tokens == len(inputs)


def test_planning_speed() -> None:
    """At least 2 million tokens a second on one core: the best of five, since other work may be going on."""
    random.seed(0)
    passages = [[random.randrange(49_000) for _ in range(110)] for _ in range(500)]
    batch = [
        ScoringRequest((*random.choice(passages), *(random.randrange(49_000) for _ in range(40))), 146)
        for _ in range(4000)
    ]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        build_prefix_tree(batch)
        seconds.append(time.perf_counter() - started)
    assert 4000 * 150 / min(seconds) > 2e6
