"""One varlen attention interface, several providers, imported only when they are chosen."""

from __future__ import annotations

from fastscore.attention.registry import (
    PROVIDERS,
    Attend,
    AttentionNeeds,
    Provider,
    available_providers,
    choose_provider,
)

__all__ = ["PROVIDERS", "Attend", "AttentionNeeds", "Provider", "available_providers", "choose_provider"]
