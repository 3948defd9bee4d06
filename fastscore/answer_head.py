"""Answer rows of several packs through the LM head together: each call reads the whole weight once.

Shapes: A hidden rows, J targets per row, D hidden size, Q answer slots.
"""

from __future__ import annotations

import numpy as np
import torch
from fastscore_kernels.answer_nll import answer_nll

from fastscore.lm_head import LMHead
from fastscore.ranges import Ints
from fastscore.transfer import HostCopy, to_device
from fastscore.types import Batch

ROWS_PER_CALL = 1024
"""Enough that a GPU multiplies longer than it reads the weight, and that a CPU's upcast of it hardly counts."""
MAX_TARGETS = 8
"""A row with more targets is given to the head again."""


class SlotScores:
    """NLL in nats (fp32) of every slot, and whether its target is the model's own first choice; on their way here."""

    def __init__(self, num_slots: int, slots: list[Ints], nll: list[torch.Tensor], greedy: list[torch.Tensor]) -> None:
        self._num_slots = num_slots
        self._slots = slots
        self._copy = HostCopy([torch.cat(nll), torch.cat(greedy)]) if nll else None

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """Both arrays, as soon as the device is done."""
        nll_Q = np.full(self._num_slots, np.nan, dtype=np.float32)
        greedy_Q = np.zeros(self._num_slots, dtype=bool)
        if self._copy is not None:
            slots = np.concatenate(self._slots)
            nll_Q[slots], greedy_Q[slots] = self._copy.wait()
        return nll_Q, greedy_Q


class AnswerHead:
    """Collects answer rows and turns them into the NLL of every slot. Nothing here waits for the device."""

    def __init__(self, head: LMHead, num_slots: int, *, fixed_rows: bool = False) -> None:
        """``fixed_rows`` makes every call the same size, filled up with zeros, so that no score depends on the size."""
        self._head = head
        self._fixed_rows = fixed_rows
        self._hidden: list[torch.Tensor] = []
        self._slot_row: list[Ints] = []
        self._target: list[Ints] = []
        self._num_rows = 0
        self._slots: list[Ints] = []
        self._nll: list[torch.Tensor] = []
        self._greedy: list[torch.Tensor] = []
        self._num_slots = num_slots

    def add(self, batch: Batch, hidden_AD: torch.Tensor) -> None:
        """``hidden_AD`` are the states of the batch's ``answer_row_A``."""
        self._hidden.append(hidden_AD)
        self._slot_row.append(batch.slot_row_Q + self._num_rows)
        self._target.append(batch.target_Q)
        self._slots.append(batch.slot_Q)
        self._num_rows += len(hidden_AD)
        if self._num_rows >= ROWS_PER_CALL:
            self._flush()

    def finish(self) -> SlotScores:
        """Compute what is left and send everything on its way to the host."""
        self._flush()
        return SlotScores(self._num_slots, self._slots, self._nll, self._greedy)

    def _flush(self) -> None:
        if not self._num_rows:
            return
        hidden_AD = torch.cat(self._hidden)
        row_Q, target_Q = np.concatenate(self._slot_row), np.concatenate(self._target)
        self._hidden, self._slot_row, self._target, self._num_rows = [], [], [], 0

        # Rows ascend, so a slot's rank among those of its row is its distance from the first of them.
        rank_Q = np.arange(len(row_Q)) - np.searchsorted(row_Q, row_Q)
        column_Q = rank_Q % MAX_TARGETS
        first_Q = column_Q == 0
        line_Q = np.cumsum(first_Q) - 1
        target_AJ = np.repeat(target_Q[first_Q][:, None], int(column_Q.max()) + 1, axis=1)
        target_AJ[line_Q, column_Q] = target_Q
        device = hidden_AD.device
        line, column = (to_device(torch.from_numpy(values), device) for values in (line_Q, column_Q))
        if target_AJ.shape != (len(hidden_AD), 1):
            hidden_AD = hidden_AD[to_device(torch.from_numpy(row_Q[first_Q]), device)]
        nll_AJ, top1_A = self._answer_nll(hidden_AD, to_device(torch.from_numpy(target_AJ), device))
        self._nll.append(nll_AJ[line, column])
        self._greedy.append(top1_A[line] == to_device(torch.from_numpy(target_Q), device))

    def _answer_nll(self, hidden_AD: torch.Tensor, target_AJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._fixed_rows:
            return self._call(hidden_AD, target_AJ)
        parts = []
        for first in range(0, len(hidden_AD), ROWS_PER_CALL):
            block_AD, block_AJ = hidden_AD[first : first + ROWS_PER_CALL], target_AJ[first : first + ROWS_PER_CALL]
            missing = ROWS_PER_CALL - len(block_AD)
            block_AD = torch.nn.functional.pad(block_AD, (0, 0, 0, missing))
            nll_AJ, top1_A = self._call(block_AD, torch.nn.functional.pad(block_AJ, (0, 0, 0, missing)))
            parts.append((nll_AJ[: ROWS_PER_CALL - missing], top1_A[: ROWS_PER_CALL - missing]))
        return torch.cat([nll for nll, _ in parts]), torch.cat([top1 for _, top1 in parts])

    def _call(self, hidden_AD: torch.Tensor, target_AJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return answer_nll(
            hidden_AD,
            self._head.weight_VD,
            target_AJ,
            bias=self._head.bias_V,
            logit_scale=self._head.logit_scale,
            logit_softcap=self._head.logit_softcap,
            check_targets=False,  # tokenization has looked at every id
        )
