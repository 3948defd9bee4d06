"""What sharing prefixes brings, on both files that share them: ``python bench/prefix_sharing.py --json OUT``.

fastscore with and without its prefix tree, and both padded peers, by turns on the same token ids. ``--queries`` of
``nq_qa.jsonl`` are chosen so that they share about as much as the whole file, and of ``logiqa_mc.jsonl`` the first
``--questions`` are taken; the factors of both, and those of the whole files, are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import compare, comparison_table
from contenders import TUNED, FastScore, Padded, PaddedTuned, load_both
from environment import environment, one_line, write_json
from peer_lm_eval import LMEval
from sharing_workload import choice_questions, first_queries, keeping_share, qa_queries, sharing
from transformers import PreTrainedModel
from workload import Workload

from fastscore import Scorer
from fastscore.config import DEFAULT_MODEL


def measure_files(
    scorer: Scorer, plain: PreTrainedModel, num_queries: int, num_questions: int, rounds: int, harness: bool = False
) -> Iterator[dict[str, Any]]:
    """The report of one file after the other."""
    queries, questions = qa_queries(scorer.tokenizer), choice_questions(scorer.tokenizer)
    for whole, workload in (
        (queries, keeping_share(queries, num_queries)),
        (questions, first_queries(questions, num_questions)),
    ):
        yield measure(scorer, plain, workload, sharing(whole.pairs).factor, rounds, harness)


def measure(
    scorer: Scorer, plain: PreTrainedModel, workload: Workload, whole_factor: float, rounds: int, harness: bool = False
) -> dict[str, Any]:
    """One comparison as plain values; ``whole_factor`` is the sharing factor of the file it was taken from. With
    ``harness``, lm-evaluation-harness's own model takes part."""
    pairs = workload.pairs
    ours = FastScore(scorer)
    contenders = [ours, ours.without_tree(), Padded(plain), PaddedTuned.picked(plain, pairs)]
    if harness:
        contenders.append(LMEval.picked(plain, scorer.tokenizer, pairs))
    return {
        "workload": workload.describe(),
        "sharing_factor": sharing(pairs).factor,
        "whole_file_sharing_factor": whole_factor,
        **compare(contenders, pairs, rounds, plain).report(),
    }


def show(result: Mapping[str, Any]) -> str:
    """The figures of one file as text."""
    task, tuned = result["workload"], result["contenders"][TUNED]["settings"]
    sizes = ", ".join(f"{size} {seconds:.1f} s" for size, seconds in tuned["batch_size_seconds"].items())
    return (
        f"{task['source']}: {task['queries']} queries, {task['pairs']} pairs, {task['tokens']:,} tokens, sharing "
        f"factor {result['sharing_factor']:.2f} (whole file: {result['whole_file_sharing_factor']:.2f}); "
        f"padded-tuned takes batches of {tuned['batch_size']} ({sizes}); "
        f"GEMM {result['gemm_tflops_per_s'] * 1e3:,.0f} GFLOP/s\n{comparison_table(result)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all contenders agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--questions", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lm-eval", action="store_true", help="lm-evaluation-harness's own model takes part")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    scorer, plain = load_both(options.model, options.dtype)
    where = environment()
    print(one_line(where), flush=True)
    files: list[dict[str, Any]] = []
    for result in measure_files(scorer, plain, options.queries, options.questions, options.rounds, options.lm_eval):
        files.append(result)
        print(show(result), flush=True)
        if options.json is not None:
            report = {"environment": where, "model": options.model, "rounds": options.rounds, "files": files}
            write_json(options.json, report)
        if result["disagreeing"]:
            print(f"not fastscore's scores: {', '.join(result['disagreeing'])}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
