"""Rows in, rows with teacher scores out: against each pair alone, and against the pairs scored as pairs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model
from transformers import AutoTokenizer
from truth import alone

from fastscore import InputError, Scorer
from fastscore.config import TaskConfig
from fastscore.run_stats import RunStats
from fastscore.types import Row

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "qa.jsonl"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def scorer(llama: Path) -> Scorer:
    return Scorer(str(llama), dtype="fp32", max_batch_tokens=100)


@pytest.mark.slow
def test_smollm2_on_real_rows() -> None:
    """The example's passages, each alone and unpadded through plain transformers in fp32."""
    rows = [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()][:4]
    scorer = Scorer("smollm2-135m", dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(scorer.model_path)
    bare = len(tokenizer.encode("Answer:"))
    pairs, num_candidates = [], []
    for row in rows:
        keys = row["pos"] + row["neg"]
        num_candidates.append(len(keys))
        for key in keys:
            text = (
                f"Knowledge: {key.strip()}\n\nQuestion: {row['query'].strip()}\n\nAnswer: {row['answers'][0].strip()}"
            )
            count = len(tokenizer.encode(f"Answer: {row['answers'][0].strip()}")) - bare
            ids = tokenizer.encode(text)
            pairs.append((ids[:-count], ids[-count:]))
    assert len(pairs) >= 16
    truth = alone(scorer.model_path, pairs)
    expected = iter([sum(logprobs) / len(logprobs) for logprobs in truth])
    for row, scored, count in zip(rows, scorer.score_rows(rows, task="qa"), num_candidates, strict=True):
        assert scored["teacher_scores"] == pytest.approx(list(itertools.islice(expected, count)), abs=1e-5)
        assert {**scored, "teacher_scores": None} == {**row, "teacher_scores": None}


def choice_rows(count: int) -> list[dict[str, Any]]:
    return [{"context": f"Question {i}:", "choices": ["one", "two", f"{i} houses"][: i % 3 + 1]} for i in range(count)]


@pytest.mark.parametrize("pairs_at_a_time", [1, 2, 5, 1000])
def test_portions_of_the_tokenizer_change_nothing(
    pairs_at_a_time: int, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = choice_rows(9)
    expected = [
        [score.mean_logprob for score in scorer.score([(row["context"], f" {choice}") for choice in row["choices"]])]
        for row in rows
    ]
    monkeypatch.setattr("fastscore.windows.TOKENISED_PAIRS", pairs_at_a_time)
    found = scorer.score_rows(rows, "choices")
    assert [len(row["teacher_scores"]) for row in found] == [len(row["choices"]) for row in rows]
    for row, scores in zip(found, expected, strict=True):
        assert row["teacher_scores"] == pytest.approx(scores, abs=1e-5)


def test_bad_rows_are_handed_over_and_the_others_scored(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastscore.windows.TOKENISED_PAIRS", 3)
    scorer = Scorer(str(llama), dtype="fp32", window_tokens=30)
    good = {"context": "b", "choices": ["c", "d"]}
    bad = {
        2: ({"context": "b"}, "r.jsonl:2: field 'choices': missing"),
        5: ({"context": "b", "choices": ["c", " "]}, "r.jsonl:5: field 'choices[1]': the answer is empty"),
        6: ({"context": "b " * 300, "choices": ["c"]}, "r.jsonl:6: 600 prompt and 2 answer tokens do not fit"),
        9: ({"context": "", "choices": ["c"]}, None),  # " c" is two tokens: the space is no prompt
    }
    rows = [Row(bad[line][0] if line in bad else good, "r.jsonl", line) for line in range(1, 12)]
    handed: dict[int | None, str] = {}
    scored = list(
        scorer.stream_rows(rows, TaskConfig("choices"), on_bad_row=lambda r, e: handed.update({r.line: str(e)}))
    )
    assert [row.row.line for row in scored] == [1, 3, 4, 7, 8, 10, 11]
    assert list(handed) == list(bad)
    for line, (_, complaint) in bad.items():
        assert handed[line].startswith(complaint or "r.jsonl:9: the first answer token has nothing before it")
    expected = [score.mean_logprob for score in scorer.score([("b", " c"), ("b", " d")])]
    for row in scored:
        assert row.teacher_scores == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match=r"^r\.jsonl:2: field 'choices': missing"):
        list(scorer.stream_rows(rows, TaskConfig("choices")))


def test_progress_grows_to_the_whole(llama: Path) -> None:
    seen: list[RunStats] = []
    scorer = Scorer(str(llama), dtype="fp32", max_batch_tokens=20, window_tokens=60)
    rows = [Row(row, line=line) for line, row in enumerate(choice_rows(12), start=1)]
    scored = list(scorer.stream_rows(rows, TaskConfig("choices"), on_progress=seen.append))
    assert [stats.pairs for stats in seen] == sorted(stats.pairs for stats in seen)
    assert [stats.seconds for stats in seen] == sorted(stats.seconds for stats in seen)
    assert len(seen) > 5
    assert seen[-1] == scorer.stats
    assert seen[-1].pairs == sum(len(row.scores) for row in scored) == 24


QA = {"query": "where does the river run", "pos": ["The river runs."], "neg": ["42 houses", "naïve café"]}


def qa_scores(scorer: Scorer, answer: str) -> list[float]:
    prompts = [f"Knowledge: {key}\n\nQuestion: {QA['query']}\n\nAnswer:" for key in [*QA["pos"], *QA["neg"]]]
    return [score.mean_logprob for score in scorer.score([(prompt, f" {answer}") for prompt in prompts])]


def test_several_answers(scorer: Scorer) -> None:
    answers = ["the old town", "1990", "Straße"]
    row = {**QA, "answers": answers}
    single = [qa_scores(scorer, answer) for answer in answers]
    columns = list(zip(*single, strict=True))

    def scores(**options: Any) -> list[float]:
        return scorer.score_rows([row], "qa", **options)[0]["teacher_scores"]

    assert scores() == pytest.approx(single[0], abs=1e-5)
    assert scores(answers="all") == pytest.approx([max(column) for column in columns], abs=1e-5)
    assert scores(answers="all", combine="min") == pytest.approx([min(column) for column in columns], abs=1e-5)
    assert scores(answers="all", combine="mean") == pytest.approx([sum(c) / 3 for c in columns], abs=1e-5)
    expected = [math.log(sum(map(math.exp, column))) for column in columns]
    assert scores(answers="all", combine="logsumexp") == pytest.approx(expected, abs=1e-5)
    # A sample is one of the answers for all candidates alike, always the same for a seed, not for all seeds.
    sampled = [scores(answers="sample", seed=seed) for seed in range(8)]
    drawn = [next(i for i, s in enumerate(single) if s == pytest.approx(found, abs=1e-5)) for found in sampled]
    assert len(set(drawn)) > 1
    assert sampled == [scores(answers="sample", seed=seed) for seed in range(8)]


def test_rows_of_token_ids(scorer: Scorer, llama: Path) -> None:
    row = {
        "query_id": 3,
        "score_inputs": [[5, 6, 7], [300, 8], []],
        "context_inputs": [9, 10],
        "query_inputs": [11],
        "answer_inputs": [12, 13, 14],
    }
    (scored,) = scorer.score_rows([row], task="lrlm")
    truth = alone(llama, [([*ids, 9, 10, 11], [12, 13, 14]) for ids in row["score_inputs"]])
    assert scored == {"query_id": 3, "teacher_scores": pytest.approx([sum(t) / 3 for t in truth], abs=1e-5)}
    with pytest.raises(InputError, match=r"^1: token id 999 in the answer is not in \[0, 512\)"):
        scorer.score_rows([{**row, "answer_inputs": [999]}], task="lrlm")


def test_rows_through_an_encoder_decoder(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "t5", add_eos=True)
    scorer = Scorer(str(folder), dtype="fp32", max_batch_tokens=150)
    rows = [{**QA, "answers": [answer]} for answer in ("the old town", "1990 people, in 42 houses", "白")]
    pairs = []
    for row in rows:
        for key in [*QA["pos"], *QA["neg"]]:
            prompt = f"Knowledge: {key}\n\nQuestion: {QA['query']}\n\nAnswer:"
            answer = scorer.tokenizer(f" {row['answers'][0]}", add_special_tokens=False)["input_ids"]
            pairs.append((scorer.tokenizer(prompt)["input_ids"], answer))
    assert pairs[0][0][-1] == scorer.tokenizer.eos_token_id
    expected = [sum(logprobs) / len(logprobs) for logprobs in alone(folder, pairs)]
    found = [score for row in scorer.score_rows(rows, "qa") for score in row["teacher_scores"]]
    assert found == pytest.approx(expected, abs=1e-5)
    assert scorer.describe()["mode"] == "encoder-decoder"
