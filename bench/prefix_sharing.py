"""What sharing prefixes brings, on both files that share them: ``python bench/prefix_sharing.py --json OUT``.

fastscore with and without its prefix tree, and both padded peers, by turns on the same token ids. ``--queries`` of
``nq_qa.jsonl`` are chosen so that they share about as much as the whole file, and of ``logiqa_mc.jsonl`` the first
``--questions`` are taken; the factors of both, and those of the whole files, are printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compare import (
    GEMM,
    MAX_DIFFERENCE,
    MEAN_DIFFERENCE,
    OURS,
    PADDED,
    TUNED,
    Difference,
    TokenLogprobs,
    difference,
)
from environment import environment, one_line, write_json
from limits import layer_gemms, useful_work
from padded import BATCH_SIZES, pick_batch_size, score_padded, score_padded_tuned
from rounds import interleave, medians, table
from sharing_workload import choice_questions, first_queries, keeping_share, qa_queries, sharing
from transformers import AutoModelForCausalLM, PreTrainedModel
from workload import TokenPair, Workload, lengths, spread_sample

from fastscore import Scorer
from fastscore.config import DEFAULT_MODEL

NO_TREE = "fastscore, no tree"

FURTHEST = {**MAX_DIFFERENCE, "bf16": 1.5}
"""As MAX_DIFFERENCE, for thousands of tokens: over all of nq_qa, bf16 scores of fastscore are up to 0.76 nats from the
fp32 truth and those of padded batches up to 0.69 (``fidelity.py``), so two of them may be that far apart together.
"""


@dataclass(frozen=True, slots=True)
class Computed:
    """Tokens that went through the model; ``fill`` is their share of the packs' budgets or of the padded batches."""

    tokens: int
    fill: float


class Disagreement(Exception):
    """A contender's scores are not fastscore's: its times mean nothing."""


class Contenders:
    """Everyone's scores of the same pairs; what the last run gave is kept."""

    def __init__(self, scorer: Scorer, plain: PreTrainedModel, batch_size: int, batch_size_seconds: dict[int, float]):
        """``batch_size`` is that of ``padded-tuned``, ``plain`` the same weights in plain transformers."""
        model = scorer.load()
        self.dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(model.dtype).split(".")[1]]
        self.plain = plain
        self.batch_size = batch_size
        self.batch_size_seconds = batch_size_seconds
        without = Scorer.from_model(
            model.model, scorer.tokenizer, share_prefixes=False, max_batch_tokens=model.max_batch_tokens
        )
        self.scorers = {OURS: scorer, NO_TREE: without}
        self.scores: dict[str, TokenLogprobs] = {}

    def runs(self, pairs: Sequence[TokenPair]) -> dict[str, Callable[[], None]]:
        def run(name: str) -> None:
            if name in self.scorers:
                self.scores[name] = [list(score.token_logprobs) for score in self.scorers[name].score_tokens(pairs)]
            elif name == PADDED:
                self.scores[name] = [score.token_logprobs for score in score_padded(self.plain, pairs)]
            else:
                tuned = score_padded_tuned(self.plain, pairs, self.batch_size)
                self.scores[name] = [score.token_logprobs for score in tuned]

        return {name: lambda name=name: run(name) for name in (OURS, NO_TREE, PADDED, TUNED)}

    def differences(self) -> dict[str, Difference]:
        """Of each from fastscore, in the last run.

        Raises:
            Disagreement: one is further away than rounding explains.
        """
        found = {name: difference(self.scores[name], self.scores[OURS]) for name in (NO_TREE, PADDED, TUNED)}
        for name, value in found.items():
            if value.max > FURTHEST[self.dtype] or value.mean > MEAN_DIFFERENCE[self.dtype]:
                raise Disagreement(f"{name} differs from fastscore: {value}")
        return found


def make_contenders(scorer: Scorer, plain: PreTrainedModel, pairs: Sequence[TokenPair]) -> Contenders:
    """The batch size of ``padded-tuned`` is picked by measurement on a sample of the pairs."""
    return Contenders(scorer, plain, *pick_batch_size(plain, spread_sample(pairs, max(BATCH_SIZES))))


def measure(contenders: Contenders, pairs: Sequence[TokenPair], rounds: int) -> dict[str, Any]:
    """First a few pairs for agreement and warm-up, then all by turns; the last round's scores must agree, too.

    Raises:
        Disagreement: before any time is reported.
    """
    for run in contenders.runs(pairs[:8]).values():
        run()
    contenders.differences()
    computed = {}
    runs = contenders.runs(pairs)
    for name, scorer in contenders.scorers.items():
        computed[name] = _counted(scorer, runs[name])
    computed[PADDED] = padded_tokens(lengths(pairs), 4)
    computed[TUNED] = padded_tokens(sorted((n - 1 for n in lengths(pairs)), reverse=True), contenders.batch_size)
    model = contenders.scorers[OURS].load()
    gemms = layer_gemms(contenders.plain, model.max_batch_tokens, 2)
    gemms.run()
    seconds = interleave({**runs, GEMM: gemms.run}, rounds)
    differences = contenders.differences()
    median = medians(seconds)
    work = useful_work(contenders.plain, pairs)
    limit = work.flops * median[GEMM] / gemms.flops
    return {
        "pair_tokens": sum(lengths(pairs)),
        "sharing_factor": sharing(pairs).factor,
        "tuned_batch_size": contenders.batch_size,
        "batch_size_seconds": {str(size): value for size, value in contenders.batch_size_seconds.items()},
        "gemm_tflops_per_s": gemms.flops / median[GEMM] / 1e12,
        "limit_seconds": limit,
        "seconds": seconds,
        "contenders": {
            name: {
                "median_seconds": median[name],
                "times_fastscore": median[name] / median[OURS],
                "times_fastscore_by_round": [a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)],
                "tokens_computed": computed[name].tokens,
                "fill": computed[name].fill,
                "of_limit": limit / median[name],
                "difference_from_fastscore": asdict(differences[name]) if name in differences else None,
            }
            for name in runs
        },
    }


def padded_tokens(sizes: Sequence[int], batch_size: int) -> Computed:
    """What batches of these sequences, in this order, make of them."""
    batches = [sizes[first : first + batch_size] for first in range(0, len(sizes), batch_size)]
    tokens = sum(max(batch) * len(batch) for batch in batches)
    return Computed(tokens, sum(sizes) / tokens)


def show(source: str, task: Mapping[str, Any], whole_factor: float, result: Mapping[str, Any]) -> str:
    """The figures of one file as text."""
    sizes = ", ".join(f"{size} {seconds:.1f} s" for size, seconds in result["batch_size_seconds"].items())
    head = (
        f"{source}: {task['queries']} queries, {task['pairs']} pairs, {task['tokens']:,} tokens, sharing factor "
        f"{result['sharing_factor']:.2f} (whole file: {whole_factor:.2f}); padded-tuned takes batches of "
        f"{result['tuned_batch_size']} ({sizes}); GEMM {result['gemm_tflops_per_s'] * 1e3:,.0f} GFLOP/s"
    )
    rows = []
    for name, values in result["contenders"].items():
        by_round = values["times_fastscore_by_round"]
        differs = values["difference_from_fastscore"]
        rows.append(
            [
                name,
                f"{values['median_seconds']:.2f}",
                f"{values['times_fastscore']:.2f}",
                f"{min(by_round):.2f}-{max(by_round):.2f}",
                f"{values['tokens_computed']:,}",
                f"{values['fill']:.1%}",
                f"{values['of_limit']:.0%}",
                "" if differs is None else f"{differs['mean']:.1e}",
                "" if differs is None else f"{differs['max']:.1e}",
            ]
        )
    columns = ["", "median s", "x", "x by round", "tokens computed", "fill", "of limit", "mean diff", "max diff"]
    return f"{head}\n{table(columns, rows)}"


def workloads(tokenizer: Any, num_queries: int, num_questions: int) -> list[tuple[Workload, float]]:
    """A subset of each file, and the sharing factor of the whole file."""
    queries, questions = qa_queries(tokenizer), choice_questions(tokenizer)
    return [
        (keeping_share(queries, num_queries), sharing(queries.pairs).factor),
        (first_queries(questions, num_questions), sharing(questions.pairs).factor),
    ]


def load_both(model: str, dtype: str) -> tuple[Scorer, PreTrainedModel]:
    """fastscore's side, and the same weights in plain transformers."""
    scorer = Scorer(model, dtype=dtype)  # type: ignore[arg-type]
    loaded = scorer.load()
    plain = AutoModelForCausalLM.from_pretrained(scorer.model_path, dtype=loaded.dtype).eval()
    return scorer, plain.to(loaded.device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--questions", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    scorer, plain = load_both(options.model, options.dtype)
    where = here()
    print(one_line(where), flush=True)
    report: dict[str, Any] = {"environment": where, "model": options.model, "rounds": options.rounds, "files": []}
    for workload, whole_factor in workloads(scorer.tokenizer, options.queries, options.questions):
        contenders = make_contenders(scorer, plain, workload.pairs)
        try:
            result = measure(contenders, workload.pairs, options.rounds)
        except Disagreement as error:
            print(f"{workload.source}: {error}", file=sys.stderr)
            return 1
        task = workload.describe()
        report["scorer"] = {key: value for key, value in scorer.describe().items() if key != "model_path"}
        report["files"].append({"workload": task, "whole_file_sharing_factor": whole_factor, **result})
        print(show(workload.source, task, whole_factor, result), flush=True)
        if options.json is not None:
            write_json(options.json, report)
    return 0


def here() -> dict[str, Any]:
    """The environment; on a busy machine threads that spin while they wait slow down whoever has most small steps."""
    return {**environment(), "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "")}


def _counted(scorer: Scorer, run: Callable[[], None]) -> Computed:
    """One run, not timed."""
    before = (scorer.stats.tokens_computed, scorer.stats.pack_tokens)
    run()
    tokens, budget = scorer.stats.tokens_computed - before[0], scorer.stats.pack_tokens - before[1]
    return Computed(tokens, tokens / budget)


if __name__ == "__main__":
    sys.exit(main())
