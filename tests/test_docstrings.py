"""What others call says in its docstring what it takes, gives and raises."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from test_rooms import ROOMS, room_of, source_files, source_name

import fastscore
from fastscore.config import ScorerConfig, TaskConfig

EXPORTED = [name for name in fastscore.__all__ if not name.startswith("__")]
INHERITED = "ScorerConfig", "TaskConfig", "same arguments"
LEVELS = 3
SHAPE = re.compile(r"_[A-Z][A-Za-z0-9]*$")


def public_definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Classes, functions and methods whose names do not begin with an underscore."""
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{prefix}{node.name}.")


def others_call(path: Any) -> bool:
    name = source_name(path)
    return ROOMS[room_of(name)].level <= LEVELS or name.startswith("integrations/") or path.stem == "__init__"


@pytest.mark.parametrize("path", filter(others_call, source_files()), ids=source_name)
def test_everything_public_is_described(path: Any) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body
    described: dict[str, list[str]] = {}  # a method that overrides another is described there
    for name, node in public_definitions(tree):
        text = ast.get_docstring(node)
        if text:
            described.setdefault(name.rpartition(".")[2], []).append(name)
        assert text or ("." in name and described.get(name.rpartition(".")[2])), name
        raised = [each for each in ast.walk(node) if isinstance(each, ast.Raise) and each.exc is not None]
        if raised and isinstance(node, ast.FunctionDef):
            assert text, name
            assert "aise" in text, f"{name} does not say that it raises"


@pytest.mark.parametrize(
    "path", [path for path in source_files() if source_name(path).startswith("kernels/")], ids=source_name
)
def test_shapes_of_tensors_have_a_legend(path: Any) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    arguments = {arg.arg for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for arg in node.args.args}
    if any(SHAPE.search(name) for name in arguments):
        said = ast.get_docstring(tree) or ""
        assert "Shapes:" in said or any(
            "``[" in (ast.get_docstring(node) or "") for _, node in public_definitions(tree)
        )


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_exported_names_its_arguments(name: str) -> None:
    exported = getattr(fastscore, name)
    assert exported.__doc__
    methods = {
        method: value
        for method, value in vars(exported).items()
        if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod | property))
    }
    for method, value in methods.items():
        text = inspect.getdoc(value)
        assert text, method
        if isinstance(value, property):
            continue
        parameters = set(inspect.signature(getattr(exported, method)).parameters) - {"self"}
        if any(phrase in text for phrase in INHERITED):
            text += f"{ScorerConfig.__doc__}{TaskConfig.__doc__}{fastscore.Scorer.stream_rows.__doc__}"
        missing = {each for each in parameters if not re.search(rf"\b{each}\b", text)}
        assert not missing, f"{name}.{method}: {missing}"


@pytest.mark.parametrize("config", [ScorerConfig, TaskConfig])
def test_every_field_of_a_config_is_described(config: Any) -> None:
    for field in config.__dataclass_fields__:
        assert re.search(rf"\b{field}\b", config.__doc__), field


def test_the_scorer_takes_what_its_config_describes() -> None:
    taken = list(inspect.signature(fastscore.Scorer).parameters)
    assert set(taken) == {*ScorerConfig.__dataclass_fields__, "cache"}
    assert "``cache``" in (fastscore.Scorer.__doc__ or "")
