"""What comes before the first score: nothing but PyTorch and transformers, and little time beyond theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

PLAIN = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
"""
PLAIN_SCORE = """
tokenizer, model = (auto.from_pretrained(sys.argv[1]) for auto in (AutoTokenizer, AutoModelForCausalLM))
with torch.inference_mode():
    print(model(input_ids=torch.tensor([tokenizer.encode("the old town")])).logits.log_softmax(-1)[0, -1, 5])
"""
OURS_SCORE = """
import json, sys, time
from fastscore import Scorer
print(Scorer(sys.argv[1], dtype="fp32", device="cpu").score([("the old", " town")]))
"""
TELL = """
packages = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"cpu": time.process_time(), "packages": packages}))
"""


def run(code: str, *arguments: str) -> tuple[float, set[str]]:
    """CPU seconds of the process, and the packages it has imported."""
    command = [sys.executable, "-c", code + TELL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["cpu"], set(found["packages"])


@pytest.mark.slow
def test_a_scorer_imports_what_it_needs_and_no_more() -> None:
    _, plain = run(PLAIN)
    _, ours = run(f"{PLAIN}import fastscore.scorer\n")
    assert ours - plain - sys.stdlib_module_names <= {"fastscore", "fastscore_kernels", "platformdirs"}


@pytest.mark.slow
def test_the_first_score_takes_little_more_than_loading_the_model(tmp_path: Path) -> None:
    """CPU time beside plain transformers', which loads the same model and runs it once; in turns, the least of two."""
    folder = str(make_tiny_model(tmp_path / "llama"))
    rounds = [[run(code, folder)[0] for code in (PLAIN + PLAIN_SCORE, OURS_SCORE)] for _ in range(2)]
    plain, ours = (min(seconds) for seconds in zip(*rounds, strict=True))
    assert ours < 1.5 * plain, (ours, plain)


def test_a_program_that_ends_does_not_look_through_its_memory() -> None:
    code = "import atexit, gc; atexit.register(lambda: print('frozen', gc.get_freeze_count()))\n"
    code += "from fastscore.cli import main\nmain(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said, (word, count) = done.stdout.splitlines()[0], done.stdout.splitlines()[1].split()
    assert said.startswith("fastscore ")
    assert (word, int(count) > 10_000) == ("frozen", True)
