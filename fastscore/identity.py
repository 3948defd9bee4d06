"""What a loaded model's scores come from, in words for a run's metadata; and what they are known by in a cache: its
files by their content, and all that computes a score from them."""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from fastscore_kernels.answer_nll import answer_nll_path
from huggingface_hub import try_to_load_from_cache

from fastscore.config import ScorerConfig
from fastscore.decoder import OwnForward
from fastscore.fingerprint import ScoreIdentity, content_identity, file_marks
from fastscore.language_model import ALIGNMENT, DETERMINISTIC_TOKENS, LanguageModel
from fastscore.model_source import ModelSource, cache_folder
from fastscore.types import InputError, dtype_name


def describe_run(model: LanguageModel, config: ScorerConfig, model_path: str, commit: str | None) -> dict[str, Any]:
    """What runs here and how; ``commit`` is the hub's, where the model has one."""
    return {
        "model": config.model,
        "model_path": model_path,
        "revision": config.revision,
        "commit": commit,
        "adapter": config.adapter,
        "architecture": type(model.model).__name__,
        "device": str(model.device),
        "dtype": dtype_name(model.dtype),
        "mode": model.mode,
        "mode_reason": model.reason,
        "forward": model.forward_name,
        "quantize": config.quantize,
        "attention": _attention(model),
        "answer_nll": answer_nll_path(model.device),
        "max_batch_tokens": model.max_batch_tokens,
        "window_tokens": config.window_tokens,
        "share_prefixes": config.share_prefixes,
        "deterministic": config.deterministic,
        "overflow": config.overflow,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def score_identity(
    model: LanguageModel, config: ScorerConfig, source: ModelSource, commit: str | None, files: dict[str, list[int]]
) -> ScoreIdentity:
    """The identity of a model that was loaded with this config from there; ``commit`` is the hub's, where it has one.
    ``files`` were its :func:`local_files` before it was loaded.

    Reads the files of the model and the adapter, unless they are remembered from before or a snapshot of the hub's.

    Raises:
        InputError: they can't be found or read, or are not those that were loaded.
    """
    adapter = config.adapter
    identity = ScoreIdentity(
        model=config.model,
        weights=_content(source.path, "config.json", config.cache_dir, commit or config.revision),
        adapter=adapter,
        adapter_weights=None if adapter is None else _content(adapter, "adapter_config.json"),
        dtype=dtype_name(model.dtype),
        quantization=config.quantize,
        precision=torch.get_float32_matmul_precision(),
        device=model.device.type,
        mode=model.mode,
        attention=_attention(model),
        # Why the model's own layers run is no part of it.
        forward=model.forward_name if isinstance(model.forward, OwnForward) else "the model's own layers",
        answer_nll=answer_nll_path(model.device),
        trust_remote_code=config.trust_remote_code,
        torch=".".join(torch.__version__.split(".")[:2]),
        transformers=transformers.__version__,
        machine=_machine(model) if model.deterministic else None,
    )
    if local_files(config, source) != files:  # after they were read: whichever was there first, it is not both
        raise InputError(f"the files of {config.model} have changed since they were loaded")
    return identity


def _attention(model: LanguageModel) -> str:
    return model.provider.name if model.provider is not None else "model's own"


def _content(
    name: str, file: str, cache_dir: str | None = None, revision: str | None = None, is_base: bool = False
) -> str:
    """The content of a folder or a file; of a hub id, that of the snapshot which holds ``file``.

    is_base: another model names it as its base, as transformers follows such names: once.
    """
    memo = cache_folder() / "fingerprints.json"
    of_base = str if is_base else partial(_content, file="config.json", cache_dir=cache_dir, is_base=True)
    if (path := Path(name).expanduser()).exists():
        return content_identity(path, memo, of_base)
    found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
    if not isinstance(found, str):
        raise InputError(f"what is in {name} is unknown: the hub's cache has no {file} of it")
    return content_identity(Path(found).parent, memo, of_base)


def local_files(config: ScorerConfig, source: ModelSource) -> dict[str, list[int]]:
    """The files of a model and an adapter that are no hub ids, as they are now (:func:`file_marks`)."""
    places = [Path(name).expanduser() for name in (source.path, config.adapter) if name is not None]
    return {name: mark for place in places for name, mark in file_marks(place).items()}


def _machine(model: LanguageModel) -> dict[str, str | int]:
    """Whatever may change the last bit of a score."""
    is_cuda = model.device.type == "cuda"
    # Sums over processes that hold a model together; without them nothing is said, as before there were any.
    together = {} if model.followers is None else {"processes": dist.get_world_size()}
    return {
        **together,
        "device": torch.cuda.get_device_name(model.device) if is_cuda else cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "pack": DETERMINISTIC_TOKENS,
        "alignment": ALIGNMENT,
        "share_prefixes": model.share_prefixes,
    }


def cpu_name() -> str:
    """The processor as its maker calls it, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
