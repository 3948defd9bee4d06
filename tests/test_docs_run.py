"""Every command and every piece of library code in the documents runs, and prints what the documents show."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_blocks import (
    EXAMPLES,
    NOT_RUN,
    ROOT,
    Reader,
    assert_comments,
    assert_shown,
    blocks_of,
    in_process,
    lines_of,
    why_not_run,
)
from harness import read_own_tasks_once
from test_attention import OPTIONS, inputs, packs_of, shared_requests, truth
from tiny_models import make_tiny_model
from transformers.utils.logging import disable_progress_bar

from fastscore.attention import PROVIDERS, AttentionNeeds
from fastscore.model_source import cache_folder

DOCUMENTS = ("README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")))
BLOCKS = {name: blocks_of((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS}

# What the README shows of a guide runs there.
IN_GUIDES = {block.code for name, blocks in BLOCKS.items() if name != "README.md" for block in blocks if block.runs}


@pytest.fixture(autouse=True)
def _models_are_loaded_anew(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not, here: each only the first time, and noted beside nobody else's."""
    folder = tmp_path_factory.getbasetemp() / "cache of a reader"
    folder.mkdir(exist_ok=True)
    if not (folder / "models").is_symlink():
        (cache_folder() / "models").mkdir(parents=True, exist_ok=True)
        (folder / "models").symlink_to(cache_folder() / "models")
    monkeypatch.setenv("FASTSCORE_CACHE", str(folder))
    monkeypatch.setattr("fastscore.known_models.is_settled", lambda *_: True)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scored rows."""
    folder = tmp_path_factory.mktemp("scored")
    rows = (EXAMPLES / "qa.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    status, said = in_process(["score", str(folder / "rows.jsonl"), "-o", str(folder / "scored.jsonl"), "--quiet"])
    assert status == 0, said
    return folder / "scored.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chat model that reads whole passages."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen3", max_position_embeddings=4096)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A copy of the examples, on a wide terminal; what a document registers is gone after it."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("*.scored.*", "*.report.html"))
    # One row does what twelve do, in less time: tests/test_examples.py scores the whole. A guide may take two of them.
    rows = (EXAMPLES / "qa.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    needed = 2 if "teacher-scores" in request.node.name else 1
    (tmp_path / "examples" / "qa.jsonl").write_text("".join(rows[:needed]), encoding="utf-8")
    (tmp_path / "build").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    read_own_tasks_once(monkeypatch)
    disable_progress_bar()  # the program's own way works only before transformers is imported, as in a process
    providers = dict(PROVIDERS)
    logger = logging.getLogger("lm_eval")
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers.clear()
    yield tmp_path
    logger.handlers[:], logger.propagate = handlers, propagate
    PROVIDERS.clear()
    PROVIDERS.update(providers)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if any(block.runs for block in BLOCKS[name])])
def test_a_document_can_be_followed(name: str, folder: Path, scored: Path, model: Path) -> None:
    reader = Reader(folder, scored, model)
    for block in BLOCKS[name]:
        if not block.runs or (name == "README.md" and block.code in IN_GUIDES):
            continue
        try:
            printed = reader.run(block)
            if block.language == "python":
                assert_comments(block, printed)
            if block.language == "python" or not any(map(why_not_run, lines_of(block))):
                assert_shown(block.shown, printed)
        except Exception as error:
            raise AssertionError(f"{name}, line {block.line}: {error}") from error


@pytest.mark.parametrize("options", ["plain", "window", "wide-window"])
def test_the_provider_of_the_guide_is_right(options: str) -> None:
    """On packs cut in the middle of requests that share prefixes, against one dense product in fp64."""
    (code,) = (block.code for block in BLOCKS["docs/attention-providers.md"] if "file" in block.marks)
    module: dict[str, Any] = {}
    exec(compile(code, "per_segment.py", "exec"), module)  # noqa: S102 - our own document
    arguments = {"scaling": 0.25, "sliding_window": None, "softcap": None, "sinks": None, **OPTIONS[options]}
    for pack in packs_of(shared_requests(3), 37):
        query, key, value = inputs(pack, torch.float32)
        found = module["attend"](query, key, value, pack, **arguments)
        assert (found - truth(query, key, value, pack, **arguments)).abs().max() < 1e-5
    for needs in (AttentionNeeds("cpu", softcap=True), AttentionNeeds("cpu", sinks=True)):
        assert module["PROVIDER"].unusable(needs)
    assert module["PROVIDER"].unusable(AttentionNeeds("cpu", sliding_window=True)) == ""


def test_every_block_says_what_it_is_and_no_reason_is_stale() -> None:
    blocks = [block for found in BLOCKS.values() for block in found]
    assert {block.language for block in blocks} <= {"sh", "python", "text", "json", "yaml"}
    lines = [line for block in blocks if block.language == "sh" for line in lines_of(block)]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line) for line in lines), pattern
    assert all(block.language in ("sh", "python") for block in blocks if "not run" in block.marks)
    for name, found in BLOCKS.items():  # a document whose blocks are all left out would pass without a word
        run = [line for block in found if block.runs for line in lines_of(block) if not why_not_run(line)]
        assert run or not any(block.runs for block in found), name


def test_what_is_shown_is_compared() -> None:
    printed = "cpu, fp32\n╭──────┬────────╮\n│ rows │ 3      │\n│ speed│ 9 tokens/s │\n[-0.3494, -1.2]\nlast\n"
    for shown in (
        "cpu, fp32\n│ rows │ 3 │",
        "cpu, fp32\n...\n[-0.349, ...]\nlast",
        "│ rows │ 3 │\n│ speed│ 1,234 tokens/s │",
        "cpu, fp32\n... (more)\nlast",
    ):
        assert_shown(shown, printed)
    for shown in ("cpu, bf16", "rows 4", "cpu, fp32\nlast", "last\n...\ncpu, fp32", "[-0.352, -1.2]", "rows 3 more"):
        with pytest.raises(AssertionError):
            assert_shown(shown, printed)
