"""What the LM head costs on a CPU: ``python bench/cpu_head.py --json OUT``.

``answer_nll`` with a head of SmolLM2's shape against nothing but the matrix product of that shape in fp32, by turns. A
ratio of 1 would mean that maximum, exponentials, sums, targets and top tokens cost nothing. Beside that, how far its
NLL and that of PyTorch's own ``cross_entropy`` on fp32 logits are from fp64, whose sums over a vocabulary lose nothing.

Shapes: A answer rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import environment, one_line, write_json
from fastscore_kernels.answer_nll import answer_nll
from rounds import interleave, medians, table

HIDDEN_SIZE, VOCAB_SIZE = 576, 49152
ROWS = (64, 512, 4096)
CHECKED_ROWS = 64
CROSS_ENTROPY = "cross_entropy fp32"
GEMM = "GEMM fp32"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    where = environment()
    print(one_line(where))
    print(f"D={HIDDEN_SIZE}, V={VOCAB_SIZE}, {options.rounds} rounds by turns")
    cells = [measure(num_rows, options.rounds) for num_rows in options.rows]
    lines = []
    for cell in cells:
        gemm = cell["median_seconds"][GEMM]
        flops = 2 * cell["num_rows"] * HIDDEN_SIZE * VOCAB_SIZE
        for name, seconds in cell["median_seconds"].items():
            ratio = f"{cell['times_gemm'][name]:.2f}"
            lines.append(
                [f"A={cell['num_rows']} {name}", f"{seconds * 1e3:.1f}", ratio, f"{flops / seconds / 1e9:.0f}"]
            )
        assert gemm > 0
    print(table(["", "median ms", "x GEMM", "GFLOP/s"], lines))
    errors = errors_from_fp64()
    print(table(["NLL less fp64's, nats", "mean", "largest"], [[name, *map("{:.1e}".format, e)] for name, e in errors]))
    if options.json is not None:
        shape = {"hidden_size": HIDDEN_SIZE, "vocab_size": VOCAB_SIZE}
        write_json(
            options.json,
            {"environment": where, **shape, "rounds": options.rounds, "cells": cells, "errors": dict(errors)},
        )


def draw(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head whose logits have a standard deviation of 2, and targets."""
    torch.manual_seed(0)
    weight_VD = torch.randn(VOCAB_SIZE, HIDDEN_SIZE) * 2 / HIDDEN_SIZE**0.5
    return torch.randn(num_rows, HIDDEN_SIZE), weight_VD, torch.randint(VOCAB_SIZE, (num_rows,))


@torch.inference_mode()
def errors_from_fp64() -> list[tuple[str, tuple[float, float]]]:
    """(mean, largest) difference in nats from the NLL in fp64 of the same operands.

    As in language, one token has most of the probability: beside it the others are small terms of the sum.
    """
    errors = []
    hidden_AD, weight_VD, target_A = draw(CHECKED_ROWS)
    hidden_AD /= 4
    hidden_AD += 3.5 * weight_VD[torch.randint(VOCAB_SIZE, (CHECKED_ROWS,))]
    drawn = (hidden_AD, weight_VD)
    for name, dtype in DTYPES.items():
        hidden_AD, weight_VD = (each.to(dtype) for each in drawn)
        truth_A = F.cross_entropy(hidden_AD.double() @ weight_VD.double().T, target_A, reduction="none")
        found = {f"answer_nll {name}": answer_nll(hidden_AD, weight_VD, target_A)[0]}
        if dtype == torch.float32:
            found[CROSS_ENTROPY] = F.cross_entropy(hidden_AD @ weight_VD.T, target_A, reduction="none")
        for computed, nll_A in found.items():
            error_A = nll_A.double() - truth_A
            errors.append((computed, (float(error_A.mean()), float(error_A.abs().max()))))
    return errors


@torch.inference_mode()
def measure(num_rows: int, rounds: int) -> dict[str, object]:
    """Seconds, and the median over the rounds of the ratio to the product's seconds in the same round."""
    hidden_AD, weight_VD, target_A = draw(num_rows)
    logits_AV = torch.empty(num_rows, VOCAB_SIZE)
    runs: dict[str, Callable[[], object]] = {GEMM: partial(torch.mm, hidden_AD, weight_VD.T, out=logits_AV)}
    for name, dtype in DTYPES.items():
        runs[f"answer_nll {name}"] = partial(answer_nll, hidden_AD.to(dtype), weight_VD.to(dtype), target_A)
    interleave(runs, 1)  # warm-up
    seconds = interleave(runs, rounds)
    ratios = {
        name: statistics.median(own / gemm for own, gemm in zip(values, seconds[GEMM], strict=True))
        for name, values in seconds.items()
    }
    return {"num_rows": num_rows, "seconds": seconds, "median_seconds": medians(seconds), "times_gemm": ratios}


if __name__ == "__main__":
    main()
