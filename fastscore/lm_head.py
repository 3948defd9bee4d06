"""The LM head as the answer NLL wants it: a weight, a bias, and what the model does to its logits afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fastscore.types import InputError


@dataclass(frozen=True, slots=True)
class LMHead:
    """``logits = softcap(logit_scale * (hidden @ weight_VD.T + bias_V))``."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    logit_scale: float
    logit_softcap: float | None

    def logits(self, hidden_AD: torch.Tensor) -> torch.Tensor:
        """Full logits ``[A, V]`` in fp32: for checks on a few rows, never for scoring."""
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
    return LMHead(module.weight, bias_V, _logit_scale(config), _logit_softcap(config))


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
    """Compare the head with the model's own logits for the same hidden states.

    Raises:
        InputError: they differ: the head does something that is not known here, and scores would be wrong.
    """
    if hidden_AD.shape[1] != head.weight_VD.shape[1] or logits_AV.shape[1] != head.weight_VD.shape[0]:
        raise InputError(
            f"hidden states of size {hidden_AD.shape[1]}, an LM head of shape {tuple(head.weight_VD.shape)} and "
            f"{logits_AV.shape[1]} logits do not fit together: this architecture is not supported"
        )
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
