"""The independent truth: each pair alone, unpadded, through plain transformers in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM


@torch.inference_mode()
def alone(folder: Path | str, token_pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
    """Log-probability of every answer token, fp32 model, log-softmax in fp64. Nothing of fastscore is used."""
    config = AutoConfig.from_pretrained(folder)
    # Eager attention is what each family defines; the SDPA of transformers 5.17 leaves Gemma 2's soft cap out.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if config.is_encoder_decoder:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, **options).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    result = []
    for prompt, answer in token_pairs:
        if config.is_encoder_decoder:
            decoder = [config.decoder_start_token_id, *answer[:-1]]
            output = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([decoder]))
            logits_LV = output.logits[0]
        else:
            output = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False)
            logits_LV = output.logits[0, len(prompt) - 1 : -1]
        logprobs_LV = logits_LV.double().log_softmax(dim=-1)
        result.append(logprobs_LV[torch.arange(len(answer)), torch.tensor(answer)].tolist())
    return result
