"""Train with DPO on scored preference rows: python examples/train_dpo.py MODEL SCORED.jsonl OUTPUT_DIR

MODEL is the model that the rows were scored with. TRL (pip install trl) reads its reference log-probabilities from
the rows, and no reference model is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fastscore.rows import read_rows

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class ScoredDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL 1.16 computes the columns even where they are there already; this one takes them as they are."""

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if all(name in dataset.column_names for name in COLUMNS):
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)


def trainer(model: str, scored: Path, output: Path, **options: Any) -> ScoredDPOTrainer:
    """A trainer on the rows; ``options`` go to ``DPOConfig``."""
    meta = json.loads(scored.with_name(f"{scored.name}.meta.json").read_text(encoding="utf-8"))
    config = DPOConfig(
        output_dir=str(output),
        precompute_ref_log_probs=True,
        max_length=meta["task"]["max_length"],  # sequences must be cut where they were when they were scored
        **options,
    )
    return ScoredDPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=Dataset.from_list([row.data for row in read_rows(scored)]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    model, scored, output = arguments
    trainer(model, Path(scored), Path(output)).train()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
