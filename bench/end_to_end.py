"""fastscore against everything else that could do its work: ``python bench/end_to_end.py --json OUT``.

Queries of ``nq_qa.jsonl`` that share about as much as the whole file, in one run, by turns: fastscore, ``padded`` and
``padded-tuned`` (plain transformers), ``lm-eval``, ``vllm`` with prompt_logprobs and vLLM's plain prefill, beside the
rate of the model's own matrix products. A peer that is not installed is left out with a message. Scores are compared
first: one that disagrees is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compare import compare, comparison_table
from contenders import (
    OURS,
    PADDED,
    TUNED,
    Contender,
    FastScore,
    Padded,
    PaddedTuned,
    Unavailable,
    load_both,
)
from environment import environment, one_line, write_json
from peer_lm_eval import LM_EVAL, LMEval
from peer_vllm import VLLM, Vllm, VllmPrefill, VllmWorker
from sharing_workload import keeping_share, qa_queries, sharing
from transformers import PreTrainedModel
from workload import NQ_QA, Workload

from fastscore import Scorer
from fastscore.config import DEFAULT_MODEL

PEERS = (PADDED, TUNED, LM_EVAL, VLLM)


@contextmanager
def all_contenders(
    scorer: Scorer,
    plain: PreTrainedModel,
    workload: Workload,
    peers: Sequence[str],
    vllm_python: str | None = None,
) -> Iterator[tuple[list[Contender], dict[str, str]]]:
    """fastscore and those of the peers that can take part; of the others, why they can't."""
    pairs = workload.pairs
    workers: list[VllmWorker] = []

    def vllm() -> list[Contender]:
        workers.append(VllmWorker(vllm_python, scorer.model_path, plain.dtype))
        return [Vllm(workers[0]), VllmPrefill(workers[0])]

    make: dict[str, Callable[[], list[Contender]]] = {
        PADDED: lambda: [Padded(plain)],
        TUNED: lambda: [PaddedTuned.picked(plain, pairs)],
        LM_EVAL: lambda: [LMEval.picked(plain, scorer.tokenizer, pairs)],
        VLLM: vllm,
    }
    contenders: list[Contender] = [FastScore(scorer)]
    absent: dict[str, str] = {}
    try:
        for name in peers:
            try:
                contenders += make[name]()
            except Unavailable as error:
                absent[name] = str(error)
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        yield contenders, absent
    finally:
        for worker in workers:
            worker.close()


def measure(
    model: str, dtype: str, num_queries: int, rounds: int, peers: Sequence[str], vllm_python: str | None = None
) -> dict[str, Any]:
    """The whole comparison as plain values."""
    scorer, plain = load_both(model, dtype)
    whole = qa_queries(scorer.tokenizer)
    workload = keeping_share(whole, num_queries)
    with all_contenders(scorer, plain, workload, peers, vllm_python) as (contenders, absent):
        comparison = compare(contenders, workload.pairs, rounds, plain)
    return {
        "model": model,
        "rounds": rounds,
        "workload": workload.describe(),
        "sharing_factor": sharing(workload.pairs).factor,
        "whole_file_sharing_factor": sharing(whole.pairs).factor,
        "left_out": absent,
        **comparison.report(),
    }


def show(report: Mapping[str, Any]) -> str:
    """A report of ``measure`` as text."""
    task, work = report["workload"], report["useful_work"]
    lines = [
        f"{report['model']} in {report['dtype']}; {task['queries']} queries of {task['source']}, {task['pairs']} "
        f"pairs, {task['tokens']:,} tokens, {work['unique_tokens']:,} unique inputs, sharing factor "
        f"{report['sharing_factor']:.2f} (whole file: {report['whole_file_sharing_factor']:.2f}); "
        f"{report['rounds']} rounds by turns; GEMM {report['gemm_tflops_per_s'] * 1e3:,.0f} GFLOP/s"
    ]
    if task["source"] != NQ_QA.name:
        lines.append(f"{NQ_QA.name} is absent: {task['source']} stands in for it, and its figures are not comparable")
    for name, values in report["contenders"].items():
        if tried := values["settings"].get("batch_size_seconds"):
            sizes = ", ".join(f"{size} {seconds:.1f} s" for size, seconds in tried.items())
            lines.append(f"{name} takes batches of {values['settings']['batch_size']} ({sizes})")
    lines.append(comparison_table(report))
    ours = report["contenders"][OURS]
    lines.append(
        f"{OURS}: {ours['useful_flop_efficiency']:.1%} of the GEMM rate; "
        f"{ours['efficiency_without_skippable']:.1%} if the last layer counts at answer tokens only"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all contenders agree, 1 when one does not, 2 when a peer that was named can't take part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="these and no others (default: all that are there)")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM (or FASTSCORE_VLLM_PYTHON)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    where = environment()
    print(one_line(where), flush=True)
    peers = PEERS if options.peers is None else options.peers
    report = measure(options.model, options.dtype, options.queries, options.rounds, peers, options.vllm_python)
    print(show(report), flush=True)
    if options.json is not None:
        write_json(options.json, {"environment": where, **report})
    if report["disagreeing"]:
        print(f"not fastscore's scores: {', '.join(report['disagreeing'])}", file=sys.stderr)
        return 1
    return 2 if options.peers and report["left_out"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that vLLM's processes are ended, too
    sys.exit(main())
