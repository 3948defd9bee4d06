"""Parameters of which each process holds a part, as transformers' tensor parallelism leaves them: DTensors."""

from __future__ import annotations

from typing import Any, cast

import torch


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter: all of it, unless it is split."""
    return cast("Any", tensor).to_local() if is_distributed(tensor) else tensor


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor: split, or the same in all processes."""
    return hasattr(tensor, "placements")


def is_split(tensor: torch.Tensor) -> bool:
    """Whether other processes hold other parts of it."""
    return is_distributed(tensor) and any(place.is_shard() for place in cast("Any", tensor).placements)


def first_row(tensor: torch.Tensor) -> int:
    """Where this process's part of a parameter that is split by rows begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    split = cast("Any", tensor)
    _, offset = compute_local_shape_and_global_offset(split.shape, split.device_mesh, split.placements)
    return int(offset[0])


def processes(tensor: torch.Tensor) -> Any:
    """The group of processes that hold a distributed parameter together."""
    return cast("Any", tensor).device_mesh.get_group()


def with_own_part(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A parameter like that one, around another tensor of the same values."""
    if not is_distributed(tensor):
        return part
    from torch.distributed.tensor import DTensor

    like = cast("Any", tensor)
    split: torch.Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return split
