"""Attention providers against dense masked attention in fp64: each query sees exactly the prefix it stands on."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from attention_truth import OPTIONS, cpu_varlen, inputs, packs_of, shared_requests, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore.attention import PROVIDERS, AttentionNeeds, available_providers, choose_provider, registry
from fastscore.attention import spans as spans_module
from fastscore.attention import varlen as varlen_module
from fastscore.attention.batches import batch_spans
from fastscore.attention.blocked import BLOCK
from fastscore.attention.reference import attend_segment
from fastscore.attention.spans import split_spans
from fastscore.attention.split import split_attention
from fastscore.attention.varlen import attend_varlen
from fastscore.packing import cut_pack
from fastscore.prefix_tree import build_prefix_tree
from fastscore.types import InputError, ScoringRequest

ATTENDS: dict[str, Any] = {
    **{name: PROVIDERS[name].load() for name in ("dense", "blocked", "reference")},
    "varlen": partial(attend_varlen, cpu_varlen),
}


@pytest.fixture(params=["many-parts", "few-parts", "as-shipped"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rectangles wherever a run has four keys, or nowhere; spans of five queries, or of all that fit."""
    if request.param != "as-shipped":
        many = request.param == "many-parts"
        monkeypatch.setattr(varlen_module, "MIN_RECTANGLE_KEYS", 4 if many else 10_000)
        monkeypatch.setattr(spans_module, "CALL_SCORES", -1_000_000 if many else 1_000_000)
        monkeypatch.setattr(spans_module, "MAX_SCORES", 1 if many else 1_000_000)
        monkeypatch.setattr(spans_module, "MIN_ROWS", 5)
    return str(request.param)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ATTENDS)
def test_provider_equals_dense_attention(name: str, options: str, parts: str) -> None:
    given_options = {"sliding_window": None, "softcap": None, "sinks": None, "scaling": 0.3} | OPTIONS[options]
    for seed, size in ((0, 1000), (1, 64), (2, 17)):
        for pack in packs_of(shared_requests(seed), size):
            query, key, value = inputs(pack, torch.float32, seed)
            out = ATTENDS[name](query, key, value, pack, **given_options)
            torch.testing.assert_close(
                out.double(), truth(query, key, value, pack, **given_options), rtol=1e-5, atol=2e-6
            )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(9, 90), st.integers(1, 9))
def test_providers_agree_on_any_pack(seed: int, size: int, count: int) -> None:
    for pack in packs_of(shared_requests(seed, count), size):
        query, key, value = inputs(pack, torch.float32, seed)
        expected = truth(query, key, value, pack, scaling=0.3)
        for attend in ATTENDS.values():
            out = attend(query, key, value, pack, scaling=0.3, sliding_window=None, softcap=None, sinks=None)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ATTENDS)
def test_low_precision_is_as_close_as_the_reference(name: str, dtype: torch.dtype, parts: str) -> None:
    (pack,) = packs_of(shared_requests(5), 10_000)
    query, key, value = inputs(pack, dtype)
    options = {"scaling": 0.3, "sliding_window": None, "softcap": None, "sinks": None}
    expected = truth(query, key, value, pack, **options)
    own = (ATTENDS[name](query, key, value, pack, **options).double() - expected).abs().max()
    reference = (ATTENDS["reference"](query, key, value, pack, **options).double() - expected).abs().max()
    assert own <= reference + torch.finfo(dtype).eps * expected.abs().max()


def test_rectangles_cover_what_many_queries_share() -> None:
    header = list(range(300))
    requests = [
        ScoringRequest((*header, 1000 + question, *range(40), 2000 + choice, 5), 342)
        for question in range(5)
        for choice in range(4)
    ]
    (pack,) = packs_of(requests, 10_000)
    parts = split_attention(pack, 128)
    assert parts.rectangles, "the header is one"
    widest = max(parts.rectangles, key=lambda each: each.last_q - each.first_q)
    assert widest.first_k == 0
    assert widest.last_k == 300
    covered = sum((each.last_q - each.first_q) * (each.last_k - each.first_k) for each in parts.rectangles)
    assert covered >= 0.9 * 300 * (pack.num_tokens - 342)
    assert int(parts.rest.length_P.sum()) < 0.2 * int(pack.key_runs.length_P.sum()), "few keys are copied"


def test_no_rectangles_without_sharing() -> None:
    (pack,) = packs_of([ScoringRequest(tuple(range(first, first + 300)), 1) for first in (0, 1000, 2000)], 10_000)
    assert split_attention(pack, 128).rectangles == ()


def questions(stem: int, count: int, length: int) -> list[ScoringRequest]:
    """Different continuations of one stem."""
    return [
        ScoringRequest((*range(stem), *range(5000 + 100 * i, 5000 + 100 * i + length), 7), stem) for i in range(count)
    ]


def test_questions_about_a_passage_are_one_span_and_copy_no_key() -> None:
    (pack,) = packs_of(questions(stem=30, count=2, length=20), 10_000)
    (span,) = split_spans(pack, None, 1, torch.float32)
    assert (span.first_q, span.last_q) == (0, pack.num_tokens)
    assert span.key_runs == ((0, pack.num_tokens),)
    seen = (span.mask_qk == 0).sum(dim=1)
    assert seen.tolist() == [position + 1 for position in pack.position_ids_T.tolist()]


def test_what_shares_little_is_not_computed_together() -> None:
    (pack,) = packs_of([ScoringRequest(tuple(range(first, first + 300)), 1) for first in (0, 1000, 2000)], 10_000)
    spans = split_spans(pack, None, 1, torch.float32)
    assert [span.last_q - span.first_q for span in spans] == [50, 50, 50, 50, 50, 49] * 3
    assert [span.mask_qk.shape[1] for span in spans] == [50, 100, 150, 200, 250, 299] * 3


def test_many_short_branches_are_a_few_spans_of_bounded_waste() -> None:
    (pack,) = packs_of(questions(stem=600, count=400, length=3), 10_000)
    spans = split_spans(pack, None, 1, torch.float32)
    assert len(batch_spans(spans, pack.num_tokens, spans_module.MAX_SCORES)) < 30, "calls"
    computed = sum(span.mask_qk.numel() for span in spans)
    needed = sum(int((span.mask_qk == 0).sum()) for span in spans)
    assert computed < 1.5 * needed


@pytest.mark.parametrize("window", [None, 700])
def test_a_long_text_over_two_packs_has_one_small_mask(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans_module, "MAX_SCORES", 1 << 18)
    _, pack = packs_of([ScoringRequest(tuple(range(4001)), 4000)], 2000)
    spans = split_spans(pack, window, 1, torch.float32)
    assert [span.first_q for span in spans] == [0, *(span.last_q for span in spans[:-1])]
    masks = [span.mask_qk for span in spans]
    assert len(spans) > 10
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1
    assert masks[0].untyped_storage().nbytes() <= 4 * (1 << 18)
    keys = [sum(stop - start for start, stop in span.key_runs) for span in spans]
    assert keys == [mask.shape[1] for mask in masks]
    assert max(keys) == 4000 if window is None else max(keys) < 700 + spans_module.ROWS + 1


def test_padding_of_a_fixed_pack_is_zero() -> None:
    tree = build_prefix_tree(shared_requests(3))
    pack = cut_pack(tree, 0, tree.num_tokens, padded_to=tree.num_tokens + 9)
    query, key, value = inputs(pack, torch.float32)
    for name in ("blocked", "reference", "dense"):
        out = ATTENDS[name](query, key, value, pack, scaling=0.3, sliding_window=None, softcap=None, sinks=None)
        assert out.shape == query.shape
        assert (out[tree.num_tokens :] == 0).all()


def test_blocked_is_bitwise_the_same_however_a_text_is_cut() -> None:
    """The same rows of q, k and v, reached through different segments, packs and neighbours."""
    rng = random.Random(7)
    tokens = tuple(rng.randrange(100) for _ in range(3 * BLOCK + 11))
    generator = torch.Generator().manual_seed(1)
    rows = {
        place: tuple(torch.randn(heads, 16, generator=generator) for heads in (4, 2, 2)) for place in range(len(tokens))
    }
    options = {"scaling": 0.3, "sliding_window": None, "softcap": None, "sinks": None}

    def last_row(others: list[ScoringRequest], size: int) -> torch.Tensor:
        tree = build_prefix_tree([ScoringRequest((*tokens, 1), len(tokens)), *others])
        carried: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, tree.num_tokens, size):
            pack = cut_pack(tree, start, min(size, tree.num_tokens - start))
            positions = pack.position_ids_T.tolist()
            query, key, value = (torch.stack([rows[p][part] for p in positions]) for part in range(3))
            if pack.num_carried:
                key, value = torch.cat([carried[0][0], key]), torch.cat([carried[0][1], value])
            out = ATTENDS["blocked"](query, key, value, pack, **options)
            carried = [(key[pack.carry_rows], value[pack.carry_rows])]
            for place, (row, target) in enumerate(zip(pack.slot_row_Q, pack.target_Q, strict=True)):
                if target == 1 and positions[int(pack.answer_row_A[row])] == len(tokens) - 1:
                    found = out[int(pack.answer_row_A[row])]
                    assert place >= 0
                    result = found
        return result

    alone = last_row([], 10_000)
    for cut in (1, 50, BLOCK, 100, len(tokens) - 1):
        branch = ScoringRequest((*tokens[:cut], 777, 3), cut + 1)
        for size in (10_000, 40, 97):
            assert torch.equal(last_row([branch], size), alone)


def test_a_window_gathers_no_key_that_nobody_sees() -> None:
    """Many short segments behind a long prefix: each copies the keys of its window."""
    stem = tuple(range(3, 203))
    requests = [ScoringRequest((*stem, 1000 + first, 2000, 3000), 201) for first in range(20)]
    tree = build_prefix_tree(requests)
    pack = cut_pack(tree, 0, tree.num_tokens)
    gathered = []

    def varlen(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> Any:
        gathered.append(len(key))
        return cpu_varlen(query, key, *args, **options)

    torch.manual_seed(0)
    query, key, value = (torch.randn(tree.num_tokens, heads, 16) for heads in (4, 2, 2))
    asked: dict[str, Any] = {"scaling": 0.25, "sliding_window": 8, "softcap": None, "sinks": None}
    out = attend_varlen(varlen, query, key, value, pack, **asked)
    torch.testing.assert_close(out, ATTENDS["reference"](query, key, value, pack, **asked), rtol=1e-5, atol=1e-5)
    first = len(stem) + 2
    assert gathered == [first + 19 * (2 + 8 - 1)]


NEEDS = AttentionNeeds("cuda", "bfloat16", 64, 64)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (AttentionNeeds("cuda", "bfloat16", softcap=True), "soft cap"),
        (AttentionNeeds("cuda", "float32"), "bf16 and fp16"),
        (AttentionNeeds("cuda", "bfloat16", head_size=512, value_head_size=512), "head sizes"),
        (AttentionNeeds("cuda", "bfloat16", head_size=192, value_head_size=128), "differ in head size"),
        (AttentionNeeds("cpu", "bfloat16"), "runs on CUDA"),
        (AttentionNeeds("cuda", "bfloat16", deterministic=True), "sums depend"),
    ],
)
def test_what_torch_varlen_cannot_do_is_known_before(needs: AttentionNeeds, reason: str) -> None:
    assert PROVIDERS["torch-varlen"].unusable(NEEDS) == ""
    assert reason in PROVIDERS["torch-varlen"].unusable(needs)
    assert choose_provider("auto", needs).name != "torch-varlen"
    with pytest.raises(InputError, match=reason):
        choose_provider("torch-varlen", needs)


def test_the_next_provider_is_taken() -> None:
    assert choose_provider("auto", AttentionNeeds("cpu")).name == "dense"
    assert choose_provider("auto", AttentionNeeds("cpu", softcap=True, sinks=True, sliding_window=True)).name == "dense"
    assert choose_provider("auto", AttentionNeeds("cpu", deterministic=True)).name == "blocked"
    assert choose_provider("auto", AttentionNeeds("cpu"), {"dense"}).name == "reference"
    with pytest.raises(InputError, match="unknown attention provider 'fast'; known: auto, flash-attn-4"):
        choose_provider("fast", NEEDS)
    names = [name for name, _, _ in available_providers(NEEDS)]
    assert names == list(PROVIDERS)


@pytest.mark.parametrize(
    ("needs", "told"),
    [
        (AttentionNeeds("cuda", "bfloat16", softcap=True), ["it has no soft cap"]),
        (AttentionNeeds("cuda", "float32"), ["it takes bf16 and fp16, not float32"]),
        (AttentionNeeds("cuda", "bfloat16"), []),
        (AttentionNeeds("cpu", "float32"), []),
        (AttentionNeeds("cpu", "float32", deterministic=True), []),
    ],
)
def test_what_a_model_asks_for_and_a_provider_lacks_is_told(
    needs: AttentionNeeds, told: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not what the device or the installation lacks."""
    monkeypatch.setattr(registry, "_has", lambda module: module == "torch.nn.attention.varlen")
    with caplog.at_level("INFO", logger="fastscore"):
        choose_provider("auto", needs)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"attention by torch-varlen is not possible: {reason}" for reason in told]


def test_segment_of_the_reference_is_torch_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 4, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    out = attend_segment(query, key, value, 0.25, None, None, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(out, expected)
