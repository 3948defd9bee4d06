"""Model files made to do harm: damaged, lying about their sizes, leading elsewhere, or strangely named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from hostile import assert_ended_well, copy_of, run, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import write_gguf
from tiny_models import make_tiny_model

from fastscore import InputError
from fastscore.gguf_header import MAX_ELEMENTS, read_gguf_header
from fastscore.model_source import embedded_gguf

ROW = {"query": "where", "answers": ["the town"], "pos": ["The old town."], "neg": ["42"], "task": "qa"}
HARMLESS = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tiny_gguf(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.fixture(scope="module")
def work(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a copy of the model, whose files the examples change."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "rows.jsonl").write_text(json.dumps(ROW))
    copy_of(llama, folder / "model")
    return folder


def score(work: Path, model: str | Path, *options: str) -> str:
    """Score with a hostile model: what is said, once it is seen that it ended well and wrote what it may."""
    written = {"out.jsonl", "out.jsonl.meta.json"}
    before = tree(work)
    ended = run("score", work / "rows.jsonl", "-m", model, "-q", "-o", work / "out.jsonl", "--no-cache", *options)
    assert_ended_well(ended, (0, 2))
    assert tree(work).keys() - before.keys() == (written if ended.status == 0 else set())
    if ended.status == 0:
        scores = json.loads((work / "out.jsonl").read_text())["teacher_scores"]
        assert all(score <= 0 for score in scores), "numbers, even if the weights are others now"
    for name in written:
        (work / name).unlink(missing_ok=True)
    return ended.err


@st.composite
def damages(draw: st.DrawFn, longest: int) -> tuple[str, int, bytes]:
    """What is done to a file: where it is cut, or what is written over it, and where."""
    at = draw(st.integers(0, 200) | st.integers(0, longest))
    if draw(st.booleans()):
        return "cut", at, b""
    number = draw(st.sampled_from([0, 1, 8, 9, 2**20, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
    return "overwrite", at, draw(st.just(number.to_bytes(8, "little")) | st.binary(min_size=1, max_size=9))


def damaged(data: bytes, damage: tuple[str, int, bytes]) -> bytes:
    kind, at, patch = damage
    return data[:at] if kind == "cut" else data[:at] + patch + data[at + len(patch) :]


@HARMLESS
@given(damage=damages(2500))
def test_damaged_safetensors(damage: tuple[str, int, bytes], llama: Path, work: Path) -> None:
    data = (llama / "model.safetensors").read_bytes()
    (work / "model" / "model.safetensors").write_bytes(damaged(data, damage))
    try:
        score(work, work / "model", "--dtype", "fp32")
    finally:
        (work / "model" / "model.safetensors").write_bytes(data)


@HARMLESS
@given(damage=damages(24_000))
def test_damaged_gguf(damage: tuple[str, int, bytes], tiny_gguf: bytes, work: Path) -> None:
    (work / "damaged.gguf").write_bytes(damaged(tiny_gguf, damage))
    score(work, work / "damaged.gguf", "--dtype", "fp32")


@settings(HARMLESS, max_examples=300)
@given(damage=damages(24_000))
def test_a_gguf_header_that_passes_can_be_read_by_the_library(
    damage: tuple[str, int, bytes], tiny_gguf: bytes, work: Path
) -> None:
    """Whatever passes makes the gguf package neither hang nor fill the memory; what it cannot read, it says."""
    path = work / "header.gguf"
    path.write_bytes(damaged(tiny_gguf, damage)[:24_000])
    try:
        header = read_gguf_header(path)
    except InputError:
        return
    try:
        read = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError):
        return
    assert len(read.tensors) == header.num_tensors


def test_the_headers_of_real_files_pass(tiny_gguf: bytes, work: Path) -> None:
    (work / "whole.gguf").write_bytes(tiny_gguf)
    header, reader = read_gguf_header(work / "whole.gguf"), gguf.GGUFReader(work / "whole.gguf")
    assert header.num_tensors == len(reader.tensors)
    assert header.num_pairs == len([name for name in reader.fields if not name.startswith("GGUF.")])
    embedded = embedded_gguf()
    assert embedded is not None
    assert read_gguf_header(embedded).num_tensors == 30 * 9 + 2, "layers of SmolLM2, its embeddings, its last norm"


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return len(key).to_bytes(8, "little") + key + kind.to_bytes(4, "little") + value


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


GGUF_LIES = {
    "empty": (b"", "it is empty"),
    "other": (b"PK\3\4" * 10, "it begins otherwise"),
    "version": (b"GGUF" + number(77, 4) + number(0) * 2, "GGUF version 77; expected 2 or 3"),
    "many-tensors": (b"GGUF" + number(3, 4) + number(2**60) + number(0), "tensors are declared"),
    "many-keys": (b"GGUF" + number(3, 4) + number(0) + number(2**60), "keys are declared"),
    # The gguf package makes an object of each until the memory is full.
    "many-bytes": (
        b"GGUF" + number(3, 4) + number(0) + number(1) + pair(b"a", 9, number(0, 4) + number(2**60)),
        f"at most {MAX_ELEMENTS} are read",
    ),
    "bytes-past-the-end": (
        b"GGUF" + number(3, 4) + number(0) + number(1) + pair(b"a", 9, number(0, 4) + number(2**20)),
        "the file ends before",
    ),
    "strings-past-the-end": (
        b"GGUF" + number(3, 4) + number(0) + number(1) + pair(b"a", 9, number(8, 4) + number(2**20)),
        "elements are declared",
    ),
    "array-in-array": (
        b"GGUF" + number(3, 4) + number(0) + number(1) + pair(b"a", 9, number(9, 4) + number(1) + number(9) * 3),
        "an array in an array",
    ),
    "long-string": (
        b"GGUF" + number(3, 4) + number(0) + number(1) + pair(b"a", 8, number(2**63)),
        "the file ends before",
    ),
    "large-tensor": (
        b"GGUF"
        + number(3, 4)
        + number(1)
        + number(0)
        + number(1)
        + b"a"
        + number(2, 4)
        + number(2**32) * 2
        + bytes(12),
        "a tensor of 18446744073709551616 elements",
    ),
    "dimensions": (
        b"GGUF" + number(3, 4) + number(1) + number(0) + number(1) + b"a" + number(2**31, 4) + bytes(40),
        "a tensor of 2147483648 dimensions",
    ),
}


@pytest.mark.parametrize("case", GGUF_LIES)
def test_gguf_files_that_declare_what_they_do_not_hold(case: str, work: Path) -> None:
    data, complaint = GGUF_LIES[case]
    (work / "lie.gguf").write_bytes(data)
    said = score(work, work / "lie.gguf")
    assert complaint in said
    assert said.startswith(f"fastscore: model '{work}/lie.gguf' cannot be loaded: ")


JUNK = st.one_of(
    st.sampled_from([10**9, 10**12, 2**63, -1, 0, 1, 1e308, float("nan"), None, True, "", "x", "../x", "a/b", [], {}]),
    st.recursive(st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
SETTINGS = {
    "config.json": [
        *("model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
        *("num_key_value_heads", "intermediate_size", "head_dim", "rope_parameters", "layer_types", "text_config"),
        *("quantization_config", "transformers_weights", "auto_map", "dtype", "attn_implementation", "bos_token_id"),
        *("max_position_embeddings", "tie_word_embeddings", "hidden_act", "rms_norm_eps", "is_encoder_decoder"),
    ],
    "tokenizer_config.json": [
        *("model_max_length", "tokenizer_class", "pad_token", "bos_token", "auto_map", "added_tokens_decoder"),
        *("chat_template", "extra_special_tokens", "clean_up_tokenization_spaces", "backend", "vocab_file"),
    ],
    "tokenizer.json": ["model", "added_tokens", "pre_tokenizer", "normalizer", "post_processor", "decoder", "version"],
}


@settings(HARMLESS, max_examples=40)
@given(file_and_name=st.sampled_from([(file, name) for file, names in SETTINGS.items() for name in names]), value=JUNK)
def test_settings_that_make_no_sense(file_and_name: tuple[str, str], value: Any, llama: Path, work: Path) -> None:
    file, name = file_and_name
    original = (llama / file).read_text(encoding="utf-8")
    (work / "model" / file).write_text(json.dumps({**json.loads(original), name: value}))
    try:
        score(work, work / "model", "--dtype", "fp32")
    finally:
        (work / "model" / file).write_text(original, encoding="utf-8")


@settings(HARMLESS, max_examples=20)
@given(file=st.sampled_from(list(SETTINGS)), data=st.binary(max_size=60) | st.just(b"[" * 100_000))
def test_settings_that_are_no_json(file: str, data: bytes, llama: Path, work: Path) -> None:
    original = (llama / file).read_bytes()
    (work / "model" / file).write_bytes(data)
    try:
        score(work, work / "model", "--dtype", "fp32")
    finally:
        (work / "model" / file).write_bytes(original)


LIES: dict[str, tuple[dict[str, int], dict[str, list[int]], str]] = {
    # What is missing is filled with random numbers, as much as the config says.
    "large-vocabulary": ({"vocab_size": 10**8}, {}, "vocab_size 100000000, its weights are"),
    "wide-layers": ({"intermediate_size": 10**8}, {}, "intermediate_size 100000000, its weights are"),
    "wide-heads": ({"head_dim": 10**8}, {}, "num_attention_heads 4, its weights are"),
    "many-layers": ({"num_hidden_layers": 10**9}, {}, "1000000000 layers, its weights are 1 tensors"),
    "other-shapes": ({}, {"model.embed_tokens.weight": [2, 2]}, "have other shapes than"),
    "a-large-file": ({}, {"model.embed_tokens.weight": [2**50, 64]}, "model.safetensors: Error"),
}
LIMITED = """
import resource, sys
from fastscore.cli import main
import torch
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for model in sys.argv[2:]:
    try:
        main(["score", sys.argv[1], "-m", model, "-q", "--device", "cpu"])
    except SystemExit as stopped:
        print(stopped.code, flush=True)
"""


def test_sizes_that_are_declared_only(llama: Path, work: Path, tmp_path: Path) -> None:
    """In a process with a gigabyte to spare and without what a test has imported: as a person meets it."""
    config = json.loads((llama / "config.json").read_text())
    for name, (changes, shapes, _) in LIES.items():
        folder = copy_of(llama, tmp_path / name)
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, **changes}))
        header: dict[str, Any] = {"x": {"dtype": "F32", "shape": [4096], "data_offsets": [0, 4 * 4096]}}
        end = 4 * 4096
        for tensor, shape in shapes.items():
            size = 4 * shape[0] * shape[1]
            header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        data = number(len(text)) + text + bytes(min(end, 20_000))
        (folder / "model.safetensors").write_bytes(data)
    models = [str(tmp_path / name) for name in LIES]
    command = [sys.executable, "-c", LIMITED, str(work / "rows.jsonl"), *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2"] * len(LIES), done
    for line, model, (_, _, complaint) in zip(done.stderr.splitlines(), models, LIES.values(), strict=True):
        assert line.startswith(f"fastscore: model '{model}'"), line
        assert complaint in line


def test_odd_names_of_models(llama: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are found by their names as they are; the output's name is made of what is safe in them."""
    monkeypatch.chdir(work)
    for name in ("a b", "naïve 白", "-m", "x\ny", "'\"$(touch created)`", "..hidden", "%s{0}", "a.gguf"):
        folder = copy_of(llama, work / "odd" / name)
        ended = run("score", "rows.jsonl", "-m", f"./odd/{name}", "-q", "--dtype", "fp32", "--no-cache")
        assert_ended_well(ended, (2,) if name == "a.gguf" else (0,))
        made = [path for path in work.iterdir() if path.name.startswith("rows.scored.")]
        assert len(made) == (0 if ended.status else 2), made
        assert all(path.name.isprintable() and "/" not in path.name for path in made)
        for path in made:
            path.unlink()
        assert folder.is_dir()
    assert not (work / "created").exists()


def test_links(llama: Path, work: Path) -> None:
    os.symlink(llama, work / "link")
    assert score(work, work / "link", "--dtype", "fp32") == ""
    os.symlink("loop.gguf", work / "loop.gguf")
    os.symlink("loop", work / "loop")
    os.symlink("/dev/zero", work / "zero.gguf")
    os.mkfifo(work / "pipe.gguf")
    for name in ("loop.gguf", "loop", "zero.gguf", "pipe.gguf"):
        assert f"model '{work / name}'" in score(work, work / name)
