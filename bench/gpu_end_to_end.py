"""fastscore against plain transformers at the shapes of real models, on one GPU, in under ten minutes.

    python bench/gpu_end_to_end.py --json OUT.json

Then the answer-NLL kernel alone, by ``gpu_kernel.py``, in what is left of the time; its figures are in OUT.kernel.json.

Weights are random (nothing is downloaded) and token ids, too: the time of a dense model does not depend on them. Every
cell, a model with passages and answers of some lengths, is checked for agreement first and then timed by turns; the
limit is the rate of the model's own matrix products, measured in the same rounds. Results are written after every cell,
and a cell that fails does not keep the others from being measured. Away from its history, a checkout is told its commit
by FASTSCORE_COMMIT.
``--tiny`` runs the same with toy models anywhere. fastscore need not be installed, what it imports must be.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkout import use_checkout

use_checkout()

import torch  # noqa: E402
from compare import compare, comparison_table, time_cells, ways, why_not_measured  # noqa: E402
from contenders import OURS, FastScore, Padded, PaddedTuned  # noqa: E402
from environment import environment, one_line, write_json  # noqa: E402
from rounds import table  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402
from workload import TokenPair  # noqa: E402

from fastscore import Scorer  # noqa: E402
from fastscore.devices import DTYPES  # noqa: E402
from fastscore.error_text import error_text  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
QUESTION_TOKENS = 16
LENGTH_SPREAD = 0.25
"""Passages are up to this share shorter or longer than named, as real ones differ too."""
MIN_PAIRS = 16


@dataclass(frozen=True, slots=True)
class Cell:
    """Tokens of passages and answers; ``all`` of a model that fails as a whole."""

    model: str
    passage: int | str
    answer: int | str


def build_model(name: str, device: torch.device, dtype: torch.dtype, tiny: bool) -> PreTrainedModel:
    """Random weights of the family's own initialisation, made where they are needed."""
    shape = {**SHAPES[name], **(TINY if tiny else {})}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with its own config and attention around the same tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def make_pairs(vocab_size: int, cell: Cell, tokens: int, questions_per_passage: int) -> list[TokenPair]:
    """About ``tokens`` tokens of passages, each followed by so many questions in turn, each with its answer."""
    draw = random.Random(f"{cell.passage} {cell.answer}")

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(vocab_size), k=length))

    count = max(MIN_PAIRS, tokens // (cell.passage + QUESTION_TOKENS + cell.answer))
    pairs: list[TokenPair] = []
    while len(pairs) < count:
        passage = ids(round(cell.passage * draw.uniform(1 - LENGTH_SPREAD, 1 + LENGTH_SPREAD)))
        pairs += [((*passage, *ids(QUESTION_TOKENS)), ids(cell.answer)) for _ in range(questions_per_passage)]
    draw.shuffle(pairs)
    return pairs[:count]


def run_model(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cell after cell of one model: its report, or why there is none."""
    plain = build_model(name, device, DTYPES[options.dtype], options.tiny)
    unused_tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    scorer = Scorer.from_model(
        with_shared_weights(plain),
        unused_tokenizer,
        attention=options.attention,
        max_batch_tokens=options.max_batch_tokens,
    )
    longest = 0.0
    for passage in options.passages:
        tuned: PaddedTuned | None = None
        for answer in options.answers:
            cell = Cell(f"tiny {name}" if options.tiny else name, passage, answer)
            if time.monotonic() + longest > options.deadline:
                yield cell, {"skipped": "no time left"}
                continue
            started = time.monotonic()
            try:
                pairs = make_pairs(plain.config.vocab_size, cell, options.tokens, options.questions_per_passage)
                contenders = [FastScore(scorer), Padded(plain)]
                with suppress(torch.OutOfMemoryError):  # of every batch size: it takes no part
                    tuned = tuned or PaddedTuned.picked(plain, pairs)
                    contenders.append(tuned)
                report = compare(contenders, pairs, options.rounds, plain, gemm_repeats=options.gemm_repeats).report()
            except Exception as error:  # noqa: BLE001 - time on a GPU is dear: the other cells are measured
                yield cell, failure(error)
                continue
            longest = max(longest, time.monotonic() - started)
            print(f"\n{cell.model}, passages of {passage}, answers of {answer}, {len(pairs)} pairs", flush=True)
            print(comparison_table(report), flush=True)
            yield cell, {"pairs": len(pairs), "agrees": not report["disagreeing"], **report}


def failure(error: Exception) -> dict[str, Any]:
    """The report of a cell that failed; where, is told at once."""
    traceback.print_exception(error)
    return {"failed": error_text(error), "agrees": False}


def summary(cells: Sequence[dict[str, Any]]) -> str:
    """All cells in one table."""
    rows = []
    for cell in cells:
        head = [f"{cell['model']} {cell['passage']}+{cell['answer']}"]
        if why := why_not_measured(cell):
            rows.append([*head, why, *[""] * 7])
            continue
        for name, values in cell["contenders"].items():
            apart, peak = values.get("difference_from_fastscore"), values.get("peak_bytes_beyond_weights")
            known = "median_seconds" in values
            rows.append(
                [
                    *head,
                    name,
                    *time_cells(values),
                    f"{values['useful_flop_efficiency']:.1%}" if known else "",
                    f"{cell['gemm_tflops_per_s']:.3g}",
                    "" if apart is None else f"{apart['max']:.1e}",
                    "" if peak is None else f"{peak / 2**30:.2f}",
                ]
            )
    columns = ["model passage+answer", "", "median s", "tokens/s", "x fastscore", "efficiency", "GEMM TFLOP/s"]
    return table([*columns, "max diff", "peak GiB"], rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="toy models and lengths, on any device")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--passages", type=int, nargs="+")
    parser.add_argument("--answers", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, help="in all pairs of a cell together, about")
    parser.add_argument("--questions-per-passage", type=int, default=1, help="above 1, pairs share prefixes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gemm-repeats", type=int, default=16, help="decoder layers in the limit's measurement")
    parser.add_argument("--limit-seconds", type=float, default=540, help="for everything")
    parser.add_argument(
        "--kernel-seconds", type=float, help="of these, kept for gpu_kernel.py; 0 leaves it out (150, on a CPU 0)"
    )
    parser.add_argument("--wheels", type=Path, help="gpu_kernel.py's: a folder with wheels of its peers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--max-batch-tokens", type=int)
    options = parser.parse_args(arguments)
    options.passages = options.passages or ([16, 32, 64] if options.tiny else [128, 512, 4096])
    options.answers = options.answers or ([2, 5] if options.tiny else [8, 64])
    options.tokens = options.tokens or (512 if options.tiny else 65536)
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    if options.kernel_seconds is None:
        options.kernel_seconds = 0 if options.device == "cpu" else 150
    options.end = time.monotonic() + options.limit_seconds
    options.deadline = options.end - options.kernel_seconds
    return options


def run_kernel_bench(options: argparse.Namespace) -> int:
    """``gpu_kernel.py`` in a process of its own, and its exit status: an error on the device must not take the rest."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_kernel.py")), "--device", options.device]
    command += ["--json", str(options.json.with_suffix(".kernel.json"))]
    command += ["--limit-seconds", str(max(0.0, options.end - time.monotonic()))]
    command += ["--wheels", str(options.wheels)] if options.wheels is not None else []
    command += ["--tiny"] if options.tiny else []
    return subprocess.run(command, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every cell's contenders agree, the kernel's among them."""
    options = parse(arguments)
    where = environment()
    setting = {
        name: getattr(options, name)
        for name in ("tiny", "dtype", "device", "tokens", "questions_per_passage", "rounds", "gemm_repeats")
    }
    cells: list[dict[str, Any]] = []

    def keep(cell: Cell, report: dict[str, Any]) -> None:
        cells.append({"model": cell.model, "passage": cell.passage, "answer": cell.answer, **report})
        write_json(options.json, {"environment": where, "setting": setting, "cells": cells})

    for name in options.models:
        try:
            for cell, report in run_model(name, options, torch.device(options.device)):
                keep(cell, report)
            if options.device != "cpu":
                gc.collect()  # a scorer and its parts know one another
                torch.cuda.empty_cache()
        except Exception as error:  # noqa: BLE001 - as for a cell
            keep(Cell(name, "all", "all"), failure(error))
    kernel_status = run_kernel_bench(options) if options.kernel_seconds else 0
    print(f"\n{one_line(where)}\n{options.dtype}, {options.rounds} rounds by turns")
    print(*(f"{OURS}: {way}" for way in ways(cells)), sep="\n")
    print(summary(cells))
    return 0 if all(cell.get("agrees", True) for cell in cells) and kernel_status == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
