"""The LM head read off a model, and heads that it does not describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB_SIZE, make_tiny_model, make_tokenizer
from transformers import LlamaForCausalLM
from truth import alone, plain_model

from fastscore import Scorer
from fastscore.lm_head import find_lm_head
from fastscore.types import InputError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(
    ("family", "scale", "softcap", "bias", "tied"),
    [
        ("llama", 1.0, None, False, False),
        ("gemma", 1.0, None, False, True),
        ("gemma2", 1.0, 3.0, False, True),
        ("granite", 0.25, None, False, False),
        ("cohere", 0.25, None, False, True),
        ("phi", 1.0, None, True, False),
        ("gptj", 1.0, None, True, False),
        ("t5", 0.125, None, False, True),
        ("bart", 1.0, None, True, True),
    ],
)
def test_lm_head_of(family: str, scale: float, softcap: float | None, bias: bool, tied: bool, tmp_path: Path) -> None:
    model = plain_model(make_tiny_model(tmp_path, family))
    head = find_lm_head(model)
    assert (head.logit_scale, head.logit_softcap) == (scale, softcap)
    assert (head.bias_V is not None) == bias
    assert (head.weight_VD is model.get_input_embeddings().weight) == tied


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> type[LlamaForCausalLM]:
    """Llama with something done to its logits that no field of its config tells of."""

    class Changed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    return Changed


VECTOR = torch.linspace(-0.5, 0.5, VOCAB_SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda logits: 1.1 * logits, id="scale"),
        pytest.param(lambda logits: logits / 8, id="small-scale"),
        pytest.param(lambda logits: logits + VECTOR.to(logits.dtype), id="bias"),
        pytest.param(lambda logits: 2 * torch.tanh(logits / 2), id="softcap"),
        pytest.param(lambda logits: logits.flip(-1), id="order"),
        pytest.param(lambda logits: torch.nn.functional.layer_norm(logits, logits.shape[-1:]), id="norm"),
        pytest.param(lambda logits: logits * torch.nan, id="nan"),
        pytest.param(lambda logits: logits[..., :500], id="fewer"),
    ],
)
def test_a_head_that_does_something_else_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, llama: Path
) -> None:
    model = with_head(change).from_pretrained(llama, dtype=dtype)
    with pytest.raises(InputError, match="this architecture is not supported"):
        Scorer.from_model(model, make_tokenizer(llama))


def test_a_constant_added_to_all_logits_changes_nothing(llama: Path) -> None:
    model = with_head(lambda logits: logits + 7).from_pretrained(llama, dtype=torch.float32)
    scorer = Scorer.from_model(model, make_tokenizer(llama))
    pairs = [([5, 6, 7], [8, 9]), ([300], [301, 302, 303])]
    for score, truth in zip(scorer.score_tokens(pairs), alone(llama, pairs), strict=True):
        assert score.token_logprobs == pytest.approx(truth, abs=1e-5)


def test_a_model_without_an_lm_head_is_refused(llama: Path) -> None:
    with pytest.raises(InputError, match="LlamaModel has no LM head: it is not a language model"):
        Scorer.from_model(plain_model(llama).model, make_tokenizer(llama))
