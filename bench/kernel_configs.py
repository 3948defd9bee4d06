"""Which block sizes and splits of the vocabulary are worth timing for a call, and how a configuration is written."""

from __future__ import annotations

from dataclasses import fields

from candidates import CANDIDATES
from fastscore_kernels.launch_configs import PARTIAL_BYTES, LaunchConfig, choose_num_splits


def show_config(config: LaunchConfig) -> str:
    """As it is written in ``kernels/launch_configs.py``."""
    required = [str(getattr(config, field.name)) for field in fields(config)[:6]]
    others = [
        f"{field.name}={getattr(config, field.name)}"
        for field in fields(config)[6:]
        if getattr(config, field.name) != field.default
    ]
    return f"LaunchConfig({', '.join(required + others)})"


def candidates_for(arch: str, num_rows: int, itemsize: int) -> list[LaunchConfig]:
    """Those whose row blocks suit that many rows: not mostly empty, nor small ones that read the weight often."""
    fitting = max(16, 1 << (num_rows - 1).bit_length())
    return [
        config
        for config in CANDIDATES[arch][itemsize]
        if config.block_a <= fitting and (config.block_a >= 64 or config.block_a * 2 >= num_rows)
    ]


def split_choices(config: LaunchConfig, num_rows: int, vocab_size: int, num_sms: int) -> list[int]:
    """The split that would be chosen, and whole waves of programs around it."""
    row_blocks = -(-num_rows // config.block_a)
    at_once = num_sms * config.programs_per_sm
    num_tiles = -(-vocab_size // config.block_v)
    waves = {round(at_once * wave / row_blocks) for wave in (1, 2, 3, 4, 6, 8)} | {1, 2, 4, 8}
    chosen = choose_num_splits(row_blocks, vocab_size, config.block_v, at_once)
    # Fewer programs than fit at once leave multiprocessors idle; more splits than this take more memory than is meant.
    least = min(at_once, num_tiles)
    most = min(num_tiles, max(vocab_size * 4 // (100 * PARTIAL_BYTES), -(-at_once // row_blocks)))
    useful = {split for split in waves if split * row_blocks >= least and split <= most}
    return [chosen, *sorted(useful - {chosen})]
