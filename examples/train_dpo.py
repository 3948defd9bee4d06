"""Train with DPO on scored preference rows: python examples/train_dpo.py SCORED.jsonl OUTPUT_DIR

The model is the one that the rows were scored with. TRL (pip install trl) reads the reference log-probabilities from
the rows, and no reference model is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
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


def trainer(scored: Path, output: Path, **options: Any) -> ScoredDPOTrainer:
    """A trainer on the rows; ``options`` go to ``DPOConfig``."""
    meta = json.loads(scored.with_name(f"{scored.name}.meta.json").read_text(encoding="utf-8"))
    model = meta["scorer"]["model_path"]
    config = DPOConfig(
        output_dir=str(output),
        precompute_ref_log_probs=True,
        max_length=meta["task"]["max_length"],  # sequences must be cut where they were when they were scored
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    return ScoredDPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=Dataset.from_list([row.data for row in read_rows(scored)]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    scored, output = arguments
    trainer(Path(scored), Path(output)).train()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
