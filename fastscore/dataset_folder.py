"""Which files of a dataset's folder hold its rows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from fastscore.types import TABLE_SUFFIXES, InputError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_DATA_SUFFIXES = (*TABLE_SUFFIXES, *JSON_SUFFIXES, *(f"{suffix}.gz" for suffix in JSON_SUFFIXES))
# What lies beside rows: descriptions of the dataset, and what a run of fastscore adds.
_BESIDE = ("dataset_info.json", "dataset_infos.json", ".meta.json", ".errors.jsonl")
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_SPLIT = re.compile(rf"(?:^|[-._ 0-9/])({'|'.join(_SPLITS)})(?=[-._ 0-9/]|$)")


def dataset_files(folder: str | Path) -> list[Path]:
    """The data files of a folder in order: one that ``datasets.Dataset.save_to_disk`` wrote, or one of Parquet, Arrow
    or JSON files at any depth, as on the Hugging Face hub. What ``datasets.load_dataset`` leaves out is left out: names
    that begin with a dot, and folders' that begin with two underscores.

    Raises:
        InputError: there are none, or they are of several splits: which is meant must be said.
    """
    folder = Path(folder)
    if (state := folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_files(folder, _read(state))
    if (splits := folder / "dataset_dict.json").is_file():
        names = _read(splits).get("splits")
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            _check_beside(names, splits)
            if len(names) == 1:
                return dataset_files(folder / names[0])
            raise InputError(
                f"holds the splits {_listed(names)}: name one, for example {folder / names[0]}", path=str(folder)
            )
        raise InputError("expected the names of splits", path=str(splits), field="splits")
    files = _found_files(folder)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if len(by_split) > 1:
        names = [name or f"one without a name ({by_split[name][0].name})" for name in sorted(by_split, reverse=True)]
        raise InputError(
            f"holds the splits {_listed(names)}: give the files of one as inputs, and an output (-o)", path=str(folder)
        )
    if not files:
        raise InputError(f"a folder without data files ({', '.join(_DATA_SUFFIXES)})", path=str(folder))
    return files


def _saved_files(folder: Path, state: dict[str, Any]) -> list[Path]:
    found = state.get("_data_files")
    if not isinstance(found, list) or not all(
        isinstance(item, dict) and isinstance(item.get("filename"), str) for item in found
    ):
        raise InputError("expected a list of data files", path=str(folder / "state.json"), field="_data_files")
    names = [item["filename"] for item in found]
    _check_beside(names, folder / "state.json")
    return [folder / name for name in names]


def _check_beside(names: list[str], path: Path) -> None:
    """A dataset's description names what lies beside it: nothing above it, and not itself."""
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name:
            raise InputError(f"expected names of what lies beside this file, found {name!r}", path=str(path))


def _found_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [
            Path(place) / name
            for name in names
            if not name.startswith(".") and name.lower().endswith(_DATA_SUFFIXES) and not name.endswith(_BESIDE)
        ]
    for file in found:
        if file.exists() and not file.is_file():  # of a pipe, nothing may ever come
            raise InputError("expected a regular file", path=str(file))
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise InputError(f"cannot be read: {error.strerror or error}", path=str(error.filename)) from error


def _split_of(file: Path) -> str:
    """The split that a file's path names, by the words that ``datasets`` knows; "" where it names none."""
    named = _SPLIT.search(file.name.lower()) or _SPLIT.search(file.parent.as_posix().lower())
    return _SPLITS[named[1]] if named else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot be read: {reason}", path=str(path)) from error
    if not isinstance(data, dict):
        raise InputError("expected a JSON object", path=str(path))
    return data


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
