"""Text to token ids: the exact answer span, the model's context, and what bad pairs get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_tokenizer
from tiny_tokenizers import BOS, encode, make, scored_text
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastscore.model_source import resolve_model
from fastscore.tokenization import PairTokenizer
from fastscore.types import InputError, Pair, ScoringRequest

NQ = Path(__file__).resolve().parents[2] / "shared" / "data" / "nq_qa.jsonl"
FAMILY = "👨‍👩‍👧"  # three people and two joiners: 18 bytes


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("smollm2-135m").path)


@pytest.fixture(scope="module")
def byte_bpe(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_span_is_the_reference_systems_count_on_real_data(smollm2: Any) -> None:
    if not NQ.is_file():
        pytest.skip(f"{NQ} is not there: the real data lies beside the project, not in it")
    rows = [json.loads(line) for line in NQ.read_text(encoding="utf-8").splitlines()]
    pairs, counts = [], []
    bare = len(smollm2.encode("Answer:", add_special_tokens=False))
    for row in rows:
        answer = row["answers"][0]
        count = len(smollm2.encode(f"Answer: {answer.lstrip(' ')}", add_special_tokens=False)) - bare
        for key in row["pos"] + row["neg"]:
            prompt = f"Knowledge: {key.strip()}\n\nQuestion: {row['query'].strip()}\n\nAnswer:"
            pairs.append(Pair(prompt, f" {answer.strip()}"))
            counts.append(count)
    assert len(pairs) == 1600
    requests = PairTokenizer(smollm2, len(smollm2)).encode(pairs)
    assert [request.num_answer_tokens for request in requests if isinstance(request, ScoringRequest)] == counts
    whole = smollm2([pair.prompt + pair.answer for pair in pairs])["input_ids"]
    assert [list(request.token_ids) for request in requests if isinstance(request, ScoringRequest)] == whole


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("Answer:", " Paris", " Paris"),
        ("Answer:", "  Paris", "  Paris"),
        ("Answer:", "Paris", "Paris"),
        ("Answer: ", "Paris", " Paris"),  # the space is one token with the answer's beginning, which is scored whole
        ("Answer: ", " Paris", " Paris"),
        ("Answer:  ", "  Paris", "    Paris"),  # three of the four spaces are one token
        ("Answer:\n", "\nParis", "\nParis"),
        ("Answer:", "\n\nParis\n", "\n\nParis\n"),
        ("Answer:", "\tParis\r\n", "\tParis\r\n"),
        ("Answer:", " 1990", " 1990"),
        ("19", "90", "90"),  # digits are tokens of their own
        ("-", "3.14e-10", "3.14e-10"),
        ("Answer:", " naïve café", " naïve café"),
        ("-", "e\u0301s", "e\u0301s"),
        ("cafe", "\u0301s", "\u0301s"),  # the mark alone: two bytes, two tokens
        ("答：", "白い術", "白い術"),
        ("שאלה:", " תשובה", " תשובה"),
        ("الجواب:", " القاهرة", " القاهرة"),
        ("Answer:", f" {FAMILY} family", f" {FAMILY} family"),
        (f"{FAMILY}", FAMILY, FAMILY),
        ("👨", "\u200d👩‍👧", "\u200d👩‍👧"),  # the answer begins within what is seen as one emoji
        ("it", "'s", "'s"),
        ("Answer:", " <|im_start|>x", " <|im_start|>x"),
        ("Answer:", " yes<|im_end|>", " yes<|im_end|>"),  # its own end token, given in the text, is scored
    ],
)
def test_written_cases(smollm2: Any, prompt: str, answer: str, expected: str) -> None:
    assert scored_text(smollm2, prompt, answer) == expected
    request = encode(smollm2, prompt, answer)
    assert isinstance(request, ScoringRequest)
    assert list(request.token_ids) == smollm2(prompt + answer)["input_ids"]


def test_an_emoji_of_several_byte_tokens_is_scored_whole(smollm2: Any) -> None:
    request = encode(smollm2, "Answer:", FAMILY)
    assert isinstance(request, ScoringRequest)
    assert request.token_ids[: request.answer_start] == tuple(smollm2("Answer:")["input_ids"])
    assert request.num_answer_tokens == len(smollm2(FAMILY)["input_ids"]) > 5


def test_first_character_merged_with_the_prompts_last(byte_bpe: Any) -> None:
    assert byte_bpe.tokenize("x where") == ["x", "Ġwhere"]
    for prompt, answer in [("x whe", "re"), ("x ", "where"), ("x", " where")]:
        assert scored_text(byte_bpe, prompt, answer) == " where"


def test_answer_that_swallows_the_whole_prompt(smollm2: Any) -> None:
    assert smollm2.tokenize("\r\n") == ["čĊ"]
    request = encode(smollm2, "\r", "\n")
    assert isinstance(request, InputError)
    assert "one token with the answer's beginning" in str(request)


@pytest.mark.parametrize(
    ("prompt", "answer", "complaint"),
    [
        ("Q", "", "the answer is empty"),
        ("Q\0", " a", "the prompt contains a NUL character"),
        ("Q", " a\0", "the answer contains a NUL character"),
        ("Q\ud800", " a", "the prompt contains a lone surrogate at character 1"),
        ("Q", " a\udfff", "the answer contains a lone surrogate at character 2"),
        ("", " a", "the first answer token has nothing before it"),
        ((), (3,), "the prompt is empty"),
        ((3,), (), "the answer is empty"),
        ((3, 512), (4,), "token id 512 in the prompt is not in [0, 512)"),
        ((3,), (4, -1), "token id -1 in the answer is not in [0, 512)"),
        ((3,), (10**30,), "is not in [0, 512)"),
        ((True,), (4,), "token id True in the prompt is not a whole number"),
        ((3,), (4.0,), "token id 4.0 in the answer is not a whole number"),
        ((3,), ("4",), "token id '4' in the answer is not a whole number"),
        ((3,), (None,), "token id None in the answer is not a whole number"),
        ("Q", (4,), "both text or both token ids"),
        ((4,), "a", "both text or both token ids"),
    ],
)
def test_bad_pairs_say_why(byte_bpe: Any, prompt: Any, answer: Any, complaint: str) -> None:
    request = encode(byte_bpe, prompt, answer, vocab_size=512)
    assert isinstance(request, InputError)
    assert complaint in str(request)
    assert "\n" not in str(request)


def test_answer_that_leaves_no_token() -> None:
    request = encode(make("word-level", True, True), "where", " \n ")  # words only: white space is no token
    assert isinstance(request, InputError)
    assert str(request) == "the answer leaves no token to score"


def test_good_and_bad_pairs_keep_their_places(byte_bpe: Any) -> None:
    pairs = [Pair("a", " b"), Pair("a", ""), Pair((3, 4), (5,)), Pair("", "x"), Pair("c", " d"), Pair((3,), (9999,))]
    results = PairTokenizer(byte_bpe, 512).encode(pairs)
    assert [isinstance(result, ScoringRequest) for result in results] == [True, False, True, False, True, False]
    assert results[2] == ScoringRequest((3, 4, 5), 2)
    assert results[4] == encode(byte_bpe, "c", " d")
    assert PairTokenizer(byte_bpe, 512).encode([]) == []


def test_token_that_the_model_was_never_given(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert isinstance(encode(tokenizer, "where", " run", vocab_size=size), ScoringRequest)
    for prompt, answer in (("where", " <new>"), ("<new>", " run")):
        request = encode(tokenizer, prompt, answer, vocab_size=size)
        assert isinstance(request, InputError)
        assert f"token id {size} ('<new>')" in str(request)
        assert f"the model has only {size}" in str(request)


def fitted(max_context: int, overflow: str, prompt: int, answer: int, **options: Any) -> ScoringRequest | InputError:
    """A request of the given numbers of tokens: prompt ids count from 100, answer ids from 300."""
    tokenizer = make("byte-level-bpe", True, False)
    head = (BOS,) if options.pop("bos", False) else ()
    ids = (*head, *range(100, 100 + prompt - len(head))), tuple(range(300, 300 + answer))
    return encode(tokenizer, *ids, max_context=max_context, overflow=overflow, **options)


def test_the_last_answer_token_needs_no_room() -> None:
    assert isinstance(fitted(10, "error", 8, 3), ScoringRequest)
    request = fitted(10, "error", 9, 3)
    assert isinstance(request, InputError)
    assert "9 prompt and 3 answer tokens do not fit the model's context of 10" in str(request)
    assert "--overflow truncate-left" in str(request)


@pytest.mark.parametrize("overflow", ["error", "truncate-left"])
def test_an_answer_alone_too_long_is_never_cut(overflow: str) -> None:
    request = fitted(10, overflow, 5, 11)
    assert isinstance(request, InputError)
    assert "the answer alone does not fit the model's context of 10" in str(request)


def test_truncation_cuts_the_prompts_left() -> None:
    request = fitted(10, "truncate-left", 50, 3)
    assert request == ScoringRequest((*range(142, 150), 300, 301, 302), 8)


def test_truncation_keeps_bos_while_another_prompt_token_fits_beside_it() -> None:
    assert fitted(10, "truncate-left", 50, 3, bos=True) == ScoringRequest((BOS, *range(142, 149), 300, 301, 302), 8)
    assert fitted(10, "truncate-left", 50, 9, bos=True) == ScoringRequest((BOS, 148, *range(300, 309)), 2)
    # Room for one prompt token: the one beside the answer.
    assert fitted(10, "truncate-left", 50, 10, bos=True) == ScoringRequest((148, *range(300, 310)), 1)


@given(max_context=st.integers(1, 40), prompt=st.integers(2, 60), answer=st.integers(1, 60), bos=st.booleans(), s2s=...)
def test_truncation_keeps_all_of_the_answer_and_fills_the_context(
    max_context: int, prompt: int, answer: int, bos: bool, s2s: bool
) -> None:
    whole = fitted(10**6, "error", prompt, answer, bos=bos, is_encoder_decoder=s2s)
    request = fitted(max_context, "truncate-left", prompt, answer, bos=bos, is_encoder_decoder=s2s)
    assert isinstance(whole, ScoringRequest)
    if answer > max_context:
        assert isinstance(request, InputError)
        return
    assert isinstance(request, ScoringRequest)
    assert request.token_ids[request.answer_start :] == whole.token_ids[whole.answer_start :]
    used = request.answer_start if s2s else len(request.token_ids) - 1
    needed = whole.answer_start if s2s else len(whole.token_ids) - 1
    assert used == min(needed, max_context)
    kept = request.token_ids[: request.answer_start]
    assert kept[-1] == whole.token_ids[whole.answer_start - 1]
    if bos and len(kept) > 1:
        assert kept[0] == BOS
