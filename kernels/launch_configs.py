"""Block sizes of the fused kernel for each architecture, and how the vocabulary is split over programs.

No entry has been timed on a GPU yet: each follows from the resources that the compiler reports for it
(``bench/compile_report.py``) and from the arithmetic beside it. ``bench/gpu_kernel.py --tune`` measures alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

PARTIAL_BYTES = 12
"""One (row, split): largest logit, sum of exp, top token."""


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How the partials kernel is compiled and spread over the chip.

    block_a, block_v, block_d: rows, vocabulary entries and hidden entries of a tile.
    vocab_first: the vocabulary lies on the wide axis (M) of the matrix unit, rows on N: for few rows.
    use_tma: operands come by the bulk tensor copy engine where their strides allow it.
    programs_per_sm: programs that fit on one multiprocessor at a time.
    row_group: blocks of rows whose programs run together, so that their hidden states stay in L2.
    """

    block_a: int
    block_v: int
    block_d: int
    vocab_first: bool
    num_warps: int
    num_stages: int
    use_tma: bool = False
    programs_per_sm: int = 1
    row_group: int = 16


@dataclass(frozen=True, slots=True)
class Case:
    """Calls with at most ``max_rows`` rows and operands of ``itemsize`` bytes."""

    max_rows: float
    itemsize: int
    config: LaunchConfig


ANY = float("inf")

# The first case that fits is taken. Few rows: the time is that of reading the weight once, so deep pipelines (about
# 100 KB in flight on each multiprocessor) matter and the tile's shape does not. A matrix unit takes 64 or 128 entries
# on its wide axis: fewer rows than that lie on the narrow one. Rows that fill the wide axis stay there, because a
# thread then holds the statistics of few rows. Many rows: two programs share a multiprocessor, one's epilogue beside
# the other's matrix products.
CONFIGS: dict[str, tuple[Case, ...]] = {
    "sm_80": (
        Case(16, 2, LaunchConfig(16, 128, 64, True, 4, 5)),
        Case(64, 2, LaunchConfig(64, 128, 64, False, 8, 4)),
        Case(ANY, 2, LaunchConfig(128, 128, 32, False, 8, 4)),
        Case(16, 4, LaunchConfig(16, 64, 32, True, 4, 4)),
        Case(ANY, 4, LaunchConfig(64, 64, 32, False, 4, 3)),
    ),
    "sm_90": (
        Case(16, 2, LaunchConfig(16, 128, 128, True, 4, 4, use_tma=True)),
        Case(32, 2, LaunchConfig(32, 128, 64, True, 4, 6, use_tma=True)),
        Case(64, 2, LaunchConfig(64, 128, 64, False, 8, 5, use_tma=True)),
        Case(ANY, 2, LaunchConfig(128, 128, 64, False, 4, 3, use_tma=True, programs_per_sm=2)),
        Case(16, 4, LaunchConfig(16, 64, 32, True, 4, 4, use_tma=True)),
        Case(ANY, 4, LaunchConfig(64, 64, 32, False, 4, 3, use_tma=True)),
    ),
    "sm_100": (
        Case(16, 2, LaunchConfig(16, 128, 128, True, 4, 4, use_tma=True)),
        Case(64, 2, LaunchConfig(64, 128, 64, False, 8, 5, use_tma=True)),
        Case(ANY, 2, LaunchConfig(128, 128, 64, False, 8, 4, use_tma=True)),
        Case(16, 4, LaunchConfig(16, 64, 32, True, 4, 4, use_tma=True)),
        Case(ANY, 4, LaunchConfig(64, 64, 32, False, 4, 3, use_tma=True)),
    ),
    "gfx942": (
        Case(16, 2, LaunchConfig(16, 128, 64, True, 4, 2)),
        Case(64, 2, LaunchConfig(64, 128, 64, False, 8, 2)),
        Case(ANY, 2, LaunchConfig(128, 128, 64, False, 8, 2)),
        Case(16, 4, LaunchConfig(16, 64, 32, True, 4, 2)),
        Case(ANY, 4, LaunchConfig(64, 64, 32, False, 4, 2)),
    ),
}


def choose_config(arch: str, num_rows: int, itemsize: int) -> LaunchConfig:
    """The configuration for a call.

    Raises:
        ValueError: an architecture without a table, or operands that are neither 2 nor 4 bytes wide.
    """
    if arch not in CONFIGS:
        raise ValueError(f"no launch configurations for {arch}; known: {', '.join(CONFIGS)}")
    for case in CONFIGS[arch]:
        if num_rows <= case.max_rows and itemsize == case.itemsize:
            return case.config
    raise ValueError(f"the fused kernel takes fp32, bf16 and fp16 operands; found {itemsize} bytes an element")


@lru_cache(maxsize=4096)
def choose_num_splits(num_row_blocks: int, vocab_size: int, block_v: int, programs_at_once: int) -> int:
    """Into how many runs of tiles the vocabulary is cut: full waves of programs, and few partials.

    The partials stay below 1% of the fp32 logits, except where that would leave multiprocessors idle.
    """
    num_tiles = -(-vocab_size // block_v)
    enough = -(-programs_at_once // num_row_blocks)
    most = min(num_tiles, max(vocab_size * 4 // (100 * PARTIAL_BYTES), enough))
    # A program's start and end cost about a tile.
    cost = {
        splits: -(-num_row_blocks * splits // programs_at_once) * (-(-num_tiles // splits) + 1)
        for splits in range(1, most + 1)
    }
    return min(cost, key=lambda splits: (cost[splits], splits))
