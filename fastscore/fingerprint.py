"""What a score depends on beside its token ids: the model, by the content of its files, and how it is computed."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastscore.types import InputError

logger = logging.getLogger("fastscore")

NUMERICS = 1
"""Raised whenever fastscore comes to compute a score differently by more than rounding."""
_READ_BYTES = 1 << 20
_WORTH_A_LINE = 1 << 30
SETTLED_SECONDS = 2.0
"""A file changed less long ago may be changed again without its times showing it."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".npz")
_OTHER = ("config.json", "adapter_config.json")
_HUB_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]?$")


@dataclass(frozen=True, slots=True)
class ScoreIdentity:
    """Two scores of the same token ids and answer start differ by rounding at most where all of this is equal.

    model, adapter: the names that a person gave. Labels: a folder that is moved keeps its scores.
    weights, adapter_weights: their content, from :func:`content_identity`.
    dtype, quantization: of the weights as they are loaded; ``precision``: of the matrix products (as ``highest``).
    mode: packed, padded or encoder-decoder; ``attention``: the provider; ``answer_nll``: what computes the NLL;
        ``forward``: whose layers run and how, the dtype of the residual stream included.
        Each is another program, which agrees with the others by a self-check within a tolerance, and not more.
    device: its type, as ``cpu``.
    trust_remote_code: code of the model's own may have run instead of transformers'.
    torch: its minor version (``2.13``). transformers: its full version, because patch releases are where models are
        put right.
    machine: None, or with ``deterministic`` all that may change the last bit: makes of devices, threads, full versions.

    Left out is what changes the rounding only: how requests are batched, what they share, budgets, windows; and what
    the token ids say already: tokenizer, template, truncation.
    """

    model: str
    weights: str
    dtype: str
    device: str
    mode: str
    attention: str
    forward: str
    answer_nll: str
    torch: str
    transformers: str
    adapter: str | None = None
    adapter_weights: str | None = None
    quantization: str | None = None
    precision: str | None = None
    trust_remote_code: bool = False
    machine: Mapping[str, str | int] | None = None

    def about(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def fingerprint(self) -> bytes:
        """32 bytes that differ when any of it does, labels apart."""
        depends = {name: value for name, value in self.about().items() if name not in ("model", "adapter")}
        return sha256(json.dumps([NUMERICS, depends], sort_keys=True).encode()).digest()


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def content_identity(path: str | Path, memo: Path | None = None, of_base: Callable[[str], str] | None = None) -> str:
    """What is in a model's or an adapter's folder, or in a ``.gguf`` file: a hub commit, or a SHA-256 of the files
    that a score depends on.

    A snapshot of the hub's cache is known by its commit, as long as its files are the cache's own. Anything else is
    read whole, at about a gigabyte a second and core, once: ``memo``, a JSON file, remembers digests by device,
    inode, size and both times (of the content's last change, and of the inode's, which no program can set back).
    Names, sizes and modification times alone are not enough: copies keep them, and so do weights that are written
    again in the same shape. ``of_base`` says the same of the model that an adapter beside a model names; without it
    that is read where it is a folder, and its name stands in otherwise.

    Raises:
        InputError: it is not there or cannot be read.
    """
    path = Path(path)
    try:
        if path.is_file():
            return f"sha256:{_Digests(memo).of([path])[0]}"
        files, base = _files(path), _adapter_base(path)
        commit = _hub_commit(path, files)
        if commit is not None and base is None:
            return commit
        if commit is not None:
            lines = [commit]
        else:
            named = zip(files, _Digests(memo).of(files), strict=True)
            lines = [f"{digest} {file.relative_to(path).as_posix()}" for file, digest in named]
        if base is not None:
            if of_base is None:
                of_base = (lambda name: content_identity(name, memo, str)) if Path(base).exists() else str
            lines.append(f"{of_base(base)} base")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=str(error.filename or path)) from error
    together = "\n".join(lines).encode()
    return f"sha256:{sha256(together).hexdigest()}"


def file_marks(path: str | Path) -> dict[str, list[int]]:
    """By name, what tells without reading it whether a file has changed: those that :func:`content_identity` reads.
    Empty where there are none."""
    path = Path(path)
    try:
        return {str(file): file_mark(file) for file in ([path] if path.is_file() else _files(path))}
    except (OSError, InputError):  # reading them says what is wrong
        return {}


def _files(folder: Path) -> list[Path]:
    """The files of a folder that a score depends on, and others rather than too few."""
    top = [path for path in sorted(folder.iterdir()) if path.is_file()]
    weights = [path for path in top if path.suffix in _WEIGHTS]
    names_its_own = _text_in(folder / "config.json", "transformers_weights") is not None
    if not names_its_own and any(path.name in ("model.safetensors", "model.safetensors.index.json") for path in top):
        weights = [path for path in weights if path.suffix == ".safetensors"]  # the others are not loaded
    if not weights:
        raise InputError("no weights in this folder", path=str(folder))
    others = [path for path in top if path.name in _OTHER or path.name.endswith(".index.json")]
    return sorted([*weights, *others, *folder.rglob("*.py")])  # a model's own code may import from folders beneath


def _hub_commit(folder: Path, files: Iterable[Path]) -> str | None:
    """``hub:ORGANISATION/NAME@COMMIT`` for a snapshot whose files all point into the hub cache's store."""
    found = _HUB_SNAPSHOT.search(str(folder))
    if found is None:
        return None
    blobs = (folder.parent.parent / "blobs").resolve()
    if any(not file.is_symlink() or file.resolve().parent != blobs for file in files):
        return None
    return f"hub:{found['id'].replace('--', '/')}@{found['commit']}"


def _adapter_base(folder: Path) -> str | None:
    """transformers loads a folder that holds an adapter on top of the model that the adapter names."""
    if not (folder / "config.json").is_file():
        return None
    return _text_in(folder / "adapter_config.json", "base_model_name_or_path")


def _text_in(config: Path, key: str) -> str | None:
    """What a JSON file says under that key, if it is a text."""
    try:
        value = json.loads(config.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):  # loading it says what is wrong
        return None
    return value if isinstance(value, str) and value else None


class _Digests:
    """SHA-256 of files, remembered between runs."""

    def __init__(self, memo: Path | None) -> None:
        self._memo = memo
        self._known: dict[str, list[Any]] = {}
        if memo is not None:
            # A memo that is missing or damaged is written again.
            with suppress(OSError, ValueError):
                known = json.loads(memo.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}

    def of(self, files: list[Path]) -> list[str]:
        marks = {str(file.resolve()): file_mark(file) for file in files}
        unknown = [name for name, mark in marks.items() if self._recall(name, mark) is None]
        size = sum(marks[name][2] for name in unknown)
        if size >= _WORTH_A_LINE:
            logger.info("reading %.1f GB of weights once, to know them again by their content", size / 1e9)
        started = time.time()
        stopped = threading.Event()
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing runs outside Python's lock
            try:
                digests = dict(zip(unknown, pool.map(partial(_sha256, stopped=stopped), unknown), strict=True))
            except BaseException:  # a signal: the pool would wait for whole files
                stopped.set()
                raise
        found = {name: digests.get(name) or self._recall(name, mark) for name, mark in marks.items()}
        settled = [name for name in unknown if is_settled(marks[name], started) and file_mark(name) == marks[name]]
        if settled:
            self._known |= {name: [*marks[name], digests[name]] for name in settled}
            self._write()
        return [str(found[str(file.resolve())]) for file in files]

    def _recall(self, name: str, mark: list[int]) -> str | None:
        known = self._known.get(name)
        return known[-1] if isinstance(known, list) and known[:-1] == mark and isinstance(known[-1], str) else None

    def _write(self) -> None:
        if self._memo is None:
            return
        kept = {name: value for name, value in self._known.items() if os.path.exists(name)}
        try:
            replace_file(self._memo, lambda path: path.write_text(json.dumps(kept), encoding="utf-8"))
        except OSError as error:
            logger.warning("%s cannot be written (%s): weights are read again next time", self._memo, error.strerror)


def file_mark(file: str | Path) -> list[int]:
    """Device, inode, size, and the times in nanoseconds of the content's last change and of the inode's."""
    found = os.stat(file)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def is_settled(mark: list[int], looked: float) -> bool:
    """Whether a file that had this mark at that moment had not changed so shortly before that another change might not
    show."""
    return max(mark[3:]) / 1e9 < looked - SETTLED_SECONDS


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place, and put there when it is whole; its folder is made where there is none.

    Raises:
        OSError: it cannot be written. Whatever else ``write`` raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        written = Path(folder, path.name)
        write(written)
        os.replace(written, path)


def _sha256(file: str, stopped: threading.Event) -> str:
    """Of the whole file, unless it is stopped."""
    digest = sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(file, "rb", buffering=0) as source:
        while not stopped.is_set() and (size := source.readinto(buffer)):
            digest.update(buffer[:size])
    return digest.hexdigest()
