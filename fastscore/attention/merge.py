"""Attention computed in parts, put together by the log-sum-exp of each part.

Shapes: T packed tokens, H query heads, d head size; q the queries of a part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def merge_parts(
    out_THd: torch.Tensor,
    lse_TH: torch.Tensor,
    parts: Iterable[tuple[slice, torch.Tensor, torch.Tensor]],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Each part ``(queries, out_qHd, lse_qH)`` into ``out_THd``; the weights of the sum are in fp32.

    ``sinks``, one logit a head, take their share of the probability at the end and give no value.
    """
    merged_THd = out_THd.float()
    for queries, out_qHd, lse_qH in parts:
        both_qH = torch.logaddexp(lse_TH[queries], lse_qH)
        merged_THd[queries] *= (lse_TH[queries] - both_qH).exp()[:, :, None]
        merged_THd[queries] += (lse_qH - both_qH).exp()[:, :, None] * out_qHd
        lse_TH[queries] = both_qH
    if sinks is not None:
        # Rows of no segment have an LSE of -inf and stay zero.
        merged_THd *= torch.sigmoid(lse_TH - sinks.float())[:, :, None]
    return merged_THd.to(out_THd.dtype)
