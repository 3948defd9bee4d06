"""Scores to put into a cache, and what must come out again. As a program: a writer to kill and to starve."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache as cache_results
from pathlib import Path

import numpy as np

from fastscore import cache
from fastscore.cache import ScoreCache
from fastscore.fingerprint import ScoreIdentity
from fastscore.types import AnswerScore, ScoringRequest

IDENTITY = ScoreIdentity(
    model="tiny",
    weights="sha256:00",
    dtype="float32",
    device="cpu",
    mode="packed",
    attention="sdpa",
    forward="model",
    answer_nll="reference (PyTorch)",
    torch="2.13",
    transformers="5.23.0",
)
OTHER = replace(IDENTITY, model="other", weights="sha256:01")


@cache_results
def request(number: int) -> ScoringRequest:
    draw = random.Random(number)
    length = draw.randint(2, 30)
    return ScoringRequest((number, *(draw.randrange(50_000) for _ in range(length - 1))), draw.randint(1, length - 1))


@cache_results
def score(number: int) -> AnswerScore:
    """What the model would say of :func:`request`: made up, but always the same, in fp32."""
    draw = random.Random(-1 - number)
    logprobs = [float(np.float32(-draw.expovariate(0.5))) for _ in range(request(number).num_answer_tokens)]
    return AnswerScore(tuple(logprobs), draw.random() < 0.5)


def put(store: ScoreCache, requests: Iterable[ScoringRequest], scores: Iterable[AnswerScore]) -> None:
    scores = list(scores)
    store.put(
        store.keys(requests),
        np.array([value for score in scores for value in score.token_logprobs], dtype=np.float32),
        np.array([score.num_tokens for score in scores], dtype=np.int64),
        np.array([score.is_greedy for score in scores], dtype=bool),
    )


def put_numbers(store: ScoreCache, numbers: Iterable[int]) -> None:
    numbers = list(numbers)
    put(store, map(request, numbers), map(score, numbers))


def get_numbers(store: ScoreCache, numbers: Iterable[int]) -> dict[int, AnswerScore]:
    """Those that are there."""
    numbers = list(numbers)
    found = store.get(store.keys(map(request, numbers)))
    return {number: score for number, score in zip(numbers, found, strict=True) if score is not None}


def truth(numbers: Iterable[int]) -> dict[int, AnswerScore]:
    return {number: score(number) for number in numbers}


def aside(path: Path) -> list[str]:
    """What was set aside of a cache."""
    return sorted(entry.name for entry in path.parent.glob(f"{path.name}.corrupt-*"))


def write_and_tell(path: Path, numbers: Iterable[int], step: int) -> None:
    """Put numbers, ``step`` at a time, read some of all that anybody has put, and tell after each put what is safe."""
    numbers = list(numbers)
    with ScoreCache(path, IDENTITY) as store:
        for first in range(0, len(numbers), step):
            some = numbers[first : first + step]
            put_numbers(store, some)
            print(f"safe {' '.join(map(str, some))}", flush=True)
            looked_up = random.sample(range(min(some) + step), min(30, min(some) + step))
            for number, found in get_numbers(store, looked_up).items():
                if found != score(number):
                    print(f"wrong {number}", flush=True)


def main() -> None:
    path, first, last, by, step, index_at_once, file_bytes = (Path(sys.argv[1]), *map(int, sys.argv[2:]))
    cache.INDEX_AT_ONCE = index_at_once
    if file_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        write_and_tell(path, range(first, last, by), step)
    except OSError as error:
        print(f"failed {error.errno} {error.filename}", flush=True)
    print("end", flush=True)


if __name__ == "__main__":
    main()
