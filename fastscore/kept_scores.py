"""A window's requests as work for the model: those that the cache does not know; and their scores into the cache, as
soon as each is whole.

Shapes: R requests of the window, C of them to be computed, A answer tokens of those, Q answer slots.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastscore.cache import ScoreCache
from fastscore.cache_blocks import Bools, Floats
from fastscore.cache_file import CacheAt
from fastscore.fingerprint import ScoreIdentity
from fastscore.language_model import LanguageModel, Plan, Slots
from fastscore.ranges import Ints, offsets, ranges
from fastscore.types import AnswerScore, InputError, ScoringRequest

logger = logging.getLogger("fastscore")


class RunCache:
    """A cache that is opened when the model is there, since scores are known by what computes them. For all threads.

    place: where it is or will be; None for nowhere, and when it could not be opened.
    path: the file, once it has been opened.
    """

    def __init__(self, place: CacheAt | None, identity: Callable[[], ScoreIdentity]) -> None:
        self.path: Path | None = None
        self.place = place
        self._identity = identity
        self._opened: ScoreCache | None = None
        self._lock = threading.Lock()

    def open(self) -> ScoreCache | None:
        """The cache; None without a place, and where one that nobody asked for can't be opened, which is told once.

        Raises:
            InputError, OSError: it was asked for and can't be opened.
        """
        with self._lock:
            if self._opened is None and self.place is not None:
                try:
                    self._opened = ScoreCache(self.place.path, self._identity())
                    self.path = self.place.path
                except (InputError, OSError) as error:
                    if self.place.is_asked_for:
                        raise
                    self.place = None
                    logger.warning("scores are not kept in a cache: %s", error)
            return self._opened

    def close(self) -> None:
        """Let go of the file; the next :meth:`open` opens it again."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
            self._opened = None


class Keeper:
    """Puts the scores of a plan's requests into the cache, each as soon as its last answer token has come."""

    def __init__(self, cache: ScoreCache, key_C2: Ints, slots: Slots) -> None:
        self._cache = cache
        self._key_C2 = key_C2
        self._slots = slots
        self._missing_C = np.diff(slots.offset_R)
        # Slots are shared: which requests ask for each, slot by slot.
        request_A = np.repeat(np.arange(len(key_C2)), self._missing_C)
        self._request_A = request_A[np.argsort(slots.slot, kind="stable")]
        self._offset_Q = offsets(np.bincount(slots.slot, minlength=slots.count))

    def put(self, slot_Q: Ints, nll_Q: Floats, greedy_Q: Bools) -> None:
        """Some slots have come, each once; ``nll_Q`` and ``greedy_Q`` are those of all slots.

        Raises:
            OSError: the disk is full or failing.
        """
        start = self._offset_Q[slot_Q]
        asked = self._request_A[ranges(start, self._offset_Q[slot_Q + 1] - start)]
        request, count = np.unique(asked, return_counts=True)
        self._missing_C[request] -= count
        whole = request[self._missing_C[request] == 0]
        if not len(whole):
            return
        first = self._slots.offset_R[whole]
        length = self._slots.offset_R[whole + 1] - first
        slot_A = self._slots.slot[ranges(first, length)]
        is_greedy = np.logical_and.reduceat(greedy_Q[slot_A], offsets(length)[:-1])
        self._cache.put(self._key_C2[whole], 0.0 - nll_Q[slot_A], length, is_greedy)


@dataclass(frozen=True, slots=True)
class Work:
    """What a window asks of the model.

    plan: that of ``requests``, the C that are to be computed.
    known: for each of the R requests its score where the cache has it, else None; None where there is no cache.
    """

    plan: Plan
    requests: Sequence[ScoringRequest]
    known: Sequence[AnswerScore | None] | None = None
    keeper: Keeper | None = None

    @property
    def num_known(self) -> int:
        """Requests whose scores came from the cache."""
        return 0 if self.known is None else len(self.known) - len(self.requests)

    def place(self, index: int) -> int:
        """Where in the window a request stands that is to be computed."""
        if self.known is None:
            return index
        return [place for place, score in enumerate(self.known) if score is None][index]

    def with_known(self, computed: list[AnswerScore]) -> list[AnswerScore]:
        """The scores of all R requests, from those of the C."""
        if self.known is None:
            return computed
        left = iter(computed)
        return [next(left) if score is None else score for score in self.known]


def make_work(model: LanguageModel, requests: Sequence[ScoringRequest], cache: ScoreCache | None) -> Work:
    """Look the requests up and plan the others."""
    if cache is None:
        return Work(model.plan(requests), requests)
    key_R2 = cache.keys(requests)
    known = cache.get(key_R2)
    missing = [place for place, score in enumerate(known) if score is None]
    asked = [requests[place] for place in missing]
    plan = model.plan(asked)
    return Work(plan, asked, known, Keeper(cache, key_R2[np.array(missing, dtype=np.int64)], plan.slots))
