"""A model that was loaded before is put together without transformers' code for models: the same scores to the last
bit, or loaded anew."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from truth import alone

from fastscore import Scorer, fingerprint, known_models, recall
from fastscore.config import ScorerConfig
from fastscore.decoder.skeleton import Skeleton
from fastscore.model_source import resolve_model
from fastscore.types import AnswerScore, InputError

NOTED = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"]
SCALED_EMBEDDINGS = ["gemma", "gemma2", "gemma3_text"]
PAIRS = [((5, 6, 7, 8), (9, 10)), ((5, 6, 7, 11, 12, 13), (14,)), ((20,) * 30, (21, 22, 23))]


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where notes are kept; files that have only just been written count as settled."""
    monkeypatch.setenv("FASTSCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_models, "is_settled", lambda *_: True)
    return tmp_path / "cache" / "known-models"


def scorer_of(folder: Path, **options: Any) -> Scorer:
    return Scorer(str(folder), **{"dtype": "fp32", "device": "cpu", **options})


def is_recalled(scorer: Scorer) -> bool:
    return isinstance(scorer.load().model, Skeleton)


def scores_of(scorer: Scorer) -> list[AnswerScore]:
    return scorer.score_tokens(PAIRS)


def loaded_before(folder: Path, **options: Any) -> list[AnswerScore]:
    """The scores of the model as it is loaded for the first time."""
    scorer = scorer_of(folder, **options)
    assert not is_recalled(scorer)
    return scores_of(scorer)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", NOTED)
def test_the_second_load_gives_the_same_bits(family: str, dtype: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / family, family)
    first = scorer_of(folder, dtype=dtype)
    truth, about, identity = scores_of(first), first.describe(), first.identity()
    second = scorer_of(folder, dtype=dtype)
    assert is_recalled(second)
    assert scores_of(second) == truth
    assert second.describe() == about
    assert second.identity() == identity
    assert second.tokenizer("the old town") == first.tokenizer("the old town")
    assert second.hf_config.to_dict() == first.hf_config.to_dict()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("mistral", {"sliding_window": 9}),
        ("granite", {"embedding_multiplier": 12.3, "residual_multiplier": 0.3, "logits_scaling": 7.0}),
    ],
    ids=str,
)
def test_settings_are_kept(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", family, **settings)
    truth = loaded_before(folder)
    again = scorer_of(folder)
    assert is_recalled(again)
    assert scores_of(again) == truth
    for score, (prompt, answer) in zip(truth, PAIRS, strict=True):
        expected = alone(folder, [(prompt, answer)])[0]
        assert score.token_logprobs == pytest.approx(list(expected), abs=1e-4)


@pytest.mark.parametrize("family", SCALED_EMBEDDINGS)
def test_embeddings_with_code_of_their_own_are_loaded_anew(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / family, family)
    assert loaded_before(folder) == loaded_before(folder)


def test_positions_whose_frequencies_change_are_loaded_anew(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = make_tiny_model(tmp_path / "model", "llama", rope_parameters=rope)
    assert loaded_before(folder) == loaded_before(folder)


@pytest.mark.parametrize(
    "options", [{"deterministic": True}, {"residual": "model"}, {"attention": "reference"}], ids=str
)
def test_options_hold_for_a_model_that_was_loaded_with_others(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    truth = loaded_before(folder, dtype="bf16", **options)
    for note in (tmp_path / "cache" / "known-models").iterdir():
        note.unlink()
    loaded_before(folder, dtype="bf16")
    again = scorer_of(folder, dtype="bf16", **options)
    assert is_recalled(again)
    assert scores_of(again) == truth


@pytest.mark.parametrize("options", [{"forward": "model"}, {"trust_remote_code": True}], ids=str)
def test_what_needs_the_models_own_code_has_it(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    loaded_before(folder)
    assert not is_recalled(scorer_of(folder, **options))


def test_the_hugging_face_model_is_there_for_who_needs_it(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    whole = scorer_of(folder)
    assert whole.hugging_face_model() is whole.load().model
    for loaded in (True, False):
        scorer = scorer_of(folder)
        if loaded:
            assert is_recalled(scorer)
        model = scorer.hugging_face_model()
        assert isinstance(model, LlamaForCausalLM)
        assert scorer.load().model is model
        assert scores_of(scorer) == scores_of(whole)
    recalled: Any = scorer_of(folder).load().model
    with pytest.raises(InputError, match=r"hugging_face_model\(\), not load\(\)\.model"):
        Scorer.from_model(recalled, whole.tokenizer)


def test_transformers_code_for_models_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from fastscore import Scorer; scorer = Scorer(sys.argv[1], dtype='fp32', device='cpu');"
        "scorer.score([('the old', ' town')]); print(sorted(name for name in sys.modules if name in sys.argv[2:]))"
    )
    folder = make_tiny_model(tmp_path / "model")
    loaded_before(folder)
    heavy = ["transformers.modeling_utils", "transformers.models.llama.modeling_llama", "torch._dynamo"]
    command = [sys.executable, "-c", code, str(folder), *heavy]
    assert subprocess.check_output(command, text=True, timeout=300).strip() == "[]"


def other_weights(folder: Path) -> None:
    """Weights of the same size and shapes, written over those that are there, with their times set back."""
    path = folder / "model.safetensors"
    before = path.stat()
    weights = {name: tensor.flip(0) for name, tensor in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def other_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


@pytest.mark.parametrize("change", [other_weights, other_config])
def test_changed_files_are_loaded_anew(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    before = loaded_before(folder)
    change(folder)
    after = loaded_before(folder)
    assert after != before
    assert after[0].token_logprobs == pytest.approx(list(alone(folder, PAIRS[:1])[0]), abs=1e-4)


def test_files_that_change_between_tokenizer_and_weights(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    before = loaded_before(folder)
    scorer = scorer_of(folder)
    other_weights(folder)
    assert not is_recalled(scorer)
    assert scores_of(scorer) != before


def test_files_that_have_only_just_been_written_are_not_noted(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_models, "is_settled", fingerprint.is_settled)
    loaded_before(make_tiny_model(tmp_path / "model"))
    assert not notes.exists()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def something_else(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text('["a", 5]')
    else:
        save_file({"truth": torch.zeros(3)}, path, {"about": '{"model": 5}'})


@pytest.mark.parametrize("damage", [cut_short, empty, something_else, Path.unlink])
@pytest.mark.parametrize("which", ["*.json", "*.safetensors"])
def test_damaged_notes_are_written_again(
    damage: Callable[[Path], None], which: str, tmp_path: Path, notes: Path
) -> None:
    folder = make_tiny_model(tmp_path / "model")
    truth = loaded_before(folder)
    [note] = notes.glob(which)
    damage(note)
    assert loaded_before(folder) == truth
    again = scorer_of(folder)
    assert is_recalled(again)
    assert scores_of(again) == truth


def test_a_tokenizer_from_elsewhere_is_not_imported(tmp_path: Path, notes: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    loaded_before(folder)
    [note] = notes.glob("*.json")
    note.write_text(json.dumps({**json.loads(note.read_text()), "tokenizer": ["os", "system"]}))
    loaded_before(folder)


@pytest.mark.parametrize("name", ["truth", "head logits", "frequency "])
def test_another_result_than_noted_is_found_out(
    name: str, tmp_path: Path, notes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_model(tmp_path / "model")
    truth = loaded_before(folder)
    [note] = notes.glob("*.safetensors")
    with known_models.safe_open(note, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(note)
    save_file({**tensors, name: tensors[name] * 1.5 + 0.5}, note, metadata)
    with caplog.at_level(logging.INFO, "fastscore"):
        assert loaded_before(folder) == truth
    assert "is loaded anew" in caplog.text


def test_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTSCORE_CACHE", str(tmp_path / "file"))
    folder = make_tiny_model(tmp_path / "model")
    assert loaded_before(folder) == loaded_before(folder)
    assert "known-models cannot be written" in caplog.text


def test_the_oldest_notes_are_removed(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_models, "MOST_NOTES", 3)
    folders = [make_tiny_model(tmp_path / str(seed), seed=seed) for seed in range(3)]
    for folder in folders:
        loaded_before(folder)
    assert len(list(notes.iterdir())) == 3
    assert is_recalled(scorer_of(folders[-1]))
    assert not is_recalled(scorer_of(folders[0]))


def test_large_models_are_not_read_twice(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "LARGEST", 1000)
    loaded_before(make_tiny_model(tmp_path / "model"))
    assert not notes.exists()


def test_an_adapter_beside_a_model_is_not_left_out(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    loaded_before(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert known_models.place_of(resolve_model(str(folder)), ScorerConfig(str(folder))) is None


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    truth = loaded_before(folder)
    again = scorer_of(folder)
    assert is_recalled(again)
    assert scores_of(again) == truth


def test_a_model_of_the_hub_without_a_network(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    built, root = make_tiny_model(tmp_path / "built"), tmp_path / "hub" / "models--org--tiny"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for file in built.iterdir():
        (root / "blobs" / file.name).write_bytes(file.read_bytes())
        (root / "snapshots" / commit / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    first = Scorer("org/tiny", dtype="fp32", device="cpu", cache_dir=str(tmp_path / "hub"))
    truth = scores_of(first)
    second = Scorer("org/tiny", dtype="fp32", device="cpu", cache_dir=str(tmp_path / "hub"))
    assert is_recalled(second)
    assert scores_of(second) == truth
    assert second.describe() == first.describe()
    assert second.identity().weights == f"hub:org/tiny@{commit}"


def test_the_tokenizer_is_the_one_that_transformers_chooses(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", add_bos=True)
    loaded_before(folder)
    ours, theirs = scorer_of(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours.init_kwargs == theirs.init_kwargs
    for text in ("the old town", "Zürich 東京 \U0001f600", ""):
        assert ours(text) == theirs(text)


def test_notes_of_other_code_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = loaded_before(folder := make_tiny_model(tmp_path / "model"))
    own = known_models.__file__
    assert [own, *fingerprint.file_mark(Path(own))] in known_models._code()
    monkeypatch.setattr(known_models, "_code", lambda: ["other"])
    assert loaded_before(folder) == truth
