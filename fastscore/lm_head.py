"""The LM head as the answer NLL wants it: a weight, a bias, and what the model does to its logits afterwards.

Shapes: A answer rows, J targets per row, D hidden size, V vocabulary, or a process's part of it where several hold one
head together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fastscore_kernels.answer_nll import answer_nll

from fastscore.shards import first_row, is_split, own_part, processes
from fastscore.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LMHead:
    """``logits = softcap(logit_scale * (hidden @ weight_VD.T + bias_V))``.

    vocab_size: of the whole model. first_token, group: of weight and bias, where each process of a group holds the rows
        of some tokens.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    logit_scale: float
    logit_softcap: float | None
    vocab_size: int
    first_token: int = 0
    group: Any = None

    def nll(self, hidden_AD: torch.Tensor, target_AJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """NLL in nats ``[A, J]`` of the targets, which the caller has checked, and each row's most probable token."""
        options: dict[str, Any] = {
            "bias": self.bias_V,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }
        if self.group is None:
            return answer_nll(hidden_AD, self.weight_VD, target_AJ, **options, check_targets=False)
        from fastscore_kernels.vocab_parallel import vocab_parallel_answer_nll

        return vocab_parallel_answer_nll(
            hidden_AD, self.weight_VD, target_AJ, **options, vocab_start=self.first_token, group=self.group
        )

    def logits(self, hidden_AD: torch.Tensor) -> torch.Tensor:
        """Logits ``[A, V]`` in fp32: for checks on a few rows, never for scoring."""
        logits_AV = hidden_AD.float() @ self.weight_VD.float().T
        if self.bias_V is not None:
            logits_AV = logits_AV + self.bias_V.float()
        logits_AV = logits_AV * self.logit_scale
        if self.logit_softcap is not None:
            logits_AV = torch.tanh(logits_AV / self.logit_softcap) * self.logit_softcap
        return logits_AV


def find_lm_head(model: PreTrainedModel) -> LMHead:
    """Read the head off a model and its config.

    Raises:
        InputError: the model has no output embeddings.
    """
    module = model.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None:
        raise InputError(f"{type(model).__name__} has no LM head: it is not a language model")
    config = model.config.get_text_config()
    bias_V = getattr(module, "bias", None)
    if bias_V is None and (row_1V := getattr(model, "final_logits_bias", None)) is not None:  # BART
        bias_V = row_1V[0]
    weight_VD, scale, softcap = module.weight, _logit_scale(config), _logit_softcap(config)
    vocab_size = len(weight_VD)
    if bias_V is not None:
        bias_V = own_part(bias_V)
    if not is_split(weight_VD):
        return LMHead(own_part(weight_VD), bias_V, scale, softcap, vocab_size)
    first, group = first_row(weight_VD), processes(weight_VD)
    return LMHead(own_part(weight_VD), bias_V, scale, softcap, vocab_size, first, group)


def _logit_scale(config: object) -> float:
    """Families name it differently; ``check_lm_head`` finds out when a new one does something else."""
    scale = 1.0
    if (multiplier := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale *= float(multiplier)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale /= float(divisor)
    if (multiplier := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
        scale *= float(multiplier)
    if getattr(config, "scale_decoder_outputs", False):  # T5 with tied embeddings
        scale *= float(config.d_model) ** -0.5  # type: ignore[attr-defined]
    return scale


def _logit_softcap(config: object) -> float | None:
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma 2, Griffin, xLSTM
        if (softcap := getattr(config, name, None)) is not None:
            return float(softcap)
    return None


def check_lm_head(head: LMHead, hidden_AD: torch.Tensor, logits_AV: torch.Tensor) -> None:
    """Compare the head with the model's own logits ``[A, V]`` of the whole vocabulary for the same hidden states.

    Raises:
        InputError: they differ: the head does something that is not known here, and scores would be wrong.
    """
    shape = (head.vocab_size, head.weight_VD.shape[1])
    if shape != (logits_AV.shape[1], hidden_AD.shape[1]):
        raise InputError(
            f"hidden states of size {hidden_AD.shape[1]}, an LM head of shape {shape} and "
            f"{logits_AV.shape[1]} logits do not fit together: this architecture is not supported"
        )
    logits_AV = logits_AV[:, head.first_token : head.first_token + len(head.weight_VD)]
    ours_AV, theirs_AV = head.logits(hidden_AD), logits_AV.float()
    # Log-probabilities don't see a constant, so neither does this.
    ours_AV = ours_AV - ours_AV.mean(dim=1, keepdim=True)
    theirs_AV = theirs_AV - theirs_AV.mean(dim=1, keepdim=True)
    # Rounding goes with the logits as they are, constant included: against their norm, bf16 gives about 0.002.
    difference = float((ours_AV - theirs_AV).norm() / logits_AV.float().norm().clamp_min(1e-30))
    if not difference <= (1e-3 if hidden_AD.dtype == torch.float32 else 0.03):
        raise InputError(
            f"the model's logits are not its hidden states times its LM head (relative difference {difference:.1e}): "
            "this architecture is not supported"
        )
