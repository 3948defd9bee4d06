"""A loaded model at work: requests become a plan, and a plan hidden states of answer rows, batch by batch.

Shapes: A answer rows, D hidden, R requests, Q answer slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from fastscore.attention import Provider
from fastscore.lm_head import LMHead
from fastscore.packing import cut_pack, pack_size
from fastscore.padding import padded_batch, padded_groups, seq2seq_batch, seq2seq_groups, slot_offsets
from fastscore.prefix_tree import PrefixTree, build_prefix_tree
from fastscore.ranges import Ints, ranges
from fastscore.types import Batch, CarriedKeys, PackForward, PaddedBatch, ScoringRequest, Seq2SeqBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fastscore")

DETERMINISTIC_TOKENS = 1024
"""Size of every pack under ``deterministic``, whatever the budget: matrix products of one shape sum in one order."""
ALIGNMENT = 64
"""Weights on a CPU begin at multiples of so many bytes, as all memory that PyTorch allocates."""
SMALLEST_BUDGET = 64
"""A pack that does not fit at this size never will."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the NLL of each answer token is found: request r's are ``slot[offset_R[r]:offset_R[r + 1]]``."""

    count: int
    slot: Ints
    offset_R: Ints


@dataclass(frozen=True, slots=True)
class Plan:
    """What a window of requests asks of a model; made without touching the device, so in any thread.

    num_tokens: input tokens of the model; a prefix that requests of the tree share counts once.
    tree: the requests that run packed; None when there are none. Their slots come behind those of ``padded``.
    padded, padded_offset_R: the others, and the first slot of each.
    """

    slots: Slots
    num_tokens: int
    tree: PrefixTree | None
    padded: Sequence[ScoringRequest]
    padded_offset_R: Ints


@dataclass(slots=True)
class LanguageModel:
    """A loaded model. ``mode`` is ``packed``, ``padded`` (with the reason) or ``encoder-decoder``.

    model: as transformers loads it; or its modules without their code, where no request runs through them.
    provider, forward: attention over packs and the forward pass around it; None where the model does not run packed.
    forward_name: whose layers run and how, in words.
    max_batch_tokens: budget of a batch; halved when the device runs out of memory.
    longest_packed: longer inputs take the padded path, a batch of their own (LongRoPE); None for no such limit.
    followers: tells other processes, which hold parts of this model, what it is about to do; None where there are none.
        All must cut the same packs, so that one which runs out of memory ends the run.
    """

    model: torch.nn.Module
    head: LMHead
    device: torch.device
    dtype: torch.dtype
    provider: Provider | None
    forward: PackForward | None
    forward_name: str
    mode: str
    reason: str
    max_batch_tokens: int
    share_prefixes: bool = True
    deterministic: bool = False
    longest_packed: int | None = None
    followers: Callable[..., None] | None = None

    def plan(self, requests: Sequence[ScoringRequest]) -> Plan:
        """Which requests run packed, what they share, and where the NLL of each of their answer tokens is found."""
        if self.mode != "packed":
            is_padded_R = np.ones(len(requests), dtype=bool)
        else:
            longest = self.longest_packed
            is_padded_R = np.array([longest is not None and len(r.token_ids) - 1 > longest for r in requests], bool)
        offset_R = slot_offsets(requests)
        slot = np.empty(offset_R[-1], dtype=np.int64)

        def place(places: Ints, part: Ints) -> None:
            slot[ranges(offset_R[places], np.diff(offset_R)[places])] = part

        padded_places, packed_places = np.flatnonzero(is_padded_R), np.flatnonzero(~is_padded_R)
        padded = [requests[index] for index in padded_places.tolist()]
        padded_offset_R = slot_offsets(padded)
        count = int(padded_offset_R[-1])
        place(padded_places, np.arange(count))
        unread = 0 if self.mode == "encoder-decoder" else 1  # a causal model's last answer token is only predicted
        num_tokens = sum(len(request.token_ids) - unread for request in padded)
        tree = None
        if len(packed_places):
            tree = build_prefix_tree([requests[index] for index in packed_places.tolist()], share=self.share_prefixes)
            place(packed_places, tree.request_slot + count)
            count += len(tree.slot_row_Q)
            num_tokens += tree.num_tokens
        return Plan(Slots(count, slot, offset_R), num_tokens, tree, padded, padded_offset_R)

    def run(self, plan: Plan) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Batch after batch with the hidden states ``[A, D]`` of its answer rows."""
        if plan.padded:
            yield from self._run_padded(plan.padded, plan.padded_offset_R)
        if plan.tree is not None:
            shift = int(plan.padded_offset_R[-1])
            for batch, hidden_AD in self._run_packs(plan.tree):
                yield (replace(batch, slot_Q=batch.slot_Q + shift) if shift else batch), hidden_AD

    def _run_packs(self, tree: PrefixTree) -> Iterator[tuple[Batch, torch.Tensor]]:
        """The stream, pack by pack. Out of memory: the budget is halved and the pack cut again from where it began."""
        assert self.forward is not None, "a packed model has one"
        carried: CarriedKeys = []
        start = 0
        while start < tree.num_tokens:
            left = tree.num_tokens - start
            if self.deterministic:
                size, padded_to = min(left, DETERMINISTIC_TOKENS), DETERMINISTIC_TOKENS
            else:
                size, padded_to = pack_size(left, self.max_batch_tokens), 0
            carry: CarriedKeys | None = None
            try:
                pack = cut_pack(tree, start, size, padded_to).to(self.device)
                with torch.inference_mode():
                    # Products of another number of rows sum in another order.
                    hidden, carry = self.forward(pack, carried, None if self.deterministic else pack.answer_row_A)
                    hidden_AD = hidden[pack.answer_row_A] if self.deterministic else hidden
            except torch.OutOfMemoryError:
                if self.deterministic or size <= SMALLEST_BUDGET or self.followers is not None:
                    raise
            if carry is None:
                self._halve_budget(size)
                continue
            carried = carry
            start += size
            yield pack, hidden_AD

    def _run_padded(
        self, requests: Sequence[ScoringRequest], slot_offset_R: Ints
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Group by group. Out of memory: the budget is halved, and what is left grouped again."""
        from fastscore.packed_forward import own_attention, padded_hidden, seq2seq_hidden

        seq2seq = self.mode == "encoder-decoder"
        model = cast("PreTrainedModel", self.model)
        config = model.config

        def grouped(left: Sequence[int]) -> list[list[int]]:
            # Each by itself where no score may depend on what else there is.
            budget = 1 if self.deterministic else self.max_batch_tokens
            groups = (seq2seq_groups if seq2seq else padded_groups)([requests[index] for index in left], budget)
            return [[left[place] for place in group] for group in groups]

        groups = grouped(range(len(requests)))
        while groups:
            group = groups.pop(0)
            batch: PaddedBatch | Seq2SeqBatch
            hidden_AD: torch.Tensor | None = None
            try:
                if seq2seq:
                    start, pad = config.decoder_start_token_id, config.pad_token_id or 0
                    batch = seq2seq_batch(requests, group, slot_offset_R, start, pad).to(self.device)
                else:
                    batch = padded_batch(requests, group, slot_offset_R).to(self.device)
                with torch.inference_mode(), own_attention(model):  # a model that packs has some requests padded
                    if isinstance(batch, PaddedBatch):
                        hidden_AD = padded_hidden(model, batch)[batch.answer_row_A]
                    else:
                        hidden_AD = seq2seq_hidden(model, batch)[batch.answer_row_A]
            except torch.OutOfMemoryError:
                if len(group) == 1 or self.followers is not None:
                    raise
            if hidden_AD is None:
                self._halve_budget(sum(len(requests[index].token_ids) for index in group))
                groups = grouped([index for each in (group, *groups) for index in each])
                continue
            yield batch, hidden_AD

    @property
    def batch_room(self) -> int:
        """Tokens that a batch could hold."""
        packed = self.deterministic and self.mode == "packed"
        return DETERMINISTIC_TOKENS if packed else self.max_batch_tokens

    def _halve_budget(self, failed_tokens: int) -> None:
        """Called after the exception is done with, which holds on to what the batch had computed."""
        self.max_batch_tokens = max(SMALLEST_BUDGET, min(failed_tokens, self.max_batch_tokens) // 2)
        logger.warning(
            "%s ran out of memory with a batch of %d tokens; going on with batches of %d",
            self.device,
            failed_tokens,
            self.max_batch_tokens,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
