"""Counters of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields


@dataclass(slots=True)
class RunStats:
    """Counters of a run, for progress bars and the summary. Token counts are input tokens of the model."""

    pairs: int = 0
    cached: int = 0
    """Pairs whose score came from the cache; tokens, packs and seconds are those of the others."""
    answer_tokens: int = 0
    tokens_computed: int = 0
    tokens_unpadded: int = 0
    """Tokens of all requests, each counted alone, without any padding."""
    tokens_padded: int = 0
    """What batches of four in input order, padded to their longest, would have computed."""
    pack_tokens: int = 0
    """Sum of the token budgets of the packs run: ``tokens_computed / pack_tokens`` is the fill."""
    packs: int = 0
    seconds: float = 0.0
    _padding_group: list[int] = field(default_factory=list, repr=False)

    def counters(self) -> dict[str, int | float]:
        """The public fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}

    def minus(self, before: RunStats) -> RunStats:
        """What was counted since."""
        return RunStats(**{name: n - getattr(before, name) for name, n in self.counters().items()})  # type: ignore[arg-type]

    def plus(self, more: RunStats) -> RunStats:
        """Both together, the seconds too."""
        return RunStats(**{name: n + getattr(more, name) for name, n in self.counters().items()})  # type: ignore[arg-type]

    def count_padded(self, lengths: Sequence[int], group_size: int = 4) -> None:
        """Feed request lengths in input order to ``tokens_padded``."""
        for length in lengths:
            self._padding_group.append(length)
            if len(self._padding_group) == group_size:
                self.flush_padded()

    def flush_padded(self) -> None:
        """Count the last, possibly smaller group."""
        if self._padding_group:
            self.tokens_padded += max(self._padding_group) * len(self._padding_group)
            self._padding_group.clear()
