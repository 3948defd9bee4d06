"""The answer NLL where the LM head is split over devices by vocabulary, as tensor parallelism splits it.

Shapes: A answer rows, J targets per row, D hidden size, v vocabulary entries of one device's shard.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from fastscore_kernels.answer_nll import answer_nll_partials
from fastscore_kernels.partials import Partials, combine_partials, nll_from_partials


def vocab_parallel_answer_nll(
    hidden_AD: torch.Tensor,
    weight_vD: torch.Tensor,
    target_A: torch.Tensor,
    *,
    vocab_start: int,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The NLL over the whole vocabulary, on every rank, from each rank's shard of the head.

    Every rank of ``group`` (the default group when None) calls this with the same hidden states and targets. What
    travels is 16 bytes a row and 4 bytes a target for each rank, once; no logits.

    Args:
        hidden_AD: hidden states ``[A, D]``.
        weight_vD: this rank's rows of the LM head, tokens ``vocab_start`` to ``vocab_start + v``. Shards may differ in
            size; together they must hold every token once.
        target_A: int64 ``[A]`` or ``[A, J]``, tokens of the whole vocabulary, checked by the caller: a target in no
            shard gets an NLL of +inf.
        vocab_start: first token of this rank's shard.
        bias: this rank's part of the bias, ``[v]``.
        logit_scale, logit_softcap: as in :func:`fastscore_kernels.answer_nll.answer_nll`.
        group: the ranks that share the vocabulary.

    Returns:
        The NLL in nats, fp32, shaped like ``target_A``, and ``top1_A``; bitwise the same on every rank, since all
        combine the shards in the order of the ranks.

    Raises:
        ValueError: as :func:`fastscore_kernels.answer_nll.answer_nll_partials`.
    """
    own = answer_nll_partials(
        hidden_AD,
        weight_vD,
        target_A,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        vocab_start=vocab_start,
    )
    parts = [Partials(*tensors) for tensors in zip(*(_gather(tensor, group) for tensor in own), strict=True)]
    combined = combine_partials(parts)
    return nll_from_partials(combined).reshape(target_A.shape), combined.top1_A


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered
