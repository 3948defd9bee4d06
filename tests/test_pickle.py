"""Weights that are pickles: refused in one line, unless --allow-pickle, and never run as code."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hostile import CreatesFile, assert_ended_well, bomb, copy_of, run, tree
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from fastscore import InputError, Scorer
from fastscore.config import ScorerConfig
from fastscore.model_source import ModelSource
from fastscore.weight_files import check_weight_files

ROW = {"query": "where", "answers": ["the town"], "pos": ["The old town."], "neg": ["42"], "task": "qa"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def only_bomb(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    bomb(folder / "pytorch_model.bin", marker)


def zipped_bomb(folder: Path, marker: Path) -> None:
    """In torch's own format."""
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": CreatesFile(marker)}, folder / "pytorch_model.bin")


def sharded_bomb(folder: Path, marker: Path) -> None:
    only_bomb(folder, marker)
    (folder / "pytorch_model.bin").rename(folder / "part.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "part.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def safetensors_index_of_a_bomb(folder: Path, marker: Path) -> None:
    """Asked for safetensors, transformers follows this index to a pickle."""
    names = dict.fromkeys(weights(folder), "pytorch_model.bin")
    only_bomb(folder, marker)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def config_names_a_bomb(folder: Path, marker: Path) -> None:
    """The one pickle that transformers takes from a config, also when it is asked for safetensors."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    bomb(folder / "adapter_model.bin", marker)


def adapter_in_the_folder(folder: Path, marker: Path) -> None:
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    bomb(folder / "adapter_model.bin", marker)


BOMBS: list[Callable[[Path, Path], None]] = [
    only_bomb,
    zipped_bomb,
    sharded_bomb,
    safetensors_index_of_a_bomb,
    config_names_a_bomb,
    adapter_in_the_folder,
]


@pytest.mark.parametrize("lay", BOMBS, ids=lambda lay: lay.__name__)
def test_a_pickle_is_refused_and_never_run(
    lay: Callable[[Path, Path], None], llama: Path, rows: Path, tmp_path: Path
) -> None:
    folder, marker = copy_of(llama, tmp_path / "model"), tmp_path / "created"
    lay(folder, marker)
    before = tree(tmp_path)
    for command in (["score", rows, "-m", folder], ["bench", rows, "-m", folder, "--seconds", "1"]):
        ended = run(*command, "-q")
        assert_ended_well(ended, [2])
        assert "--allow-pickle" in ended.err, ended.err
        assert ended.err.startswith(f"fastscore: model '{folder}'")
        assert tree(tmp_path) == before
    # Allowed, it is read by torch's unpickler for weights, which calls nothing that a pickle names.
    assert_ended_well(run("score", rows, "-m", folder, "-q", "--allow-pickle"), [2])
    assert tree(tmp_path) == before
    assert not marker.exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    bomb(tmp_path / "bomb", tmp_path / "created")
    pickle.loads((tmp_path / "bomb").read_bytes())
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_benign_pickles_load_when_they_are_allowed(sharded: bool, llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "model")
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        parts = {"a.bin": names[:5], "b.bin": names[5:]}
        for part, held in parts.items():
            torch.save({name: tensors[name] for name in held}, folder / part)
        index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="its weights are pickled"):
        Scorer(str(folder), dtype="fp32").load()
    pairs = [("where does the river run", " the old town")]
    ours, truth = (Scorer(str(path), dtype="fp32", allow_pickle=True).score(pairs) for path in (folder, llama))
    assert ours == truth


def test_the_reference_systems_command_line(llama: Path, rows: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "model")
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = ["--eval_data", rows, "--model_name_or_path", folder, "--lm_dtype", "fp32", "--cpu", "True"]
    ended = run(*command)
    assert_ended_well(ended, [2])
    assert "--allow-pickle" in ended.err
    assert run(*command, "--allow_pickle", "True").status == 0
    assert run(*command, "--allow-pickle").status == 0


def lora(folder: Path, **settings: Any) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = folder.parent / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return adapter


def test_adapters_that_are_pickles(llama: Path, rows: Path, tmp_path: Path) -> None:
    adapter = lora(copy_of(llama, tmp_path / "model"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    bomb(adapter / "adapter_model.bin", tmp_path / "created")
    command = ["score", rows, "-m", llama, "--adapter", adapter, "-q", "-o", tmp_path / "out.jsonl"]
    ended = run(*command)
    assert_ended_well(ended, [2])
    assert ended.err.startswith(f"fastscore: adapter '{adapter}': ")
    assert "--allow-pickle" in ended.err
    assert_ended_well(run(*command, "--allow-pickle"), [2])
    assert not (tmp_path / "created").exists()
    torch.save(tensors, adapter / "adapter_model.bin")
    assert run(*command, "--allow-pickle").status == 0


def test_an_adapter_imports_nothing_that_it_names(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = lora(copy_of(llama, tmp_path / "model"), megatron_config={"a": 1}, megatron_core="hostile_module")
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'created')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    ended = run("score", rows, "-m", llama, "--adapter", adapter, "-q")
    assert_ended_well(ended, [2])
    assert "megatron_config" in ended.err
    assert not (tmp_path / "created").exists()
    assert "hostile_module" not in sys.modules


HUB_ADAPTER = """
from fastscore.config import ScorerConfig
from fastscore.weight_files import adapter_folder
for allow_pickle in (False, True):
    try:
        print(adapter_folder(ScorerConfig(adapter="some/adapter", allow_pickle=allow_pickle)))
    except ValueError as error:
        print(error)
"""


def test_an_adapter_in_the_hubs_cache(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--some--adapter" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text("{}")
    bomb(snapshot / "adapter_model.bin", tmp_path / "created")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB_ADAPTER], capture_output=True, text=True, env=environment)
    refused, allowed = done.stdout.splitlines()
    assert refused.startswith("adapter 'some/adapter': there is no adapter_model.safetensors")
    assert allowed == str(snapshot)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "names the weights"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "names the weights"),
        ({"weight_map": {"a": "x.bin"}}, "--allow-pickle"),
        ({"weight_map": {"a": 7}}, "names the weights"),
        ({"weight_map": {"a": ["x"]}}, "no index of weights"),
        ({"weight_map": 7}, "no index of weights"),
        ({}, "no index of weights"),
        ([], "no index of weights"),
    ],
)
def test_an_index_leads_to_files_beside_it_only(index: Any, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    hf_config = SimpleNamespace()
    hf_config.get_text_config = lambda: hf_config
    with pytest.raises(InputError, match=complaint):
        check_weight_files(ModelSource(str(tmp_path)), ScorerConfig(), hf_config)


def test_a_config_brings_no_kernel(llama: Path, rows: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "some/kernel"}))
    ended = run("score", rows, "-m", folder, "-q")
    assert_ended_well(ended, [2])
    assert "'some/kernel' to be run (--trust-remote-code allows that)" in ended.err
