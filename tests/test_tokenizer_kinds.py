"""The answer span under tokenizers of every kind: with BOS and EOS, with odd offsets or none, and on any text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tokenizer
from tiny_tokenizers import BOS, EOS, KINDS, encode, make, scored_text
from tokenizers import Tokenizer, normalizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fastscore.tokenization import PairTokenizer
from fastscore.types import InputError, Pair, ScoringRequest

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
HARD = st.text(st.sampled_from("a 1\n\r\té\u0301白👩\u200d🚀\u202e'’ \u00a0\u2028"), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def byte_bpe(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_bos_once_eos_never(kind: str, bos: bool, eos: bool) -> None:
    tokenizer = make(kind, bos, eos)
    for prompt, answer in [("where does the river run", " the old town"), ("Answer: 42", " houses, 👩‍🚀 too")]:
        request = encode(tokenizer, prompt, answer)
        assert isinstance(request, ScoringRequest)
        body = tuple(tokenizer.encode(prompt + answer, add_special_tokens=False))
        assert request.token_ids == ((BOS, *body) if bos else body)
        # " the old town" begins with a new token in all four vocabularies: the prompt's tokens are those of it alone.
        assert request.token_ids[: request.answer_start] == tuple(tokenizer(prompt)["input_ids"])[: -1 if eos else None]


@pytest.mark.parametrize("kind", KINDS)
def test_end_token_given_in_the_text_is_scored_and_the_added_one_is_not(kind: str) -> None:
    request = encode(make(kind, True, True), "where does it run", " river</s>")
    assert isinstance(request, ScoringRequest)
    assert request.token_ids[-1] == EOS
    assert request.token_ids.count(EOS) == 1
    assert request.num_answer_tokens >= 2


@pytest.mark.parametrize("kind", ["byte-level-bpe", "sentencepiece-bpe", "unigram-metaspace"])
def test_bos_stands_in_for_an_empty_prompt(kind: str) -> None:
    request = encode(make(kind, True, True), "", "river")
    assert isinstance(request, ScoringRequest)
    assert (request.token_ids[0], request.answer_start) == (BOS, 1)
    request = encode(make(kind, False, True), "", "river")
    assert isinstance(request, InputError)
    assert "the prompt is empty" in str(request)
    assert "no BOS" in str(request)


@pytest.mark.parametrize("kind", ["byte-level-bpe", "sentencepiece-bpe", "unigram-metaspace"])
def test_lone_spaces_of_an_answer_are_scored(kind: str) -> None:
    tokenizer = make(kind, True, True)
    for spaces in (1, 2, 5):
        request = encode(tokenizer, "where", " " * spaces + "river")
        assert isinstance(request, ScoringRequest)
        tokens = tokenizer.convert_ids_to_tokens(request.token_ids[request.answer_start :])
        assert "".join(tokens).replace("▁", " ").replace("Ġ", " ") == " " * spaces + "river"


def test_trimmed_offsets_give_a_lone_space_no_width_and_lose_nothing(byte_bpe: Any) -> None:
    encoding = byte_bpe("run   river").encodings[0]
    assert any(start == stop for start, stop in encoding.offsets), "this test is about such tokens"
    assert byte_bpe("  river").encodings[0].offsets[0] == (0, 0), "at the beginning it stands at its start"
    assert "nothing before it" in str(encode(byte_bpe, "", "  river"))
    for cut in range(1, len("run   river")):
        prompt, answer = "run   river"[:cut], "run   river"[cut:]
        scored = scored_text(byte_bpe, prompt, answer)
        assert scored.endswith(answer)
        assert "run   river".endswith(scored)


def test_composition_credits_the_composed_character_to_the_prompt(byte_bpe: Any) -> None:
    """NFC (Qwen's normalizer) joins an accent at the answer's start with the prompt's last letter."""
    backend = Tokenizer.from_str(byte_bpe.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert scored_text(tokenizer, "Answer: cafe", "\u0301s") == "s"
    assert scored_text(tokenizer, "cafe\u0301", " e\u0301") == " é"
    assert "leaves no token" in str(encode(tokenizer, "cafe", "\u0301"))


def test_encoder_decoder_ends_the_prompt_as_trained_and_gives_the_answer_plain() -> None:
    tokenizer = make("byte-level-bpe", False, True)
    request = encode(tokenizer, "where", " river", is_encoder_decoder=True)
    assert isinstance(request, ScoringRequest)
    assert request.token_ids[: request.answer_start] == tuple(tokenizer("where")["input_ids"])
    assert request.token_ids[request.answer_start - 1] == EOS
    assert request.token_ids[request.answer_start :] == tuple(tokenizer.encode(" river", add_special_tokens=False))
    # The context bounds both sides by themselves.
    limits = {"is_encoder_decoder": True, "max_context": request.answer_start}
    assert isinstance(encode(tokenizer, "where", " river", **limits), ScoringRequest)
    assert isinstance(encode(tokenizer, "where it", " river", **limits), InputError)


@pytest.mark.parametrize(("prompt", "answer"), [("Answer:", " Paris"), ("a ", "é白👩‍🚀"), ("", "x")])
def test_tokenizer_in_pure_python(prompt: str, answer: str) -> None:
    """ByT5: a token per byte, id = byte + 3, and an EOS at the end."""
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    request = encode(tokenizer, prompt, answer)
    if not prompt:
        assert isinstance(request, InputError)
        return
    assert isinstance(request, ScoringRequest)
    assert request.token_ids[request.answer_start :] == tuple(byte + 3 for byte in answer.encode())


def test_tokenizer_in_pure_python_scores_the_token_that_holds_the_answers_first_character() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["wer an"])
    request = encode(tokenizer, "Answer", " an answer")
    assert isinstance(request, ScoringRequest)
    assert tokenizer.decode(request.token_ids[: request.answer_start]) == "Ans"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [1, 3, 512])
def test_keys_are_decoded_after_encoding(kind: str, max_length: int) -> None:
    tokenizer = make(kind, True, True)
    keys = ["The river runs  through the old town.", "", "naïve café, Straße 👩‍🚀 42"]
    expected = [tokenizer.decode(tokenizer.encode(key, add_special_tokens=False)[:max_length]) for key in keys]
    assert PairTokenizer(tokenizer, len(tokenizer)).truncate_keys(keys, max_length) == expected
    assert PairTokenizer(tokenizer, len(tokenizer)).truncate_keys([], max_length) == []


def test_short_keys_make_the_round_trip_too() -> None:
    """Words only: what comes back is not what was given, and the reference system scores what comes back."""
    tokenizer = make("word-level", True, True)
    assert PairTokenizer(tokenizer, 100).truncate_keys(["The  river\nruns"], 512) == ["The river runs"]


def test_truncating_keys_leaves_later_encodings_whole(byte_bpe: Any) -> None:
    pair_tokenizer = PairTokenizer(byte_bpe, len(byte_bpe))
    (before,) = pair_tokenizer.encode([Pair("where does the river run", " the old town")])
    pair_tokenizer.truncate_keys(["where does the river run"], 2)
    assert pair_tokenizer.encode([Pair("where does the river run", " the old town")]) == [before]


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """Bytes behind each id of a byte-level vocabulary: GPT-2's printable stand-ins turned back."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocabulary = tokenizer.get_vocab()
    plain = {token: i for token, i in vocabulary.items() if all(char in stand_ins for char in token)}
    return {i: bytes(stand_ins[char] for char in token) for token, i in plain.items()}


@settings(max_examples=400)
@given(prompt=TEXT | HARD, answer=TEXT | HARD)
def test_scored_tokens_are_those_that_hold_the_answers_bytes(byte_bpe: Any, prompt: str, answer: str) -> None:
    """The tokens' own bytes tell where each stands in the text, without any offsets."""
    request = encode(byte_bpe, prompt, answer)
    vocabulary = token_bytes(byte_bpe)
    ids = byte_bpe(prompt + answer)["input_ids"]
    pieces = [vocabulary[token] for token in ids]
    assert b"".join(pieces) == (prompt + answer).encode()
    boundary = len(prompt.encode())
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    first = next(i for i, end in enumerate(ends) if end > boundary)
    if first == 0:
        assert isinstance(request, InputError)
        return
    assert isinstance(request, ScoringRequest)
    assert list(request.token_ids) == ids
    assert request.answer_start == first


@settings(max_examples=150)
@given(prompt=TEXT | HARD, answer=TEXT | HARD, bos=..., eos=...)
def test_any_text_through_any_kind(prompt: str, answer: str, bos: bool, eos: bool) -> None:
    """A request or an error, never an exception; nothing of the tokens is lost, and BOS is never scored."""
    for kind in KINDS:
        tokenizer = make(kind, bos, eos)
        request = encode(tokenizer, prompt, answer)
        if isinstance(request, InputError):
            assert "nothing before it" in str(request) or "leaves no token" in str(request)
            continue
        assert 1 <= request.answer_start < len(request.token_ids)
        whole = tokenizer(prompt + answer)["input_ids"]
        assert list(request.token_ids) == (whole[:-1] if eos else whole)
