"""A model for EleutherAI's lm-evaluation-harness: the harness's own HFLM, with fastscore in place of padded batches.

HFLM's own code makes token ids of texts (BOS, empty contexts, spaces at a context's end, rolling windows, chat
templates); how token ids get their log-probabilities is replaced.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any, cast, get_args

import numpy as np
import torch

try:
    # HFLM's module brings the package lm_eval.models with it, and that the harness's own models: it registers them only
    # as long as no other is there.
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import _add_special_kwargs, has_bos_prefix, resolve_max_length
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"lm-eval is needed, and accelerate ({error}): pip install 'fastscore[lm-eval]'") from error

from fastscore.config import DEFAULT_WINDOW_TOKENS, DType
from fastscore.run_stats import RunStats
from fastscore.scorer import Scorer
from fastscore.types import InputError

logger = logging.getLogger("fastscore")

TokenPair = tuple[list[int], list[int]]
# The harness's form of a request: its texts (None for a window of a longer text), context ids, continuation ids.
HarnessRequest = tuple[tuple[str, str] | None, list[int], list[int]]

TEXTS_AT_ONCE = 1024

_DTYPES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
_OTHER_NAMES = {
    "adapter": "it is called peft",
    "model": "it is called pretrained",
    "gguf_file": "pretrained=FOLDER/FILE.gguf names both",
    "parallelize": "device_map=auto spreads a model over devices",
}


@register_model("fastscore")
class FastscoreLM(HFLM):  # type: ignore[misc]
    """``--model fastscore``: scores as HFLM does, and does not generate.

    pretrained: hub id, folder, ``.gguf`` file or ``smollm2-135m``; in Python also a :class:`fastscore.Scorer`, which
        brings all that concerns the model with it.
    dtype: ``auto`` is the one that the model's config names, as for HFLM; else a name of torch's or of fastscore's.
    device: ``auto`` is the first GPU, or else the CPU.
    max_length: most tokens of a text, cut on the left as HFLM does; None is the model's own context.
    add_bos_token, prefix_token_id, tokenizer, chat_template_args, enable_thinking, peft, revision: as for HFLM.
    max_batch_tokens, attention, deterministic, device_map, allow_pickle: as for :class:`fastscore.Scorer`.
    window_tokens: requests are scored together; more than so many tokens of them in sorted portions.
    cache: a file in which scores are kept and looked up.
    batch_size, max_batch_size: the harness hands them over; without meaning here.

    Raises:
        ValueError: a bad argument, or (as ``InputError``) a model that is not there or not causal.
    """

    def __init__(
        self,
        pretrained: str | Scorer | None = None,
        *,
        revision: str | None = None,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        peft: str | None = None,
        device_map: str | None = None,
        attention: str = "auto",
        deterministic: bool = False,
        max_batch_tokens: int | None = None,
        window_tokens: int = DEFAULT_WINDOW_TOKENS,
        cache: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        _refuse(others)
        if batch_size not in (None, 1, "1") or max_batch_size is not None:
            logger.info("batch_size has no meaning here: max_batch_tokens is the size of a pack")
        options = {
            "revision": None if revision is None else str(revision),
            "dtype": _dtype_name(dtype),
            "device": device,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
            "adapter": peft,
            "device_map": device_map,
            "attention": attention,
            "deterministic": deterministic,
            "max_batch_tokens": max_batch_tokens,
            "window_tokens": window_tokens,
            "cache": cache,
        }
        self.scorer = _scorer(pretrained, options)
        _check_max_length(max_length, self.scorer.hf_config)
        with _without_advice():
            super().__init__(
                pretrained=self.scorer.hugging_face_model(),
                backend="causal",
                revision=self.scorer.config.revision or "main",
                tokenizer=self.scorer.tokenizer if tokenizer is None and isinstance(pretrained, Scorer) else tokenizer,
                max_length=max_length,
                trust_remote_code=self.scorer.config.trust_remote_code,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix_token_id,
                gguf_file=os.path.basename(path) if (path := self.scorer.model_path).endswith(".gguf") else None,
                chat_template_args=chat_template_args,
                enable_thinking=enable_thinking,
                # HFLM hands rolling windows over in batches of this size; prefixes are shared within a call.
                batch_size=sys.maxsize,
            )
        self.pretrained, self.peft = self.scorer.config.model, self.scorer.config.adapter
        self._known_ids: dict[str, np.ndarray] = {}
        if self.prefix_token_id is None:
            raise InputError("the tokenizer has neither BOS nor EOS: prefix_token_id=ID says what a text begins with")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Sum of each continuation's log-probabilities in nats, and whether all its tokens are the first choice."""
        pairs = [request.args for request in requests]
        self._encode_beforehand(
            text for context, continuation in pairs if context for text in (context + continuation, context.rstrip())
        )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum of the log-probabilities of all tokens of each text, in windows of ``max_length``; nats."""
        self._encode_beforehand(text for request in requests for text in request.args)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids, as HFLM makes them."""
        if add_special_tokens is None and left_truncate_len is None and string in self._known_ids:
            return self._known_ids[string].tolist()
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)

    def _encode_beforehand(self, texts: Iterable[str]) -> None:
        """What HFLM will ask for text by text, and for a context once more for each continuation, encoded together."""
        bos = self.tokenizer.decode(self.prefix_token_id)
        with_bos: list[str] = []
        others: list[str] = []
        for text in dict.fromkeys(texts):
            (with_bos if has_bos_prefix(text, bos) else others).append(text)
        groups = (with_bos, {"add_special_tokens": False}), (others, _add_special_kwargs(None, self.add_bos_token))
        # The harness denies the tokenizer its threads, for the sake of processes that are not started here.
        denied = os.environ.pop("TOKENIZERS_PARALLELISM", None)
        try:
            for group, options in groups:
                for start in range(0, len(group), TEXTS_AT_ONCE):
                    chunk = group[start : start + TEXTS_AT_ONCE]
                    encoded = self.tokenizer(chunk, verbose=False, **options)["input_ids"]
                    self._known_ids.update(zip(chunk, (np.array(ids, dtype=np.int32) for ids in encoded), strict=True))
        finally:
            if denied is not None:
                os.environ["TOKENIZERS_PARALLELISM"] = denied

    def _loglikelihood_tokens(
        self, requests: Sequence[HarnessRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._known_ids = {}  # all that was asked for has been taken
        pairs = [self._within_max_length(*request) for request in requests]
        if cut := sum(len(request[1]) > len(pair[0]) for request, pair in zip(requests, pairs, strict=True)):
            logger.warning(
                "%d of %d contexts are cut on the left to fit max_length=%d", cut, len(pairs), self.max_length
            )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for window in _windows(pairs, self.scorer.config.window_tokens):
                before = self.scorer.stats.pairs - bar.n

                def show(stats: RunStats, before: int = before) -> None:
                    bar.update(stats.pairs - before - bar.n)

                scores = self.scorer.score_tokens([pairs[index] for index in window], on_progress=show)
                for index, score in zip(window, scores, strict=True):
                    results[index] = (score.logprob, score.is_greedy)
                    if (texts := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, results[index])
        return results

    def _within_max_length(
        self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> TokenPair:
        """The last ``max_length + 1`` tokens: the very last is predicted and never read."""
        if not context or not continuation or len(continuation) > self.max_length:
            problem = f"the {'continuation' if context else 'context'} makes no token"
            if len(continuation) > self.max_length:
                problem = f"{len(continuation)} tokens of continuation exceed max_length={self.max_length}"
            where = f"context {_shown(texts[0])}, continuation {_shown(texts[1])}: " if texts else ""
            raise InputError(where + problem)
        excess = len(context) + len(continuation) - (self.max_length + 1)
        return context[max(excess, 0) :], continuation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: fastscore scores texts and does not write any.

        Raises:
            InputError: always.
        """
        tasks = ", ".join(sorted({str(request.task_name) for request in requests if request.task_name}))
        raise InputError(
            f"{tasks or 'the task'} generates text (generate_until), and fastscore only scores: "
            "run it with one of the harness's own models (lm_eval --model hf)"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What HFLM writes to the results about a model, and how fastscore ran it."""
        described = self.scorer.describe()
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": self.revision,
            "model_sha": described["commit"] or "",
            "fastscore": described,
        }


def _scorer(pretrained: str | Scorer | None, options: dict[str, Any]) -> Scorer:
    """The scorer that was given, or one made with the options."""
    defaults = {name: parameter.default for name, parameter in signature(Scorer.__init__).parameters.items()}
    if isinstance(pretrained, Scorer):
        if given := [name for name, value in options.items() if value != defaults[name]]:
            raise InputError(f"{', '.join(given)}: the Scorer that was given has its own")
        scorer = pretrained
    elif not isinstance(pretrained, str):
        raise InputError(f"pretrained=MODEL is needed (a hub id, a folder or a .gguf file); found {pretrained!r}")
    else:
        if options["device"] == "cuda:0" and not torch.cuda.is_available():
            # What the harness says when nobody has named a device; HFLM takes it the same way.
            logger.info("there is no cuda:0, the harness's default device: the CPU is used")
            options["device"] = "auto"
        scorer = Scorer(pretrained, **options)
        if options["dtype"] == "auto":
            scorer = Scorer.from_config(replace(scorer.config, dtype=_own_dtype(scorer.hf_config)), options["cache"])
    if scorer.hf_config.is_encoder_decoder:
        raise InputError(f"{scorer.config.model} is an encoder-decoder: only causal models are evaluated here")
    return scorer


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _own_dtype(hf_config: Any) -> DType:
    """The dtype of the model's config; where it names none of ours, fastscore chooses."""
    name = _dtype_name(hf_config.get_text_config().dtype)
    return cast(DType, name if name in get_args(DType) else "auto")


def _check_max_length(max_length: Any, hf_config: Any) -> None:
    if max_length is None:
        return
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise InputError(f"max_length must be a whole number of at least 1; found {max_length!r}")
    context = resolve_max_length(hf_config, default=0)
    if context and max_length > context:
        raise InputError(f"max_length={max_length} exceeds the model's context of {context}")


def _refuse(others: Iterable[str]) -> None:
    """Arguments of HFLM that cannot be honoured are not passed over in silence."""
    known = [name for name in signature(FastscoreLM.__init__).parameters if name not in ("self", "others")]
    for name in others:
        close = difflib.get_close_matches(name, known, n=1)
        hint = _OTHER_NAMES.get(name) or (f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}")
        raise InputError(f"model_args: {name!r} is no argument of fastscore; {hint}")


def _windows(pairs: Sequence[TokenPair], max_tokens: int) -> Iterator[Sequence[int]]:
    """Indices of the pairs, all at once or, where they have more tokens than that, in sorted portions.

    Sorted by their tokens, pairs that begin alike stay together, so that little is computed twice.
    """
    if sum(len(context) + len(continuation) for context, continuation in pairs) <= max_tokens:
        yield range(len(pairs))
        return
    window: list[int] = []
    size = 0
    for index in sorted(range(len(pairs)), key=lambda index: pairs[index][0] + pairs[index][1]):
        window.append(index)
        size += len(pairs[index][0]) + len(pairs[index][1])
        if size >= max_tokens:
            yield window
            window, size = [], 0
    if window:
        yield window


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


@contextmanager
def _without_advice() -> Iterator[None]:
    """HFLM warns of models in memory (how to launch them, which arguments they ignore): not meant for this one."""
    harness_logger = logging.getLogger("lm_eval.models.huggingface")
    level = harness_logger.level
    harness_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness_logger.setLevel(level)
