"""The independent truth: each pair alone, unpadded, through plain transformers. Nothing of fastscore is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

TokenPairs = Sequence[tuple[Sequence[int], Sequence[int]]]


def plain_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it, in evaluation mode."""
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # Eager attention is what each family defines; the SDPA of transformers 5.17 leaves Gemma 2's soft cap out.
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def alone(folder: Path | str, token_pairs: TokenPairs) -> list[list[float]]:
    """Log-probability of every answer token from the fp32 model."""
    return alone_in(plain_model(folder), token_pairs)


@torch.inference_mode()
def alone_in(model: Any, token_pairs: TokenPairs) -> list[list[float]]:
    """Log-probability of every answer token from a model in memory, log-softmax in fp64."""
    result = []
    for prompt, answer in token_pairs:
        if model.config.is_encoder_decoder:
            decoder = [model.config.decoder_start_token_id, *answer[:-1]]
            output = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([decoder]))
            logits_LV = output.logits[0]
        else:
            output = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False)
            logits_LV = output.logits[0, len(prompt) - 1 : -1]
        logprobs_LV = logits_LV.double().log_softmax(dim=-1)
        result.append(logprobs_LV[torch.arange(len(answer)), torch.tensor(answer)].tolist())
    return result
