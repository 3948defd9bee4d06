"""The two files whose requests share prefixes, and subsets of them that share about as much as the whole.

``nq_qa.jsonl``: queries with 16 passages each; a passage stands before several questions. ``logiqa_mc.jsonl``: five
answered questions stand before each of a hundred four-choice questions. Where they are absent, the project's examples
stand in for them, and say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from environment import ROOT
from workload import EXAMPLE, NQ_QA, TokenPair, Workload, read_workload

from fastscore.config import TaskConfig
from fastscore.rows import read_rows
from fastscore.tasks import expand_row
from fastscore.tokenization import PairTokenizer
from fastscore.types import Row, ScoringRequest

LOGIQA_MC = NQ_QA.with_name("logiqa_mc.jsonl")
CHOICES_EXAMPLE = ROOT / "examples" / "choices.jsonl"
SHOTS = 5
FIRST_SCORED = 10
"""Rows of ``logiqa_mc.jsonl`` before this one are kept for headers."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Input tokens (a last answer token is only predicted) counted request by request, and with each prefix once."""

    tokens: int
    unique_tokens: int

    @property
    def factor(self) -> float:
        return self.tokens / self.unique_tokens


def sharing(pairs: Sequence[TokenPair]) -> Sharing:
    """How much the pairs share."""
    prefixes = _Prefixes()
    unique = set().union(*(prefixes.of(pair) for pair in pairs))
    return Sharing(sum(len(prompt) + len(answer) - 1 for prompt, answer in pairs), len(unique))


def qa_queries(tokenizer: Any) -> Workload:
    """All queries of ``nq_qa.jsonl``, or of the example."""
    return read_workload(NQ_QA if NQ_QA.is_file() else EXAMPLE, tokenizer, None)


def choice_questions(tokenizer: Any) -> Workload:
    """All scored questions of ``logiqa_mc.jsonl`` behind the 5-shot header; of the example, all behind its first 2."""
    real = LOGIQA_MC.is_file()
    rows = list(read_rows(LOGIQA_MC if real else CHOICES_EXAMPLE))
    shots, scored = (rows[:SHOTS], rows[FIRST_SCORED:]) if real else (rows[:2], rows)
    header = "".join(f"{row.data['context']} {row.data['choices'][row.data['gold']]}\n\n" for row in shots)
    encoder = PairTokenizer(tokenizer, vocab_size=len(tokenizer))
    queries = []
    for row in scored:
        shown = Row({**row.data, "context": header + row.data["context"]}, row.path, row.line)
        query = []
        for request in encoder.encode(expand_row(shown, TaskConfig(task="choices"), _uncut).pairs):
            if not isinstance(request, ScoringRequest):
                raise request
            query.append((request.token_ids[: request.answer_start], request.token_ids[request.answer_start :]))
        queries.append(tuple(query))
    name = f"{SHOTS}-shot {LOGIQA_MC.name}" if real else str(CHOICES_EXAMPLE.relative_to(ROOT))
    return Workload(name, tuple(queries))


def keeping_share(whole: Workload, num_queries: int) -> Workload:
    """Queries, in file order, chosen one by one so that the sharing factor comes closest to the whole file's.

    The first queries of a file would share less than the file: their passages come back further down.
    """
    target = sharing(whole.pairs).factor
    prefixes = _Prefixes()
    nodes = [set().union(*(prefixes.of(pair) for pair in query)) for query in whole.queries]
    tokens = [sum(len(prompt) + len(answer) - 1 for prompt, answer in query) for query in whole.queries]
    chosen: list[int] = []
    seen: set[int] = set()
    total = 0
    left = list(range(len(whole.queries)))
    while left and len(chosen) < num_queries:
        best = min(left, key=lambda q: abs((total + tokens[q]) / (len(seen) + len(nodes[q] - seen)) - target))
        left.remove(best)
        chosen.append(best)
        seen |= nodes[best]
        total += tokens[best]
    return Workload(whole.source, tuple(whole.queries[query] for query in sorted(chosen)))


def first_queries(whole: Workload, num_queries: int) -> Workload:
    return Workload(whole.source, whole.queries[:num_queries])


class _Prefixes:
    """A number for every distinct prefix met: a trie in one dictionary, independent of fastscore's tree."""

    def __init__(self) -> None:
        self._number: dict[tuple[int, int], int] = {}

    def of(self, pair: TokenPair) -> set[int]:
        """The prefixes of a pair's input, by number."""
        prompt, answer = pair
        found, node = set(), -1
        for token in (*prompt, *answer[:-1]):
            node = self._number.setdefault((node, token), len(self._number))
            found.add(node)
        return found


def _uncut(keys: Sequence[str]) -> Sequence[str]:
    return keys
