"""The code blocks of the documents, run in order as a reader would run them, and what is shown of their output.

Blocks marked ``sh`` and ``python`` run; those of one document share a folder and a Python namespace. A ``text`` block
below one, in the same section, shows its output: ``...`` stands for whatever is left out, blanks and lines of tables
may differ, and so may figures that are the machine's (tokens/s, kB, ...). HTML comments right before a block tell what
a reader need not see::

    <!-- not run: REASON -->    <!-- exit status 2 -->    <!-- file: NAME.py -->  (written to that file, and not run)
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastscore.cli import main

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

# Names that need the Hugging Face hub, and numbers of processes that need a larger machine, are replaced.
_HUB_MODEL = re.compile(r"\bQwen/[\w.-]+")
_PROCESSES = re.compile(r"(?<=--nproc_per_node )\d+")

# Lines of sh blocks that are not run, wherever they stand, with the reason.
NOT_RUN = {
    r"^make (demo|test)$": "takes minutes and installs things: .ci/run and a fresh clone are where that is tried",
    r"^pip install ": "changes the environment that the tests run in",
    r"--engine ray": "starts or needs a cluster: tests/test_ray_data.py is where that is tried",
}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (not run|exit status|file):? (.+?) -->\s*\Z")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
_OF_THE_MACHINE = re.compile(r"\s*(?:(?:answer )?tokens/s|kB|MB|GB|GiB|s|seconds|minutes)\b")
_INPUT = re.compile(r".+(\.jsonl(\.gz)?|\.parquet|/)")


@dataclass
class Block:
    """A code block. ``shown`` is the output that stands below it; ``marks`` are those of the comment before it."""

    language: str
    code: str
    line: int
    section: int
    marks: dict[str, str]
    shown: str = ""

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and "not run" not in self.marks


def blocks_of(text: str) -> list[Block]:
    """Blocks of a document, in order."""
    blocks: list[Block] = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        mark = _MARK.search(before)
        block = Block(
            match[1],
            match[2],
            before.count("\n") + 1,
            len(re.findall(r"^#+ ", _FENCE.sub("", before), re.MULTILINE)),
            {mark[1]: mark[2]} if mark else {},
        )
        last = blocks[-1] if blocks else None
        if block.language == "text" and last is not None and last.runs and last.section == block.section:
            last.shown = block.code
        blocks.append(block)
    return blocks


def lines_of(block: Block) -> list[str]:
    """The commands of an sh block, without comments and blank lines; continued lines are one."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def why_not_run(line: str) -> str:
    """The reason in NOT_RUN, or ""."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, line)), "")


@dataclass
class Reader:
    """Runs the blocks of one document in a folder that holds a copy of examples/."""

    folder: Path
    scored: Path
    """A scored file, with its metadata and its cache, that stands in for one that a command only names."""
    model: Path
    """A small chat model, which stands in for those of the hub."""
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def run(self, block: Block) -> str:
        """What it printed, stdout and stderr together.

        Raises:
            AssertionError: another exit status than the document's.
        """
        if "file" in block.marks:
            (self.folder / block.marks["file"]).write_text(block.code, encoding="utf-8")
            return ""
        if block.language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.code, f"line {block.line}", "exec"), self.namespace)  # noqa: S102 - our document
            return out.getvalue()
        expected = int(block.marks.get("exit status", 0))
        return "".join(self._command(line, expected) for line in lines_of(block) if not why_not_run(line))

    def _command(self, line: str, expected: int) -> str:
        line = _PROCESSES.sub("2", _HUB_MODEL.sub(str(self.model), line))
        words = shlex.split(line, comments=True)
        arguments = words[1:] if words[0] == "fastscore" else words[3:]
        ours = words[0] == "fastscore" or words[:3] == ["python", "-m", "fastscore"]
        if ours or words[0] == "torchrun":
            self._make_inputs(arguments)
        if ours and not re.search(r"[|<>;&*$`]", re.sub(r"'[^']*'|#.*", "", line)):
            status, said = in_process(arguments)
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            done = subprocess.run(
                ["bash", "-c", line], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120
            )
            status, said = done.returncode, done.stdout + done.stderr
        assert status == expected, f"{line}: exit status {status}\n{said}"
        return said

    def _make_inputs(self, arguments: list[str]) -> None:
        """Files that a command names as the reader's own: the first rows of an example, or a scored file."""
        for before, argument in zip(["", *arguments], arguments, strict=False):
            path = self.folder / argument
            if before.startswith("-") or argument.startswith("-") or "*" in argument or path.exists():
                continue
            if argument.endswith(".cache.sqlite"):
                shutil.copy(f"{self.scored}.cache.sqlite", path)
            if not _INPUT.fullmatch(argument):
                continue
            if argument.endswith("/"):
                path = path / "data" / "train-0.parquet"
                path.parent.mkdir(parents=True)
            data = b"".join((EXAMPLES / "qa.jsonl").read_bytes().splitlines(keepends=True)[:1])
            if "scored" in argument:
                data = self.scored.read_bytes()
                shutil.copy(f"{self.scored}.meta.json", f"{path}.meta.json")
            if path.suffix == ".parquet":
                import pyarrow
                import pyarrow.parquet

                rows = [json.loads(line) for line in data.splitlines()]
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            else:
                path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def in_process(arguments: list[str]) -> tuple[int, str]:
    """The program here, since every process of its own would import torch again: exit status, and what it printed."""
    out = io.StringIO()
    status: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(arguments)
        except SystemExit as stopped:
            status = stopped.code
    return int(status or 0), out.getvalue()


def assert_shown(shown: str, printed: str) -> None:
    """Every line of ``shown`` was printed, in that order, and none between two of them but where ``...`` stands."""
    left = _plain_lines(printed)
    for part in re.split(r"(?m)^\s*\.\.\.(?: \(.*\))?\s*$", shown):
        wanted = _plain_lines(part)
        place = next((i for i in range(len(left)) if _agree(wanted, left[i : i + len(wanted)])), None)
        assert place is not None or not wanted, f"not printed:\n{part}\nin\n{printed}"
        left = left[(place or 0) + len(wanted) :]


def assert_comments(block: Block, printed: str) -> None:
    """``print(...)  # this`` prints this. A block shows everything that it prints so, or nothing."""
    promised = re.findall(r"^\s*print\(.*\)  # (.*)$", block.code, re.MULTILINE)
    lines = printed.splitlines()
    if promised:
        assert len(lines) == len(promised), printed
        for want, got in zip(promised, lines, strict=True):
            assert _agree(_plain_lines(want), _plain_lines(got)), f"promised {want!r}, printed {got!r}"


def _plain_lines(text: str) -> list[str]:
    lines = (re.sub(r"[\s\u2500-\u257f]+", " ", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def _agree(wanted: list[str], got: list[str]) -> bool:
    return len(wanted) == len(got) and all(_same(*pair) for pair in zip(wanted, got, strict=True))


def _same(wanted: str, got: str) -> bool:
    """Text must be equal; whole numbers, too; others to the last digit shown, give or take one."""
    pattern, figures = "", []
    for place, part in enumerate(re.split(f"({_NUMBER.pattern})", wanted)):
        if place % 2:
            pattern += f"({_NUMBER.pattern})"
            figures.append(part)
        else:
            pattern += ".*".join(re.escape(text) for text in part.split("..."))
    found = re.fullmatch(pattern, got)
    if found is None:
        return False
    position = 0
    for want, have in zip(figures, found.groups(), strict=True):
        position = wanted.index(want, position) + len(want)
        if _OF_THE_MACHINE.match(wanted, position):
            continue
        decimals = len(want.partition(".")[2].partition("e")[0])
        allowed = max(10.0**-decimals, 1e-4) * 1.01 if decimals and "e" not in want else 0.0
        values = [float(figure.replace(",", "")) for figure in (want, have)]
        if abs(values[0] - values[1]) > allowed:
            return False
    return True
