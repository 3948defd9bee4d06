"""What a score may be: every definition against plain transformers, one pair alone, and arithmetic written out here."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_tiny_model
from transformers import AutoTokenizer
from truth import alone

from fastscore import InputError, ScoreConfig, Scorer
from fastscore.aggregate import softmax
from fastscore.config import TaskConfig
from fastscore.run_files import Tally
from fastscore.tasks import expand_row, validate_row
from fastscore.types import Row, ScoredRow
from fastscore.windows import Window

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "qa.jsonl"
NATS_PER_TOKEN = 1e-5
QUERY = "where does the river run"
KEYS = ["The river runs.", "42 houses", "Straße"]
ANSWERS = ["the old town", "naïve café", "1990"]
ROW = {"query": QUERY, "answers": ANSWERS, "pos": KEYS[:1], "neg": KEYS[1:], "task": "qa"}
# With target answer: a prompt for each candidate and, last, the one without a passage; and the texts that follow.
PROMPTS = {
    "answer": [*(f"Knowledge: {key}\n\nQuestion: {QUERY}\n\nAnswer:" for key in KEYS), f"Question: {QUERY}\n\nAnswer:"],
    "query": [
        *(f"Passage: {key}. Please write a question based on this passage." for key in KEYS),
        "Please write a question.",
    ],
}
TEXTS = {"answer": [f" {answer}" for answer in ANSWERS], "query": [f" {QUERY}"]}
MODELS = {"llama": {}, "llama-bos": {"add_bos": True}, "t5": {}}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param.removesuffix("-bos")
    return make_tiny_model(tmp_path_factory.mktemp("models") / request.param, family, **MODELS[request.param])


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(str(folder), dtype="fp32", max_batch_tokens=200)


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[tuple[str, bool], list[list[list[float]]]]:
    """By target and EOS: for each prompt, for each text, the log-probabilities of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for target, eos in itertools.product(PROMPTS, (False, True)):
        pairs = [
            (
                tokenizer.encode(prompt),
                tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * eos,
            )
            for prompt in PROMPTS[target]
            for text in TEXTS[target]
        ]
        logprobs = alone(folder, pairs)
        count = len(TEXTS[target])
        found[target, eos] = [logprobs[start : start + count] for start in range(0, len(pairs), count)]
    return found


REDUCTIONS: dict[str, Callable[[Sequence[float], str], float]] = {
    "mean": lambda logprobs, text: sum(logprobs) / len(logprobs),
    "sum": lambda logprobs, text: sum(logprobs),
    "byte": lambda logprobs, text: sum(logprobs) / len(text.encode()),
    "char": lambda logprobs, text: sum(logprobs) / len(text),
}
COMBINERS: dict[str, Callable[[Sequence[float]], float]] = {
    "max": max,
    "mean": lambda values: sum(values) / len(values),
    "logsumexp": lambda values: math.log(sum(map(math.exp, values))),
}
DEFINITIONS = [
    ScoreConfig(target, reduce, baseline, normalize, temperature, append_eos, keep_raw=True)
    for target, reduce, baseline, (normalize, temperature), append_eos in itertools.product(
        ("answer", "query"), REDUCTIONS, ("none", "no-context"), (("none", 1), ("softmax", 1), ("softmax", 2.5)), (0, 1)
    )
    for append_eos in [bool(append_eos)]
]


def defined(score: ScoreConfig, by_prompt: list[list[float]], combine: str) -> list[float]:
    """From numbers of every prompt (the last without a passage) and every text, by the words of docs/scores.md."""
    *with_passage, without = by_prompt
    if score.baseline == "no-context":
        with_passage = [[s - b for s, b in zip(texts, without, strict=True)] for texts in with_passage]
    scores = [COMBINERS[combine](texts) for texts in with_passage]
    if score.normalize == "softmax":
        weights = [math.exp(value / score.temperature) for value in scores]
        scores = [weight / sum(weights) for weight in weights]
    return scores


def which(score: ScoreConfig) -> str:
    return "first" if score.target == "query" else "all"


def test_every_definition(scorer: Scorer, truth: dict[tuple[str, bool], list[list[list[float]]]]) -> None:
    for index, score in enumerate(DEFINITIONS):
        combine = [*COMBINERS][index % len(COMBINERS)]
        [found] = scorer.score_rows([ROW], answers=which(score), combine=combine, score=score)
        tokens, reduce = truth[score.target, score.append_eos], REDUCTIONS[score.reduce]
        texts = TEXTS[score.target]
        numbers = [[reduce(t, text) for t, text in zip(by_text, texts, strict=True)] for by_text in tokens]
        longest = max(len(t) for by_text in tokens for t in by_text)
        tolerance = NATS_PER_TOKEN * (longest if score.reduce == "sum" else 1) * (1 + (score.baseline != "none"))
        assert found["teacher_scores"] == pytest.approx(defined(score, numbers, combine), abs=tolerance), score
        if score.normalize == "softmax":
            assert sum(found["teacher_scores"]) == pytest.approx(1, abs=1e-12)

        raw = found["teacher_raw"]
        assert raw["num_tokens"] == [[len(t) for t in by_text] for by_text in tokens[:-1]]
        assert raw["num_bytes"] == [[len(text.encode()) for text in texts]] * len(KEYS)
        assert raw["num_chars"] == [[len(text) for text in texts]] * len(KEYS)
        assert ("baseline_logprob" in raw) == (score.baseline == "no-context")
        assert list(found) == [*ROW, "teacher_scores", "teacher_raw"]


def test_every_definition_can_be_computed_from_one_run(scorer: Scorer) -> None:
    runs: dict[tuple[str, bool], dict[str, Any]] = {}
    for score in DEFINITIONS:
        key = score.target, score.append_eos
        if key not in runs:
            kept = ScoreConfig(score.target, "sum", "no-context", append_eos=score.append_eos, keep_raw=True)
            [row] = scorer.score_rows([ROW], answers=which(score), score=kept)
            runs[key] = json.loads(json.dumps(row["teacher_raw"]))
        raw = runs[key]
        sums = [*raw["logprob"], raw["baseline_logprob"]]
        sizes = {
            "mean": [*raw["num_tokens"], raw["baseline_num_tokens"]],
            "sum": [[1] * len(texts) for texts in sums],
            "byte": [*raw["num_bytes"], raw["num_bytes"][0]],
            "char": [*raw["num_chars"], raw["num_chars"][0]],
        }[score.reduce]
        numbers = [[s / n for s, n in zip(*both, strict=True)] for both in zip(sums, sizes, strict=True)]
        [row] = scorer.score_rows([ROW], answers=which(score), score=score)
        assert row["teacher_scores"] == pytest.approx(defined(score, numbers, "max"), abs=2e-4), score
        if score.baseline == "no-context":  # the very same requests
            assert row["teacher_scores"] == pytest.approx(defined(score, numbers, "max"), abs=1e-12), score


def test_tokens_of_every_candidate(scorer: Scorer, truth: dict[tuple[str, bool], list[list[list[float]]]]) -> None:
    for target, eos in truth:
        score = ScoreConfig(target, "none", append_eos=eos)  # type: ignore[arg-type]
        [row] = scorer.score_rows([ROW], score=score)
        expected = [texts[0] for texts in truth[target, eos][:-1]]
        assert [len(tokens) for tokens in row["teacher_scores"]] == list(map(len, expected))
        for tokens, true in zip(row["teacher_scores"], expected, strict=True):
            assert tokens == pytest.approx(true, abs=NATS_PER_TOKEN)
        assert json.loads(json.dumps(row)) == row, "lists, as they are written"


def test_the_baseline_is_one_more_request_for_each_answer(scorer: Scorer) -> None:
    before = scorer.stats.pairs
    scorer.score_rows([ROW], answers="all", score=ScoreConfig(baseline="no-context"))
    assert scorer.stats.pairs - before == len(ANSWERS) * (len(KEYS) + 1)


@pytest.mark.slow
def test_smollm2_as_upr_ranks() -> None:
    """log p(query | passage) with the prompt of UPR, by hand in plain transformers."""
    row = json.loads(EXAMPLES.read_text(encoding="utf-8").splitlines()[0])
    scorer = Scorer("smollm2-135m", dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(scorer.model_path)
    row["neg"] = row["neg"][:2]
    keys = [key.strip() for key in row["pos"] + row["neg"]]
    query = tokenizer.encode(f" {row['query'].strip()}", add_special_tokens=False)
    prompts = [f"Passage: {key}. Please write a question based on this passage." for key in keys]
    truths = alone(scorer.model_path, [(tokenizer.encode(prompt), query) for prompt in prompts])
    del row["answers"]  # not read
    [scored] = scorer.score_rows([row], "qa", score=ScoreConfig("query"))
    assert scored["teacher_scores"] == pytest.approx([sum(t) / len(query) for t in truths], abs=NATS_PER_TOKEN)


SCORES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6)


@given(SCORES, st.floats(1e-300, 1e6), st.floats(-1e3, 1e3))
def test_softmax(scores: list[float], temperature: float, shift: float) -> None:
    shares = softmax(scores, temperature)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-12)
    assert all(0 <= share <= 1 for share in shares)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    assert [shares[i] for i in order] == sorted(shares), "the order stays"
    for (a, p), (b, q) in itertools.combinations(zip(scores, shares, strict=True), 2):
        if p > 1e-250 and q > 1e-250:
            assert math.log(p) - math.log(q) == pytest.approx((a - b) / temperature, rel=1e-9, abs=1e-9)
    whole = [round(score) for score in scores]  # so that shifting them rounds nothing
    assert softmax([score + round(shift) for score in whole], temperature) == softmax(whole, temperature)


def pairs_of(row: dict[str, Any], **options: Any) -> list[tuple[Any, Any]]:
    config = TaskConfig(options.pop("task", None), options.pop("template", None), score=ScoreConfig(**options))
    expanded = expand_row(Row(row), config, lambda keys: keys)
    assert validate_row(Row(row), config) == len(expanded.pairs)
    assert expanded.has_baseline == (options.get("baseline") == "no-context")
    return [(pair.prompt, pair.answer) for pair in expanded.pairs]


IDS = {
    "task": "lrlm",
    "score_inputs": [[7, 8], []],
    "context_inputs": [1],
    "query_inputs": [2, 3],
    "answer_inputs": [4],
}
CHAT = {"query": " q ", "answers": ["a"], "history": ["h"], "task": "chat"}
ICL = {**CHAT, "history": None, "pos": ["h"], "task": "icl"}
BASELINES: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]] = {
    "chat": (CHAT, {}, [("h\nSpeaker 1:  q \nSpeaker 2:", " a"), ("Speaker 1:  q \nSpeaker 2:", " a")]),
    "chat-query": (CHAT, {"target": "query"}, [("h\nSpeaker 1:", "  q "), ("Speaker 1:", "  q ")]),
    "icl": (ICL, {}, [("h\n q \n", "a"), (" q \n", "a")]),
    "icl-query": (ICL, {"target": "query"}, [("h\n", " q "), ("", " q ")]),
    "lrlm": (IDS, {}, [((7, 8, 1, 2, 3), (4,)), ((1, 2, 3), (4,)), ((1, 2, 3), (4,))]),
    "lrlm-query": (IDS, {"target": "query"}, [((7, 8, 1), (2, 3)), ((1,), (2, 3)), ((1,), (2, 3))]),
}


@pytest.mark.parametrize("case", BASELINES)
def test_pairs_with_and_without_a_passage(case: str) -> None:
    row, options, expected = BASELINES[case]
    assert pairs_of(row, baseline="no-context", **options) == expected
    assert pairs_of(row, **options) == expected[:-1]


WITHOUT_KEY = {
    "{key}\nQ: {query}\nA: {answer}": "Q: QQ\nA:",
    "Read.\n\n{key}\n\n  \nQ: {query}\nA: {answer}": "Read.\n\nQ: QQ\nA:",
    "Text: {key} (end)\nQ: {query}\n\nA: {answer}": "Q: QQ\n\nA:",
    "Text: {key}, {title}\nQ: {query}\nA: {answer}": "Text: , TT\nQ: QQ\nA:",
    "{key} {query} {answer}": " QQ",
    "Q: {query}\n\nText: {key}\nA: {answer}": "Q: QQ\n\nA:",
    "Q: {query}\n<{key}>\n<{key}>\n\n{title}\n\nA: {answer}": "Q: QQ\nTT\n\nA:",
    "Q: {query}\nFrom {key}: {answer}": "Q: QQ\nFrom :",
}


@pytest.mark.parametrize("template", WITHOUT_KEY)
def test_a_template_without_its_passage(template: str) -> None:
    row = {"query": "QQ", "title": "TT", "answers": ["a"], "pos": ["k", "l"]}
    pairs = pairs_of(row, template=template, baseline="no-context")
    assert len(pairs) == 3
    assert pairs[2] == (WITHOUT_KEY[template], " a")


def test_a_template_of_the_query() -> None:
    row = {"query": "QQ", "pos": ["k", "l"], "lang": "en"}
    template = "Text ({lang}): {key}\nQuestion: {query}"
    pairs = pairs_of(row, template=template, target="query", baseline="no-context")
    assert pairs == [
        ("Text (en): k\nQuestion:", " QQ"),
        ("Text (en): l\nQuestion:", " QQ"),
        ("Text (en): \nQuestion:", " QQ"),
    ]


QA, PAIR, CHOICES = {**ROW}, {"context": "a", "continuation": "b"}, {"context": "a", "choices": ["b", "c"]}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pairs-query": (PAIR, {"task": "pairs", "target": "query"}, "field 'task': the task 'pairs' has no query to score"),
    "choices-query": (CHOICES, {"task": "choices", "target": "query"}, "the task 'choices' has no query to score"),
    "pairs-baseline": (PAIR, {"task": "pairs", "baseline": "no-context"}, "'pairs' has no passage to leave out"),
    "choices-baseline": (CHOICES, {"task": "choices", "baseline": "no-context"}, "'choices' has no passage to leave"),
    "pairs-softmax": (PAIR, {"task": "pairs", "normalize": "softmax"}, "the task 'pairs' has no candidates to share a"),
    "template-baseline": (
        QA,
        {"task": None, "template": "{query} {answer}", "baseline": "no-context"},
        "field 'template': a template without {key} has no passage to leave out (--baseline no-context)",
    ),
    "template-softmax": (QA, {"template": "{query} {answer}", "normalize": "softmax"}, "has no candidates to share a"),
    "lrlm-byte": (IDS, {"reduce": "byte"}, "'lrlm' has no bytes to count (--reduce byte): it scores token ids"),
    "lrlm-char": (IDS, {"reduce": "char"}, "'lrlm' has no chars to count (--reduce char): it scores token ids"),
    "lrlm-empty": (
        {**IDS, "context_inputs": [], "query_inputs": [], "score_inputs": [[1]]},
        {"baseline": "no-context"},
        "field 'context_inputs': without a passage there is no token before the answer",
    ),
    "lrlm-query": ({**IDS, "query_inputs": []}, {"target": "query"}, "field 'query_inputs': the query is empty"),
    "query-empty": ({**QA, "query": " "}, {"target": "query"}, "field 'query': the query is empty"),
    "query-missing": ({"pos": ["k"]}, {"task": "qa", "target": "query"}, "field 'query': missing; expected a string"),
    "template-no-query": (QA, {"template": "{key} {answer}", "target": "query"}, "expected {query} exactly once"),
    "template-answer": (QA, {"template": "{answer} {query}", "target": "query"}, "{answer} has no place where the"),
    "template-end": (QA, {"template": "{query} {key}", "target": "query"}, "expected {query} at the very end"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_definitions_without_a_meaning_are_refused(case: str) -> None:
    row, options, expected = REFUSED[case]
    with pytest.raises(InputError) as refused:
        pairs_of(row, **options)
    assert expected in str(refused.value)


def test_choices_may_share_a_distribution() -> None:
    assert len(pairs_of(CHOICES, task="choices", normalize="softmax", reduce="byte")) == 2


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"target": "x"}, "target must be one of answer, query; found 'x'"),
    "reduce": ({"reduce": "median"}, "reduce must be one of mean, sum, byte, char, none; found 'median'"),
    "baseline": ({"baseline": "no"}, "baseline must be one of none, no-context"),
    "normalize": ({"normalize": "l2"}, "normalize must be one of none, softmax"),
    "zero": ({"normalize": "softmax", "temperature": 0}, "temperature must be a finite number above 0; found 0"),
    "nan": ({"normalize": "softmax", "temperature": math.nan}, "temperature must be a finite number above 0"),
    "inf": ({"normalize": "softmax", "temperature": math.inf}, "temperature must be a finite number above 0"),
    "true": ({"normalize": "softmax", "temperature": True}, "temperature must be a finite number above 0"),
    "alone": ({"temperature": 2.0}, "temperature belongs to normalize softmax"),
    "eos": ({"append_eos": 1}, "append_eos must be true or false; found 1"),
    "none-baseline": ({"reduce": "none", "baseline": "no-context"}, "reduce none gives lists of tokens: baseline and"),
    "none-softmax": ({"reduce": "none", "normalize": "softmax"}, "reduce none gives lists of tokens: baseline and"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_that_cannot_be(case: str) -> None:
    options, expected = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        ScoreConfig(**options)


def test_answers_that_a_definition_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"^target query scores the query: answers are not read$"):
        TaskConfig(answers="all", score=ScoreConfig("query"))
    with pytest.raises(ValueError, match=r"^reduce none gives lists of tokens: answers all cannot be combined$"):
        TaskConfig(answers="all", score=ScoreConfig(reduce="none"))


def test_no_eos_token_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    scorer = Scorer(str(make_tiny_model(tmp_path / "model")), dtype="fp32")
    scorer.tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"^append_eos: the tokenizer has no EOS token$"):
        scorer.score_rows([ROW], score=ScoreConfig(append_eos=True))
    scorer.tokenizer.add_tokens([f"new {index}" for index in range(600)])
    scorer.tokenizer.add_special_tokens({"eos_token": "<a new one>"})
    with pytest.raises(InputError, match=r"^append_eos: the tokenizer's EOS token is .*, the model has only"):
        scorer.score_rows([ROW], score=ScoreConfig(append_eos=True))
    assert "_model" not in vars(scorer)


def test_a_baseline_that_has_nothing_before_it_is_told(tmp_path: Path) -> None:
    scorer = Scorer(str(make_tiny_model(tmp_path / "model")), dtype="fp32")
    with pytest.raises(InputError) as told:
        scorer.score_rows([ICL], score=ScoreConfig("query", baseline="no-context"))
    assert str(told.value).startswith(
        "1: without a passage (--baseline no-context): the first answer token has nothing"
    )
    with_bos = Scorer(str(make_tiny_model(tmp_path / "bos", add_bos=True)), dtype="fp32")
    [row] = with_bos.score_rows([ICL], score=ScoreConfig("query", baseline="no-context"))
    assert len(row["teacher_scores"]) == 1


def test_a_request_of_the_baseline_has_a_name() -> None:
    config = TaskConfig(answers="all", score=ScoreConfig(baseline="no-context"))
    window = Window([expand_row(Row(ROW, "r.jsonl", line), config, lambda keys: keys) for line in (1, 2)])
    places = [window.place(index) for index in range(2 * len(ANSWERS) * (len(KEYS) + 1))]
    names = [f"candidate {index}" for index in range(len(KEYS))] + ["the baseline"]
    assert places == [f"r.jsonl:{line}: {name}" for line in (1, 2) for name in names for _ in ANSWERS]


def test_raw_counts_of_an_earlier_run_go_with_its_scores(scorer: Scorer) -> None:
    [kept] = scorer.score_rows([ROW], score=ScoreConfig(keep_raw=True))
    [again] = scorer.score_rows([kept])
    assert again == {name: value for name, value in kept.items() if name != "teacher_raw"}


def test_raw_counts_of_token_ids(scorer: Scorer) -> None:
    [row] = scorer.score_rows([IDS], score=ScoreConfig(baseline="no-context", keep_raw=True))
    raw = row["teacher_raw"]
    assert (raw["num_tokens"], raw["baseline_num_tokens"]) == ([[1], [1]], [1])
    assert (raw["num_bytes"], raw["num_chars"]) == (None, None)
    assert row["teacher_scores"][1] == pytest.approx(0, abs=NATS_PER_TOKEN), "the second candidate is empty"


def test_lists_of_tokens_are_not_ranked() -> None:
    tally = Tally()
    tally.count(ScoredRow(Row(ROW), ((-1.0, -2.0), (-9.0,), (-8.0,)), ()))
    assert (tally.rows, tally.ranked_rows, tally.positive_best) == (1, 0, 0)
    tally.count(ScoredRow(Row(ROW), (0.5, 0.25, 0.25), ()))
    assert (tally.rows, tally.ranked_rows, tally.positive_best) == (2, 1, 1)
