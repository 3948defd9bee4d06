"""The Triton kernels compile for every architecture of the table, without spills, on a machine without a GPU.

In processes of their own: the other tests need Triton's interpreter, and with that nothing is compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastscore_kernels.launch_configs import CONFIGS, LaunchConfig

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "bench" / "results" / "compile_report.json"
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
MACHINE_MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    """Every configuration with every option, in the two dtypes that compile differently, for one hidden size."""
    arguments = ("--json", "--dtype", "bf16", "--dtype", "fp32", "--hidden-size", "576")
    ended = run_python("bench/compile_report.py", *arguments)
    assert ended.returncode in (0, 1), ended.stderr
    result: list[dict[str, Any]] = json.loads(ended.stdout)["cases"]
    return result


def partials(cases: list[dict[str, Any]], arch: str) -> list[dict[str, Any]]:
    return [case for case in cases if case["arch"] == arch and case["kernel"] == "partials"]


def test_nothing_is_wrong(cases: list[dict[str, Any]]) -> None:
    assert [(case, case["faults"]) for case in cases if case["faults"]] == []


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_configuration_is_compiled(arch: str, cases: list[dict[str, Any]]) -> None:
    """In all that a call can ask for, beside the two kernels that need no table."""
    mine = partials(cases, arch)
    for case in CONFIGS[arch]:
        mine_here = [one for one in mine if LaunchConfig(**one["config"]) == case.config]
        found = {(one["dtype"], one["options"], one["use_tma"]) for one in mine_here}
        dtype = "bf16" if case.itemsize == 2 else "fp32"
        for options in ("plain", "all", "softcap"):
            assert (dtype, options, case.config.use_tma) in found
    others = {(one["kernel"], one["options"]) for one in cases if one["arch"] == arch and one["config"] is None}
    assert others == {("combine", "plain"), *(("fold_logits", options) for options in ("plain", "all", "softcap"))}


@pytest.mark.parametrize("arch", CONFIGS)
def test_resources(arch: str, cases: list[dict[str, Any]]) -> None:
    """The report's own verdict is not taken at its word: spills, memory, matrix instructions, programs that fit."""
    for case in (one for one in cases if one["arch"] == arch):
        compiled = case["compiled"]
        assert compiled["spill_bytes"] == 0, case
        assert compiled["local_memory_instructions"] == 0, case
        assert compiled["shared_bytes"] <= SHARED_LIMIT[arch], case
        assert 16 <= compiled["registers"] <= (512 if arch == "gfx942" else 255), case
    for case in partials(cases, arch):
        compiled = case["compiled"]
        assert any(name.startswith(MATRIX[arch]) for name in compiled["matrix"]), case
        assert compiled["programs_that_fit"] >= case["config"]["programs_per_sm"], case
        if arch in MACHINE_MATRIX:
            assert compiled["machine_matrix"][MACHINE_MATRIX[arch]] > 0, case


@pytest.mark.parametrize("arch", [arch for arch in CONFIGS if arch.startswith("sm_")])
def test_loads_run_ahead(arch: str, cases: list[dict[str, Any]]) -> None:
    """Operands come by the copy engine, or by asynchronous copies, into as many buffers as there are stages."""
    for case in partials(cases, arch):
        compiled, config = case["compiled"], case["config"]
        if case["use_tma"]:
            assert compiled["tma_loads"] >= 2 * config["num_stages"] - 2, case
            assert compiled["async_copies"] == 0, case
        else:
            assert compiled["async_copies"] > 0, case
        itemsize = 4 if case["dtype"] == "fp32" else 2
        stage = (config["block_a"] + config["block_v"]) * config["block_d"] * itemsize
        assert compiled["shared_bytes"] >= (config["num_stages"] - 1) * stage, case


def test_matrix_products_overlap_on_hopper(cases: list[dict[str, Any]]) -> None:
    """The main loop waits until one product is left under way, not none. (fp32 is three tf32 products in a row.)"""
    for case in partials(cases, "sm_90"):
        if case["dtype"] == "bf16":
            assert 1 in case["compiled"]["wgmma_waits"], case


def test_addresses_have_64_bits() -> None:
    """V times D passes 2^31. In Triton's own code, every two-dimensional address is made of 64-bit offsets."""
    program = """
import sys; sys.path.insert(0, "bench")
import compiled_kernel, compile_jobs
kept = []
compiled_kernel._nvidia_facts = lambda code: kept.append(code.asm["ttir"]) or {"registers": 1}
compiled_kernel.Compiled = lambda **facts: None
job = next(job for job in compile_jobs.shipped_jobs("sm_80", ["bf16"], [576]) if job.kernel == "partials")
fold = next(job for job in compile_jobs.shipped_jobs("sm_80", ["bf16"], [576]) if job.kernel == "fold_logits")
for one in (job, fold):
    compile_jobs.compile_job(one)
print("NEXT KERNEL".join(kept))
"""
    ended = run_python("-c", program)
    assert ended.returncode == 0, ended.stderr
    for code, operands in zip(ended.stdout.split("NEXT KERNEL"), (2, 1), strict=True):
        offsets = re.findall(r"tt\.addptr .* : tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+x(i\d+)>", code)
        assert len(offsets) >= operands
        assert set(offsets) == {"i64"}


def test_stored_report_is_of_what_ships() -> None:
    """Made anew whenever the table changes; for each version of Triton in it every configuration, and no fault."""
    reports = json.loads(STORED.read_text(encoding="utf-8"))["reports"]
    assert len(reports) >= 2
    for report in reports:
        assert [case for case in report["cases"] if case["faults"]] == []
        for arch, table in CONFIGS.items():
            stored = {LaunchConfig(**case["config"]) for case in partials(report["cases"], arch)}
            assert stored == {case.config for case in table}


def test_a_fault_ends_with_status_1(tmp_path: Path) -> None:
    """A configuration that cannot be: more shared memory than there is, and a tile that no register file holds."""
    program = """
import sys; sys.path.insert(0, "bench")
import compile_jobs, compile_report
from fastscore_kernels.launch_configs import ANY, Case, LaunchConfig
compile_jobs.CONFIGS["sm_80"] = (Case(ANY, 2, LaunchConfig(128, 256, 64, False, 4, 5)),)
sys.exit(compile_report.main(["--arch", "sm_80", "--dtype", "bf16", "--options", "plain", "--hidden-size", "576",
    "--workers", "1", "--out", sys.argv[1]]))
"""
    ended = run_python("-c", program, str(tmp_path / "report.json"))
    assert ended.returncode == 1, ended.stderr
    assert re.search(r"FAULT: spills \d+ bytes a thread", ended.stdout)
    assert re.search(r"FAULT: \d+ bytes of shared memory; the device has 166912", ended.stdout)
    (report,) = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["reports"]
    assert sum(bool(case["faults"]) for case in report["cases"]) == 1


def test_the_interpreter_is_refused() -> None:
    """With it nothing would be compiled, and nothing found wrong."""
    command = [sys.executable, "bench/compile_report.py"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert "TRITON_INTERPRET is set" in ended.stderr
