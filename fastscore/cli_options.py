"""Options that several commands have, each declared once, and the configs they make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fastscore.config import TASKS, Answers, Combine, DType, ScoreConfig, ScorerConfig, TaskConfig
from fastscore.types import InputError

FILES, MODEL, TASK, RUNNING = "Input and output", "Model", "Task", "Running"
ON_ERROR = ("fail", "skip")

NO_VALUE = " "
"""Flags take no value, so help shows none."""


def choices(literal: Any) -> str:
    *others, last = get_args(literal)
    return f"{', '.join(others)} or {last}"


Inputs = Annotated[
    list[Path],
    typer.Argument(
        metavar="INPUT",
        help="Rows: JSON Lines or JSON arrays, plain or gzip; .parquet, .arrow or .feather; a dataset's folder.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Hugging Face id, folder, .gguf file, or smollm2-135m (embedded).",
        rich_help_panel=MODEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="LoRA adapter: id or folder.", rich_help_panel=MODEL, show_default=False),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.", rich_help_panel=MODEL, show_default=False),
]
DTypeName = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        help=f"{choices(DType)}. auto is bf16 where the device multiplies it natively, else fp32.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="cpu, cuda, cuda:1, ... auto is the first GPU, or else the CPU.", rich_help_panel=MODEL
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="Spread the model over devices, for example auto.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        metavar=NO_VALUE,
        help="Run Python code that comes with the model.",
        rich_help_panel=MODEL,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        metavar=NO_VALUE,
        help="Load weights that are not safetensors but pickles (.bin), which may hold code.",
        rich_help_panel=MODEL,
    ),
]
CacheDir = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Where models from the hub are kept.",
        rich_help_panel=MODEL,
        show_default="the hub's own cache",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"{', '.join(TASKS[:-1])} or {TASKS[-1]}.",
        rich_help_panel=TASK,
        show_default="each row's own field task",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="A task of your own: fields of the row by name, {key} for the candidate, {answer} at the end "
        "({query} with --target query), "
        "\\n and \\t as usual. For example '{key}\\nQ: {query}\\nA: {answer}'.",
        rich_help_panel=TASK,
        show_default=False,
    ),
]
WhichAnswers = Annotated[
    str,
    typer.Option(
        metavar="WHICH",
        help=f"Of a row that has several answers: {choices(Answers)}.",
        rich_help_panel=TASK,
    ),
]
CombineHow = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help=f"With --answers all, how they become one score: {choices(Combine)}.",
        rich_help_panel=TASK,
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="For --answers sample.", rich_help_panel=TASK)]
KeyMaxLength = Annotated[
    int, typer.Option(metavar="N", help="Candidates are cut to this many tokens.", rich_help_panel=TASK)
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template",
        metavar=NO_VALUE,
        help="Prompts go through the tokenizer's chat template, as the user's message.",
        rich_help_panel=TASK,
    ),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="With --chat-template, a system message before it; \\n and \\t as usual.",
        rich_help_panel=TASK,
        show_default=False,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Task preference: prompt and answer are cut to this many tokens, as TRL's max_length does it.",
        rich_help_panel=TASK,
        show_default="nothing is cut",
    ),
]
OverflowHow = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="A prompt too long for the model: error, or truncate-left (cuts its beginning).",
        rich_help_panel=RUNNING,
    ),
]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens that go through the model at once.",
        rich_help_panel=RUNNING,
        show_default="chosen for the device",
    ),
]
WindowTokens = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Rows are held until they have this many tokens; within such a window shared prefixes are computed once.",
        rich_help_panel=RUNNING,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        metavar=NO_VALUE,
        help="Bitwise the same scores whatever else is in the file; slower.",
        rich_help_panel=RUNNING,
    ),
]
Attention = Annotated[
    str,
    typer.Option(metavar="NAME", help="Attention provider; fastscore doctor lists them.", rich_help_panel=RUNNING),
]
ForwardHow = Annotated[
    str,
    typer.Option(
        metavar="WHOSE",
        help="Whose layers run: own (fastscore's, for the families it knows), model (the model's own), or auto.",
        rich_help_panel=RUNNING,
    ),
]
ResidualType = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        help="Residual stream between fastscore's own layers: fp32, or model (the model's dtype). auto is fp32.",
        rich_help_panel=RUNNING,
    ),
]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compile",
        metavar=NO_VALUE,
        help="Element-wise work through torch.compile; takes a minute the first time.",
        rich_help_panel=RUNNING,
    ),
]
QuantizeHow = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Linear layers in int8 or fp8 (torchao; scores change).",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keep scores here and look them up here: a run that is started again computes only what is missing.",
        rich_help_panel=FILES,
        show_default="OUTPUT.cache.sqlite",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", metavar=NO_VALUE, help="Keep no scores and look none up.", rich_help_panel=FILES),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar=NO_VALUE, help="Only warnings and errors.", rich_help_panel=RUNNING),
]


def skips_bad_rows(on_error: str) -> bool:
    """What ``--on-error`` asks for.

    Raises:
        InputError: it is neither of the two.
    """
    if on_error not in ON_ERROR:
        raise InputError(f"on_error must be one of {', '.join(ON_ERROR)}; found {on_error!r}")
    return on_error == "skip"


def make_configs(options: Mapping[str, Any]) -> tuple[ScorerConfig, TaskConfig]:
    """The configs from a command's options, by the names of their fields; other options are left alone.

    Raises:
        InputError: a value that cannot be.
    """
    from fastscore.templates import parse_template  # not before --help has been printed

    try:
        scorer_config = ScorerConfig(**{name: options[name] for name in ScorerConfig.__slots__ if name in options})
        score = ScoreConfig(**{name: options[name] for name in ScoreConfig.__slots__})
        fields = {name: options[name] for name in TaskConfig.__slots__ if name != "score"}
        for name in ("template", "system_prompt"):
            if fields[name] is not None:
                fields[name] = unescape(fields[name])
        task_config = TaskConfig(**fields, score=score)
        if task_config.template is not None:
            parse_template(task_config.template, target=score.target)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    return scorer_config, task_config


def unescape(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as shells hand them over; any other backslash stands for itself."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)
