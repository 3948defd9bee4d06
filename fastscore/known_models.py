"""Models that were loaded before: notes of what was found out about each, kept in fastscore's cache folder.

A note holds for files that have not changed since, in the same versions of everything that had a part in it. There is
one of the model as such (settings, kind of tokenizer), and one for every device and dtype that it was loaded in.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastscore.config import ScorerConfig
from fastscore.fingerprint import file_mark, is_settled, replace_file
from fastscore.model_source import ModelSource, cache_folder
from fastscore.types import dtype_name

logger = logging.getLogger("fastscore")

FORMAT = 1
"""Raised whenever a note comes to say something else."""
MOST_NOTES = 64
"""The oldest are removed: two or three for each model, a few megabytes at most."""


@dataclass(frozen=True, slots=True)
class Place:
    """A model's folder and where its notes are, by what its files are now.

    settled: whether no file changed so shortly ago that another change might not show.
    """

    folder: Path
    about: Path
    settled: bool = field(compare=False)

    def loaded(self, device: torch.device, dtype: torch.dtype) -> Path:
        """Of the model in one dtype on one kind of device."""
        return self.about.with_name(f"{self.about.stem}-{device.type}-{dtype_name(dtype)}.safetensors")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What is noted of a model as such.

    config: the plain settings of its config. tokenizer: module and class that read it.
    """

    place: Place
    config: Mapping[str, Any]
    tokenizer: tuple[str, str]


@dataclass(frozen=True, slots=True)
class LoadedNote:
    """What is noted of a model as it was loaded: plain values, and tensors by name."""

    about: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


def place_of(source: ModelSource, config: ScorerConfig) -> Place | None:
    """Where notes of the model are, as its files are now; None for a model that none are kept of.

    Of a model on the hub, that is the newest one, as the hub says.
    """
    has_more = (config.adapter, config.quantize, config.device_map, config.tensor_parallel, config.trust_remote_code)
    if source.gguf_file is not None or any(has_more) or config.forward == "model":
        return None
    folder = _folder(source, config)
    if folder is None or (folder / "adapter_config.json").exists():
        return None
    return place_at(folder)


def place_at(folder: Path) -> Place | None:
    """Where notes of the model in that folder are, as its files are now."""
    looked = time.time()
    try:
        marks = {str(path): file_mark(path) for path in sorted(folder.iterdir()) if path.is_file()}
        key = sha256(json.dumps([FORMAT, _code(), marks]).encode()).hexdigest()[:32]
    except OSError:  # loading it says what is wrong; or a checkout is changing
        return None
    settled = all(is_settled(mark, looked) for mark in marks.values())
    return Place(folder, cache_folder() / "known-models" / f"{key}.json", settled)


def find_known(place: Place) -> KnownModel | None:
    """What is noted of a model, or None where it is not known."""
    try:
        noted = json.loads(place.about.read_text(encoding="utf-8"))
        module, name = noted["tokenizer"]
        if not module.startswith("transformers."):
            return None
        return KnownModel(place, dict(noted["config"]), (module, name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # never written, or damaged: it is written again
        return None


def find_loaded(known: KnownModel, device: torch.device, dtype: torch.dtype) -> LoadedNote | None:
    """What is noted of a model as it was loaded on such a device, its tensors on this one; or None."""
    try:
        with safe_open(known.place.loaded(device, dtype), framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["about"])
            return LoadedNote(about, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except (OSError, ValueError, KeyError, SafetensorError):  # as above
        return None


def write_notes(known: KnownModel, device: torch.device, dtype: torch.dtype, note: LoadedNote) -> None:
    """Keep both, each whole or not at all."""
    place = known.place
    about = {"config": known.config, "tokenizer": known.tokenizer}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in note.tensors.items()}
    try:
        settings = {"about": json.dumps(note.about)}
        replace_file(place.loaded(device, dtype), lambda path: save_file(tensors, path, settings))
        replace_file(place.about, lambda path: path.write_text(json.dumps(about), encoding="utf-8"))
        _remove_oldest(place.about.parent)
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be written (%s): models load as slowly next time", place.about.parent, error)


@lru_cache
def _code() -> list[Any]:
    """What takes part in loading. fastscore's own files too, since a checkout changes while its version stays."""
    return [
        *(metadata.version(name) for name in ("fastscore", "torch", "transformers", "tokenizers")),
        *([str(path), *file_mark(path)] for path in sorted(Path(__file__).parent.rglob("*.py"))),
    ]


def _folder(source: ModelSource, config: ScorerConfig) -> Path | None:
    """The model's own, or its snapshot in the hub's cache."""
    if (folder := Path(source.name_or_path)).is_dir():
        return folder.resolve()
    try:
        found = hf_hub_download(
            source.name_or_path,
            "config.json",
            revision=config.revision,
            cache_dir=config.cache_dir,
            local_files_only=source.local_files_only,
        )
    except Exception:  # noqa: BLE001 - loading it says what is wrong
        return None
    return Path(found).parent


def _remove_oldest(folder: Path) -> None:
    with suppress(FileNotFoundError):  # another process has just done it
        notes = [path for path in folder.iterdir() if path.is_file()]
        for path in sorted(notes, key=lambda path: path.stat().st_mtime)[:-MOST_NOTES]:
            path.unlink()
