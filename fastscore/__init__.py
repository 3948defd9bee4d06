"""fastscore: the log-probability of answers given prompts, from causal language models, fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AnswerScore", "InputError", "ScoreConfig", "Scorer", "__version__"]

if TYPE_CHECKING:
    from fastscore.config import ScoreConfig
    from fastscore.scorer import Scorer
    from fastscore.types import AnswerScore, InputError


def __getattr__(name: str) -> Any:
    """``Scorer`` brings torch and transformers with it, so it is imported when it is asked for."""
    if name == "Scorer":
        from fastscore.garbage import collection_paused

        with collection_paused():
            from fastscore.scorer import Scorer

        return Scorer
    if name in ("AnswerScore", "InputError"):
        from fastscore import types

        return getattr(types, name)
    if name == "ScoreConfig":
        from fastscore.config import ScoreConfig

        return ScoreConfig
    raise AttributeError(f"module 'fastscore' has no attribute {name!r}")
