"""Scores as the cache keeps them: blocks of up to 16 entries, packed and unpacked many at a time.

Shapes: R requests, B blocks, E entries, A answer tokens.

A block of n entries is, little-endian: n keys of 16 bytes, n times ``end << 1 | is_greedy`` (uint32), and the
log-probabilities of all answer tokens (fp32), of which an entry's stop at ``end``. Small, because a look-up reads a
whole block; not single entries, because rows of a table cost more than what an entry holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from struct import Struct
from zlib import crc32

import numpy as np
import numpy.typing as npt

from fastscore.ranges import Ints, offsets, ranges
from fastscore.types import AnswerScore, ScoringRequest

BLOCK_ENTRIES = 16
"""An entry's place is the id of its block times this, plus its number in the block."""
_KEY_WORDS = 4
_HEAD_WORDS = _KEY_WORDS + 1
_WORD = 4

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Row = tuple[int, int, int, bytes]
"""A block in the file: id, number of entries, CRC-32, the block."""


def request_keys(fingerprint: bytes, requests: Iterable[ScoringRequest]) -> Ints:
    """``[R, 2]``: 128 bits of a SHA-256 of what was asked of which model.

    Of n entries two have one key with a probability of n**2 / 2**129. The first 64 bits are what the index knows an
    entry by; the others are compared when it has been found.
    """
    digests = [
        sha256(_layout(len(request.token_ids)).pack(fingerprint, request.answer_start, *request.token_ids)).digest()
        for request in requests
    ]
    return np.frombuffer(b"".join(digests), dtype="<i8").reshape(-1, 4)[:, :2].astype(np.int64)


@lru_cache(maxsize=1 << 16)
def _layout(num_tokens: int) -> Struct:
    # Packing the ids of one request is three times as fast as making an array of the whole window's.
    return Struct(f"<32sQ{num_tokens}I")


@dataclass(frozen=True, slots=True)
class Entries:
    """E scores as arrays: the log-probabilities (nats) of entry e's answer tokens follow those of e - 1 in
    ``logprob_A``."""

    key_E2: Ints
    logprob_A: Floats
    length_E: Ints
    is_greedy_E: Bools

    def __len__(self) -> int:
        return len(self.length_E)

    def storable(self) -> Entries:
        """Each key once, and only where every token's log-probability is a number."""
        finite_E = np.logical_and.reduceat(np.isfinite(self.logprob_A), offsets(self.length_E)[:-1])
        finite = np.flatnonzero(finite_E)
        _, first = np.unique(self.key_E2[finite, 0], return_index=True)
        return self if len(first) == len(self) else self.take(finite[np.sort(first)])

    def take(self, index: Ints) -> Entries:
        """Some of them, in the order of ``index``."""
        length = self.length_E[index]
        start = offsets(self.length_E)[:-1][index]
        logprob_A = self.logprob_A[ranges(start, length)]
        return Entries(self.key_E2[index], logprob_A, length, self.is_greedy_E[index])


def pack(entries: Entries) -> Iterator[tuple[int, int, bytes]]:
    """(number of entries, CRC-32, block) of one block after another."""
    bound_E = offsets(entries.length_E)
    begin_E = bound_E[np.arange(len(entries)) // BLOCK_ENTRIES * BLOCK_ENTRIES]
    heads = ((bound_E[1:] - begin_E) << 1 | entries.is_greedy_E).astype("<u4").tobytes()
    keys = entries.key_E2.astype("<i8").tobytes()
    logprobs = entries.logprob_A.astype("<f4").tobytes()
    bounds = (bound_E * _WORD).tolist()
    for first in range(0, len(entries), BLOCK_ENTRIES):
        last = min(first + BLOCK_ENTRIES, len(entries))
        data = b"".join(
            (
                keys[first * _KEY_WORDS * _WORD : last * _KEY_WORDS * _WORD],
                heads[first * _WORD : last * _WORD],
                logprobs[bounds[first] : bounds[last]],
            )
        )
        yield last - first, crc32(data), data


@dataclass(frozen=True, slots=True)
class Blocks:
    """B blocks that were read, in ascending order of id, one after another in ``words``: block b has ``count_B[b]``
    entries and begins at ``begin_B[b]``."""

    id_B: Ints
    begin_B: Ints
    count_B: Ints
    words: npt.NDArray[np.uint32]

    def places(self) -> dict[int, int]:
        """Where every entry is, by the first half of its key."""
        keys = self.words[ranges(self.begin_B, _KEY_WORDS * self.count_B)].view("<i8")[::2]
        places = ranges(self.id_B * BLOCK_ENTRIES, self.count_B)
        return dict(zip(keys.tolist(), places.tolist(), strict=True))

    def scores(self, place_R: Ints, key_R2: Ints) -> list[AnswerScore | None]:
        """The scores at those places, None where there is none with that key."""
        scores: list[AnswerScore | None] = [None] * len(place_R)
        if not len(self.id_B):
            return scores
        block_R = np.minimum(np.searchsorted(self.id_B, place_R // BLOCK_ENTRIES), len(self.id_B) - 1)
        is_there_R = self.id_B[block_R] == place_R // BLOCK_ENTRIES
        is_there_R &= place_R % BLOCK_ENTRIES < self.count_B[block_R]
        asked = np.flatnonzero(is_there_R)

        begin, count, slot = self.begin_B[block_R[asked]], self.count_B[block_R[asked]], place_R[asked] % BLOCK_ENTRIES
        key = self.words[(begin + _KEY_WORDS * slot)[:, None] + np.arange(_KEY_WORDS)].view("<i8")
        head = begin + _KEY_WORDS * count + slot
        end = (self.words[head] >> 1).astype(np.int64)
        start = np.where(slot > 0, self.words[head - 1] >> 1, 0).astype(np.int64)
        # Of a sound block these hold, but whoever forges its CRC may have written anything.
        is_right = (key == key_R2[asked]).all(axis=1) & (start < end) & (end <= self._num_logprobs(block_R[asked]))
        length = np.where(is_right, end - start, 0)
        logprobs = self.words.view("<f4")[ranges(begin + _HEAD_WORDS * count + start, length)].tolist()
        bounds, is_greedy = offsets(length).tolist(), (self.words[head] & 1).astype(bool).tolist()
        for index, request in enumerate(asked.tolist()):
            if of_request := logprobs[bounds[index] : bounds[index + 1]]:
                scores[request] = AnswerScore(tuple(of_request), is_greedy[index])
        return scores

    def _num_logprobs(self, block: Ints) -> Ints:
        last = self.begin_B[block] + _HEAD_WORDS * self.count_B[block] - 1
        return (self.words[last] >> 1).astype(np.int64)


def unpack(rows: Sequence[Row]) -> tuple[Blocks, list[int]]:
    """Rows in ascending order of id; and the ids of blocks that are damaged, of which nothing is believed."""
    blocks = _unpack(rows)
    if blocks is not None:
        return blocks, []
    sound = [row for row in rows if _unpack([row]) is not None]
    blocks = _unpack(sound)
    assert blocks is not None, "each of them is sound"
    return blocks, sorted({row[0] for row in rows} - {row[0] for row in sound})


def _unpack(rows: Sequence[Row]) -> Blocks | None:
    """None where a block's CRC, number of entries or length does not fit, or a column is of another type: in a damaged
    file it may hold anything."""
    nothing = np.zeros(0, dtype=np.int64)
    if not rows:
        return Blocks(nothing, nothing, nothing, np.zeros(0, dtype="<u4"))
    ids, counts, crcs, data = zip(*rows, strict=True)
    try:
        if list(map(crc32, data)) != list(crcs):
            return None
        count_B, bytes_B = (np.array(values, dtype=np.int64) for values in (counts, list(map(len, data))))
    except (TypeError, ValueError, OverflowError):
        return None
    words_B = bytes_B // _WORD
    least_B = _HEAD_WORDS * count_B
    if not ((count_B > 0) & (count_B <= BLOCK_ENTRIES) & (bytes_B % _WORD == 0) & (words_B > least_B)).all():
        return None
    words = np.frombuffer(b"".join(data), dtype="<u4")
    blocks = Blocks(np.array(ids, dtype=np.int64), offsets(words_B)[:-1], count_B, words)
    fits = blocks._num_logprobs(np.arange(len(rows))) == words_B - least_B
    return blocks if fits.all() else None
