"""The fuzzer's targets on its seeds and on simple changes to them, without the fuzzer (make fuzz runs that)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
from targets import TARGETS, seeds


@pytest.mark.parametrize("name", TARGETS)
def test_targets_hold_on_the_seeds_and_near_them(name: str) -> None:
    chance = random.Random(name)
    for seed in seeds(name):
        TARGETS[name](seed)
        for _ in range(20):
            at, size = chance.randrange(len(seed) + 1), chance.randrange(3)
            TARGETS[name](seed[:at] + chance.randbytes(size) + seed[at + chance.randrange(3) :])


def test_a_target_that_fails_is_seen() -> None:
    with pytest.raises(AssertionError):
        TARGETS["json_stream"](_Torn(b"1, 2]"))


class _Torn(bytes):
    """Reads otherwise in pieces than as a whole."""

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        return b"9" if isinstance(key, slice) else super().__getitem__(key)
