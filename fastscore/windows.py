"""A stream of rows in portions: small ones for the tokenizer, large ones in which prefixes are shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastscore.types import RowPairs, ScoringRequest

TOKENISED_PAIRS = 1024
"""Pairs handed to the tokenizer at a time."""

EncodedRow = tuple[RowPairs, list[ScoringRequest]]


def chunks(rows: Iterable[RowPairs], max_pairs: int) -> Iterator[list[RowPairs]]:
    """Rows until they have ``max_pairs`` pairs."""
    chunk: list[RowPairs] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.pairs)
        if size >= max_pairs:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def windows(rows: Iterable[EncodedRow], max_tokens: int) -> Iterator[list[EncodedRow]]:
    """Rows until their requests have ``max_tokens`` tokens."""
    window: list[EncodedRow] = []
    size = 0
    for row_pairs, requests in rows:
        window.append((row_pairs, requests))
        size += sum(len(request.token_ids) for request in requests)
        if size >= max_tokens:
            yield window
            window, size = [], 0
    if window:
        yield window
