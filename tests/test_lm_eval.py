"""The model for lm-evaluation-harness against the harness's own HFLM, request by request."""

from __future__ import annotations

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import NATS_PER_TOKEN, hflm, instances
from peft import LoraConfig, get_peft_model
from tiny_models import CONTEXT, make_tiny_model, make_tokenizer
from tiny_tokenizers import KINDS, make
from truth import alone, plain_model

from fastscore import InputError, Scorer
from fastscore.integrations.lm_eval import FastscoreLM

RIVER = "Knowledge: The river runs through the old town. How many people live there? About 1990 people, in 42 houses. "
PAIRS = [
    ("The river runs through", " the old town"),
    ("The river runs through ", "the old town"),
    ("The river runs through \n ", "the old town"),
    ("", "where does the river run"),
    ("", "<s>where does the river run"),
    ("<s>The river runs", " through the old town"),
    ("Ελληνικά, 白 术: naïve café,", " Straße and 👩‍🚀 too"),
    (RIVER * 3, " About 1990 people"),
    (RIVER * 3, " in 42 houses"),
    (RIVER * 3, " the old"),
    (RIVER, " About 1990 people"),
    ("The river runs through", " the old town"),
]
TEXTS = ["", "The", "<s>The river runs", "Ελληνικά, 白 术, naïve café, Straße and 👩‍🚀 too", RIVER, RIVER * 6, RIVER]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("lm_eval") / "llama")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(str(folder), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return plain_model(folder)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_tokenizer(tmp_path_factory, "byte-level-bpe", False, False)


def saved_tokenizer(factory: pytest.TempPathFactory, kind: str, bos: bool, eos: bool) -> str:
    path = factory.mktemp("tokenizer")
    make(kind, bos, eos).save_pretrained(path)
    return str(path)


def compare(ours: FastscoreLM, theirs: Any, pairs: list[tuple[str, str]]) -> None:
    got = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for pair, (logprob, greedy), (expected_logprob, expected_greedy) in zip(pairs, got, expected, strict=True):
        tolerance = NATS_PER_TOKEN * (len(pair[1].encode()) + 1)
        assert logprob == pytest.approx(expected_logprob, abs=tolerance), pair
        assert greedy == expected_greedy, pair


def compare_rolling(ours: FastscoreLM, theirs: Any, texts: list[str]) -> None:
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    got = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    for text, logprob, expected_logprob in zip(texts, got, expected, strict=True):
        assert logprob == pytest.approx(expected_logprob, abs=NATS_PER_TOKEN * (len(text.encode()) + 1)), text


@pytest.mark.parametrize("add_bos", [None, True, False], ids="add_bos_token={}".format)
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True)], ids=["none", "bos", "bos-eos"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_and_bos(
    scorer: Scorer,
    plain: Any,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    bos: bool,
    eos: bool,
    add_bos: bool | None,
) -> None:
    options = {"tokenizer": saved_tokenizer(tmp_path_factory, kind, bos, eos), "add_bos_token": add_bos}
    ours, theirs = FastscoreLM(scorer, **options), hflm(plain, logits_cache=False, **options)
    compare(ours, theirs, PAIRS)
    compare_rolling(ours, theirs, TEXTS)


@pytest.mark.parametrize("prefix", [None, 7])
def test_what_stands_before_a_text_without_context(scorer: Scorer, plain: Any, bpe: str, prefix: int | None) -> None:
    options = {"tokenizer": bpe, "prefix_token_id": prefix}
    ours = FastscoreLM(scorer, **options)
    (got,) = ours.loglikelihood(instances("loglikelihood", [("", "The river")]))
    ids = ours.tokenizer.encode("The river", add_special_tokens=False)
    truth = alone(scorer.model_path, [([1 if prefix is None else prefix], ids)])[0]
    assert got[0] == pytest.approx(sum(truth), abs=NATS_PER_TOKEN * len(ids))
    compare(ours, hflm(plain, **options), PAIRS)


def test_truncation(scorer: Scorer, plain: Any, bpe: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = (make(tokenizer=bpe, max_length=16) for make in (_ours(scorer), _theirs(plain)))
    words = " river" * 40
    ids = ours.tokenizer.encode(words)
    decode = ours.tokenizer.decode
    context = [decode(ids[:length]) for length in (1, 8, 13, 14, 15, 40)]
    pairs = [(text, " the old town") for text in context] + [(context[1], decode(ids[:16]))]
    lengths = [len(part) for pair in pairs for part in ours._encode_pair(*pair)]
    assert max(lengths) > 16
    assert 16 in lengths
    with caplog.at_level(logging.WARNING, "fastscore"):
        compare(ours, theirs, pairs)
    assert "contexts are cut on the left to fit max_length=16" in caplog.text
    compare_rolling(ours, theirs, [decode(ids[:length]) for length in (0, 1, 15, 16, 17, 18, 31, 32, 33, 40)])
    with pytest.raises(InputError, match="17 tokens of continuation exceed max_length=16"):
        ours.loglikelihood(instances("loglikelihood", [("The", decode(ids[:17]))]))


def _ours(scorer: Scorer) -> Any:
    return lambda **options: FastscoreLM(scorer, **options)


def _theirs(plain: Any) -> Any:
    return lambda **options: hflm(plain, **options)


def test_the_models_own_context(folder: Path) -> None:
    ours, theirs = FastscoreLM(str(folder)), hflm(str(folder))
    assert ours.max_length == theirs.max_length == CONTEXT
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.scorer.config.dtype == "fp32"  # as its config says, whatever the device prefers
    compare(ours, theirs, [(RIVER * 20, " the old town"), (RIVER * 20, " About")])
    compare_rolling(ours, theirs, [RIVER * 20])


def test_a_model_that_is_not_packed_and_has_no_context_of_its_own(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "bloom", "bloom")
    ours, theirs = FastscoreLM(str(folder)), hflm(str(folder))
    assert ours.scorer.load().mode == "padded"
    assert ours.max_length == theirs.max_length == 2048
    compare(ours, theirs, PAIRS[:7])
    compare_rolling(ours, theirs, TEXTS[:4])


def test_continuations_that_begin_elsewhere_in_the_same_text(scorer: Scorer, plain: Any, bpe: str) -> None:
    # HFLM's cache of logits gives the shorter continuation the longer one's first rows, so the truth is without it.
    pairs = [("The river", " runs through the"), ("The river runs", " through the"), ("The river runs through", " the")]
    compare(FastscoreLM(scorer, tokenizer=bpe), hflm(plain, tokenizer=bpe, logits_cache=False), pairs)


def test_greedy_continuations(scorer: Scorer, plain: Any, bpe: str) -> None:
    ours, theirs = FastscoreLM(scorer, tokenizer=bpe), hflm(plain, tokenizer=bpe)
    requests = []
    for text in ("The river", "Question: where", "About 1990"):
        ids = ours.tokenizer.encode(text)
        continued = plain.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0].tolist()
        requests += [((text, "greedy"), ids, continued[len(ids) :]), ((text, "not"), ids, [*continued[len(ids) :], 9])]
    got = ours._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in got] == [True, False] * 3
    assert [greedy for _, greedy in theirs._loglikelihood_tokens(requests)] == [True, False] * 3


def test_every_prefix_is_computed_once(folder: Path) -> None:
    pairs = [
        (RIVER + f"Question {number}:", choice) for number in range(6) for choice in (" yes", " no", " both of it")
    ]
    ours = FastscoreLM(str(folder))
    expected = ours.loglikelihood(instances("loglikelihood", pairs))
    encoded = [list(chain(*ours._encode_pair(*pair))) for pair in pairs]
    distinct = {tuple(ids[:length]) for ids in encoded for length in range(1, len(ids))}
    assert ours.scorer.stats.tokens_computed == len(distinct)

    narrow = FastscoreLM(str(folder), window_tokens=2 * max(map(len, encoded)))
    got = narrow.loglikelihood(instances("loglikelihood", list(reversed(pairs))))[::-1]
    assert [logprob for logprob, _ in got] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert len(distinct) < narrow.scorer.stats.tokens_computed < sum(map(len, encoded))


def test_deterministic(folder: Path) -> None:
    ours = FastscoreLM(str(folder), deterministic=True, max_batch_tokens=64)
    together = ours.loglikelihood(instances("loglikelihood", PAIRS))
    assert together == [ours.loglikelihood(instances("loglikelihood", [pair]))[0] for pair in PAIRS]


def test_an_adapter(tmp_path: Path) -> None:
    # With an adapter, HFLM cuts the model's vocabulary to the tokenizer's, so the two are made equal.
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    make_tiny_model(folder, vocab_size=len(make_tokenizer(tmp_path / "tokenizer")))
    torch.manual_seed(1)
    adapted = get_peft_model(plain_model(folder), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(adapter)
    pairs = PAIRS[:4]
    ours, theirs = FastscoreLM(str(folder), peft=str(adapter)), hflm(str(folder), peft=str(adapter))
    compare(ours, theirs, pairs)
    unadapted = FastscoreLM(str(folder)).loglikelihood(instances("loglikelihood", pairs))
    assert abs(unadapted[0][0] - ours.loglikelihood(instances("loglikelihood", pairs))[0][0]) > 0.01


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"pretrained": None}, "pretrained=MODEL is needed"),
        ({"pretrained": "./nowhere"}, "model './nowhere': no such folder"),
        ({"atention": "sdpa"}, "'atention' is no argument of fastscore; did you mean attention?"),
        ({"parallelize": True}, "device_map=auto spreads a model"),
        ({"adapter": "x"}, "it is called peft"),
        ({"dtype": "float64"}, "dtype must be one of auto, fp32, bf16, fp16; found 'float64'"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1; found 0"),
        ({"max_length": "long"}, "max_length must be a whole number of at least 1; found 'long'"),
        ({"max_length": CONTEXT + 1}, "max_length=257 exceeds the model's context of 256"),
        ({"attention": "nope"}, "nope"),
    ],
)
def test_bad_arguments(folder: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("?", r"\?").replace("(", r"\(")):
        FastscoreLM(**{"pretrained": str(folder), **options})


def test_a_scorer_brings_its_own_options(scorer: Scorer) -> None:
    with pytest.raises(InputError, match="dtype, attention: the Scorer that was given has its own"):
        FastscoreLM(scorer, dtype="bf16", attention="sdpa")


def test_only_causal_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="encoder-decoder: only causal models"):
        FastscoreLM(str(make_tiny_model(tmp_path / "t5", "t5")))


def test_texts_that_leave_nothing_to_score(scorer: Scorer, bpe: str) -> None:
    ours = FastscoreLM(scorer, tokenizer=bpe)
    with pytest.raises(InputError, match="context 'The', continuation '': the continuation makes no token"):
        ours.loglikelihood(instances("loglikelihood", [("The", "")]))
    with pytest.raises(InputError, match="the context makes no token"):
        ours.loglikelihood(instances("loglikelihood", [("  ", "The")]))


def test_it_does_not_generate(scorer: Scorer, bpe: str) -> None:
    requests = instances("generate_until", [("The river", "{}")])
    with pytest.raises(InputError, match=r"generates text .* only scores: run it with one of the harness's own models"):
        FastscoreLM(scorer, tokenizer=bpe).generate_until(requests)
