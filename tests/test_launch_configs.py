"""Which block sizes a call gets, and into how many parts the vocabulary is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from fastscore_kernels.launch_configs import (
    ANY,
    CONFIGS,
    PARTIAL_BYTES,
    LaunchConfig,
    choose_config,
    choose_num_splits,
)

CASES = [
    (arch, itemsize, rows) for arch in CONFIGS for itemsize in (2, 4) for rows in (1, 16, 17, 64, 65, 4096, 1 << 22)
]
VOCABULARIES = [1, 2, 127, 128, 129, 32000, 49152, 50257, 128256, 151936, 256000, 1 << 24]


@pytest.mark.parametrize(("arch", "itemsize", "num_rows"), CASES)
def test_every_call_has_a_configuration(arch: str, itemsize: int, num_rows: int) -> None:
    """That of the first case with room for its rows, and for fewer rows never larger blocks of them."""
    config = choose_config(arch, num_rows, itemsize)
    fitting = [case for case in CONFIGS[arch] if case.itemsize == itemsize and num_rows <= case.max_rows]
    assert config == fitting[0].config
    assert choose_config(arch, max(1, num_rows // 2), itemsize).block_a <= config.block_a


@pytest.mark.parametrize("arch", CONFIGS)
def test_the_table_has_no_case_that_nothing_reaches(arch: str) -> None:
    for itemsize in (2, 4):
        limits = [case.max_rows for case in CONFIGS[arch] if case.itemsize == itemsize]
        assert limits == sorted(set(limits))
        assert limits[-1] == ANY


@pytest.mark.parametrize("arch", CONFIGS)
def test_few_rows_read_the_weight_once(arch: str) -> None:
    """One block holds all rows up to a case's limit: the weight, which takes the time, is not read again."""
    for case in CONFIGS[arch]:
        if case.max_rows != ANY:
            assert case.config.block_a >= case.max_rows


def test_unknown_architectures_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"no launch configurations for sm_70; known: sm_80, sm_90, sm_100, gfx942"):
        choose_config("sm_70", 16, 2)
    with pytest.raises(ValueError, match="fp32, bf16 and fp16 operands; found 8 bytes an element"):
        choose_config("sm_90", 16, 8)


def split_sizes(num_tiles: int, num_splits: int) -> list[int]:
    """Tiles of each split, as the kernel counts them."""
    borders = [split * num_tiles // num_splits for split in range(num_splits + 1)]
    return [last - first for first, last in pairwise(borders)]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("num_rows", [1, 16, 64, 256, 1024, 4096, 16384, 1 << 20])
def test_splits(num_rows: int, vocab_size: int) -> None:
    """None is empty; the partials stay below 1% of the logits wherever the device is full without more of them."""
    config = choose_config("sm_90", num_rows, 2)
    at_once = 132 * config.programs_per_sm
    row_blocks = -(-num_rows // config.block_a)
    splits = choose_num_splits(row_blocks, vocab_size, config.block_v, at_once)
    num_tiles = -(-vocab_size // config.block_v)
    assert min(split_sizes(num_tiles, splits)) >= 1
    assert sum(split_sizes(num_tiles, splits)) == num_tiles
    if row_blocks * splits > at_once:
        assert splits * PARTIAL_BYTES <= 0.01 * 4 * vocab_size or row_blocks * (splits - 1) < at_once


@pytest.mark.parametrize("vocab_size", [32000, 49152, 128256, 151936, 256000])
@pytest.mark.parametrize("num_rows", [1, 16, 64, 256, 1024, 4096, 16384])
def test_multiprocessors_are_busy(num_rows: int, vocab_size: int) -> None:
    """Programs of equal speed, as many at a time as fit: at least nine tenths of the time is work on tiles."""
    config = choose_config("sm_90", num_rows, 2)
    at_once = 132 * config.programs_per_sm
    row_blocks = -(-num_rows // config.block_a)
    num_tiles = -(-vocab_size // config.block_v)
    splits = choose_num_splits(row_blocks, vocab_size, config.block_v, at_once)
    waves = -(-row_blocks * splits // at_once)
    time = waves * -(-num_tiles // splits)
    ideal = row_blocks * num_tiles / at_once
    # No split of whole tiles does better than this where there are few of them for each place.
    unavoidable = -(-row_blocks * num_tiles // at_once)
    assert time <= max(ideal / 0.9, unavoidable)


def test_block_sizes_are_what_triton_takes() -> None:
    """Powers of two, none larger than the copy engine's box of 256; rows of at least 16 bytes."""
    for cases in CONFIGS.values():
        for case in cases:
            config: LaunchConfig = case.config
            for size in (config.block_a, config.block_v, config.block_d):
                assert 16 <= size <= 256
                assert size & (size - 1) == 0
            assert config.num_warps in (1, 2, 4, 8)
            assert config.block_d * case.itemsize >= 16
