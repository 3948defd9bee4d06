"""fastscore's own forward pass against the model's layers: in fp32 the same numbers, in bf16 nearer to the truth."""

from __future__ import annotations

import logging
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model
from truth import alone_in, plain_model

from fastscore.attention import PROVIDERS
from fastscore.config import ScorerConfig
from fastscore.decoder import OwnForward, choose_operators, instructions, read_decoder
from fastscore.decoder import operators as operators_module
from fastscore.decoder.operators import CompiledOperators, Operators, PackedOperators, packing_works
from fastscore.decoder.skeleton import Rotary
from fastscore.models import prepare_model
from fastscore.packed_forward import ATTENTION_NAME, ModelForward, body_of
from fastscore.packing import cut_pack
from fastscore.prefix_tree import build_prefix_tree
from fastscore.quantize import quantize_linears
from fastscore.types import CarriedKeys, InputError, ScoringRequest

OWN = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3", "gemma", "gemma2", "gemma3_text"]
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "granite": {"embedding_multiplier": 12.3},
}
OTHERS = ["olmo2", "cohere", "mixtral", "gpt2", "gpt_oss"]


def requests(seed: int = 3, count: int = 12) -> list[ScoringRequest]:
    draw = random.Random(seed)
    stem = [draw.randrange(3, 500) for _ in range(40)]
    made = []
    for _ in range(count):
        tokens = stem[: draw.randint(0, 40)] + [draw.randrange(3, 500) for _ in range(draw.randint(2, 30))]
        made.append(ScoringRequest(tuple(tokens), draw.randint(1, len(tokens) - 1)))
    return made


def hidden_states(forward: Any, size: int, only_answers: bool) -> torch.Tensor:
    """Of the rows that predict answer tokens, pack after pack."""
    tree = build_prefix_tree(requests())
    carried: CarriedKeys = []
    parts = []
    with torch.inference_mode():
        for start in range(0, tree.num_tokens, size):
            pack = cut_pack(tree, start, min(size, tree.num_tokens - start))
            hidden, carried = forward(pack, carried, pack.answer_row_A if only_answers else None)
            parts.append(hidden if only_answers else hidden[pack.answer_row_A])
    return torch.cat(parts)


def packed_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = plain_model(folder, dtype)
    model.set_attn_implementation(ATTENTION_NAME)
    return model


def own_forward(model: Any, operators: Operators) -> OwnForward:
    decoder = read_decoder(model, body_of(model))
    assert not isinstance(decoder, str), decoder
    return OwnForward(operators.prepare(decoder), operators, PROVIDERS["reference"].load())


@pytest.mark.parametrize("family", OWN)
def test_own_layers_are_the_models_layers(family: str, tmp_path: Path) -> None:
    model = packed_model(make_tiny_model(tmp_path, family))
    truth = hidden_states(ModelForward(model, PROVIDERS["reference"].load()), 10_000, False)
    own = own_forward(model, Operators(torch.float32, wide=True))
    for size in (10_000, 60, 7):
        for only_answers in (False, True):
            torch.testing.assert_close(hidden_states(own, size, only_answers), truth, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_merged_weights_are_the_models_own(bias: bool, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", attention_bias=bias, mlp_bias=bias)
    model, untouched = plain_model(folder), plain_model(folder)
    read_decoder(model, body_of(model))
    again = read_decoder(model, body_of(model))
    assert not isinstance(again, str)
    attention = model.model.layers[1].self_attn
    assert again.layers[1].qkv.weight.data_ptr() == attention.q_proj.weight.data_ptr(), "merged once, held once"
    for (name, ours), theirs in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ids_1L = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids_1L).logits, untouched(ids_1L).logits)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2", "gemma2"])
def test_bf16_with_an_fp32_residual_is_nearer_to_the_truth(family: str, tmp_path: Path) -> None:
    """Against fp32 with the same (bf16) weights, over hundreds of states, for the plain operators, and the packed ones
    where this CPU can read packed weights."""
    folder = make_tiny_model(tmp_path, family, num_hidden_layers=8)
    model = packed_model(folder, torch.bfloat16)
    exact = packed_model(folder, torch.bfloat16).float()
    reference = PROVIDERS["reference"].load()
    truth = hidden_states(ModelForward(exact, reference), 10_000, False)
    model_error = (hidden_states(ModelForward(model, reference), 10_000, False) - truth).norm()
    kinds: list[Operators] = [Operators(torch.float32, wide=False)]
    if packing_works():
        kinds.append(PackedOperators(torch.float32, wide=True))
    for operators in kinds:
        own_error = (hidden_states(own_forward(model, operators), 60, True) - truth).norm()
        assert own_error < 0.9 * model_error
    kept = hidden_states(own_forward(model, Operators(torch.bfloat16, wide=False)), 60, True) - truth
    assert kept.norm() < 1.3 * model_error, "with the model's residual dtype about what the model itself gives"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", OWN)
def test_widened_weights_give_the_fp32_models_numbers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Those of the same rounded weights in an fp32 model, unpadded: nothing else is rounded."""
    model = packed_model(make_tiny_model(tmp_path, family, **OPTIONS.get(family, {})), dtype)
    exact = packed_model(tmp_path, dtype).float()
    truth = hidden_states(ModelForward(exact, PROVIDERS["reference"].load()), 10_000, False)
    own = own_forward(model, Operators(torch.float32, wide=True, widened=True))
    for size in (10_000, 60, 7):
        for only_answers in (False, True):
            torch.testing.assert_close(hidden_states(own, size, only_answers), truth, rtol=1e-5, atol=2e-5)
    assert own.decoder.layers[0].qkv.weight.dtype == dtype, "memory holds them as they were loaded"


@pytest.mark.skipif(not packing_works(), reason="needs oneDNN's packed weights, and a CPU that can read them")
@pytest.mark.parametrize(
    ("family", "overrides"), [*((family, {}) for family in OWN), ("phi3", {"partial_rotary_factor": 0.5})]
)
def test_packed_operators_compute_the_same(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """But for rounding; with norms of heads whose weights differ, which a wrong order of entries would mix up."""
    model = packed_model(make_tiny_model(tmp_path, family, **overrides), torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    plain = hidden_states(own_forward(model, Operators(torch.float32, wide=True)), 60, True)
    packed = hidden_states(own_forward(model, PackedOperators(torch.float32, wide=True)), 60, True)
    assert (packed - plain).norm() < 0.02 * plain.norm()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_operators_compute_the_same(tmp_path: Path) -> None:
    model = packed_model(make_tiny_model(tmp_path, "llama"))
    plain = hidden_states(own_forward(model, Operators(torch.float32, wide=True)), 60, True)
    compiled = hidden_states(own_forward(model, CompiledOperators(torch.float32, wide=True)), 60, True)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=2e-5)
    half = packed_model(tmp_path, torch.bfloat16)
    plain = hidden_states(own_forward(half, Operators(torch.float32, wide=True, widened=True)), 60, True)
    compiled = hidden_states(own_forward(half, CompiledOperators(torch.float32, wide=True, widened=True)), 60, True)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_run_their_own_layers(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = plain_model(make_tiny_model(tmp_path, family))
    with caplog.at_level(logging.INFO, "fastscore"):
        loaded = prepare_model(model, ScorerConfig(device="cpu"))
    assert loaded.forward_name.startswith("the model's own layers: ")
    assert "the model's own layers run: " in caplog.text
    for config in (ScorerConfig(forward="own"), ScorerConfig(residual="fp32"), ScorerConfig(compiled=True)):
        with pytest.raises(InputError, match="is not possible with this model"):
            prepare_model(model, config)


def test_whose_layers_run_is_told(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama")
    own = prepare_model(plain_model(folder), ScorerConfig())
    assert own.forward_name == "fastscore's, residual stream in float32, plain PyTorch"
    theirs = prepare_model(plain_model(folder), ScorerConfig(forward="model"))
    assert theirs.forward_name == "the model's own layers"
    kept = prepare_model(plain_model(folder, torch.bfloat16), ScorerConfig(residual="model"))
    assert "residual stream in bfloat16" in kept.forward_name


def test_a_forward_pass_that_is_wrong_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastscore.decoder.operators.rms_norm", lambda hidden, weight, eps: hidden * weight)
    folder = make_tiny_model(tmp_path, "llama")
    with caplog.at_level(logging.WARNING, "fastscore"):
        loaded = prepare_model(plain_model(folder), ScorerConfig())
    assert "own forward pass is not used: it is wrong (relative difference" in caplog.text
    assert "was tried: it is wrong" in loaded.forward_name
    with pytest.raises(InputError, match="forward own is not possible"):
        prepare_model(plain_model(folder), ScorerConfig(forward="own"))


def test_quantised_or_spread_models_are_left_alone(tmp_path: Path) -> None:
    class Odd(torch.nn.Linear):
        """As a quantiser or an adapter would put in a linear layer's place."""

    model = plain_model(make_tiny_model(tmp_path, "llama"))
    layer = model.model.layers[0].mlp
    odd = Odd(layer.down_proj.in_features, layer.down_proj.out_features, bias=False)
    odd.weight = layer.down_proj.weight
    layer.down_proj = odd
    assert read_decoder(model, body_of(model)) == "its linear layers are not plain ones"


def test_quantising_asks_for_what_it_needs(tmp_path: Path) -> None:
    model = plain_model(make_tiny_model(tmp_path, "llama"))
    with pytest.raises(InputError, match="quantize int8 needs a model in bf16 or fp16"):
        quantize_linears(model, "int8")
    with pytest.raises(InputError, match="quantize fp8 needs a model in bf16"):
        quantize_linears(model.half(), "fp8")
    with pytest.raises(InputError, match="quantize fp8 needs a CUDA device"):
        quantize_linears(model.bfloat16(), "fp8")
    if find_spec("torchao") is None:
        with pytest.raises(InputError, match=r"pip install 'fastscore\[quantize\]'"):
            quantize_linears(model, "int8")


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs the extra [quantize]")
def test_int8_scores_are_near(tmp_path: Path) -> None:
    from fastscore import Scorer

    folder = str(make_tiny_model(tmp_path, "llama"))
    pairs = [(r.token_ids[: r.answer_start], r.token_ids[r.answer_start :]) for r in requests()]
    exact = Scorer(folder, dtype="bf16", device="cpu").score_tokens(pairs)
    eight = Scorer(folder, dtype="bf16", device="cpu", quantize="int8").score_tokens(pairs)
    differences = [abs(a.mean_logprob - b.mean_logprob) for a, b in zip(exact, eight, strict=True)]
    assert 0 < sum(differences) / len(differences) < 0.2


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs the extra [quantize]")
@pytest.mark.parametrize(("family", "share", "level"), [("llama", 100, "INFO"), ("mixtral", 14, "WARNING")])
def test_how_much_is_quantised_is_told(
    family: str, share: int, level: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Experts that are one tensor stay as they are."""
    caplog.set_level("INFO", logger="fastscore")
    quantize_linears(plain_model(make_tiny_model(tmp_path, family)).bfloat16(), "int8")
    [record] = [record for record in caplog.records if "in eight bits" in record.message]
    assert (record.levelname, f"{share}% of" in record.message) == (level, True), record.message


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="belong to fastscore's own forward pass"):
        ScorerConfig(forward="model", residual="fp32")
    with pytest.raises(ValueError, match="forward must be one of auto, own, model"):
        ScorerConfig(forward="theirs")  # type: ignore[arg-type]


def test_operators_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert type(choose_operators(cpu, torch.float32, torch.float32, wide=True, compiled=False)) is Operators
    assert type(choose_operators(cpu, torch.float32, torch.float32, wide=True, compiled=True)) is CompiledOperators
    for native in (True, False):

        def multiplies(device: torch.device, dtype: torch.dtype, can: bool = native) -> bool:
            assert (device, dtype) in ((cpu, torch.float16), (cpu, torch.bfloat16), (cpu, torch.float32))
            return can or dtype == torch.float32

        monkeypatch.setattr(operators_module, "multiplies", multiplies)
        for compiled in (True, False):
            chosen = choose_operators(cpu, torch.float16, torch.float32, wide=True, compiled=compiled)
            assert ("products in float32" in chosen.description) is not native
            chosen = choose_operators(cpu, torch.float32, torch.float32, wide=True, compiled=compiled)
            assert "products in float32" not in chosen.description
            chosen = choose_operators(torch.device("cuda"), torch.float16, torch.float32, wide=True, compiled=compiled)
            assert "products in float32" not in chosen.description


def test_x86_multiplies_bf16_only_with_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN takes AVX-512 alone for enough, and emulates."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(instructions.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for tile in (True, False):
        for avx in (True, False):
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=tile: has)
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx: has)
            assert instructions.multiplies(cpu, torch.bfloat16) is (tile or avx)
    monkeypatch.setattr(instructions.platform, "machine", lambda: "aarch64")
    assert instructions.multiplies(cpu, torch.bfloat16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert [instructions.multiplies(cpu, dtype) for dtype in (torch.bfloat16, torch.float16)] == [False, False]
    assert instructions.multiplies(cpu, torch.float32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_without_instructions_scores_are_those_of_fp32(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole scorer, LM head included: only the weights are rounded, and with the model's own residual dtype
    the sums of layers."""
    from fastscore import Scorer

    monkeypatch.setattr(operators_module, "multiplies", lambda device, dtype: False)
    folder = make_tiny_model(tmp_path, "llama")
    pairs = [(r.token_ids[: r.answer_start], r.token_ids[r.answer_start :]) for r in requests()]
    rounded = plain_model(folder, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]).float()
    scorer = Scorer(str(folder), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    scores = scorer.score_tokens(pairs)
    for score, truth in zip(scores, alone_in(rounded, pairs), strict=True):
        assert score.token_logprobs == pytest.approx(truth, abs=1e-5)
    assert scorer.describe()["forward"].endswith("products in float32")
    narrow = Scorer(str(folder), dtype=dtype, device="cpu", residual="model")  # type: ignore[arg-type]
    again = [p for score in narrow.score_tokens(pairs) for p in score.token_logprobs]
    differences = [abs(a - b) for a, b in zip(again, [p for s in scores for p in s.token_logprobs], strict=True)]
    assert 0 < sum(differences) / len(differences) < 0.1


def test_scores_of_a_bf16_model_agree_with_fp32(tmp_path: Path) -> None:
    """Through the whole scorer: the mean over many answer tokens stays within bf16's own error."""
    from fastscore import Scorer

    folder = make_tiny_model(tmp_path, "llama")
    pairs = [(r.token_ids[: r.answer_start], r.token_ids[r.answer_start :]) for r in requests()]
    truth = alone_in(plain_model(folder, torch.bfloat16).float(), pairs)
    scores = Scorer(str(folder), dtype="bf16", device="cpu").score_tokens(pairs)
    flat = [(a, b) for s, t in zip(scores, truth, strict=True) for a, b in zip(s.token_logprobs, t, strict=True)]
    assert sum(abs(a - b) for a, b in flat) / len(flat) < 0.03


def test_positions_are_exact_whatever_products_are_rounded_to() -> None:
    """As inside somebody's autocast, where angles that come of a product would be radians away."""
    rotary = Rotary({"": 10000.0 ** -(torch.arange(0, 64, 2) / 64)}, {"": 1.0})
    like, positions_1T = torch.empty(0), torch.arange(3900, 4100)[None]
    expected = rotary(like, positions_1T)
    with torch.autocast("cpu", torch.bfloat16):
        found = rotary(like, positions_1T)
    assert all(map(torch.equal, found, expected))
    angle_Tr = positions_1T[0, :, None].double() * rotary.frequency_r[""].double()
    assert (expected[0][0, :, :32] - angle_Tr.cos()).abs().max() < 1e-3
