"""Block sizes that ``bench/gpu_kernel.py --tune`` times, beside those that ship.

Those listed compile without spilling (plain logits; soft cap and bias need more registers, which
``bench/compile_report.py --candidates`` shows). The comment behind an entry gives registers a thread and KB of shared
memory where they say how many programs fit on a multiprocessor: 65536 registers and 227 KB on sm_90 and sm_100, 163 KB
on sm_80.
"""

from __future__ import annotations

from fastscore_kernels.launch_configs import LaunchConfig as Config

CANDIDATES: dict[str, dict[int, tuple[Config, ...]]] = {
    "sm_90": {
        2: (
            # Few rows: the weight is read once, so what counts is bytes in flight on each multiprocessor (4.8 TB/s
            # times about 1 us over 132 of them is 36 KB; the copy engine takes several times that to run evenly).
            # One program with a deep pipeline against several with shallow ones, whose epilogues overlap the loads.
            Config(16, 128, 128, True, 4, 4, use_tma=True),  # 112 regs, 144 KB
            Config(16, 128, 128, True, 4, 6, use_tma=True),  # 216 KB: all that there is
            Config(16, 128, 64, True, 4, 6, use_tma=True, programs_per_sm=2),  # 113 regs, 108 KB
            Config(16, 128, 64, True, 4, 4, use_tma=True, programs_per_sm=3),  # 72 KB
            Config(16, 64, 128, True, 4, 6, use_tma=True),  # 120 KB
            Config(16, 64, 128, True, 4, 5, use_tma=True, programs_per_sm=2),  # 96 regs, 100 KB
            Config(16, 64, 128, True, 4, 3, use_tma=True, programs_per_sm=3),  # 60 KB
            Config(16, 64, 256, True, 4, 5, use_tma=True),  # 200 KB; few, long copies
            Config(16, 256, 64, True, 8, 5, use_tma=True),  # 171 KB; half as many epilogues
            Config(16, 128, 64, True, 4, 5, programs_per_sm=2),  # cp.async in place of the copy engine
            Config(32, 128, 64, True, 4, 6, use_tma=True),  # 138 regs, 121 KB
            Config(32, 128, 64, True, 4, 8, use_tma=True),
            Config(32, 128, 64, True, 4, 5, use_tma=True, programs_per_sm=2),  # 101 KB
            Config(32, 128, 128, True, 4, 4, use_tma=True),  # 161 KB
            Config(32, 256, 64, True, 8, 5, use_tma=True),  # 181 KB
            Config(64, 128, 64, True, 8, 5, use_tma=True),  # 222 regs, 122 KB
            Config(64, 128, 64, True, 8, 8, use_tma=True),  # 194 KB
            Config(64, 128, 64, True, 4, 4, use_tma=True, programs_per_sm=2),  # 247 regs, 97 KB
            Config(64, 128, 128, True, 8, 4, use_tma=True),  # 194 KB
            Config(64, 256, 64, True, 8, 4, use_tma=True),  # 246 regs, 162 KB
            Config(64, 256, 64, False, 8, 4, use_tma=True),  # rows on M, wgmma of N=256
            # Many rows: the matrix unit is the limit. A wgmma reads its operands from shared memory, and a larger
            # tile reads fewer bytes for each product: 128x256 and 256x128 are what libraries take. They leave one
            # program on a multiprocessor, whose epilogue nothing covers; with 128x128 and 4 warps it is covered.
            Config(128, 128, 64, False, 4, 3, use_tma=True, programs_per_sm=2),  # 254 regs, 97 KB
            Config(128, 128, 64, False, 4, 3, use_tma=True, programs_per_sm=2, row_group=8),
            Config(128, 128, 64, False, 4, 3, use_tma=True, programs_per_sm=2, row_group=32),
            Config(128, 128, 32, False, 4, 6, use_tma=True, programs_per_sm=2),  # 97 KB: finer steps, deeper
            Config(128, 128, 64, False, 8, 4, use_tma=True),  # 210 regs, 129 KB
            Config(128, 128, 64, False, 8, 6, use_tma=True),  # 193 KB
            Config(128, 128, 128, False, 8, 3, use_tma=True),  # 193 KB; half as many barriers
            Config(128, 256, 64, False, 8, 3, use_tma=True),  # 255 regs, 145 KB
            Config(128, 256, 64, False, 8, 4, use_tma=True),  # 193 KB
            Config(128, 256, 64, False, 8, 4, use_tma=True, row_group=8),
            Config(128, 256, 64, False, 8, 4, use_tma=True, row_group=32),
            Config(128, 256, 32, False, 8, 6, use_tma=True),  # 145 KB
            Config(256, 128, 64, False, 8, 3, use_tma=True, row_group=8),  # 254 regs, 145 KB
            Config(256, 128, 64, False, 8, 4, use_tma=True, row_group=8),  # 193 KB
            Config(256, 64, 64, False, 4, 2, use_tma=True, programs_per_sm=2, row_group=8),  # 254 regs, 81 KB
            Config(64, 256, 64, False, 4, 2, use_tma=True, programs_per_sm=2),  # 255 regs, 81 KB
            Config(128, 64, 64, False, 4, 4, use_tma=True, programs_per_sm=2),  # 166 regs, 97 KB
            Config(128, 64, 64, False, 4, 3, use_tma=True, programs_per_sm=3),  # 73 KB
            Config(128, 128, 64, False, 8, 3),  # cp.async
        ),
        # Three tf32 products for each fp32 one: the matrix unit is the limit from about 32 rows on.
        4: (
            Config(16, 64, 32, True, 4, 4, use_tma=True),  # 118 regs, 34 KB
            Config(16, 64, 32, True, 4, 5, use_tma=True, programs_per_sm=4),
            Config(16, 64, 64, True, 4, 4, use_tma=True, programs_per_sm=3),  # 164 regs, 68 KB
            Config(16, 128, 32, True, 4, 4, use_tma=True, programs_per_sm=3),  # 168 regs, 58 KB
            Config(32, 128, 32, True, 4, 4, use_tma=True, programs_per_sm=2),  # 220 regs, 68 KB
            Config(64, 64, 32, True, 4, 4, use_tma=True, programs_per_sm=2),  # 232 regs, 64 KB
            Config(64, 64, 32, False, 4, 3, use_tma=True, programs_per_sm=3),  # 162 regs, 48 KB
            Config(64, 128, 32, False, 4, 3, use_tma=True, programs_per_sm=2),  # 236 regs, 80 KB
            Config(64, 128, 32, False, 8, 3, use_tma=True),  # 206 regs, 80 KB
            Config(128, 64, 32, False, 8, 3, use_tma=True),  # 173 regs, 64 KB
            Config(128, 128, 32, False, 8, 3, use_tma=True),  # 236 regs, 96 KB
        ),
    },
    "sm_80": {
        2: (
            Config(16, 128, 64, True, 4, 5),  # 128 regs, 72 KB
            Config(16, 128, 64, True, 4, 5, programs_per_sm=2),
            Config(16, 64, 128, True, 4, 4, programs_per_sm=2),
            Config(16, 128, 128, True, 4, 3, programs_per_sm=2),
            Config(64, 128, 64, True, 8, 4),  # 170 regs, 73 KB
            Config(64, 128, 32, True, 4, 5, programs_per_sm=2),  # 239 regs, 49 KB
            Config(128, 128, 32, False, 8, 4),  # 247 regs, 50 KB
            Config(128, 128, 32, False, 4, 4, programs_per_sm=2),  # 255 regs, 49 KB
            Config(128, 128, 64, False, 8, 3),
            Config(256, 128, 32, False, 8, 3, row_group=8),  # 255 regs, 50 KB
            Config(64, 256, 32, False, 8, 4),  # 245 regs, 62 KB
            Config(128, 64, 32, False, 4, 4, programs_per_sm=2),  # 224 regs, 37 KB
        ),
        4: (
            Config(16, 64, 32, True, 4, 4, programs_per_sm=3),  # 144 regs, 31 KB
            Config(16, 128, 32, True, 4, 4, programs_per_sm=2),
            Config(64, 64, 32, False, 4, 3, programs_per_sm=2),  # 255 regs, 33 KB
            Config(64, 64, 16, False, 4, 4, programs_per_sm=3),  # 168 regs, 25 KB
            Config(64, 128, 32, False, 8, 3),
            Config(128, 64, 32, False, 8, 3),
        ),
    },
    # The accumulator lies in tensor memory and comes to registers for the epilogue alone.
    "sm_100": {
        2: (
            Config(16, 128, 128, True, 4, 4, use_tma=True),  # 151 regs, 144 KB
            Config(16, 128, 64, True, 4, 6, use_tma=True, programs_per_sm=2),
            Config(16, 128, 128, True, 4, 6, use_tma=True),
            Config(64, 128, 64, True, 8, 5, use_tma=True),  # 254 regs, 121 KB
            Config(64, 128, 128, True, 8, 4, use_tma=True),
            Config(64, 256, 64, False, 8, 4, use_tma=True),  # 198 regs, 161 KB
            Config(128, 128, 64, False, 8, 4, use_tma=True),  # 255 regs, 129 KB
            Config(128, 128, 64, False, 8, 6, use_tma=True),
            Config(128, 128, 128, False, 8, 3, use_tma=True),  # 193 KB
        ),
        4: (
            Config(16, 64, 32, True, 4, 4, use_tma=True),
            Config(64, 64, 32, False, 4, 3, use_tma=True),
            Config(64, 128, 32, False, 8, 3, use_tma=True),
            Config(128, 128, 32, False, 8, 3, use_tma=True),
        ),
    },
    "gfx942": {
        2: (
            Config(16, 128, 64, True, 4, 2),
            Config(64, 128, 64, True, 8, 2),
            Config(128, 128, 64, False, 8, 2),
        ),
        4: (
            Config(16, 64, 32, True, 4, 2),
            Config(64, 64, 32, False, 4, 2),
        ),
    },
}
