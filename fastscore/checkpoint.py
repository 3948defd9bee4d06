"""A model on disk or on the hub: what is read of it at once, and how its weights are loaded when they are needed."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from fastscore.config import ScorerConfig
from fastscore.decoder.skeleton import PlainConfig
from fastscore.fingerprint import ScoreIdentity
from fastscore.garbage import collection_paused
from fastscore.identity import local_files, score_identity
from fastscore.known_models import find_known, place_of
from fastscore.language_model import LanguageModel
from fastscore.model_source import resolve_model
from fastscore.pretrained import AUTO_TOKENIZER, load_config, load_tokenizer
from fastscore.recall import recall


class Checkpoint:
    """The model that a config names. One that was loaded before needs none of transformers' code for models, which
    takes seconds to import; ``settings`` are its Hugging Face config, or the plain values of it that were noted then.

    Raises:
        InputError: the model is not there or cannot be read.
    """

    def __init__(self, config: ScorerConfig) -> None:
        self._config = config
        self._source = resolve_model(config.model)
        self._place = place_of(self._source, config)
        self._known = None if self._place is None else find_known(self._place)
        self._files: dict[str, list[int]] = {}
        self.settings: Any = self.hf_config if self._known is None else PlainConfig(self._known.config)

    @property
    def path(self) -> str:
        """Where the model lies: the hub id, the folder, or the GGUF file."""
        return self._source.path

    @property
    def commit(self) -> str | None:
        """The hub's, where the model has one."""
        return getattr(self.settings, "_commit_hash", None)

    @cached_property
    def hf_config(self) -> Any:
        """The Hugging Face config.

        Raises:
            InputError: as for the class.
        """
        with collection_paused():
            return load_config(self._source, self._config)

    def tokenizer(self) -> Any:
        """A new tokenizer of the model's.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        with collection_paused():
            kind = AUTO_TOKENIZER if self._known is None else self._known.tokenizer
            return load_tokenizer(self._source, self._config, kind)

    def load(self) -> LanguageModel:
        """The model, ready for scoring.

        Raises:
            InputError: weights, adapter or device are not there, or the model can't be scored with.
        """
        self._files = local_files(self._config, self._source)
        if self._known is not None and (recalled := recall(self._known, self._config)) is not None:
            return recalled
        self._known = None
        with collection_paused():
            from fastscore.models import load_model

        return load_model(self._source, self._config, self.hf_config, self._place)

    def forget(self) -> bool:
        """From now on the model is loaded as transformers has it; whether it was not, or would not have been."""
        was_known, self._known = self._known is not None, None
        if was_known:
            self._place = None  # the note is good: it is not made again
        return was_known

    def identity(self, model: LanguageModel) -> ScoreIdentity:
        """What scores of the model, which was loaded from here, are known by in a cache. Reads its files once.

        Raises:
            InputError: the files can't be found or read, or are not those that were loaded.
        """
        return score_identity(model, self._config, self._source, self.commit, self._files)
