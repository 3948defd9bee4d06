"""Runs of consecutive indices, as arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def offsets(length: Ints) -> Ints:
    """``[0, length[0], length[0] + length[1], ...]``: one entry more than ``length``."""
    result = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(length, out=result[1:])
    return result


def ranges(start: Ints, length: Ints) -> Ints:
    """``start[i], start[i] + 1, ...`` for ``length[i]`` numbers each, one run after the other."""
    first = offsets(length)
    shift = np.repeat(start - first[:-1], length)
    return np.arange(first[-1], dtype=np.int64) + shift
