"""What transformers reads of a model: config, tokenizer and weights, with its errors in our words.

transformers is asked by name and when it is needed: its code for models takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastscore.config import ScorerConfig
from fastscore.error_text import error_text
from fastscore.model_source import ModelSource
from fastscore.types import InputError
from fastscore.weight_files import ALLOW_PICKLE

AUTO_TOKENIZER = ("transformers", "AutoTokenizer")


def load_config(source: ModelSource, config: ScorerConfig) -> Any:
    """The Hugging Face config of the model.

    Raises:
        InputError: the model is not there or cannot be read.
    """
    hf_config = from_pretrained(("transformers", "AutoConfig"), source, config)
    for name, otherwise in (("vocab_size", None), ("hidden_size", 1)):
        size = getattr(hf_config.get_text_config(), name, otherwise)
        if not isinstance(size, int) or size < 1:
            raise InputError(f"model {config.model!r} cannot be loaded: its config says {name} {size!r}")
    return hf_config


def load_tokenizer(source: ModelSource, config: ScorerConfig, kind: tuple[str, str] = AUTO_TOKENIZER) -> Any:
    """The model's tokenizer; ``kind`` is the module and the class that reads it, where that is known.

    Raises:
        InputError: the tokenizer is not there or cannot be read.
    """
    tokenizer = from_pretrained(kind, source, config)
    try:
        tokenizer("a")  # some settings are looked at only now
    except Exception as error:
        raise InputError(f"model {config.model!r}: its tokenizer cannot be used: {error_text(error)}") from error
    return tokenizer


def from_pretrained(kind: tuple[str, str], source: ModelSource, config: ScorerConfig, **extra: Any) -> Any:
    """What a class's ``from_pretrained`` gives for the model; the class by its module and name.

    Raises:
        InputError: it cannot be loaded.
    """
    named = {"revision": config.revision, "cache_dir": config.cache_dir, "gguf_file": source.gguf_file}
    options: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    options |= {"trust_remote_code": config.trust_remote_code, "local_files_only": source.local_files_only}
    module, name = kind
    try:
        return getattr(import_module(module), name).from_pretrained(source.name_or_path, **options, **extra)
    except Exception as error:
        hint = " (--trust-remote-code allows that)" if "trust_remote_code=True" in str(error) else ""
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(f"model {config.model!r}: its weights have other shapes than its config says") from error
        if "use_safetensors=True" in str(error):  # a model on the hub
            hint = f" ({ALLOW_PICKLE}, if it has any)"
        raise InputError(f"model {config.model!r} cannot be loaded: {error_text(error)}{hint}") from error
