"""Small tokenizers of several kinds, built in the test that needs them, and what fastscore makes of a pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tiny_models import TRAINING_TEXT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastscore.tokenization import PairTokenizer
from fastscore.types import InputError, Pair, ScoringRequest

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
BOS, EOS = 1, 2


def encode(tokenizer: Any, prompt: Any, answer: Any, **options: Any) -> ScoringRequest | InputError:
    (request,) = PairTokenizer(tokenizer, **{"vocab_size": len(tokenizer), **options}).encode([Pair(prompt, answer)])
    return request


def scored_text(tokenizer: Any, prompt: str, answer: str) -> str:
    request = encode(tokenizer, prompt, answer)
    assert isinstance(request, ScoringRequest), request
    return tokenizer.decode(request.token_ids[request.answer_start :])


def special_ends(backend: Tokenizer, bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    used = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def word_level(bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(TRAINING_TEXT, trainers.WordLevelTrainer(special_tokens=SPECIALS))
    return special_ends(backend, bos, eos)


def unigram(bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>")
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    return special_ends(backend, bos, eos)


def byte_level(bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    return special_ends(backend, bos, eos)


def llama_like(bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    """SentencePiece BPE as Llama 2 converts it: a prepended space, byte fallback, a normalizer that moves offsets."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [word for text in TRAINING_TEXT for word in text.split()]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIALS, *fallback]))
    return special_ends(backend, bos, eos)


KINDS: dict[str, Callable[[bool, bool], PreTrainedTokenizerFast]] = {
    "word-level": word_level,
    "unigram-metaspace": unigram,
    "byte-level-bpe": byte_level,
    "sentencepiece-bpe": llama_like,
}


@cache
def make(kind: str, bos: bool, eos: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of that kind, made once: do not change it."""
    return KINDS[kind](bos, eos)


CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)
CHATS = {
    "plain": CHAT,
    "without-bos": CHAT.replace("{{ bos_token }}", ""),
    # Like models that think: what the assistant begins with is not what is kept of what it said.
    "thinking": CHAT.replace("'assistant\\n'", "'assistant\\nOK hmm\\n\\n'"),
    "trimming": CHAT.replace("message['content']", "message['content'] | trim"),
    "refuses-system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role here') }}{% endif %}"
    + CHAT,
    "drops-system": CHAT.replace("in messages %}", "in messages if message['role'] != 'system' %}"),
}
"""Chat templates of several kinds, for any of the tokenizers."""
