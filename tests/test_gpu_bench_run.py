"""The kernel's benchmark as a whole: its command run tiny, from a bare checkout, its picture, and its GPU's clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

from checkout import use_wheels  # noqa: E402
from device_timer import CudaTimer, take_turns  # noqa: E402
from kernel_configs import candidates_for, show_config  # noqa: E402
from kernel_measure import LIBRARY_GEMM  # noqa: E402
from kernel_peers import ANSWER_NLL, FUSED, GEMM_PATH, OURS, TORCH_CHUNKED  # noqa: E402


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own: the kernel is interpreted, which Triton decides when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_checkout_needs_no_installation(tmp_path: Path) -> None:
    run = python(
        "-c",
        "import sys; from importlib.util import find_spec\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]\n"
        "sys.path = [entry for entry in sys.path if '__editable__' not in entry]\n"
        f"sys.path.append({str(ROOT / 'bench')!r})\n"
        "print(find_spec('fastscore'), find_spec('fastscore_kernels'))\n"
        "sys.modules.update(dict.fromkeys(['platformdirs', 'typer', 'click', 'rich', 'gguf', 'peft', 'pyarrow']))\n"
        "import gpu_end_to_end; gpu_end_to_end.environment()\n"
        "import fastscore_kernels.answer_nll as module; print(module.__file__)",
        cwd=tmp_path,
        PYTHONPATH="",
        FASTSCORE_CACHE=str(tmp_path),
    )
    assert run.returncode == 0, run.stderr
    before, where = run.stdout.splitlines()
    assert before == "None None"
    assert Path(where) == ROOT / "kernels" / "answer_nll.py"


def test_wheels_are_used_without_being_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "carried_peer-1.0-py3-none-any.whl", "w") as wheel:
        folder = "carried_peer-1.0.dist-info"
        wheel.writestr("carried_peer.py", "answer = 42\n")
        wheel.writestr("json.py", "raise ImportError('this would replace the real one')\n")
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: carried-peer\nVersion: 1.0\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    use_wheels(tmp_path)
    import carried_peer  # type: ignore[import-not-found]

    assert carried_peer.answer == 42
    assert json.loads(python("-c", "import json; print(json.dumps(1))").stdout) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no wheels"):
        use_wheels(tmp_path / "empty")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str], Path]:
    """Results, printed lines and the folder of the whole command: one cell, then its continuation to a second."""
    folder = tmp_path_factory.mktemp("gpu-kernel")
    command = ["bench/gpu_kernel.py", "--tiny", "--json", str(folder / "out.json"), "--shapes", "24x131"]
    first = python(*command, "--rows", "3")
    assert first.returncode == 0, first.stdout + first.stderr
    (cell,) = json.loads((folder / "out.json").read_text("utf-8"))["cells"]
    paths = ["--paths", str(folder / "paths.json")]
    second = python(*command, "--rows", "3", "20", "--resume", *paths)
    assert second.returncode == 0, second.stdout + second.stderr
    result = json.loads((folder / "out.json").read_text("utf-8"))
    assert result["cells"][0] == cell
    return result, second.stdout.splitlines(), folder


def test_the_whole_command_runs_tiny(tiny: tuple[dict[str, Any], list[str], Path]) -> None:
    result, lines, folder = tiny
    assert [cell["num_rows"] for cell in result["cells"]] == [3, 20]
    for cell in result["cells"]:
        assert cell["agrees"]
        assert cell["errors"] == {}
        assert set(cell["contenders"]) >= {*OURS, TORCH_CHUNKED}
        assert cell["limit_us"] == max(cell["gemm_us"], cell["copy_us"])
        for values in cell["contenders"].values():
            assert values["agrees"]
            assert values["max_error"] < 1e-5
            assert values["times_limit"] == pytest.approx(values["us"] / cell["limit_us"])
        for name in OURS:
            assert cell["contenders"][name]["top1_error"] < 1e-5
        assert cell["contenders"]["cce" if "cce" in cell["contenders"] else FUSED]["graph_us"] is None
    table = [line for line in lines if line.startswith("24x131 ")]
    assert [line.split()[1] for line in table] == ["3", "20"]
    assert lines[-1].startswith(f"Aims of {ANSWER_NLL}:")
    assert any("cce (runs on a GPU only)" in line for line in lines)
    (paths,) = json.loads((folder / "paths.json").read_text("utf-8")).values()
    assert [(cell["num_rows"], cell["vocab_size"], cell["hidden_size"]) for cell in paths] == [
        (3, 131, 24),
        (20, 131, 24),
    ]
    for path, cell in zip(paths, result["cells"], strict=True):
        assert path["fused_us"] == pytest.approx(cell["contenders"][FUSED]["us"], abs=0.01)
        assert path["gemm_us"] == pytest.approx(cell["contenders"][GEMM_PATH]["us"], abs=0.01)


def test_tuning_runs_tiny_and_cells_without_time_are_skipped(tmp_path: Path) -> None:
    command = ["bench/gpu_kernel.py", "--tiny", "--tune", "--shapes", "32x256", "--rows", "5"]
    command += ["--json", str(tmp_path / "tune.json"), "--paths", str(tmp_path / "paths.json")]
    run = python(*command)
    assert run.returncode == 0, run.stdout + run.stderr
    (cell,) = json.loads((tmp_path / "tune.json").read_text("utf-8"))["cells"]
    assert cell["agrees"]
    assert cell["best"]["us"] == min(one["us"] for one in cell["tried"] if one["final"])
    configs = {one["config"] for one in cell["tried"]}
    assert configs >= {show_config(config) for config in candidates_for("sm_90", 5, 4)}
    assert run.stdout.splitlines()[-1].lstrip().startswith("N 5: LaunchConfig(")
    (paths,) = json.loads((tmp_path / "paths.json").read_text("utf-8")).values()
    assert (paths[0]["fused_us"], paths[0]["gemm_us"]) == (
        pytest.approx(cell["best"]["us"], abs=0.01),
        pytest.approx(cell["gemm_path_us"], abs=0.01),
    )
    late = python("bench/gpu_kernel.py", "--tiny", "--json", str(tmp_path / "late.json"), "--limit-seconds", "0")
    assert late.returncode == 0, late.stderr
    assert {cell["skipped"] for cell in json.loads((tmp_path / "late.json").read_text())["cells"]} == {"no time left"}


def test_the_plot_shows_the_figures(tiny: tuple[dict[str, Any], list[str], Path]) -> None:
    pytest.importorskip("matplotlib")
    import plot

    result, _, folder = tiny
    panels = [panel for panel in plot.plot_kernel(result).axes if panel.axison]
    assert [panel.get_title() for panel in panels] == ["D 24, V 131"]
    lines = {line.get_label(): line for line in panels[0].get_lines()}
    for name in OURS:
        assert lines[name].get_xdata().tolist() == [3, 20]
        assert lines[name].get_ydata().tolist() == [c["contenders"][name]["times_limit"] for c in result["cells"]]
    assert set(lines["limit"].get_ydata()) == {1}
    plot.main(["kernel", str(folder / "out.json"), str(folder / "out.svg")])
    assert "</svg>" in (folder / "out.svg").read_text("utf-8")
    with pytest.raises(SystemExit, match="no measured cells"):
        plot.plot_kernel({**result, "cells": [{"skipped": "no time left"}]})


def test_make_bench_times_the_cpu_path(tmp_path: Path) -> None:
    record = tmp_path / "benchmark.json"
    options = ["-s", "-p", "no:cacheprovider", f"--benchmark-json={record}", "bench/test_kernel.py"]
    run = python("-m", "pytest", *options, FASTSCORE_BENCH_KERNEL="7x33x1021", FASTSCORE_BENCH_KERNEL_ROUNDS="3")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "N7-D33-V1021" in run.stdout
    records = {entry["param"]: entry for entry in json.loads(record.read_text("utf-8"))["benchmarks"]}
    assert set(records) >= {ANSWER_NLL, TORCH_CHUNKED, LIBRARY_GEMM}
    for entry in records.values():
        times = entry["stats"]["median"] / records[ANSWER_NLL]["stats"]["median"]
        assert entry["extra_info"]["times_answer_nll"] == pytest.approx(times)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_a_graph_replays_the_calls_and_a_waiting_call_is_not_captured() -> None:
    device = torch.device("cuda")
    timer = CudaTimer(device)
    counts = torch.zeros(4, device=device)
    replay = timer.capture(lambda number: counts[number].add_(1), 4)
    assert replay is not None
    counts.zero_()
    for _ in range(3):
        replay(0)
    assert counts.tolist() == [3, 3, 3, 3]
    assert timer.capture(lambda _: counts.sum().item(), 2) is None
    assert timer.alive()
    assert (counts + 1).tolist() == [4, 4, 4, 4]


@pytest.mark.gpu
@needs_gpu
def test_gpu_seconds_and_peak_bytes_are_those_of_the_work() -> None:
    device = torch.device("cuda")
    timer = CudaTimer(device)
    side = 4096
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    one = take_turns(
        timer,
        {"one": lambda _: left @ left, "four": lambda _: [left @ left for _ in range(4)]},
        {},
        input_sets=1,
        budget_seconds=1.0,
        max_rounds=15,
    )
    assert one["four"].seconds / one["one"].seconds == pytest.approx(4, rel=0.2)
    # No GPU reaches 10 PFLOP/s in bf16, nor is one below 1 TFLOP/s.
    assert 1e12 < 2 * side**3 / one["one"].seconds < 1e16
    peak = timer.peak_bytes(lambda _: torch.empty(1 << 20, device=device).add(1))
    assert peak == 2 * 4 * (1 << 20)
