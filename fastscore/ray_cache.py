"""The score cache of a run on a Ray cluster: the file is where the run was started, and workers anywhere ask for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fastscore.cache import ScoreCache
from fastscore.cache_blocks import Bools, Floats, request_keys
from fastscore.cache_file import CacheAt
from fastscore.fingerprint import ScoreIdentity
from fastscore.ranges import Ints
from fastscore.types import AnswerScore, InputError, ScoringRequest

logger = logging.getLogger("fastscore")


class ClusterCache:
    """The cache of a job, as the process sees it that started the run.

    place: where it is or will be; None for nowhere.
    path: the file, once a worker has used it.
    """

    def __init__(self, place: CacheAt | None) -> None:
        self.place = place
        self.path: Path | None = None
        self.actor: Any = None

    def start(self) -> None:
        """Have an actor on this machine that opens the file."""
        if self.place is not None and self.actor is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            options = {"num_cpus": 0, "scheduling_strategy": here}
            actor: Any = _CacheActor  # Ray's decorator has changed it
            self.actor = actor.options(**options).remote(os.path.abspath(self.place.path))

    def told(self, trouble: str | None) -> None:
        """What a worker says of it: nothing, or why it goes without."""
        if self.place is None:
            return
        if trouble is None:
            self.path = self.place.path
        else:
            logger.warning("scores are not kept in a cache: %s", trouble)
            self.place = None

    def close(self) -> None:
        """Let go of the file. Every score was in it when the worker went on."""
        if self.actor is not None:
            ray.get(self.actor.close.remote())
            ray.kill(self.actor)
            self.actor = None


class _CacheFile:
    """Holds the file open, for as many models as ask."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._caches: dict[bytes, ScoreCache] = {}

    def open(self, identity: ScoreIdentity) -> str | None:
        """Why it can't be opened."""
        fingerprint = identity.fingerprint()
        try:
            if fingerprint not in self._caches:
                self._caches[fingerprint] = ScoreCache(self._path, identity)
        except (InputError, OSError) as error:
            return str(error)
        return None

    def get(self, fingerprint: bytes, key_R2: Ints) -> list[AnswerScore | None]:
        return self._caches[fingerprint].get(key_R2)

    def put(self, fingerprint: bytes, *entries: Any) -> None:
        self._caches[fingerprint].put(*entries)

    def close(self) -> None:
        for cache in self._caches.values():
            cache.close()
        self._caches.clear()


_CacheActor: Any = ray.remote(_CacheFile)


class WorkerCache:
    """What a worker's scorer is given as its cache."""

    def __init__(self, actor: Any, is_asked_for: bool, identity: Callable[[], ScoreIdentity]) -> None:
        self.trouble: str | None = None
        self._actor = actor
        self._is_asked_for = is_asked_for
        self._identity = identity
        self._opened: _FarCache | None = None

    def open(self) -> Any:
        """The cache; None where one that nobody asked for can't be opened.

        Raises:
            InputError: it was asked for and can't be opened.
        """
        if self._opened is None and self.trouble is None:
            identity = self._identity()
            self.trouble = ray.get(self._actor.open.remote(identity))
            if self.trouble is None:
                self._opened = _FarCache(self._actor, identity.fingerprint())
            elif self._is_asked_for:
                raise InputError(self.trouble)
        return self._opened


class _FarCache:
    """A :class:`fastscore.cache.ScoreCache` in another process."""

    def __init__(self, actor: Any, fingerprint: bytes) -> None:
        self._actor = actor
        self._fingerprint = fingerprint

    def keys(self, requests: Sequence[ScoringRequest]) -> Ints:
        return request_keys(self._fingerprint, requests)

    def get(self, key_R2: Ints) -> list[AnswerScore | None]:
        return _answer(self._actor.get.remote(self._fingerprint, key_R2))

    def put(self, key_R2: Ints, logprob_A: Floats, length_R: Ints, is_greedy_R: Bools) -> None:
        entries = [np.ascontiguousarray(part) for part in (key_R2, logprob_A, length_R, is_greedy_R)]
        _answer(self._actor.put.remote(self._fingerprint, *entries))


def _answer(asked: Any) -> Any:
    """What the actor gives back, or raises."""
    try:
        return ray.get(asked)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
