"""What a run is told: frozen, validated once, standard library only (so that ``--help`` needs no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

DType = Literal["auto", "fp32", "bf16", "fp16"]
Overflow = Literal["error", "truncate-left"]
Forward = Literal["auto", "own", "model"]
Residual = Literal["auto", "fp32", "model"]
Quantize = Literal["int8", "fp8"]
Answers = Literal["first", "all", "sample"]
Combine = Literal["max", "mean", "logsumexp", "min"]
Target = Literal["answer", "query"]
Reduce = Literal["mean", "sum", "byte", "char", "none"]
Baseline = Literal["none", "no-context"]
Normalize = Literal["none", "softmax"]
Format = Literal[
    "teacher",
    "bge",
    "sentence-transformers",
    "sentence-transformers-triplets",
    "sentence-transformers-lists",
    "pairs",
]

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_WINDOW_TOKENS = 4_000_000
"""A usual file whole; about 300 MB of token ids and index arrays (a GPU's run holds two windows)."""
TASKS = ("qa", "convsearch", "icl", "chat", "lrlm", "pairs", "choices", "preference")
FORMATS: tuple[str, ...] = get_args(Format)
NO_CHAT_TEMPLATE = {
    "lrlm": "its prompts are token ids",
    "preference": "its conversations go through the template by themselves",
}
"""Tasks that the option is not for, and why."""


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; found {value!r}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; found {value!r}")


@dataclass(frozen=True, slots=True)
class ScorerConfig:
    """How the model is loaded and run.

    model: alias (``smollm2-135m``), Hugging Face hub id, local folder, or a ``.gguf`` file.
    dtype: ``auto`` is bf16 where the device multiplies bf16 natively, otherwise fp32.
    device: ``auto`` is the first CUDA device when there is one, otherwise the CPU.
    revision, cache_dir: which version from the hub, and where it is kept; None for the newest, in Hugging Face's cache.
    adapter: LoRA adapter (hub id or folder) that is folded into the weights.
    trust_remote_code: run Python code that comes with the model.
    device_map: spread the model over devices, as accelerate names them (``auto``, say).
    tensor_parallel: the processes that torchrun started hold one model together; for the program, not in a library.
    attention: name of an attention provider, or ``auto`` for the first one that can run the model.
    forward: whose layers run: ``auto`` is fastscore's own forward pass where it knows the model's layers and agrees
        with them, otherwise the model's; ``own`` insists; ``model`` is always the model's.
    residual: dtype of the residual stream: ``auto`` is fp32 in fastscore's own forward pass; ``model`` the model's.
    quantize: linear layers in eight bits (the model's own layers run then), or None.
    compiled: element-wise work of fastscore's own forward pass through torch.compile.
    trust_remote_code: Python code that comes with the model may run.
    allow_pickle: weights may come as pickles (``.bin``), not as safetensors and GGUF files only.
    max_batch_tokens: token budget of a pack; None chooses one for the model and the device.
    window_tokens: rows are scored together until they have this many tokens; prefixes are shared within a window.
    share_prefixes: False computes every request by itself, for comparison.
    deterministic: scores are bitwise the same whatever else is in the file, at a cost in speed.
    overflow: what to do with a prompt that does not fit the model's context with its answer: ``error``, or
        ``truncate-left``, which drops the prompt's first tokens.

    A value that none of them allows raises ValueError.
    """

    model: str = DEFAULT_MODEL
    dtype: DType = "auto"
    device: str = "auto"
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attention: str = "auto"
    forward: Forward = "auto"
    residual: Residual = "auto"
    compiled: bool = False
    quantize: Quantize | None = None
    max_batch_tokens: int | None = None
    window_tokens: int = DEFAULT_WINDOW_TOKENS
    share_prefixes: bool = True
    deterministic: bool = False
    overflow: Overflow = "error"
    cache_dir: str | None = None
    device_map: str | None = None
    tensor_parallel: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError(f"model must be a name or a path; found {self.model!r}")
        _check_choice("dtype", self.dtype, get_args(DType))
        _check_choice("overflow", self.overflow, get_args(Overflow))
        _check_choice("forward", self.forward, get_args(Forward))
        _check_choice("residual", self.residual, get_args(Residual))
        if self.quantize is not None:
            _check_choice("quantize", self.quantize, get_args(Quantize))
        if self.forward == "model" and self.own_forward_option:
            raise ValueError("residual fp32 and compile belong to fastscore's own forward pass, not to forward model")
        if self.tensor_parallel:
            for name in ("device_map", "adapter", "quantize"):
                if getattr(self, name) is not None:
                    raise ValueError(f"tensor_parallel and {name} exclude each other")
        if self.max_batch_tokens is not None:
            _check_positive("max_batch_tokens", self.max_batch_tokens)
        _check_positive("window_tokens", self.window_tokens)

    @property
    def own_forward_option(self) -> str:
        """The option that only fastscore's own forward pass can serve, or ""."""
        asked = {
            "forward own": self.forward == "own",
            "residual fp32": self.residual == "fp32",
            "compile": self.compiled,
        }
        return next((name for name, value in asked.items() if value), "")


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """What a score is (``docs/scores.md`` has the formulas, and the papers that use them).

    target: the text that is scored: the ``answer`` after passage and query, or the ``query`` after the passage.
    reduce: how its tokens' log-probabilities become one number: ``mean``, ``sum``, the sum per UTF-8 ``byte`` or per
        ``char`` of the scored text, or ``none`` (a list of them for each candidate).
    baseline: ``no-context`` takes off the score of the same text without the passage.
    normalize: ``softmax`` makes a row's scores a distribution over its candidates, at ``temperature``.
    append_eos: the tokenizer's EOS token is scored as the last one.
    keep_raw: rows also get ``teacher_raw``: sums, and counts of tokens, bytes and characters.
    """

    target: Target = "answer"
    reduce: Reduce = "mean"
    baseline: Baseline = "none"
    normalize: Normalize = "none"
    temperature: float = 1.0
    append_eos: bool = False
    keep_raw: bool = False

    def __post_init__(self) -> None:
        _check_choice("target", self.target, get_args(Target))
        _check_choice("reduce", self.reduce, get_args(Reduce))
        _check_choice("baseline", self.baseline, get_args(Baseline))
        _check_choice("normalize", self.normalize, get_args(Normalize))
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not number or not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0; found {self.temperature!r}")
        for name in ("append_eos", "keep_raw"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; found {getattr(self, name)!r}")
        if self.temperature != 1 and self.normalize == "none":
            raise ValueError("temperature belongs to normalize softmax")
        if self.reduce == "none" and (self.baseline, self.normalize) != ("none", "none"):
            raise ValueError("reduce none gives lists of tokens: baseline and normalize need one number per answer")


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """How a row becomes prompts and answers, and how several answers become one score.

    task: overrides the row's own ``task`` field; None reads it from the row.
    template: a template of the user's own (see fastscore.tasks); then ``task`` must be None.
    answers: ``first``, ``all`` (then ``combine`` applies), or ``sample`` (one per row, drawn by ``seed``).
    key_max_length: candidates are cut to this many tokens.
    chat_template: prompts go through the tokenizer's chat template, as the user's message.
    system_prompt: a system message before it.
    max_length: task preference: prompt and answer are cut to this many tokens at their end, as TRL does it.
    score: what a score is.

    A value that none of them allows raises ValueError.
    """

    task: str | None = None
    template: str | None = None
    answers: Answers = "first"
    combine: Combine = "max"
    seed: int = 0
    key_max_length: int = 512
    chat_template: bool = False
    system_prompt: str | None = None
    max_length: int | None = None
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def __post_init__(self) -> None:
        if self.task is not None:
            _check_choice("task", self.task, TASKS)
        if self.task is not None and self.template is not None:
            raise ValueError("task and template exclude each other")
        _check_choice("answers", self.answers, get_args(Answers))
        _check_choice("combine", self.combine, get_args(Combine))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number; found {self.seed!r}")
        _check_positive("key_max_length", self.key_max_length)
        if not isinstance(self.chat_template, bool):
            raise ValueError(f"chat_template must be True or False; found {self.chat_template!r}")
        if self.chat_template and self.task in NO_CHAT_TEMPLATE:
            raise ValueError(f"chat_template is not for task {self.task}: {NO_CHAT_TEMPLATE[self.task]}")
        if self.system_prompt is not None:
            if not isinstance(self.system_prompt, str) or not self.system_prompt.strip():
                raise ValueError(f"system_prompt must be a text; found {self.system_prompt!r}")
            if not self.chat_template:
                raise ValueError("system_prompt is part of a chat: it needs chat_template")
        if self.max_length is not None:
            _check_positive("max_length", self.max_length)
            if self.task not in (None, "preference") or self.template is not None:
                raise ValueError("max_length belongs to the task preference")
        if self.answers != "first" and self.score.target == "query":
            raise ValueError("target query scores the query: answers are not read")
        if self.answers == "all" and self.score.reduce == "none":
            raise ValueError("reduce none gives lists of tokens: answers all cannot be combined")
