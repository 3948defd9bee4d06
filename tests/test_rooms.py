"""The table of rooms: which file may import what. Every import counts, also those inside functions.

Imports only go down. A new file needs a line in ``ROOMS`` before these tests pass.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 350

KERNELS = frozenset({"torch", "triton"})
TERMINAL = frozenset({"typer", "click", "rich"})
MODEL = frozenset({"torch", "transformers"})


@dataclass(frozen=True)
class Room:
    """A file's level, the rooms of this project it may import, and the packages of others (beside the stdlib)."""

    level: int
    rooms: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()


def room(level: int, rooms: str = "", packages: frozenset[str] = frozenset()) -> Room:
    return Room(level, frozenset(rooms.split()), packages)


# A name ending in "/" stands for every file under that folder. Names are those of modules under fastscore.
ROOMS: dict[str, Room] = {
    "kernels/": room(0, packages=KERNELS),
    "error_text": room(1),
    "ranges": room(1, packages=frozenset({"numpy"})),
    "transfer": room(1, packages=frozenset({"numpy", "torch"})),
    "types": room(1, "ranges transfer", packages=frozenset({"torch"})),
    "config": room(1),
    "garbage": room(1),
    "read_ahead": room(1),
    "interrupts": room(1),
    "run_stats": room(1),
    "json_stream": room(1, "types"),
    "dataset_folder": room(1, "types"),
    "table_rows": room(1, "types", frozenset({"pyarrow"})),
    "rows": room(1, "types json_stream dataset_folder table_rows"),
    "context": room(1),
    "fields": room(1, "types"),
    "templates": room(1, "types config"),
    "definitions": room(1, "types config templates"),
    "tokenization": room(1, "types config", frozenset({"transformers"})),
    "chat": room(1, "types config fields", frozenset({"transformers"})),
    "preference": room(1, "types fields tokenization chat"),
    "tasks": room(1, "types config fields templates definitions chat preference"),
    "candidates": room(1, "types config fields tasks"),
    "output_formats": room(1, "types config preference tasks candidates"),
    "table_schema": room(1, "types fields table_rows", frozenset({"pyarrow"})),
    "table_writer": room(1, "types table_rows table_schema rows", frozenset({"pyarrow"})),
    "outputs": room(1, "types config tasks output_formats rows table_rows table_schema table_writer"),
    "prefix_tree": room(1, "types ranges", frozenset({"numpy"})),
    "packing": room(1, "types ranges prefix_tree", frozenset({"numpy", "torch"})),
    "padding": room(1, "types ranges", frozenset({"numpy", "torch"})),
    "sampling": room(1, "types"),
    "windows": room(1, "types config chat tasks tokenization"),
    "row_parts": room(1, "types config tasks"),
    "blocks": room(1, "types config row_parts tokenization"),
    "fingerprint": room(1, "types"),
    "cache_blocks": room(1, "types ranges", frozenset({"numpy"})),
    "mounts": room(1, ""),
    "cache_file": room(1, "types mounts"),
    "block_scores": room(1, "types run_stats config blocks cache_file"),
    "total_stats": room(1, "run_stats block_scores"),
    "aggregate": room(1, "types config"),
    "dealt": room(1, "types config aggregate windows row_parts blocks block_scores"),
    "cache": room(1, "types ranges fingerprint garbage cache_blocks cache_file", frozenset({"numpy"})),
    "cache_upkeep": room(1, "types cache_blocks cache_file"),
    "attention/": room(
        2, "types ranges transfer attention/", frozenset({"numpy", "torch", "flash_attn", "flash_attn_interface"})
    ),
    "gguf_header": room(1, "types"),
    "hub": room(2, "", frozenset({"huggingface_hub"})),
    "model_source": room(2, "types gguf_header hub", frozenset({"transformers", "gguf", "platformdirs"})),
    "weight_files": room(
        2, "types config hub model_source", frozenset({"transformers", "safetensors", "huggingface_hub"})
    ),
    "pretrained": room(2, "types config error_text model_source weight_files", frozenset({"transformers"})),
    "shards": room(2, "", frozenset({"torch"})),
    "lm_head": room(2, "kernels/ types shards", MODEL),
    "quantize": room(2, "types error_text shards", MODEL | {"torchao"}),
    "decoder/": room(2, "types attention/ decoder/ quantize shards", MODEL),
    "devices": room(2, "types error_text decoder/", frozenset({"torch"})),
    "budget": room(2, "", frozenset({"torch"})),
    "answer_head": room(2, "transfer types ranges lm_head", frozenset({"numpy", "torch"})),
    "probes": room(2, "types error_text prefix_tree packing", frozenset({"torch"})),
    "own_forward": room(2, "types config error_text attention/ decoder/", frozenset({"torch"})),
    "packed_forward": room(2, "types attention/", MODEL),
    "self_check": room(2, "types error_text padding attention/ packed_forward probes quantize", MODEL),
    "forwards": room(2, "types config attention/ decoder/ packed_forward probes own_forward", MODEL),
    "language_model": room(
        2,
        "types ranges prefix_tree packing padding attention/ lm_head packed_forward",
        MODEL | {"numpy"},
    ),
    "ready_model": room(
        2, "types config budget decoder/ devices lm_head own_forward language_model", frozenset({"torch"})
    ),
    "known_models": room(2, "types config fingerprint model_source", MODEL | {"huggingface_hub", "safetensors"}),
    "recall": room(
        2,
        "config context error_text attention/ budget decoder/ devices lm_head probes own_forward packed_forward "
        "pretrained model_source language_model ready_model known_models",
        MODEL | {"safetensors"},
    ),
    "split_model": room(2, "types model_source language_model packed_forward", MODEL),
    "models": room(
        2,
        "types config context error_text padding attention/ decoder/ devices model_source weight_files pretrained "
        "lm_head quantize packed_forward probes self_check forwards language_model ready_model known_models recall "
        "split_model",
        MODEL | {"peft", "accelerate"},
    ),
    "execution": room(3, "types language_model answer_head"),
    "identity": room(
        3,
        "kernels/ types config decoder/ fingerprint language_model model_source",
        MODEL | {"huggingface_hub"},
    ),
    "checkpoint": room(
        3,
        "config garbage decoder/ fingerprint identity known_models language_model model_source models pretrained "
        "recall",
    ),
    "kept_scores": room(
        3, "types ranges fingerprint cache_blocks cache_file cache language_model", frozenset({"numpy"})
    ),
    "launch": room(3, "types run_stats interrupts language_model execution aggregate kept_scores"),
    "pipeline": room(3, "types interrupts windows read_ahead language_model kept_scores launch", frozenset({"torch"})),
}
ROOMS["row_stream"] = room(
    3, "types config run_stats aggregate chat tokenization windows devices language_model kept_scores launch pipeline"
)
ROOMS["scorer"] = room(3, " ".join(ROOMS), MODEL)
# What every edge may import: the scorer and level 1.
_EDGE = " ".join(["__init__", "scorer", *(key for key, entry in ROOMS.items() if entry.level == 1)])
ROOMS |= {
    # Only re-exports, and those lazily.
    "__init__": room(4, "scorer types config garbage"),
    "run_files": room(4, _EDGE),
    "terminal": room(4, "run_files types run_stats interrupts", TERMINAL),
    "estimate": room(4, f"{_EDGE} run_files pipeline", frozenset({"torch"})),
    "doctor": room(4, f"{_EDGE} kernels/ terminal attention/ decoder/ devices model_source identity", TERMINAL | MODEL),
    "ray_shelf": room(4, _EDGE, frozenset({"pyarrow", "ray"})),
    "ray_cache": room(4, _EDGE, frozenset({"numpy", "ray"})),
    "integrations/": room(
        4, f"{_EDGE} ray_shelf ray_cache", MODEL | {"datasets", "lm_eval", "numpy", "pyarrow", "ray", "tqdm"}
    ),
    "rank_messages": room(4, "", frozenset({"torch"})),
    "shared_model": room(
        4, "scorer config interrupts execution language_model rank_messages types", frozenset({"torch"})
    ),
    "rank_follower": room(4, f"{_EDGE} rank_messages shared_model", frozenset({"torch"})),
    "distributed": room(4, f"{_EDGE} rank_messages rank_follower shared_model", frozenset({"torch"})),
    "launched": room(4, "distributed"),
    "report/": room(4, f"{_EDGE} run_files", frozenset({"numpy", "jinja2", "markupsafe", "vl_convert"})),
    "run_lm_score": room(4, f"{_EDGE} run_files terminal integrations/ launched"),
}
# The command line may import everything, though not at its top: see LIGHT.
for _name in ("cli_options", "cli_definitions", "cli_engine", "cli_score", "cli_bench", "cli_report"):
    ROOMS[_name] = room(4, " ".join(ROOMS), TERMINAL)
ROOMS["cli_lm_eval"] = room(4, " ".join(ROOMS), TERMINAL | {"lm_eval"})
ROOMS["cli_cache"] = room(4, " ".join(ROOMS), TERMINAL)
ROOMS["cli"] = room(4, " ".join(ROOMS), TERMINAL)
ROOMS["__main__"] = room(4, "cli")

# The members of these never import one another, not even lazily.
SEPARATE_MEMBERS = ("integrations/",)
# Loaded before the arguments are read: --help must not wait for torch, nor for the rooms behind it.
COMMANDS = (
    "cli",
    "cli_options",
    "cli_definitions",
    "cli_engine",
    "cli_score",
    "cli_bench",
    "cli_cache",
    "cli_lm_eval",
    "cli_report",
)
LIGHT = ("__main__", "__init__", *COMMANDS, "types", "config", "garbage", "launched")
LIGHT_IMPORTS = frozenset({*LIGHT, "typer", "rich"})


@dataclass(frozen=True)
class Import:
    """One imported module; ``lazy`` inside a function or under ``TYPE_CHECKING``."""

    module: str
    line: int
    lazy: bool


def source_files() -> list[Path]:
    return sorted(path for folder in ("fastscore", "kernels") for path in (ROOT / folder).rglob("*.py"))


def source_name(path: Path) -> str:
    """``fastscore/attention/dense.py`` is ``attention/dense``; files of kernels/ keep their folder."""
    relative = path.relative_to(ROOT).with_suffix("").as_posix()
    return relative.removeprefix("fastscore/")


def room_of(name: str) -> str:
    """The key of ROOMS for a file's name."""
    return next((key for key in ROOMS if name == key or (key.endswith("/") and name.startswith(key))), "")


def modules_of(node: ast.Import | ast.ImportFrom, package: list[str]) -> Iterator[str]:
    """Full names of everything a statement may import. ``from a import b`` may mean the module ``a.b``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    above = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        member = f"{base}.{alias.name}"
        yield member if is_ours(base) and module_exists(member) else base


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("fastscore", "fastscore_kernels")


def module_exists(module: str) -> bool:
    path = ROOT / module.replace("fastscore_kernels", "kernels", 1).replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_in(source: str, package: str) -> list[Import]:
    """Every import of a file, and every module named in a call of ``import_module`` or ``__import__``."""
    found: list[Import] = []

    def walk(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend(Import(module, node.lineno, lazy) for module in modules_of(node, package.split(".")))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append(Import(node.args[0].value, node.lineno, lazy))
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_type_check = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            walk(child, lazy or is_function or is_type_check)

    walk(ast.parse(source), False)
    return found


def imports_of(path: Path) -> list[Import]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imports_in(path.read_text(encoding="utf-8"), package)


def target_name(module: str) -> str:
    """A module of ours, named as :func:`source_name` names its file."""
    parts = module.split(".")
    if parts[0] == "fastscore_kernels":
        return "/".join(["kernels", *parts[1:]]) if len(parts) > 1 else "kernels/"
    if parts == ["fastscore"]:
        return "__init__"
    folder = ROOT.joinpath(*parts).is_dir()
    return "/".join(parts[1:]) + ("/__init__" if folder else "")


def violations(name: str, imports: list[Import]) -> list[str]:
    """What the table forbids among a file's imports, in words."""
    key = room_of(name)
    if not key:
        return [f"{name}: no room in the table of tests/test_rooms.py"]
    allowed, found = ROOMS[key], []
    for imported in imports:
        top = imported.module.split(".")[0]
        place = f"{name}:{imported.line}: imports {imported.module}"
        if is_ours(imported.module):
            target = target_name(imported.module)
            target_key = room_of(target)
            if target == name:
                continue
            if not target_key:
                found.append(f"{place}, which has no room in the table")
            elif target_key == key:
                if key in SEPARATE_MEMBERS and not target.endswith("__init__"):
                    found.append(f"{place}: members of {key} never import one another")
            elif target_key not in allowed.rooms:
                found.append(f"{place}, which {key} may not")
        elif top == "kernels":
            found.append(f"{place}: the package is called fastscore_kernels")
        elif top not in sys.stdlib_module_names and top not in allowed.packages:
            found.append(f"{place}, which {key} may not")
    return found


@pytest.mark.parametrize("path", source_files(), ids=source_name)
def test_imports_follow_the_table(path: Path) -> None:
    assert violations(source_name(path), imports_of(path)) == []


def test_the_table_itself_only_points_down() -> None:
    # Two level-1 files may lean on each other in one direction only: the order of the table is that direction.
    order = list(ROOMS)
    for key, entry in ROOMS.items():
        for target in entry.rooms - {key}:
            assert target in ROOMS, f"{key} may import {target}, which is not in the table"
            assert ROOMS[target].level <= entry.level, f"{key} may import {target}, which is above it"
            assert order.index(target) < order.index(key), f"{key} may import {target}, which stands below it in ROOMS"
        if entry.level < 4:
            assert not entry.packages & TERMINAL, f"{key}: typer and rich belong to the edges"


@pytest.mark.parametrize("name", LIGHT)
def test_help_waits_for_nothing_heavy(name: str) -> None:
    for imported in imports_of(ROOT / "fastscore" / f"{name}.py"):
        if imported.lazy or imported.module.split(".")[0] in sys.stdlib_module_names:
            continue
        target = target_name(imported.module) if is_ours(imported.module) else imported.module.split(".")[0]
        assert target in LIGHT_IMPORTS, f"{name}:{imported.line} imports {imported.module} at its top"


def hands_on(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "set_exception"
    return isinstance(node, ast.Raise)


@pytest.mark.parametrize("path", source_files(), ids=source_name)
def test_no_bare_except(path: Path) -> None:
    handlers = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ExceptHandler)]
    assert [node.lineno for node in handlers if node.type is None] == []
    # Catching everything is only for handing it on, up or to another thread.
    blind = [node for node in handlers if node.type and ast.unparse(node.type) == "BaseException"]
    assert [node.lineno for node in blind if not any(map(hands_on, ast.walk(node)))] == []


@pytest.mark.parametrize("path", source_files(), ids=source_name)
def test_files_are_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "transformers looks for a package named kernels and would take ours"
    )


@pytest.mark.parametrize("folder", ["tests", "bench", "examples"])
def test_nobody_says_import_kernels(folder: str) -> None:
    found = [
        f"{path.name}:{imported.line}"
        for path in (ROOT / folder).rglob("*.py")
        for imported in imports_of(path)
        if imported.module.split(".")[0] == "kernels"
    ]
    assert found == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("types", "from fastscore.rows import read_rows", "types:1: imports fastscore.rows, which types may not"),
        ("packing", "def f():\n    from fastscore import scorer", "packing:2: imports fastscore.scorer, which"),
        ("packing", "def f():\n    from . import models", "packing:2: imports fastscore.models, which packing may"),
        ("tasks", "from .scorer import Scorer", "tasks:1: imports fastscore.scorer, which tasks may not"),
        ("rows", "import rich.table", "rows:1: imports rich.table, which rows may not"),
        ("scorer", "def f():\n    import typer", "scorer:2: imports typer, which scorer may not"),
        ("config", "from importlib import import_module\nimport_module('torch')", "config:2: imports torch, which"),
        ("models", "import kernels.answer_nll", "the package is called fastscore_kernels"),
        ("kernels/answer_nll", "import numpy", "kernels/answer_nll:1: imports numpy, which kernels/ may not"),
        ("kernels/answer_nll", "import fastscore.types", "imports fastscore.types, which kernels/ may not"),
        ("attention/dense", "from fastscore.models import load_model", "imports fastscore.models, which attention/"),
        ("integrations/ray", "from fastscore.integrations import upstream", "never import one another"),
        ("integrations/ray", "import fastscore.cli", "imports fastscore.cli, which integrations/ may not"),
        ("rows", "import fastscore.nowhere", "imports fastscore.nowhere, which has no room in the table"),
        ("newcomer", "", "newcomer: no room in the table"),
    ],
)
def test_the_table_catches(name: str, source: str, complaint: str) -> None:
    folder, _, _ = name.rpartition("/")
    package = (
        folder if folder == "kernels" else ".".join(["fastscore", *folder.split("/")] if folder else ["fastscore"])
    )
    found = violations(name, imports_in(source, package))
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("rows", "from fastscore.types import InputError\nimport json, os.path"),
        ("attention/flash", "from fastscore.attention.dense import attend\nimport flash_attn"),
        ("kernels/answer_nll", "import torch\nfrom fastscore_kernels.answer_nll_reference import answer_nll_reference"),
        ("integrations/ray", "def f():\n    from fastscore import Scorer\n    import ray.data"),
        ("cli", "def f():\n    from fastscore.doctor import doctor"),
    ],
)
def test_the_table_allows(name: str, source: str) -> None:
    folder, _, _ = name.rpartition("/")
    assert violations(name, imports_in(source, folder if folder == "kernels" else "fastscore")) == []
