"""Loading: dtypes, adapters, device maps, the self-check, and models that must be refused."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCAB_SIZE, make_tiny_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from truth import alone, alone_in, plain_model

from fastscore import Scorer, models, probes, self_check
from fastscore.attention import PROVIDERS
from fastscore.config import ScorerConfig
from fastscore.decoder import multiplies
from fastscore.packed_forward import ModelForward
from fastscore.packing import cut_pack
from fastscore.prefix_tree import build_prefix_tree
from fastscore.types import CarriedKeys, InputError, PackedBatch

Pairs = list[tuple[list[int], list[int]]]


def token_pairs(lengths: tuple[int, ...] = (1, 2, 9, 40, 73), answer_length: int = 4) -> Pairs:
    draw = random.Random(3)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]

    return [(ids(length), ids(answer_length)) for length in lengths]


def token_logprobs(scorer: Scorer, pairs: Pairs) -> list[list[float]]:
    return [list(score.token_logprobs) for score in scorer.score_tokens(pairs)]


def assert_close(found: list[list[float]], truth: list[list[float]], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, truth, strict=True):
        assert one == pytest.approx(other, abs=tolerance)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "everything": {"target_modules": "all-linear", "use_rslora": True},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "trained-head": {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_scores_as_the_unmerged_one(kind: str, llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **ADAPTERS[kind])
    adapted = get_peft_model(plain_model(llama), config)
    if kind == "trained-head":
        with torch.no_grad():
            adapted.get_output_embeddings().weight.normal_(std=0.2)
    adapted.save_pretrained(tmp_path)
    truth = alone_in(PeftModel.from_pretrained(plain_model(llama), tmp_path).eval(), token_pairs())
    scorer = Scorer(str(llama), adapter=str(tmp_path), dtype="fp32")
    assert_close(token_logprobs(scorer, token_pairs()), truth, 2e-5)
    assert scorer.describe()["adapter"] == str(tmp_path)
    without = alone(llama, token_pairs())
    assert max(abs(a - b) for x, y in zip(truth, without, strict=True) for a, b in zip(x, y, strict=True)) > 0.1


def test_adapters_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    wider = make_tiny_model(tmp_path / "wider", hidden_size=96)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(plain_model(wider), config).save_pretrained(tmp_path / "of-the-wider")
    other = get_peft_model(plain_model(make_tiny_model(tmp_path / "gpt2", "gpt2")), LoraConfig(target_modules=["c_fc"]))
    other.save_pretrained(tmp_path / "of-gpt2")
    (tmp_path / "empty").mkdir()
    for adapter in ("nowhere", "empty", "of-the-wider", "of-gpt2"):
        with pytest.raises(InputError, match=f"adapter '.*{adapter}' cannot be loaded: .") as raised:
            Scorer(str(llama), adapter=str(tmp_path / adapter)).load()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "bf16"), ("llama", "fp16"), ("gemma2", "bf16"), ("bloom", "bf16"), ("t5", "bf16")]
)
def test_low_precision_is_as_near_as_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    """The mean error against fp32 is at most that of plain transformers in the same dtype, unpadded, and a tenth."""
    folder, pairs = make_tiny_model(tmp_path, family), token_pairs((5, 20, 33, 60) * 2, 40)
    scorer = Scorer(str(folder), dtype=dtype)
    assert scorer.describe()["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    truth = torch.tensor(alone(folder, pairs))
    plain = torch.tensor(alone_in(plain_model(folder, getattr(torch, scorer.describe()["dtype"])), pairs))
    ours = torch.tensor(token_logprobs(scorer, pairs))
    assert 0 < (ours - truth).abs().mean() <= 1.1 * (plain - truth).abs().mean()


def test_dtype_auto_is_bf16_only_where_it_is_native(llama: Path) -> None:
    expected = "bfloat16" if multiplies(torch.device("cpu"), torch.bfloat16) else "float32"
    assert Scorer(str(llama), device="cpu").describe()["dtype"] == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "longrope"])
def test_products_without_instructions_are_told_where_they_remain(
    family: str, native: bool, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """fastscore's own forward pass has none; the model's own layers do."""
    monkeypatch.setattr(models, "multiplies", lambda device, dtype: native or dtype == torch.float32)
    with caplog.at_level(logging.WARNING, logger="fastscore"):
        folder = longrope(tmp_path) if family == "longrope" else make_tiny_model(tmp_path, family)
        Scorer(str(folder), dtype=dtype, device="cpu").score_tokens(token_pairs())
    told = f"PyTorch has no fast {dtype} products on this CPU, and this model's own layers use them: "
    is_slow = family != "llama" and dtype != "fp32" and not native
    expected = [f"{told}fp32 is faster, and nearer to the truth"] if is_slow else []
    assert [record.getMessage() for record in caplog.records if record.name == "fastscore"] == expected


def test_device_map(llama: Path) -> None:
    scorer = Scorer(str(llama), device_map="cpu", dtype="fp32")
    assert_close(token_logprobs(scorer, token_pairs()), alone(llama, token_pairs()))
    assert scorer.describe()["device"] == "cpu"
    automatic = Scorer(str(llama), device_map="auto", dtype="fp32")
    assert_close(token_logprobs(automatic, token_pairs()), alone(llama, token_pairs()), 1e-3)


@pytest.mark.parametrize("device", ["cuda:97", "nowhere", "cpu:x"])
def test_devices_that_are_not_there(device: str, llama: Path) -> None:
    with pytest.raises(InputError, match=f"^device '{device}' cannot be used: .") as raised:
        Scorer(str(llama), device=device).load()
    assert "\n" not in str(raised.value)


def test_incomplete_models_are_refused(llama: Path, tmp_path: Path) -> None:
    def copy(name: str, *left_out: str) -> Path:
        (tmp_path / name).mkdir()
        for path in llama.iterdir():
            if path.name not in left_out:
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
        return tmp_path / name

    def refused(folder: Path, complaint: str) -> None:
        with pytest.raises(InputError, match=complaint) as raised:
            Scorer(str(folder)).load()
        assert "\n" not in str(raised.value)

    refused(copy("no-weights", "model.safetensors"), "cannot be loaded: .*no file named model.safetensors")
    weights = (llama / "model.safetensors").read_bytes()
    (copy("cut") / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(tmp_path / "cut", "cannot be loaded: SafetensorError")
    refused(copy("no-tokenizer", "tokenizer.json", "tokenizer_config.json"), "cannot be loaded: ")
    # transformers would fill both with random numbers.
    plain_model(llama).model.save_pretrained(copy("no-head"))
    refused(tmp_path / "no-head", r"lm_head\.weight not among its weights")
    config = json.loads((llama / "config.json").read_text())
    (copy("too-few-layers") / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    refused(tmp_path / "too-few-layers", r"model\.layers\.2\..* and 15 more not among its weights")


@pytest.mark.parametrize("family", ["bloom", "mamba", "falcon"])
def test_padded_mode_is_logged_once(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_tiny_model(tmp_path, family)
    with caplog.at_level(logging.INFO, logger="fastscore"):
        scorer = Scorer(str(folder), dtype="fp32", device="cpu", max_batch_tokens=100)
        assert_close(token_logprobs(scorer, token_pairs()), alone(folder, token_pairs()))
        token_logprobs(scorer, token_pairs())
    (record,) = [record for record in caplog.records if record.name == "fastscore"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"cpu, fp32, not packed: {scorer.describe()['mode_reason']}"
    assert scorer.describe()["attention"] == "model's own"


def test_packed_mode_is_logged_once(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastscore"):
        Scorer(str(llama), dtype="fp32", device="cpu").score_tokens(token_pairs())
    assert [record.getMessage() for record in caplog.records if record.name == "fastscore"] == [
        "cpu, fp32, packed, attention by dense"
    ]


def test_layers_that_no_probe_tells_apart_run_padded(tmp_path: Path) -> None:
    """Llama 4 attends within chunks of 8,192 tokens: a short probe sees no difference, so the layers' name decides."""
    scorer = Scorer(str(make_tiny_model(tmp_path, "llama4_text", attention_chunk_size=8192)), dtype="fp32")
    assert scorer.describe()["mode"] == "padded"
    assert scorer.describe()["mode_reason"] == "layers of type chunked_attention"


def longrope(folder: Path) -> Path:
    """A model that turns positions by other angles in sequences of more than 32 tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    return make_tiny_model(folder, "phi3", rope_parameters=rope, original_max_position_embeddings=32)


def test_longrope_deterministic_scores_do_not_depend_on_neighbours(tmp_path: Path) -> None:
    """Long requests take the padded path: each by itself."""
    scorer = Scorer(str(longrope(tmp_path)), dtype="fp32", deterministic=True)
    pairs = token_pairs((5, 60, 20, 90, 27, 61, 31, 75))
    together = scorer.score_tokens(pairs)
    scorer.load().max_batch_tokens = 70
    assert scorer.score_tokens(pairs[::-1])[::-1] == together
    assert [scorer.score_tokens([pair])[0] for pair in pairs] == together
    assert_close([list(score.token_logprobs) for score in together], alone(tmp_path, pairs))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}),
        ("phimoe", {}),
    ],
)
def test_a_window_that_only_the_mask_knows_is_not_lost(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Packs have no mask: such a model runs padded. Without its window it is packed."""
    pairs = token_pairs((5, 60, 20, 90, 27))
    folder = make_tiny_model(tmp_path / "window", family, sliding_window=40, **options)
    scorer = Scorer(str(folder), dtype="fp32")
    assert_close(token_logprobs(scorer, pairs), alone(folder, pairs))
    assert scorer.describe()["mode"] == "padded"
    assert (
        scorer.describe()["mode_reason"] == "its layers don't tell their attention of the sliding window of 40 tokens"
    )
    folder = make_tiny_model(tmp_path / "none", family)
    scorer = Scorer(str(folder), dtype="fp32")
    assert_close(token_logprobs(scorer, pairs), alone(folder, pairs))
    assert scorer.describe()["mode"] == "packed"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [60, 4096])
def test_longrope_lengths_do_not_mix(attention: str, budget: int, tmp_path: Path) -> None:
    """Phi-3's long factors hold for every position of a batch that has one long sequence in it."""
    folder = longrope(tmp_path)
    pairs = token_pairs((5, 60, 20, 90, 27, 12, 31))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    scorer = Scorer.from_model(model, make_tokenizer(tmp_path / "tokenizer"), max_batch_tokens=budget)
    assert_close(token_logprobs(scorer, pairs), alone(folder, pairs))


REMOTE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path("executed").touch()

class OwnConfig(LlamaConfig):
    model_type = "own_family"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_runs_only_when_trusted(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder, marker = tmp_path / "own", tmp_path / "executed"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    config["model_type"] = "own_family"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(REMOTE)
    with pytest.raises(InputError, match=r"custom code .*--trust-remote-code allows that") as raised:
        Scorer(str(folder))
    assert "\n" not in str(raised.value)
    assert not marker.exists()
    scorer = Scorer(str(folder), trust_remote_code=True, dtype="fp32")
    assert_close(token_logprobs(scorer, token_pairs()), alone(llama, token_pairs()))
    assert scorer.describe()["architecture"] == "OwnForCausalLM"
    assert marker.exists()


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = make_tokenizer(tmp_path)
    for family in ("bert", "bert-generation", "electra"):
        for decoder in (False, True):
            config = AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, is_decoder=decoder, **sizes)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if family == "bert-generation" and decoder:
                scorer = Scorer.from_model(model, tokenizer)
                assert_close(token_logprobs(scorer, token_pairs()), alone_in(model_like(model), token_pairs()))
                continue
            complaint = "is not supported" if decoder else "is not a causal language model"
            with pytest.raises(InputError, match=complaint):
                Scorer.from_model(model, tokenizer)


def model_like(model: Any) -> Any:
    """A second model with the same weights, for the truth: a scorer changes its own."""
    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, attn_implementation="eager")
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def test_a_model_in_memory_serves_several_scorers(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.train()
    tokenizer = make_tokenizer(llama)
    truth = alone(llama, token_pairs())
    for budget in (10, 4096):
        scorer = Scorer.from_model(model, tokenizer, max_batch_tokens=budget)
        assert scorer.describe()["mode"] == "packed"
        assert_close(token_logprobs(scorer, token_pairs()), truth)
    assert not model.training


def test_encoder_decoder_that_does_not_say_how_answers_begin(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "t5", decoder_start_token_id=None)
    with pytest.raises(InputError, match="decoder_start_token_id"):
        Scorer(str(folder)).load()


def test_the_probes_have_keys_carried_on_through_a_whole_pack() -> None:
    """Only then does the self-check see a forward pass that carries nothing on but what is its own."""
    first, second, third, _ = probes.probe_requests(VOCAB_SIZE)
    tree = build_prefix_tree([first, second, third])
    size = probes.SHARED_PACK
    cuts = [(start, min(size, tree.num_tokens - start)) for start in range(0, tree.num_tokens, size)]
    packs = [cut_pack(tree, start, length) for start, length in cuts]
    assert len(packs) == 3
    assert bool((packs[1].carry_rows < packs[1].num_carried).any())
    assert packs[2].num_carried == len(packs[1].carry_rows)


def test_a_forward_pass_that_forgets_carried_keys_is_found_out(llama: Path) -> None:
    model = plain_model(llama)
    check = self_check.SelfCheck(model, model.device)
    assert check.packed()[0] == ""
    right = ModelForward(model, PROVIDERS["reference"].load())
    assert check.truth.difference(right) == ""

    def forgets(pack: PackedBatch, carried: CarriedKeys, rows: torch.Tensor | None) -> tuple[Any, CarriedKeys]:
        hidden, carry = right(pack, carried, rows)
        old = pack.carry_rows < pack.num_carried
        for keys, values in carry:
            keys[old], values[old] = 0.0, 0.0
        return hidden, carry

    assert check.truth.difference(forgets).startswith("it is wrong")


def test_the_head_is_compared_in_the_models_own_attention(tmp_path: Path) -> None:
    """Not states of one attention with logits of another, where the two differ."""
    model = plain_model(make_tiny_model(tmp_path / "gemma2", "gemma2", attn_logit_softcapping=0.01))
    attention: list[str] = []
    model.model.layers[0].self_attn.register_forward_hook(
        lambda module, *_: attention.append(module.config._attn_implementation)
    )
    seen: list[int] = []
    find = models.check_lm_head

    def note(*arguments: Any) -> None:
        seen.append(len(attention))
        find(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "check_lm_head", note)
        models.prepare_model(model, ScorerConfig("gemma2", dtype="fp32"))
    assert set(attention[: seen[0]]) == {"eager"}
