"""How many tokens should a pack hold? Token budgets by turns on one model: ``python bench/budget.py --json OUT``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from environment import environment, one_line, write_json
from rounds import interleave, medians, table
from workload import load_workload

from fastscore import Scorer

BUDGETS = (512, 1024, 2048, 4096, 8192)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    first = Scorer(options.model, dtype=options.dtype)
    workload = load_workload(first.tokenizer, options.queries)
    model = first.hugging_face_model()
    scorers = {budget: Scorer.from_model(model, first.tokenizer, max_batch_tokens=budget) for budget in options.budgets}
    runs = {str(budget): partial(scorer.score_tokens, workload.pairs) for budget, scorer in scorers.items()}
    interleave(runs, 1)  # warm-up: the allocator meets every shape
    seconds = interleave(runs, options.rounds)

    median = medians(seconds)
    task, where = workload.describe(), environment()
    print(one_line(where))
    print(f"{options.model} in {options.dtype}, {options.rounds} rounds by turns over {task}")
    rows = [
        [name, f"{value:.3f}", f"{min(seconds[name]):.3f}", f"{workload.num_tokens / value:,.0f}"]
        for name, value in median.items()
    ]
    print(table(["max_batch_tokens", "median s", "fastest s", "tokens/s"], rows))
    if options.json is not None:
        measured = {"seconds": seconds, "median_seconds": median}
        setting = {"model": options.model, "dtype": options.dtype, "workload": task}
        write_json(options.json, {"environment": where, **setting, **measured})


if __name__ == "__main__":
    main()
