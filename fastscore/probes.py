"""Short requests through a forward pass over packs: does it give what the model itself gives?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastscore.error_text import error_text
from fastscore.packing import cut_pack
from fastscore.prefix_tree import build_prefix_tree
from fastscore.types import CarriedKeys, PackedBatch, PackForward, ScoringRequest

PROBE_LENGTHS = (14, 8)
SHARED_LENGTH = 6
SHARED_PACK = 10
"""Tokens of a pack where prefixes are shared: the probes make three, and the last needs keys of the first, which the
one between has to carry on."""


def probe_requests(vocab_size: int) -> list[ScoringRequest]:
    """Short requests of spread-out token ids: two, one that begins like the first, and one of the first's length."""
    generator = torch.Generator().manual_seed(20)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())

    long, short = PROBE_LENGTHS
    first = tokens(long + 1)
    # Answers as long as can be: every token but the first is asked for, so every hidden state counts.
    return [
        ScoringRequest(ids, 1)
        for ids in (first, tokens(short + 1), first[:SHARED_LENGTH] + tokens(short), tokens(long + 1))
    ]


def tolerance_for(dtype: torch.dtype, quantized: bool) -> float:
    """Relative difference that rounding can explain after a whole model. In eight bits a last bit that differs can move
    an activation by a whole step."""
    if quantized:
        return 0.3
    return 1e-3 if dtype == torch.float32 else 0.1


def relative_difference(value_TD: torch.Tensor, truth_TD: torch.Tensor) -> float:
    """Of two tensors, by their norms, in fp32."""
    value_TD, truth_TD = value_TD.float(), truth_TD.float()
    return float((value_TD - truth_TD).norm() / truth_TD.norm().clamp_min(1e-30))


def run_packed(
    forward: PackForward, requests: list[ScoringRequest], device: torch.device, share: bool = True
) -> torch.Tensor:
    """Hidden states of every request's tokens, one after the other; in several packs where prefixes are shared."""
    tree = build_prefix_tree(requests, share=share)
    size = SHARED_PACK if share else tree.num_tokens
    hidden: list[torch.Tensor] = []
    carried: CarriedKeys = []
    for start in range(0, tree.num_tokens, size):
        pack: PackedBatch = cut_pack(tree, start, min(size, tree.num_tokens - start)).to(device)
        hidden_TD, carried = forward(pack, carried, None)
        hidden.append(hidden_TD)
    rows = torch.from_numpy(tree.slot_row_Q[tree.request_slot]).to(device)
    return torch.cat(hidden)[rows]


@dataclass(frozen=True, slots=True)
class Truth:
    """What the model's own layers give in packs with the reference attention: hidden states ``[N, D]`` of all tokens of
    the first three probes. Any other forward pass must give them too, within ``tolerance``."""

    hidden_ND: torch.Tensor
    vocab_size: int
    tolerance: float

    @torch.inference_mode()
    def difference(self, forward: PackForward) -> str:
        """How a forward pass differs from the truth, or ""."""
        try:
            found_ND = run_packed(forward, probe_requests(self.vocab_size)[:3], self.hidden_ND.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a library may fail in any way; said, and the next one taken
            return f"it fails ({error_text(error)})"
        difference = relative_difference(found_ND, self.hidden_ND)
        return "" if difference <= self.tolerance else f"it is wrong (relative difference {difference:.1e})"
