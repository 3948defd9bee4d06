"""The pairs that the contenders score: real rows as token ids, tokenised once by fastscore for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from environment import ROOT

from fastscore.config import TaskConfig
from fastscore.rows import read_rows
from fastscore.tasks import expand_row
from fastscore.tokenization import PairTokenizer

NQ_QA = ROOT.parent / "shared" / "data" / "nq_qa.jsonl"
EXAMPLE = ROOT / "examples" / "qa.jsonl"

TokenPair = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and answer ids."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Token-id pairs of the first rows of a file, in file order."""

    source: str
    queries: tuple[tuple[TokenPair, ...], ...]
    """Per query its candidates' pairs."""

    @property
    def pairs(self) -> list[TokenPair]:
        return [pair for query in self.queries for pair in query]

    @property
    def num_tokens(self) -> int:
        """Each pair counted alone, without padding."""
        return sum(len(prompt) + len(answer) for prompt, answer in self.pairs)

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "queries": len(self.queries),
            "pairs": len(self.pairs),
            "tokens": self.num_tokens,
            "answer_tokens": sum(len(answer) for _, answer in self.pairs),
        }


def load_workload(tokenizer: Any, num_queries: int) -> Workload:
    """The first queries of ``nq_qa.jsonl``, or of the project's example where that file is absent."""
    path = NQ_QA if NQ_QA.is_file() else EXAMPLE
    return read_workload(path, tokenizer, num_queries)


def read_workload(path: Path, tokenizer: Any, num_queries: int | None) -> Workload:
    """The first queries of a file of rows (all where None), templates and truncation as in a run of fastscore."""
    config = TaskConfig(task="qa")
    encoder = PairTokenizer(tokenizer, vocab_size=len(tokenizer))
    truncate = partial(encoder.truncate_keys, max_length=config.key_max_length)
    queries: list[tuple[TokenPair, ...]] = []
    for row in islice(read_rows(path), num_queries):
        requests = encoder.encode(expand_row(row, config, truncate).pairs)
        query: list[TokenPair] = []
        for request in requests:
            if isinstance(request, Exception):
                raise request
            query.append((request.token_ids[: request.answer_start], request.token_ids[request.answer_start :]))
        queries.append(tuple(query))
    name = path.name if path == NQ_QA else str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)
    return Workload(name, tuple(queries))


def lengths(pairs: Sequence[TokenPair]) -> list[int]:
    """Tokens of each pair."""
    return [len(prompt) + len(answer) for prompt, answer in pairs]


def spread_sample(pairs: Sequence[TokenPair], count: int) -> list[TokenPair]:
    """At most ``count`` pairs, evenly spread over the lengths."""
    size = lengths(pairs)
    order = sorted(range(len(pairs)), key=lambda index: size[index])
    count = min(count, len(pairs))
    return [pairs[order[place * len(order) // count]] for place in range(count)]
