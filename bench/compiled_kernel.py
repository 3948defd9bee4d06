"""Compiles the Triton kernels for a GPU that need not be there, and reads what the compiler made of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Matrix instructions as PTX or AMD assembly spells them, and as the machine code that ptxas makes of PTX does.
MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b|\b(v_mfma_\w+)")
MACHINE_MATRIX = re.compile(r"\b(HGMMA|HMMA|UTC[A-Z]*MMA)\b")


@dataclass(frozen=True, slots=True)
class Device:
    """What one multiprocessor offers. Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability"; AMD CDNA 3 instruction set and LLVM's AMDGPU usage guide."""

    target: GPUTarget
    matrix: str
    machine_matrix: str
    shared_per_program: int
    shared_per_sm: int
    shared_reserved: int
    registers: int  # of 32 bits and one thread, all threads together
    register_step: int
    threads: int
    programs: int


DEVICES: dict[str, Device] = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), "mma.sync", "HMMA", 163 << 10, 164 << 10, 1024, 1 << 16, 8, 2048, 32),
    "sm_90": Device(
        GPUTarget("cuda", 90, 32), "wgmma.mma_async", "HGMMA", 227 << 10, 228 << 10, 1024, 1 << 16, 8, 2048, 32
    ),
    "sm_100": Device(
        GPUTarget("cuda", 100, 32), "tcgen05.mma", "UTCHMMA", 227 << 10, 228 << 10, 1024, 1 << 16, 8, 2048, 32
    ),
    # 4 SIMD units, each with 512 registers for the 64 lanes of its waves.
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), "v_mfma", "", 64 << 10, 64 << 10, 0, 4 * 512 * 64, 8, 2048, 16),
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """registers: a thread's; spill_bytes: a thread's memory for what did not fit; scalar_spills: AMD's scalar
    registers kept in vector lanes, which costs no memory. shared_bytes, programs_that_fit: on one multiprocessor.
    matrix, machine_matrix: matrix instructions and how often they stand in the code, the latter in ptxas' machine code.
    wgmma_waits: how many matrix products each wait leaves under way; 1 in the main loop is a pipeline."""

    registers: int
    spill_bytes: int
    scalar_spills: int
    shared_bytes: int
    tensor_memory_columns: int
    programs_that_fit: int
    matrix: dict[str, int]
    machine_matrix: dict[str, int]
    local_memory_instructions: int
    tma_loads: int
    async_copies: int
    wgmma_waits: list[int]


def compile_kernel(
    kernel: Any,
    arch: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    aligned: Collection[str],
    *,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """Compile as a launch would, with the types in ``arguments``; ``aligned`` arguments are divisible by 16.

    Raises whatever the compiler raises.
    """
    device = DEVICES[arch]
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in aligned},
    )
    code = triton.compile(source, target=device.target, options={"num_warps": num_warps, "num_stages": num_stages})
    facts = _amd_facts(code) if device.target.backend == "hip" else _nvidia_facts(code)
    shared = code.metadata.shared
    threads = num_warps * device.target.warp_size
    fit = min(
        device.shared_per_sm // (shared + device.shared_reserved)
        if shared + device.shared_reserved
        else device.programs,
        device.registers // (-(-facts["registers"] // device.register_step) * device.register_step * threads),
        device.threads // threads,
        device.programs,
    )
    columns = getattr(code.metadata, "tmem_size", 0) or 0
    if columns:
        fit = min(fit, 512 // columns)
    return Compiled(shared_bytes=shared, tensor_memory_columns=columns, programs_that_fit=fit, **facts)


def _nvidia_facts(code: Any) -> dict[str, Any]:
    ptx = code.asm["ptx"]
    descriptor, cubin = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(code.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        machine = _tool("nvdisasm", "-c", cubin)
    finally:
        os.unlink(cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "scalar_spills": 0,
        "matrix": dict(Counter(name for name, _ in MATRIX.findall(ptx) if name)),
        "machine_matrix": dict(Counter(MACHINE_MATRIX.findall(machine))),
        "local_memory_instructions": len(re.findall(r"\b(?:LDL|STL)\b", machine)),
        "tma_loads": len(re.findall(r"\bcp\.async\.bulk\.tensor\b", ptx)),
        "async_copies": len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
        "wgmma_waits": [int(pending) for pending in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)],
    }


def _amd_facts(code: Any) -> dict[str, Any]:
    assembly = code.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the assembly has no .{name}")
        return int(found.group(1))

    return {
        "registers": field("vgpr_count") + field("agpr_count"),
        "spill_bytes": max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count")),
        "scalar_spills": field("sgpr_spill_count"),
        "matrix": dict(Counter(name for _, name in MATRIX.findall(assembly) if name)),
        "machine_matrix": {},
        "local_memory_instructions": len(re.findall(r"\bscratch_(?:load|store)\w*", assembly)),
        "tma_loads": 0,
        "async_copies": 0,
        "wgmma_waits": [],
    }


def ptxas_version() -> str:
    """Of the assembler that Triton carries."""
    found = re.search(r"release ([\d.]+), V([\d.]+)", _tool("ptxas", "--version"))
    return found.group(2) if found else "unknown"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
