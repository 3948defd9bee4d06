"""Messages between the processes that torchrun started: Python objects over torch.distributed's gloo."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

HEARTBEAT_SECONDS = 30.0
"""How often either side says that it is still there while it has nothing else to say."""
SILENCE = timedelta(minutes=10)
"""After so long without a word the other side is given up. One that has ended is missed at once."""
LOADING = timedelta(hours=2)
"""The same where ranks hold a model together: the slowest loads its part, and rank 0 reads whole files to know them."""
GOODBYE_SECONDS = 3.0
"""How long the end waits for others. One that is in the middle of a block does not listen, and misses rank 0 later."""
MEETING = timedelta(minutes=10)
"""How long ranks wait for each other at the start."""


class Lost(ConnectionError):
    """The other rank has ended, or is silent."""


def meet(share_model: bool = False) -> int:
    """Wait for all ranks, and return this one's. ``share_model``: their devices are going to work together.

    Raises:
        dist.DistError: they did not all come.
    """
    store, rank, size = next(iter(rendezvous("env://", timeout=MEETING)))
    store.set_timeout(MEETING)
    with_gpus = share_model and torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if with_gpus else "gloo"
    silence = LOADING if share_model else SILENCE
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=silence)
    return rank


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ["RANK"])


class Channel:
    """Between this rank and another. Any thread may send; one at a time receives."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self._sending = threading.Lock()

    def send(self, *message: Any) -> None:
        """Returns when the other side has taken it.

        Raises:
            Lost: the other side is not there.
        """
        with self._sending:
            _give(message, lambda tensor: dist.send(tensor, self.peer))

    def receive(self) -> tuple[Any, ...]:
        """The next message.

        Raises:
            Lost: the other side is not there.
        """
        return _take(lambda tensor: dist.recv(tensor, self.peer))


def tell_all(*message: Any) -> None:
    """To every other rank, which are in :func:`hear`; returns when it is on its way. For one thread at a time.

    Raises:
        Lost: somebody is not there.
    """
    _give(message, lambda tensor: dist.broadcast(tensor, 0))


def hear() -> tuple[Any, ...]:
    """What rank 0 tells all.

    Raises:
        Lost: it is gone.
    """
    return _take(lambda tensor: dist.broadcast(tensor, 0))


def _give(message: tuple[Any, ...], move: Callable[[torch.Tensor], Any]) -> None:
    """A message as two tensors: how long it is, and itself."""
    data_B = torch.frombuffer(bytearray(pickle.dumps(message, protocol=5)), dtype=torch.uint8)
    try:
        move(torch.tensor([len(data_B)]))
        move(data_B)
    except RuntimeError as error:
        raise Lost(str(error)) from error


def _take(move: Callable[[torch.Tensor], Any]) -> tuple[Any, ...]:
    try:
        size_1 = torch.empty(1, dtype=torch.int64)
        move(size_1)
        data_B = torch.empty(int(size_1), dtype=torch.uint8)
        move(data_B)
    except RuntimeError as error:
        raise Lost(str(error)) from error
    message: tuple[Any, ...] = pickle.loads(data_B.numpy().data)
    return message


def leave(status: int, in_order: bool) -> int:
    """End this rank with that status. Where others are gone the process ends here: closing would wait for them."""
    if in_order:
        dist.destroy_process_group()
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
