"""Weights are data: what would run code, or lead out of the model's folder, is refused before they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fastscore.config import ScorerConfig
from fastscore.hub import hub_answers
from fastscore.model_source import ModelSource
from fastscore.types import InputError

ALLOW_PICKLE = "pickles can hold code; --allow-pickle loads them"
_MOST_PER_BYTE = 8
"""Parameters in a byte of a file, at one bit each."""
_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer")

Find = Callable[[str], "Path | None"]


class _Held(NamedTuple):
    tensors: int
    num_bytes: int | None


def check_weight_files(source: ModelSource, config: ScorerConfig, hf_config: Any) -> None:
    """Look at which files would be loaded, and at what they say that they hold.

    transformers itself takes pickles where an index, the config or an adapter in the model's folder names them, also
    when it is asked for safetensors; it fetches and runs kernels that a config names; and it builds as many layers as
    the config says, and fills what is missing with random numbers, whatever the weights hold.

    Raises:
        InputError: pickles without ``allow_pickle``, code without ``trust_remote_code``, names that are no plain names
            of files, a model that its weights cannot fill.
    """
    model = f"model {config.model!r}"
    if not config.trust_remote_code:
        _check_kernels(hf_config, model)
    if source.gguf_file is not None:
        _check_sizes(hf_config, _Held(source.gguf_tensors, Path(source.path).stat().st_size), model)
        return
    named = getattr(hf_config, "transformers_weights", None)
    if named is not None:
        _check_name(named, (".safetensors", ".safetensors.index.json", ".bin"), f"{model}: its config")
        if named.endswith(".bin") and not config.allow_pickle:
            raise InputError(f"{model}: its config names {named} as its weights: {ALLOW_PICKLE}")
    find = _finder(source, config)
    held = _safetensors(find, named if named is not None else "model.safetensors", model)
    if held is not None:
        _check_sizes(hf_config, held, model)
    elif pickled := next((name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if find(name)), None):
        if not config.allow_pickle:
            raise InputError(f"{model}: its weights are pickled ({pickled}): {ALLOW_PICKLE}")
        if (index := find("pytorch_model.bin.index.json")) is not None:
            _held_by_index(index, (".bin",), model)
    if find_spec("peft") is not None and (adapter := find("adapter_config.json")) is not None:
        _check_adapter(adapter, find, config, model)


def adapter_folder(config: ScorerConfig, local_files_only: bool = False) -> str:
    """The folder of the adapter, which is fetched from the hub if need be: what was checked is what is loaded.

    local_files_only: the hub is known not to answer.

    Raises:
        InputError: as :func:`check_weight_files`; any error of the hub's client for an adapter that is not there.
    """
    from huggingface_hub import snapshot_download

    assert config.adapter is not None, "asked for a model with an adapter only"
    folder = Path(config.adapter).expanduser()
    if not folder.is_dir():
        wanted = ["adapter_config.json", "adapter_model.safetensors", *(["*.bin"] if config.allow_pickle else [])]
        folder = Path(
            snapshot_download(
                config.adapter, allow_patterns=wanted, local_files_only=local_files_only or not hub_answers()
            )
        )
    find = _in_folder(folder)
    if (adapter := find("adapter_config.json")) is not None:
        _check_adapter(adapter, find, config, f"adapter {config.adapter!r}")
    return str(folder)


def _finder(source: ModelSource, config: ScorerConfig) -> Find:
    folder = Path(source.name_or_path)
    if folder.is_dir():
        return _in_folder(folder)

    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        found = cached_file(
            source.name_or_path,
            name,
            cache_dir=config.cache_dir,
            revision=config.revision,
            local_files_only=source.local_files_only,
            _raise_exceptions_for_gated_repo=False,  # loading says what is wrong
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)

    return find


def _in_folder(folder: Path) -> Find:
    return lambda name: path if (path := folder / name).is_file() else None


def _check_kernels(hf_config: Any, model: str) -> None:
    for part in (hf_config, hf_config.get_text_config()):
        for name in ("_attn_implementation", "_experts_implementation"):
            if isinstance(kernel := getattr(part, name, None), str) and "/" in kernel:
                raise InputError(f"{model}: its config names {kernel!r} to be run (--trust-remote-code allows that)")


def _safetensors(find: Find, name: str, model: str) -> _Held | None:
    """What is in a safetensors file or in those of an index; None when there are none."""
    if name.endswith(".bin"):
        return None
    if not name.endswith(".index.json") and (path := find(name)) is not None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                return _Held(len(file.keys()), path.stat().st_size)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{model} cannot be loaded: {type(error).__name__}: {name}: {error}") from error
    index = find(name if name.endswith(".index.json") else "model.safetensors.index.json")
    return None if index is None else _held_by_index(index, (".safetensors",), model)


def _held_by_index(index: Path, endings: tuple[str, ...], model: str) -> _Held:
    """What is in the files of an index, whose names are found to be plain ones."""
    try:
        files: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name in set(files.values()):
            _check_name(name, endings, f"{model}: {index.name}")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{model}: {index.name} is no index of weights ({type(error).__name__})") from error
    parts = [index.with_name(name) for name in set(files.values())]
    # Of the hub's, none may have been fetched yet.
    return _Held(len(files), sum(part.stat().st_size for part in parts) if all(map(Path.is_file, parts)) else None)


def _check_name(name: Any, endings: tuple[str, ...], where: str) -> None:
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(endings):
        hint = f" ({ALLOW_PICKLE})" if str(name).endswith(".bin") and ".bin" not in endings else ""
        raise InputError(f"{where} names the weights {name!r}; expected a file beside it, {endings[0]}{hint}")


def _check_sizes(hf_config: Any, held: _Held, model: str) -> None:
    """Every model has a tensor of its own in each layer, and a matrix as wide as its vocabulary and its layers."""
    for part in (hf_config, hf_config.get_text_config()):

        def size(name: str, part: Any = part) -> int:
            return value if isinstance(value := getattr(part, name, None), int) else 0

        layers = max(map(size, _LAYERS))
        if layers > held.tensors:
            raise InputError(f"{model}: its config says {layers} layers, its weights are {held.tensors} tensors")
        wide = {
            "vocab_size": size("vocab_size"),
            "intermediate_size": size("intermediate_size") * max(1, layers),
            "num_attention_heads": size("num_attention_heads") * size("head_dim"),
        }
        for name, width in wide.items():
            if held.num_bytes is not None and width * size("hidden_size") > held.num_bytes * _MOST_PER_BYTE:
                raise InputError(
                    f"{model}: its config says hidden_size {size('hidden_size')} and {name} {size(name)}, "
                    f"its weights are {held.num_bytes} bytes"
                )


def _check_adapter(path: Path, find: Find, config: ScorerConfig, what: str) -> None:
    """An adapter is weights as well, and peft imports a package that its config names."""
    if not config.allow_pickle and find("adapter_model.safetensors") is None:
        raise InputError(f"{what}: there is no adapter_model.safetensors: {ALLOW_PICKLE}, if there are any")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: {path.name} cannot be read: {type(error).__name__}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{what}: {path.name} is no JSON object")
    if not config.trust_remote_code and settings.get("megatron_config") is not None:
        raise InputError(f"{what}: megatron_config imports what it names (--trust-remote-code allows that)")
