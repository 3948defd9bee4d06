"""Tensors between host and device without waiting for the work that the device has been given before.

A copy from or to ordinary (pageable) host memory waits for the device's queue to run dry; one from or to pinned memory
takes its place in the queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; on CUDA by way of pinned memory, which PyTorch keeps and uses again."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Device tensors on their way to the host. On CUDA nothing waits before :meth:`wait`."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not tensors or tensors[0].device.type != "cuda":
            self._host = [tensor.cpu() for tensor in tensors]
            return
        self._host = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def arrived(self) -> bool:
        """Whether :meth:`wait` would not have to."""
        return self._arrived is None or self._arrived.query()

    def wait(self) -> list[np.ndarray]:
        """The values, in the order of the tensors."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.numpy() for tensor in self._host]
