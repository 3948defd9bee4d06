"""``fastscore score``: its options, and from them the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fastscore.config import (
    DEFAULT_MODEL,
    DEFAULT_WINDOW_TOKENS,
    TASKS,
    Answers,
    Combine,
    DType,
    ScorerConfig,
    TaskConfig,
)

FILES, MODEL, TASK, RUNNING = "Input and output", "Model", "Task", "Running"
ON_ERROR = ("fail", "skip")

NO_VALUE = " "
"""Flags take no value, so help shows none."""

EPILOG = """[bold]Examples[/bold]

  [cyan]fastscore score train.jsonl --task qa[/cyan]

  [cyan]fastscore score a.jsonl b.jsonl.gz -o scored.jsonl -m Qwen/Qwen3-0.6B[/cyan]
"""


def _choices(literal: Any) -> str:
    *others, last = get_args(literal)
    return f"{', '.join(others)} or {last}"


def score(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT", help="JSON Lines files or JSON arrays of rows, plain or gzip.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the rows of all inputs here; gzip if it ends in .gz. "
            "Without it, each input gets NAME.scored.SAVE_NAME.EXT beside it.",
            rich_help_panel=FILES,
            show_default=False,
        ),
    ] = None,
    save_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="SAVE_NAME in the output's name.",
            rich_help_panel=FILES,
            show_default="last part of the model's name",
        ),
    ] = None,
    on_error: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="What a bad row does: fail ends the run before anything is scored; "
            "skip leaves the row out and records it in OUTPUT.errors.jsonl.",
            rich_help_panel=FILES,
        ),
    ] = "fail",
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Hugging Face id, folder, .gguf file, or smollm2-135m (embedded).",
            rich_help_panel=MODEL,
        ),
    ] = DEFAULT_MODEL,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="LoRA adapter: id or folder.", rich_help_panel=MODEL, show_default=False),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Branch, tag or commit on the hub.", rich_help_panel=MODEL, show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help=f"{_choices(DType)}. auto is bf16 where the device multiplies it natively, else fp32.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="cpu, cuda, cuda:1, ... auto is the first GPU, or else the CPU.", rich_help_panel=MODEL
        ),
    ] = "auto",
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help="Spread the model over devices, for example auto.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            metavar=NO_VALUE,
            help="Run Python code that comes with the model.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    cache_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where models from the hub are kept.",
            rich_help_panel=MODEL,
            show_default="the hub's own cache",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(TASKS[:-1])} or {TASKS[-1]}.",
            rich_help_panel=TASK,
            show_default="each row's own field task",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="A task of your own: fields of the row by name, {key} for the candidate, {answer} at the end, "
            "\\n and \\t as usual. For example '{key}\\nQ: {query}\\nA: {answer}'.",
            rich_help_panel=TASK,
            show_default=False,
        ),
    ] = None,
    answers: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help=f"Of a row that has several answers: {_choices(Answers)}.",
            rich_help_panel=TASK,
        ),
    ] = "first",
    combine: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help=f"With --answers all, how they become one score: {_choices(Combine)}.",
            rich_help_panel=TASK,
        ),
    ] = "max",
    seed: Annotated[int, typer.Option(metavar="N", help="For --answers sample.", rich_help_panel=TASK)] = 0,
    key_max_length: Annotated[
        int, typer.Option(metavar="N", help="Candidates are cut to this many tokens.", rich_help_panel=TASK)
    ] = 512,
    overflow: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="A prompt too long for the model: error, or truncate-left (cuts its beginning).",
            rich_help_panel=RUNNING,
        ),
    ] = "error",
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens that go through the model at once.",
            rich_help_panel=RUNNING,
            show_default="chosen for the device",
        ),
    ] = None,
    window_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Rows are held until they have this many tokens; within such a window shared prefixes are computed "
            "once.",
            rich_help_panel=RUNNING,
        ),
    ] = DEFAULT_WINDOW_TOKENS,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            metavar=NO_VALUE,
            help="Bitwise the same scores whatever else is in the file; slower.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    attention: Annotated[
        str,
        typer.Option(metavar="NAME", help="Attention provider; fastscore doctor lists them.", rich_help_panel=RUNNING),
    ] = "auto",
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", metavar=NO_VALUE, help="Only warnings and errors.", rich_help_panel=RUNNING),
    ] = False,
) -> None:
    """Score every candidate of every row: how likely does it make the answer?

    Writes each row with teacher_scores added: the mean log-probability of the answer's tokens given each candidate, \
in the order pos + neg. At most 0; higher is better.
    """
    options = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    options["inputs"] = [str(path) for path in inputs]
    # Not before --help has been printed.
    from fastscore.run_files import plan_jobs, run_files
    from fastscore.templates import parse_template
    from fastscore.terminal import Terminal, exit_status
    from fastscore.types import InputError

    def run() -> None:
        try:
            if on_error not in ON_ERROR:
                raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}; found {on_error!r}")
            scorer_config = ScorerConfig(
                model=model,
                dtype=dtype,  # type: ignore[arg-type]  # the configs check their values
                device=device,
                revision=revision,
                adapter=adapter,
                trust_remote_code=trust_remote_code,
                attention=attention,
                max_batch_tokens=max_batch_tokens,
                window_tokens=window_tokens,
                deterministic=deterministic,
                overflow=overflow,  # type: ignore[arg-type]
                cache_dir=cache_dir,
                device_map=device_map,
            )
            task_config = TaskConfig(
                task=task,
                template=None if template is None else unescape(template),
                answers=answers,  # type: ignore[arg-type]
                combine=combine,  # type: ignore[arg-type]
                seed=seed,
                key_max_length=key_max_length,
            )
            if task_config.template is not None:
                parse_template(task_config.template)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error
        jobs = plan_jobs(inputs, output, file_safe(model) if save_name is None else save_name)
        terminal = Terminal(quiet)
        with terminal.live():
            tally = run_files(
                jobs,
                scorer_config,
                task_config,
                reporter=terminal,
                skip_bad_rows=on_error == "skip",
                options=options,
            )
        terminal.summary(tally, jobs)

    raise typer.Exit(exit_status(run))


def unescape(text: str) -> str:
    r"""``\n``, ``\t`` and ``\\`` as shells hand them over; any other backslash stands for itself."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)


def file_safe(model: str) -> str:
    """The last part of a model's name as a part of a file name."""
    path = Path(model).expanduser()
    name = (path.resolve() if path.is_dir() else path).name.removesuffix(".gguf")
    return re.sub(r"[^\w.+-]+", "_", name).lstrip(".") or "model"
