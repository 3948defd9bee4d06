"""A loaded model at work: requests in, hidden states of their answer rows out, batch by batch.

Shapes: A answer rows, D hidden, R requests, Q answer slots.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from fastscore.attention import Provider
from fastscore.lm_head import LMHead
from fastscore.packed_forward import PackForward, own_attention, padded_hidden, seq2seq_hidden
from fastscore.packing import cut_pack, pack_size
from fastscore.padding import padded_batch, padded_groups, seq2seq_batch, seq2seq_groups, slot_offsets
from fastscore.prefix_tree import PrefixTree, build_prefix_tree
from fastscore.ranges import Ints, ranges
from fastscore.types import Batch, CarriedKeys, PaddedBatch, ScoringRequest, Seq2SeqBatch

logger = logging.getLogger("fastscore")

DETERMINISTIC_TOKENS = 1024
"""Size of every pack under ``deterministic``, whatever the budget: matrix products of one shape sum in one order."""
SMALLEST_BUDGET = 64
"""A pack that does not fit at this size never will."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the NLL of each answer token is found: request r's are ``slot[offset_R[r]:offset_R[r + 1]]``."""

    count: int
    slot: Ints
    offset_R: Ints


Work = tuple[Slots, Iterator[tuple[Batch, torch.Tensor]]]


@dataclass(slots=True)
class LanguageModel:
    """A loaded model. ``mode`` is ``packed``, ``padded`` (with the reason) or ``encoder-decoder``.

    provider, forward: attention over packs and the forward pass around it; None where the model does not run packed.
    forward_name: whose layers run and how, in words.
    max_batch_tokens: budget of a batch; halved when the device runs out of memory.
    longest_packed: longer inputs take the padded path, a batch of their own (LongRoPE); None for no such limit.
    """

    model: PreTrainedModel
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

    def run(self, requests: Sequence[ScoringRequest]) -> Work:
        """Slots of the requests, and batch after batch with the hidden states ``[A, D]`` of its answer rows."""
        if not requests:
            return Slots(0, np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)), iter(())
        if self.mode != "packed":
            return self._padded(requests)
        if self.longest_packed is None:
            return self._packed(requests)
        is_long = [len(request.token_ids) - 1 > self.longest_packed for request in requests]
        if not any(is_long):
            return self._packed(requests)
        return self._both(requests, np.array(is_long))

    def _packed(self, requests: Sequence[ScoringRequest]) -> Work:
        tree = build_prefix_tree(requests, share=self.share_prefixes)
        slots = Slots(len(tree.slot_row_Q), tree.request_slot, tree.request_offset_R)
        return slots, self._run_packs(tree)

    def _padded(self, requests: Sequence[ScoringRequest]) -> Work:
        offset_R = slot_offsets(requests)
        count = int(offset_R[-1])
        return Slots(count, np.arange(count), offset_R), self._run_padded(requests, offset_R)

    def _both(self, requests: Sequence[ScoringRequest], is_long_R: np.ndarray) -> Work:
        """Long requests padded and first, the others packed; as one piece of work."""
        offset_R = slot_offsets(requests)
        slot = np.empty(offset_R[-1], dtype=np.int64)
        count, batches = 0, []
        for run, places in ((self._padded, np.flatnonzero(is_long_R)), (self._packed, np.flatnonzero(~is_long_R))):
            if not len(places):
                continue
            part, part_batches = run([requests[place] for place in places.tolist()])
            slot[ranges(offset_R[places], np.diff(offset_R)[places])] = part.slot + count
            batches.append((count, part_batches))
            count += part.count

        def chained() -> Iterator[tuple[Batch, torch.Tensor]]:
            for shift, part_batches in batches:
                for batch, hidden_AD in part_batches:
                    yield replace(batch, slot_Q=batch.slot_Q + shift), hidden_AD

        return Slots(count, slot, offset_R), chained()

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
            pack = cut_pack(tree, start, size, padded_to).to(self.device)
            try:
                with torch.inference_mode():
                    # Products of another number of rows sum in another order.
                    hidden, carry = self.forward(pack, carried, None if self.deterministic else pack.answer_row_A)
                    hidden_AD = hidden[pack.answer_row_A] if self.deterministic else hidden
            except torch.OutOfMemoryError:
                if self.deterministic or size <= SMALLEST_BUDGET:
                    raise
                self._halve_budget(size)
                continue
            carried = carry
            start += size
            yield pack, hidden_AD

    def _run_padded(
        self, requests: Sequence[ScoringRequest], slot_offset_R: Ints
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Group by group. Out of memory: the group is halved."""
        seq2seq = self.mode == "encoder-decoder"
        groups = (seq2seq_groups if seq2seq else padded_groups)(requests, self.max_batch_tokens)
        config = self.model.config
        while groups:
            group = groups.pop(0)
            batch: PaddedBatch | Seq2SeqBatch
            if seq2seq:
                start, pad = config.decoder_start_token_id, config.pad_token_id or 0
                batch = seq2seq_batch(requests, group, slot_offset_R, start, pad).to(self.device)
            else:
                batch = padded_batch(requests, group, slot_offset_R).to(self.device)
            try:
                with torch.inference_mode(), own_attention(self.model):  # a model that packs has some requests padded
                    if isinstance(batch, PaddedBatch):
                        hidden_AD = padded_hidden(self.model, batch)[batch.answer_row_A]
                    else:
                        hidden_AD = seq2seq_hidden(self.model, batch)[batch.answer_row_A]
            except torch.OutOfMemoryError:
                if len(group) == 1:
                    raise
                self._halve_budget(batch.num_tokens)
                middle = len(group) // 2
                groups[:0] = [group[:middle], group[middle:]]
                continue
            yield batch, hidden_AD

    def _halve_budget(self, failed_tokens: int) -> None:
        self.max_batch_tokens = max(SMALLEST_BUDGET, failed_tokens // 2)
        logger.warning(
            "%s ran out of memory with a batch of %d tokens; going on with batches of %d",
            self.device,
            failed_tokens,
            self.max_batch_tokens,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
