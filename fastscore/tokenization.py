"""Text to token ids, and the exact span of the answer among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastscore.types import InputError, Pair, ScoringRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastscore.config import Overflow


@dataclass(frozen=True, slots=True)
class PairTokenizer:
    """Turns pairs into scoring requests.

    max_context: most tokens the model can take at once, or None. The last answer token is never an input, so a
        causal request may be one longer.
    vocab_size: token ids given by the user must be below it.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_context: int | None = None
    overflow: Overflow = "error"
    is_encoder_decoder: bool = False

    def truncate_keys(self, keys: Sequence[str], max_length: int) -> list[str]:
        """Each candidate cut to ``max_length`` tokens: encoded without special tokens and decoded again.

        The round trip is made for short candidates too, as the reference system does: some tokenizers do not give
        back the very text they were given.
        """
        if not keys:
            return []
        encoded = self.tokenizer(
            list(keys), add_special_tokens=False, max_length=max_length, truncation=True, verbose=False
        )
        return self.tokenizer.batch_decode(encoded["input_ids"])

    def check_eos(self) -> None:
        """Raise InputError where there is no EOS token to append."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise InputError("append_eos: the tokenizer has no EOS token")
        if eos >= self.vocab_size:
            raise InputError(f"append_eos: the tokenizer's EOS token is {eos}, the model has only {self.vocab_size}")

    def encode(self, pairs: Sequence[Pair], append_eos: bool = False) -> list[ScoringRequest | InputError]:
        """One request per pair, or the reason why there is none, in the order of the pairs.

        ``append_eos``: the tokenizer's EOS token becomes the last token of every answer (see :meth:`check_eos`).
        """
        results: list[ScoringRequest | InputError | None] = [None] * len(pairs)
        texts: dict[bool, list[int]] = {True: [], False: []}
        for index, pair in enumerate(pairs):
            if not isinstance(pair.prompt, str) or not isinstance(pair.answer, str):
                results[index] = self._from_ids(pair)
            elif problem := _text_problem(pair.prompt, pair.answer):
                results[index] = InputError(problem)
            else:
                texts[self._adds_special_tokens(pair)].append(index)
        encode = self._encode_seq2seq if self.is_encoder_decoder else self._encode_causal
        for special_tokens, indices in texts.items():
            encoded = encode([pairs[index] for index in indices], special_tokens) if indices else []
            for index, result in zip(indices, encoded, strict=True):
                results[index] = self._in_vocabulary(result)
        if append_eos:
            eos = self.tokenizer.eos_token_id
            results = [
                ScoringRequest((*result.token_ids, eos), result.answer_start)
                if isinstance(result, ScoringRequest)
                else result
                for result in results
            ]
        return [self._fit(result) if isinstance(result, ScoringRequest) else _must(result) for result in results]

    def _adds_special_tokens(self, pair: Pair) -> bool:
        """Whether the tokenizer adds its own special tokens. A second BOS is never put before a text that has one."""
        if pair.is_chat or self.is_encoder_decoder:
            return not pair.is_chat
        bos = self.tokenizer.bos_token
        return not (bos and str(pair.prompt).startswith(bos))

    def _encode_causal(self, pairs: Sequence[Pair], special_tokens: bool) -> list[ScoringRequest | InputError]:
        if not self.tokenizer.is_fast:
            return [self._encode_without_offsets(pair, special_tokens) for pair in pairs]
        texts = [f"{pair.prompt}{pair.answer}" for pair in pairs]
        encodings = self.tokenizer(
            texts, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False
        ).encodings
        results: list[ScoringRequest | InputError] = []
        for pair, encoding in zip(pairs, encodings, strict=True):
            ids = encoding.ids
            first, stop = _without_specials(encoding.special_tokens_mask)
            # A token belongs to the answer when it ends after the answer's first character begins. Only ends are
            # looked at: with trimmed offsets a lone space has zero width, and stands at its end (but at the very
            # beginning of a text it stands at 0, so an empty prompt asks for no offsets).
            start, boundary = stop, len(pair.prompt)
            while start > first and (boundary == 0 or encoding.token_to_chars(start - 1)[1] > boundary):
                start -= 1
            results.append(_request(ids[:stop], start))
        return results

    def _encode_without_offsets(self, pair: Pair, special_tokens: bool) -> ScoringRequest | InputError:
        """For tokenizers in pure Python: the answer begins where the prompt's own tokens stop agreeing."""
        texts = f"{pair.prompt}{pair.answer}", pair.prompt
        whole, prompt = (
            self.tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"] for text in texts
        )
        ends = special_tokens and bool(whole) and whole[-1] == self.tokenizer.eos_token_id
        if ends and prompt and prompt[-1] == whole[-1]:
            whole, prompt = whole[:-1], prompt[:-1]
        return _request(whole, common_length(whole, prompt))

    def _encode_seq2seq(self, pairs: Sequence[Pair], special_tokens: bool) -> list[ScoringRequest | InputError]:
        """Prompt as the encoder was trained to see it (with its end token), answer without special tokens."""
        prompts = self.tokenizer(
            [str(pair.prompt) for pair in pairs], add_special_tokens=special_tokens, verbose=False
        )["input_ids"]
        answers = self.tokenizer([str(pair.answer) for pair in pairs], add_special_tokens=False, verbose=False)
        return [
            _request([*prompt, *answer], len(prompt))
            for prompt, answer in zip(prompts, answers["input_ids"], strict=True)
        ]

    def _in_vocabulary(self, request: ScoringRequest | InputError) -> ScoringRequest | InputError:
        """A tokenizer may have entries that the model was never given (added tokens)."""
        if isinstance(request, ScoringRequest) and (largest := max(request.token_ids)) >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            return InputError(
                f"the tokenizer makes token id {largest} ({token!r}) of this text, the model has only {self.vocab_size}"
            )
        return request

    def _from_ids(self, pair: Pair) -> ScoringRequest | InputError:
        if isinstance(pair.prompt, str) or isinstance(pair.answer, str):
            return InputError("prompt and answer must be both text or both token ids")
        for name, ids in (("prompt", pair.prompt), ("answer", pair.answer)):
            if not ids:
                return InputError(f"the {name} is empty: expected at least one token id")
            for token in ids:
                if type(token) is not int:
                    return InputError(f"token id {token!r} in the {name} is not a whole number (int)")
                if not 0 <= token < self.vocab_size:
                    return InputError(f"token id {token} in the {name} is not in [0, {self.vocab_size})")
        return _request([*pair.prompt, *pair.answer], len(pair.prompt))

    def _fit(self, request: ScoringRequest) -> ScoringRequest | InputError:
        """The request if it fits the model's context, or with its prompt cut, or the error."""
        if self.max_context is None:
            return request
        if self.is_encoder_decoder:
            excess = request.answer_start - self.max_context
            answer_fits = request.num_answer_tokens <= self.max_context
        else:
            excess = len(request.token_ids) - 1 - self.max_context
            answer_fits = request.num_answer_tokens <= self.max_context
        if excess <= 0 and answer_fits:
            return request
        lengths = f"{request.answer_start} prompt and {request.num_answer_tokens} answer tokens"
        if not answer_fits:
            return InputError(f"the answer alone does not fit the model's context of {self.max_context}: {lengths}")
        if self.overflow == "error":
            return InputError(
                f"{lengths} do not fit the model's context of {self.max_context} "
                "(--overflow truncate-left cuts the prompt)"
            )
        # The tokenizer's own first token (BOS) stays: models behave badly without it.
        keep = 1 if request.token_ids[0] == self.tokenizer.bos_token_id and request.answer_start > excess + 1 else 0
        kept = request.token_ids[:keep] + request.token_ids[keep + excess :]
        return ScoringRequest(kept, request.answer_start - excess)


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items two sequences of one type have in common from their beginning.

    By halving: comparing slices is quick, and so is missing at the first item.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _request(token_ids: Sequence[int], answer_start: int) -> ScoringRequest | InputError:
    if answer_start >= len(token_ids):
        return InputError("the answer leaves no token to score")
    if answer_start == 0:
        return InputError(
            "the first answer token has nothing before it: the prompt is empty, or one token with the answer's "
            "beginning (this tokenizer adds no BOS token)"
        )
    return ScoringRequest(tuple(token_ids), answer_start)


def _without_specials(special_tokens_mask: Sequence[int]) -> tuple[int, int]:
    """First and last (exclusive) token that the tokenizer did not itself put at the ends (BOS, EOS)."""
    first, stop = 0, len(special_tokens_mask)
    while stop > 0 and special_tokens_mask[stop - 1]:
        stop -= 1
    while first < stop and special_tokens_mask[first]:
        first += 1
    return first, stop


def _text_problem(prompt: str, answer: str) -> str | None:
    if not answer:
        return "the answer is empty"
    for name, text in (("prompt", prompt), ("answer", answer)):
        if "\0" in text:
            return f"the {name} contains a NUL character"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"the {name} contains a lone surrogate at character {error.start}"
    return None


def _must(result: InputError | None) -> InputError:
    assert result is not None, "every pair was given a request or an error"
    return result
