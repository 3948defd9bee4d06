"""A scorer with a cache: the same bits again, nothing computed twice, and nothing taken for what it is not."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_shared_prefixes import out_of_memory_above
from tiny_models import VOCAB_SIZE, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from truth import alone

from fastscore import InputError, Scorer
from fastscore.cache_file import CacheAt
from fastscore.cache_upkeep import cache_info
from fastscore.cli import main
from fastscore.config import TaskConfig
from fastscore.run_lm_score import main as run_lm_score
from fastscore.run_stats import RunStats
from fastscore.types import AnswerScore, Row

Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "scores"


@pytest.fixture
def at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastscore.launch.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("fastscore.launch.KEEP_COST", 0.0)


def scorer_of(folder: Path, cache: Path | None, **options: Any) -> Scorer:
    return Scorer(str(folder), **{"dtype": "fp32", "device": "cpu", "max_batch_tokens": 100, "cache": cache, **options})


def token_pairs(count: int, seed: int = 1) -> Pairs:
    """Some share their beginning, some their answer tokens' row, one is there twice."""
    draw = random.Random(seed)
    stems = [[draw.randrange(3, VOCAB_SIZE) for _ in range(20)] for _ in range(4)]
    pairs = [
        ([*draw.choice(stems)[: draw.randint(5, 20)], draw.randrange(3, 9)], [5, *draw.choices(range(3, 40), k=2)])
        for _ in range(count - 1)
    ]
    return [*pairs, pairs[0]]


def rows_of(pairs: Sequence[tuple[list[int], list[int]]]) -> list[Row]:
    data = [{"score_inputs": [p], "context_inputs": [], "query_inputs": [], "answer_inputs": a} for p, a in pairs]
    return [Row(row, "r.jsonl", line) for line, row in enumerate(data, start=1)]


def streamed(scorer: Scorer, pairs: Pairs, **options: Any) -> list[AnswerScore]:
    return [score for row in scorer.stream_rows(rows_of(pairs), TaskConfig("lrlm"), **options) for score in row.scores]


@pytest.mark.parametrize("family", ["llama", "bloom", "t5"])
def test_the_same_bits_again_and_nothing_computed(family: str, cache: Path, tmp_path: Path) -> None:
    folder, pairs = make_tiny_model(tmp_path / family, family), token_pairs(60)
    first = scorer_of(folder, cache)
    scores = first.score_tokens(pairs)
    for score, truth in zip(scores, alone(folder, pairs), strict=True):
        assert score.token_logprobs == pytest.approx(truth, abs=1e-5)
    assert (first.stats.pairs, first.stats.cached) == (60, 0)
    again = scorer_of(folder, cache)
    assert again.score_tokens(pairs) == scores
    assert again.stats == RunStats(pairs=60, cached=60, seconds=again.stats.seconds)
    assert streamed(again, pairs[::-1]) == scores[::-1]
    assert (again.stats.pairs, again.stats.cached, again.stats.tokens_computed) == (120, 120, 0)


def test_what_is_added_costs_itself(llama: Path, cache: Path) -> None:
    pairs, more = token_pairs(40), token_pairs(25, seed=2)
    scorer_of(llama, cache).score_tokens(pairs)
    alone_, together = scorer_of(llama, None), scorer_of(llama, cache)
    expected = alone_.score_tokens(more)
    mixed = [*more[:10], *pairs, *more[10:]]
    scores = together.score_tokens(mixed)
    assert [*scores[:10], *scores[50:]] == expected, "as if there were nothing else: the same packs"
    for name in ("answer_tokens", "tokens_computed", "tokens_unpadded", "packs"):
        assert getattr(together.stats, name) == getattr(alone_.stats, name), name
    assert (together.stats.pairs, together.stats.cached) == (65, 40)


@pytest.mark.usefixtures("at_every_batch")
@pytest.mark.parametrize("beside", [False, True], ids=["in turn", "beside"])
def test_after_every_batch_what_is_whole_is_there(
    beside: bool, llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops after any number of batches has kept the requests whose last answer token was in one of them."""
    monkeypatch.setattr("fastscore.row_stream.runs_beside_host", lambda device: beside)
    pairs = token_pairs(40)
    reference = scorer_of(llama, None, max_batch_tokens=30, deterministic=False)
    expected = streamed(reference, pairs)
    packs = reference.stats.packs
    assert packs > 5
    counts = []
    for stop_after in range(1, packs + 1):
        place = cache.with_name(f"scores-{stop_after}")
        seen = 0

        def progress(stats: RunStats, limit: int = stop_after) -> None:
            nonlocal seen
            seen += 1
            if seen == limit:
                raise ZeroDivisionError

        scorer = scorer_of(llama, place, max_batch_tokens=30)
        with pytest.raises(ZeroDivisionError):
            streamed(scorer, pairs, on_progress=progress)
        counts.append(cache_info(place).entries)
        rest = scorer_of(llama, place, max_batch_tokens=30)
        for one, other in zip(streamed(rest, pairs), expected, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)
            assert one.is_greedy == other.is_greedy
        distinct = len({(tuple(prompt), tuple(answer)) for prompt, answer in pairs})
        assert cache_info(place).entries == distinct
        assert (rest.stats.tokens_computed < reference.stats.tokens_computed) == (counts[-1] > 0)
    assert counts == sorted(counts)
    assert counts[0] < counts[len(counts) // 2] < counts[-1] == distinct


def test_windows_and_budgets_do_not_matter_and_a_stream_may_have_a_cache_of_its_own(llama: Path, cache: Path) -> None:
    pairs = token_pairs(50)
    first = scorer_of(llama, None, window_tokens=80)
    own = first.cache_at(CacheAt(cache))
    scores = streamed(first, pairs, cache=own)
    own.close()
    again = scorer_of(llama, cache, window_tokens=500, max_batch_tokens=30, share_prefixes=False)
    assert streamed(again, pairs) == scores
    assert again.stats.cached == 50
    assert (first.stats.cached > 0) == (pairs[0] == pairs[-1]), "the last is the first again, windows later"


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bf16"},
        {"forward": "model"},
        {"residual": "model", "dtype": "bf16"},
        {"attention": "reference"},
        {"deterministic": True},
    ],
    ids=str,
)
def test_what_computes_otherwise_is_another_model(options: dict[str, Any], llama: Path, cache: Path) -> None:
    pairs = token_pairs(5)
    scorer_of(llama, cache).score_tokens(pairs)
    if "residual" in options:
        scorer_of(llama, cache, dtype="bf16").score_tokens(pairs)
    other = scorer_of(llama, cache, **options)
    other.score_tokens(pairs)
    assert other.stats.cached == 0
    again = scorer_of(llama, cache, **options)
    again.score_tokens(pairs)
    assert again.stats.cached == 5


def test_other_weights_under_the_same_name_are_another_model(cache: Path, tmp_path: Path) -> None:
    pairs = token_pairs(5)
    folder = make_tiny_model(tmp_path / "model")
    scores = scorer_of(folder, cache).score_tokens(pairs)
    moved = folder.rename(tmp_path / "moved")
    assert scorer_of(moved, cache).score_tokens(pairs) == scores
    make_tiny_model(moved, seed=1)
    other = scorer_of(moved, cache)
    assert other.score_tokens(pairs) != scores
    assert other.stats.cached == 0


def test_files_that_change_while_the_model_is_loaded_are_not_taken_for_its_own(cache: Path, tmp_path: Path) -> None:
    """As when a trainer writes its next checkpoint there."""
    folder, other = (make_tiny_model(tmp_path / name, seed=seed) for name, seed in (("model", 1), ("other", 2)))
    scorer = scorer_of(folder, cache)
    scorer.load()
    (other / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(InputError, match="have changed since they were loaded"):
        scorer.score_tokens(token_pairs(3))
    now = scorer_of(folder, cache)
    for score, truth in zip(now.score_tokens(token_pairs(3)), alone(folder, token_pairs(3)), strict=True):
        assert score.token_logprobs == pytest.approx(truth, abs=1e-5)
    assert now.stats.cached == 0


def test_a_cache_that_a_kill_left_half_made_is_made(llama: Path, rows: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.sqlite"
    with closing(sqlite3.connect(half)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    assert half.stat().st_size
    options = ["score", str(rows), "-m", str(llama), "--task", "pairs", "-q", "--cache", str(half)]
    with pytest.raises(SystemExit) as ended:
        main([*options, "-o", str(tmp_path / "out.jsonl")])
    assert ended.value.code == 0
    assert cache_info(half).entries > 0


def test_names_that_are_no_utf8_are_told_as_json_can(llama: Path, rows: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    try:
        shutil.copy(rows, odd)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    options = ["score", str(odd), "-m", str(llama), "--task", "pairs", "-q", "--save-name", "x"]
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 0
    meta = json.loads(Path(f"{str(odd).removesuffix('.jsonl')}.scored.x.jsonl.meta.json").read_text())
    assert meta["inputs"] == [str(odd)]
    with pytest.raises(SystemExit) as ended:
        main([*options, "--format", "pairs", "-o", str(tmp_path / "pairs.jsonl")])
    assert ended.value.code == 2
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_model_of_the_hub_is_known_by_its_commit(cache: Path, tmp_path: Path) -> None:
    """A hub cache as the hub's own client makes it, found without a network."""
    commit = "0123456789" * 4
    built, root = make_tiny_model(tmp_path / "built"), tmp_path / "hub" / "models--org--tiny"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in built.iterdir():
        (root / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    scorer = Scorer("org/tiny", dtype="fp32", device="cpu", cache_dir=str(tmp_path / "hub"), cache=cache)
    assert scorer.identity().weights == f"hub:org/tiny@{commit}"
    pairs = token_pairs(5)
    assert scorer.score_tokens(pairs) == scorer_of(built, None).score_tokens(pairs)
    assert [(m.name, m.entries) for m in cache_info(cache).models] == [("org/tiny", 5 - 1)], "one is there twice"


def test_a_model_in_memory_has_no_cache(llama: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    with pytest.raises(InputError, match="what is in a model in memory is unknown"):
        Scorer.from_model(model, tokenizer).identity()


def test_a_score_that_is_no_number_is_not_kept_and_the_others_are(cache: Path, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "hole")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = math.nan
    model.save_pretrained(folder)
    pairs: Pairs = [([20 + number, 30 + number], [40]) for number in range(20)]
    pairs[12] = ([20, 7], [40])
    for _ in range(2):
        scorer = scorer_of(folder, cache, max_batch_tokens=8)
        with pytest.raises(RuntimeError, match=r"^pair 12: the model gave a log-probability of nan for"):
            scorer.score_tokens(pairs)
    kept = cache_info(cache).entries
    assert 10 <= kept < 20
    assert scorer.stats.cached == kept, "the second time they come from the cache"
    good = [pair for index, pair in enumerate(pairs) if index != 12]
    for score, truth in zip(scorer_of(folder, cache).score_tokens(good), alone(folder, good), strict=True):
        assert score.token_logprobs == pytest.approx(truth, abs=1e-5)


@pytest.mark.usefixtures("at_every_batch")
def test_a_device_that_runs_out_of_memory_for_good_loses_nothing_scored(llama: Path, cache: Path) -> None:
    """Batches are halved until the smallest fails too; what was scored before that is there for the next run."""
    pairs = token_pairs(60)
    dying = scorer_of(llama, cache, max_batch_tokens=64)
    tried = out_of_memory_above(10_000, dying)
    real = dying.load().forward
    assert real is not None
    batches = 0

    def forward(*arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(*arguments)

    # Its own layers stay those that the scores are known by.
    identity = dying.identity()
    dying.load().forward = forward
    with pytest.raises(torch.OutOfMemoryError):
        dying.score_tokens(pairs)
    assert max(tried) <= 64
    kept = cache_info(cache).entries
    assert 0 < kept < 60
    again = scorer_of(llama, cache, max_batch_tokens=64)
    assert again.identity() == identity
    for score, truth in zip(again.score_tokens(pairs), alone(llama, pairs), strict=True):
        assert score.token_logprobs == pytest.approx(truth, abs=1e-5)
    assert again.stats.cached >= kept


@pytest.mark.usefixtures("at_every_batch")
def test_a_source_that_dies_in_its_thread_loses_nothing_scored(
    llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastscore.row_stream.runs_beside_host", lambda device: True)
    monkeypatch.setattr("fastscore.windows.TOKENISED_PAIRS", 5)
    pairs = token_pairs(40)

    def dying() -> Any:
        yield from rows_of(pairs[:30])
        raise OSError("the disk is gone")

    scorer = scorer_of(llama, cache, window_tokens=100)
    with pytest.raises(OSError, match="the disk is gone"):
        list(scorer.stream_rows(dying(), TaskConfig("lrlm")))
    kept = cache_info(cache).entries
    again = scorer_of(llama, cache, window_tokens=100)
    streamed(again, pairs)
    assert again.stats.cached >= kept > 15


def command(rows: Path, llama: Path, *more: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in ("score", rows, "-m", llama, "--task", "pairs", "--device", "cpu", *more)])
    return int(stopped.value.code or 0)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"context": f"row {number}:", "continuation": " the old town"}) for number in range(5)]
    path.write_text("\n".join(lines))
    return path


def test_a_default_place_that_cannot_be_is_told_and_the_run_goes_on(
    llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.jsonl.cache.sqlite").mkdir()
    assert command(rows, llama, "-o", tmp_path / "out.jsonl") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "fastscore: scores are not kept in a cache: " in said
    assert "cannot be written: it is a directory" in said
    assert json.loads((tmp_path / "out.jsonl.meta.json").read_text())["cache"] is None
    assert "│ cache" not in said


def test_a_place_that_was_asked_for_and_cannot_be_ends_the_run_before_the_model_is_looked_for(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, notes = tmp_path / "out.jsonl", tmp_path / "notes.txt"
    notes.write_text("notes " * 1000)
    nowhere = tmp_path / "nowhere"
    cases = {
        tmp_path: "cannot be written: it is a directory",
        nowhere / "scores": "cannot be written: no such folder",
        notes: "is not a cache of scores: file is not a database; nothing is written there",
        rows: f"the cache would be the file {rows}",
        out: f"the cache would be the file {out}",
        tmp_path / "out.jsonl.meta.json": f"the cache would be the file {out}.meta.json",
    }
    for place, complaint in cases.items():
        assert command(rows, nowhere, "-o", out, "--cache", place) == 2
        assert capsys.readouterr().err == f"fastscore: {place}: {complaint}\n"
    assert command(rows, nowhere, "-o", out, "--cache", tmp_path / "scores", "--no-cache") == 2
    assert capsys.readouterr().err == "fastscore: --cache and --no-cache exclude each other\n"
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "notes.txt"}
    assert notes.read_text() == "notes " * 1000


def test_several_files_have_a_cache_each_or_one_that_was_asked_for(llama: Path, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("row", "line"))
    assert command(rows, llama, other) == 0
    caches = sorted(tmp_path.glob("*.cache.sqlite"))
    assert [cache_info(path).entries for path in caches] == [5, 5]
    assert command(rows, llama, other, "--cache", tmp_path / "both") == 0
    assert cache_info(tmp_path / "both").entries == 10
    for name in ("rows", "other"):
        meta = json.loads((tmp_path / f"{name}.scored.llama.jsonl.meta.json").read_text())
        assert (meta["cache"], meta["stats"]["cached"]) == (str(tmp_path / "both"), 0)


def test_the_reference_systems_command_line_has_it_too(
    llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "qa.json"
    data.write_text(json.dumps([{"query": "q", "answers": ["town"], "pos": ["k"], "neg": ["l", "m"], "task": "qa"}]))
    arguments = ["--eval_data", str(data), "--model_name_or_path", str(llama), "--save_name", "s", "--cpu", "True"]
    meta = tmp_path / "qa.scored.s.json.meta.json"
    counts = []
    for more in ([], [], ["--no_cache", "True"], ["--cache", str(tmp_path / "own")]):
        run_lm_score([*arguments, *more])
        counts.append(json.loads(meta.read_text())["stats"]["cached"])
    assert counts == [0, 3, 0, 0]
    assert cache_info(tmp_path / "own").entries == 3


def test_a_cache_that_is_removed_in_the_middle_is_made_again(
    llama: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = token_pairs(20)
    scorer = scorer_of(llama, cache)
    scorer.score_tokens(pairs[:10])
    cache.unlink()
    with caplog.at_level(logging.WARNING, "fastscore"):
        scorer.score_tokens(pairs[10:])
    assert "was moved or removed" in caplog.text
    assert cache_info(cache).entries == 10


def test_identities_are_compared_whole(llama: Path) -> None:
    """One field after another: each but the labels makes another model of it."""
    identity = scorer_of(llama, None).identity()
    for name, value in identity.about().items():
        changed = {"other": 1} if name == "machine" else not value if isinstance(value, bool) else f"{value}x"
        other = replace(identity, **{name: changed})
        assert (other.fingerprint() == identity.fingerprint()) == (name in ("model", "adapter")), name
