"""Results: a file is written whole or not at all, under the right name, and never over an input."""

from __future__ import annotations

import gzip
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastscore.rows import RowWriter, read_rows, refuse_same_file, scored_path
from fastscore.types import InputError

RECORDS: list[dict[str, Any]] = [
    {"query": "naïve 😀 \u2028 \x85 line\n", "answers": ["a", "b"], "z": 1, "a": 2},
    {"big": 123456789012345678901234567890, "small": 1e-300, "none": None, "nested": [{"yes": [True, "\0"]}]},
]


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_rows_are_json_lines_that_read_back(tmp_path: Path) -> None:
    for name in ("out.jsonl", "out.jsonl.gz"):
        with RowWriter(str(tmp_path / name)) as writer:
            for record in RECORDS:
                writer.write(record)
        content = (tmp_path / name).read_bytes()
        text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
        assert text == "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
        assert [row.data for row in read_rows(tmp_path / name)] == RECORDS
    assert leftovers(tmp_path) == ["out.jsonl", "out.jsonl.gz"]


def test_gzip_output_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        with RowWriter(tmp_path / name) as writer:
            writer.write({"a": "x" * 1000})
    first = (tmp_path / "a.gz").read_bytes()
    assert first == (tmp_path / "b.gz").read_bytes()
    assert first[4:8] == b"\0\0\0\0"


@pytest.mark.parametrize("existing", [None, "old\n"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", ["out", "out.gz"])
def test_after_an_exception_nothing_has_changed(
    tmp_path: Path, name: str, error: type[BaseException], existing: str | None
) -> None:
    target = tmp_path / name
    if existing is not None:
        write(target, existing)

    def fail() -> None:
        with RowWriter(target) as writer:
            writer.write({"a": "x" * 500_000})
            assert len(leftovers(tmp_path)) == (1 if existing is None else 2)
            raise error

    with pytest.raises(error):
        fail()
    assert leftovers(tmp_path) == ([] if existing is None else [name])
    assert existing is None or target.read_text() == existing


def test_the_target_changes_only_on_exit(tmp_path: Path) -> None:
    target = write(tmp_path / "out", "old\n")
    with RowWriter(target) as writer:
        writer.write({"a": "x" * 500_000})
        assert target.read_text() == "old\n"
        hidden = [name for name in leftovers(tmp_path) if name != "out"]
        assert len(hidden) == 1
        assert hidden[0].startswith(".")
        assert str(os.getpid()) in hidden[0]
    assert json.loads(target.read_text()) == {"a": "x" * 500_000}
    with pytest.raises(RuntimeError, match="with block"):
        writer.write({})


KILLED = """
import sys
from fastscore.rows import RowWriter
with RowWriter(sys.argv[1]) as writer:
    for number in range(10**9):
        writer.write({"number": number, "text": "x" * 1000})
        if number == 2000:
            print("writing", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_in_the_middle_the_target_is_untouched(tmp_path: Path) -> None:
    target = write(tmp_path / "out.jsonl", '{"old": 1}\n')
    with subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert target.read_text() == '{"old": 1}\n'
    with RowWriter(target) as writer:  # what the killed run left behind is in nobody's way
        writer.write({"new": 2})
    assert target.read_text() == '{"new": 2}\n'


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_permissions_stay_and_new_files_follow_the_umask(tmp_path: Path) -> None:
    target = write(tmp_path / "out", "old")
    before = os.umask(0o027)
    try:
        for mode in (0o600, 0o666, 0o755):
            target.chmod(mode)
            with RowWriter(target) as writer:
                writer.write({})
            assert stat.S_IMODE(target.stat().st_mode) == mode
        with RowWriter(tmp_path / "new") as writer:
            writer.write({})
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = write(tmp_path / "real" / "data", "old")
    link = tmp_path / "link"
    link.symlink_to("real/data")
    dangling = tmp_path / "dangling"
    dangling.symlink_to("real/new")
    for path in (link, dangling):
        with RowWriter(path) as writer:
            writer.write({"a": 1})
        assert path.is_symlink()
        assert path.read_text() == '{"a": 1}\n'
    assert target.read_text() == '{"a": 1}\n'
    assert leftovers(tmp_path / "real") == ["data", "new"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX messages and devices")
def test_unwritable_targets_are_refused_on_entry(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    cases = {
        tmp_path: "it is a directory",
        tmp_path / "missing" / "out": "No such file or directory",
        write(tmp_path / "file", "x") / "out": "Not a directory",
        Path(os.devnull): "it is not a regular file",
        tmp_path / "loop": "symbolic links",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "nul\0": "cannot be written: ",
        tmp_path / "half\ud800": "cannot be written: ",
    }
    for path, message in cases.items():
        with pytest.raises(InputError) as caught:
            RowWriter(path).__enter__()
        assert message in caught.value.message
        assert caught.value.path == str(path)
    assert leftovers(tmp_path) == ["file", "loop"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions don't bind this user")
def test_read_only_targets_are_refused_on_entry(tmp_path: Path) -> None:
    target = write(tmp_path / "out", "old")
    target.chmod(0o444)
    with pytest.raises(InputError, match="it is read-only"):
        RowWriter(target).__enter__()
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            RowWriter(tmp_path / "new").__enter__()
    finally:
        tmp_path.chmod(0o755)


def test_a_text_that_cannot_be_encoded_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"field 'pos\[1\]': contains the lone surrogate U\+D800 at character 2"),
        RowWriter(tmp_path / "out") as writer,
    ):
        writer.write({"query": "fine", "pos": ["a", "ab\ud800"]})
    assert leftovers(tmp_path) == []


def test_scored_path_follows_the_reference_system() -> None:
    assert scored_path("dir/nq.json", "llama2-7b-chat") == Path("dir/nq.scored.llama2-7b-chat.json")
    assert scored_path(Path("/d.x/nq.v1.jsonl"), "a b") == Path("/d.x/nq.v1.scored.a b.jsonl")
    assert scored_path("nq.jsonl.gz", "m") == Path("nq.scored.m.jsonl.gz")
    assert scored_path("nq.v1.gz", "m") == Path("nq.v1.scored.m.gz")
    assert scored_path("nq", "m.v2") == Path("nq.scored.m.v2")
    with pytest.raises(InputError, match="expected a file"):
        scored_path("/", "m")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\\b", "a\0b", "a\nb", "a\x7f", "a\x85"])
def test_save_name_is_a_part_of_a_file_name(name: str) -> None:
    with pytest.raises(InputError, match="expected a part of a file name") as caught:
        scored_path("nq.json", name)
    assert caught.value.field == "save_name"


def test_the_output_may_not_be_an_input(tmp_path: Path) -> None:
    data, other = write(tmp_path / "data", "x"), write(tmp_path / "other", "x")
    (tmp_path / "link").symlink_to(data)
    os.link(data, tmp_path / "hard")
    (tmp_path / "folder").symlink_to(tmp_path)
    for output in (data, tmp_path / "link", tmp_path / "hard", tmp_path / "folder" / "data", str(data)):
        with pytest.raises(InputError, match="the output would replace the input") as caught:
            refuse_same_file(output, [other, data])
        assert caught.value.path == str(output)
    with pytest.raises(InputError):
        refuse_same_file(tmp_path / "gone", [tmp_path / "gone"])
    refuse_same_file(tmp_path / "new", [data, other])
    refuse_same_file(tmp_path / "new", [tmp_path / "missing"])
