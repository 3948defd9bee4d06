"""What the compiler makes of every shipped configuration of the Triton kernels, on a machine without a GPU.

``python bench/compile_report.py`` compiles each configuration in ``kernels/launch_configs.py`` for its architecture and
prints registers, spills, shared memory and matrix instructions. Exit status 1 where a case does not compile, spills,
has no matrix instruction, or needs more than the device has. ``--out FILE`` keeps the report as JSON, beside what other
versions of Triton said there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from compile_jobs import DTYPES, HIDDEN_SIZES, OPTIONS, Job, candidate_jobs, compile_job, shipped_jobs
from compiled_kernel import DEVICES, Compiled, ptxas_version
from fastscore_kernels.launch_configs import LaunchConfig


@dataclass(frozen=True, slots=True)
class Result:
    """``compiled`` is None where the compiler refused; ``faults`` is empty where all is well."""

    job: Job
    compiled: Compiled | None
    faults: list[str]


def run(job: Job) -> Result:
    """Compile one job. A compiler's refusal is a fault, not the end of the report."""
    try:
        compiled = compile_job(job)
    except Exception as error:  # noqa: BLE001 compilers raise anything
        return Result(job, None, [f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}"])
    return Result(job, compiled, find_faults(job, compiled))


def find_faults(job: Job, compiled: Compiled) -> list[str]:
    """What must not be in a shipped configuration, in words."""
    device = DEVICES[job.arch]
    faults = []
    if compiled.spill_bytes:
        faults.append(f"spills {compiled.spill_bytes} bytes a thread")
    if compiled.shared_bytes > device.shared_per_program:
        faults.append(f"{compiled.shared_bytes} bytes of shared memory; the device has {device.shared_per_program}")
    if job.config is None:
        return faults
    if not any(name.startswith(device.matrix) for name in compiled.matrix):
        faults.append(f"no {device.matrix} instruction")
    if device.machine_matrix and device.machine_matrix not in compiled.machine_matrix:
        faults.append(f"no {device.machine_matrix} in the machine code")
    if job.use_tma and not compiled.tma_loads:
        faults.append("no bulk tensor copy")
    if job.arch == "sm_90" and job.dtype != "fp32" and 1 not in compiled.wgmma_waits:
        faults.append("each wgmma is waited for before the next")
    expected = job.config.programs_per_sm
    if compiled.programs_that_fit < expected:
        faults.append(f"{compiled.programs_that_fit} programs fit on a multiprocessor; the table says {expected}")
    return faults


def run_all(jobs: Sequence[Job], workers: int) -> Iterable[Result]:
    """In the order of ``jobs``; each worker is a process of its own, because a compiler may take its process down."""
    if workers == 1:
        yield from map(run, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(run, jobs)


def show_config(config: LaunchConfig | None) -> str:
    """Sizes first, as in a tile's name: 128x256x64 is rows by vocabulary by hidden."""
    if config is None:
        return "-"
    order = "vocab-first" if config.vocab_first else "rows-first"
    return (
        f"{config.block_a}x{config.block_v}x{config.block_d} {order} {config.num_warps} warps "
        f"{config.num_stages} stages {config.programs_per_sm}/SM"
    )


def show(result: Result) -> str:
    job, compiled = result.job, result.compiled
    loads = "tma" if job.use_tma else "ptr"
    line = f"{job.arch:7} {job.kernel:11} {job.dtype} {job.options:7} D={job.hidden_size:<5}{loads} "
    line += f"{show_config(job.config):47} "
    if compiled is not None:
        matrix = "+".join(f"{count} {name}" for name, count in {**compiled.matrix, **compiled.machine_matrix}.items())
        line += f"regs {compiled.registers:3}  spill {compiled.spill_bytes:3}  "
        line += f"shared {compiled.shared_bytes / 1024:5.1f} KB  fit {compiled.programs_that_fit:2}  {matrix}"
    return line + "".join(f"\n    FAULT: {fault}" for fault in result.faults)


def as_json(result: Result) -> dict[str, Any]:
    """Flat where it can be: one line of the file each."""
    return {
        **asdict(result.job),
        "compiled": None if result.compiled is None else asdict(result.compiled),
        "faults": result.faults,
    }


def make_report(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "triton": triton.__version__,
        "ptxas": ptxas_version(),
        "python": platform.python_version(),
        "cases": [as_json(result) for result in results],
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """In place of the last one of the same version of Triton; one case a line, so that differences can be read."""
    reports = {}
    if path.exists():
        reports = {one["triton"]: one for one in json.loads(path.read_text(encoding="utf-8"))["reports"]}
    reports[report["triton"]] = report
    lines = ['{"reports": [']
    for number, version in enumerate(sorted(reports)):
        head = {name: value for name, value in reports[version].items() if name != "cases"}
        lines.append((", " if number else "") + json.dumps(head)[:-1] + ', "cases": [')
        lines.append(",\n".join(json.dumps(case) for case in reports[version]["cases"]))
        lines.append("]}")
    lines.append("]}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=list(DEVICES), help="repeatable; all by default")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="repeatable; all by default")
    parser.add_argument("--hidden-size", action="append", type=int, metavar="D", help=f"default: {HIDDEN_SIZES}")
    parser.add_argument("--options", action="append", choices=list(OPTIONS), help="repeatable; all by default")
    parser.add_argument("--candidates", action="store_true", help="bench/candidates.py in place of what ships")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(arguments)

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    jobs = [
        job
        for arch in args.arch or DEVICES
        for job in (candidate_jobs if args.candidates else shipped_jobs)(
            arch, args.dtype or list(DTYPES), args.hidden_size or HIDDEN_SIZES
        )
        if job.options in (args.options or OPTIONS)
    ]
    results = []
    for result in run_all(jobs, args.workers):
        results.append(result)
        if not args.json:
            print(show(result), flush=True)
    report = make_report(results)
    if args.json:
        print(json.dumps(report))
    if args.out:
        write_report(args.out, report)
    faulty = sum(bool(result.faults) for result in results)
    summary = f"{len(results)} cases, {faulty} with faults; triton {report['triton']}, ptxas {report['ptxas']}"
    print(summary, file=sys.stderr if args.json else sys.stdout)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
