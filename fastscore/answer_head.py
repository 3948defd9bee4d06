"""Answer rows of several packs through the LM head together: each call reads the whole weight once.

Shapes: A hidden rows, J targets per row, D hidden size, Q answer slots.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from fastscore.lm_head import LMHead
from fastscore.ranges import Ints
from fastscore.transfer import HostCopy, to_device
from fastscore.types import Batch

ROWS_PER_CALL = 1024
"""Enough that a GPU multiplies longer than it reads the weight, and that a CPU's upcast of it hardly counts."""
MAX_TARGETS = 8
"""A row with more targets is given to the head again."""


class SlotScores:
    """NLL in nats (fp32) of every slot, and whether its target is the model's own first choice.

    They are on their way here, one call of the head after another.
    """

    def __init__(self, num_slots: int) -> None:
        self.nll_Q = np.full(num_slots, np.nan, dtype=np.float32)
        self.greedy_Q = np.zeros(num_slots, dtype=bool)
        self._coming: deque[tuple[Ints, HostCopy]] = deque()

    def send(self, slot_Q: Ints, nll_Q: torch.Tensor, greedy_Q: torch.Tensor) -> None:
        """Start a call's values on their way."""
        self._coming.append((slot_Q, HostCopy([nll_Q, greedy_Q])))

    def take(self, wait: bool = False) -> Ints | None:
        """The slots of the next call when its values are here, or with ``wait`` as soon as they are; else None."""
        if not self._coming or not (wait or self._coming[0][1].arrived()):
            return None
        slot_Q, copy = self._coming.popleft()
        self.nll_Q[slot_Q], self.greedy_Q[slot_Q] = copy.wait()
        return slot_Q

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """Both arrays, as soon as the device is done."""
        while self.take(wait=True) is not None:
            pass
        return self.nll_Q, self.greedy_Q


class AnswerHead:
    """Collects answer rows and turns them into the NLL of every slot. Nothing here waits for the device."""

    def __init__(self, head: LMHead, num_slots: int, *, fixed_rows: bool = False) -> None:
        """``fixed_rows`` makes every call the same size, filled up with zeros, so that no score depends on the size."""
        self._head = head
        self._fixed_rows = fixed_rows
        self._hidden: list[torch.Tensor] = []
        self._slot_row: list[Ints] = []
        self._target: list[Ints] = []
        self._slots: list[Ints] = []
        self.num_rows = 0
        """Rows that wait for the next call."""
        self.scores = SlotScores(num_slots)

    def add(self, batch: Batch, hidden_AD: torch.Tensor) -> None:
        """``hidden_AD`` are the states of the batch's ``answer_row_A``."""
        self._hidden.append(hidden_AD)
        self._slot_row.append(batch.slot_row_Q + self.num_rows)
        self._target.append(batch.target_Q)
        self._slots.append(batch.slot_Q)
        self.num_rows += len(hidden_AD)
        if self.num_rows >= ROWS_PER_CALL:
            self.flush()

    def flush(self) -> None:
        """Compute what is left and send it on its way to the host."""
        if not self.num_rows:
            return
        hidden_AD = torch.cat(self._hidden)
        row_Q, target_Q, slot_Q = (np.concatenate(part) for part in (self._slot_row, self._target, self._slots))
        self._hidden, self._slot_row, self._target, self._slots, self.num_rows = [], [], [], [], 0

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
        greedy_Q = top1_A[line] == to_device(torch.from_numpy(target_Q), device)
        self.scores.send(slot_Q, nll_AJ[line, column], greedy_Q)

    def _answer_nll(self, hidden_AD: torch.Tensor, target_AJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._fixed_rows:
            return self._head.nll(hidden_AD, target_AJ)
        parts = []
        for first in range(0, len(hidden_AD), ROWS_PER_CALL):
            block_AD, block_AJ = hidden_AD[first : first + ROWS_PER_CALL], target_AJ[first : first + ROWS_PER_CALL]
            missing = ROWS_PER_CALL - len(block_AD)
            block_AD = torch.nn.functional.pad(block_AD, (0, 0, 0, missing))
            nll_AJ, top1_A = self._head.nll(block_AD, torch.nn.functional.pad(block_AJ, (0, 0, 0, missing)))
            parts.append((nll_AJ[: ROWS_PER_CALL - missing], top1_A[: ROWS_PER_CALL - missing]))
        return torch.cat([nll for nll, _ in parts]), torch.cat([top1 for _, top1 in parts])
