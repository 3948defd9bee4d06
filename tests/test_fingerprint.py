"""What a model is known by: the same for the same content, another for another, however the files look from outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from fastscore import fingerprint
from fastscore.fingerprint import content_identity
from fastscore.types import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "pytorch_model.bin"):
        (folder / name).write_text(f"content of {name}")
    return folder


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_folder_is_what_a_score_depends_on(folder: Path, tmp_path: Path) -> None:
    found = content_identity(folder)
    lines = [f"{sha(f'content of {name}'.encode())} {name}" for name in ("config.json", "model.safetensors")]
    assert found == "sha256:" + sha("\n".join(lines).encode())
    shutil.copytree(folder, tmp_path / "copy")
    assert content_identity(tmp_path / "copy") == found
    for name in ("tokenizer.json", "README.md", "pytorch_model.bin"):  # nothing that a score depends on
        (folder / name).write_text("changed")
    assert content_identity(folder) == found


@pytest.mark.parametrize("change", ["config.json", "model.safetensors", "modeling_own.py", "sub/part.py", "renamed"])
def test_a_change_that_counts(folder: Path, change: str) -> None:
    found = content_identity(folder)
    if change == "renamed":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    else:
        (folder / change).parent.mkdir(exist_ok=True)
        (folder / change).write_text("changed")
    assert content_identity(folder) != found


def test_weights_in_pickles_count_where_there_is_nothing_else(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    found = content_identity(folder)
    (folder / "pytorch_model.bin").write_text("changed")
    assert content_identity(folder) != found


def test_weights_that_the_config_names_count_beside_others(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"transformers_weights": "pytorch_model.bin"}))
    found = content_identity(folder)
    (folder / "pytorch_model.bin").write_text("changed")
    assert content_identity(folder) != found


def test_a_snapshot_with_an_adapter_in_it_brings_its_base(tmp_path: Path) -> None:
    repository, blobs = tmp_path / "models--some--tuned", tmp_path / "models--some--tuned" / "blobs"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    adapter = json.dumps({"base_model_name_or_path": "some/base"})
    for name, content in (("config.json", "{}"), ("adapter_config.json", adapter), ("model.safetensors", "weights")):
        (blobs / name).write_text(content)
        (snapshot / name).symlink_to(blobs / name)
    bases = ["hub:some/base@1", "hub:some/base@2"]
    found = {content_identity(snapshot, of_base=lambda name, base=base: f"{name} {base}") for base in bases}  # type: ignore[misc]
    assert len(found) == 2, "main has moved"
    assert content_identity(snapshot) not in found


def test_reading_stops_at_a_signal(tmp_path: Path) -> None:
    """Not at the end of files of many gigabytes."""
    with (tmp_path / "large.gguf").open("wb") as file:
        file.truncate(1 << 40)
    os.utime(tmp_path / "large.gguf", (1, 1))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        content_identity(tmp_path / "large.gguf")
    assert time.monotonic() - began < 30


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = os.urandom((1 << 20) + 17)
    path.write_bytes(data)
    assert content_identity(path) == "sha256:" + sha(data)


def test_an_adapter_in_a_models_folder_brings_its_base(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    found = content_identity(folder)
    (base / "model.safetensors").write_text("trained again")
    assert content_identity(folder) != found


def snapshot(root: Path, content: str = "weights") -> Path:
    """As the hub's cache keeps it."""
    folder = root / "models--org--name--x" / "snapshots" / ("0123456789" * 4)
    blobs = folder.parent.parent / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (blobs / sha(name.encode())).write_text(content)
        (folder / name).symlink_to(os.path.join("..", "..", "blobs", sha(name.encode())))
    return folder


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    assert content_identity(folder) == "hub:org/name/x@" + "0123456789" * 4
    assert content_identity(str(folder) + "/") == content_identity(folder)
    # Edited by hand it is no longer what was published.
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_text("weights")
    assert content_identity(folder).startswith("sha256:")


def test_digests_are_remembered_by_more_than_size_and_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = tmp_path / "cache" / "fingerprints.json"
    read: list[str] = []
    whole = fingerprint._sha256

    def counted(name: str, stopped: threading.Event) -> str:
        read.append(Path(name).name)
        return whole(name, stopped)

    monkeypatch.setattr(fingerprint, "_sha256", counted)
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", 0.0)
    found = content_identity(folder, memo)
    assert sorted(read) == ["config.json", "model.safetensors"]
    time.sleep(0.02)
    assert content_identity(folder, memo) == found
    assert len(read) == 2

    # Written in place with the same length, and the time of its change set back: only the inode's own time tells.
    weights = folder / "model.safetensors"
    before = os.stat(weights)
    with open(weights, "r+b") as out:
        out.write(b"C")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(weights).st_size, os.stat(weights).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    time.sleep(0.02)
    changed = content_identity(folder, memo)
    assert changed != found
    assert read[2:] == ["model.safetensors"]
    for broken in ("", "[]", '{"x": 3}', json.dumps({str(weights): "x"})):
        memo.write_text(broken)
        assert content_identity(folder, memo) == changed
    assert [entry.name for entry in memo.parent.iterdir()] == [memo.name]


def test_a_file_just_written_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    memo = tmp_path / "fingerprints.json"
    first = content_identity(folder, memo)
    assert not memo.exists()
    (folder / "model.safetensors").write_text("Content of model.safetensors")
    assert content_identity(folder, memo) != first


def test_a_memo_that_cannot_be_written_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_SECONDS", -60.0)
    (tmp_path / "file").touch()
    assert content_identity(folder, tmp_path / "file" / "memo.json") == content_identity(folder)
    assert "memo.json cannot be written" in caplog.text


def test_nothing_there(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "nowhere: cannot be read: No such file or directory"),
        (tmp_path, "no weights in this folder"),
    ):
        with pytest.raises(InputError, match=message):
            content_identity(path)
