"""``fastscore score``: its options, and from them the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fastscore import cli_options as opt
from fastscore.config import DEFAULT_MODEL, DEFAULT_WINDOW_TOKENS

EPILOG = """[bold]Examples[/bold]

  [cyan]fastscore score train.jsonl --task qa[/cyan]

  [cyan]fastscore score a.jsonl b.jsonl.gz -o scored.jsonl -m Qwen/Qwen3-0.6B[/cyan]
"""


def score(
    inputs: opt.Inputs,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the rows of all inputs here; gzip if it ends in .gz. "
            "Without it, each input gets NAME.scored.SAVE_NAME.EXT beside it.",
            rich_help_panel=opt.FILES,
            show_default=False,
        ),
    ] = None,
    save_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="SAVE_NAME in the output's name.",
            rich_help_panel=opt.FILES,
            show_default="last part of the model's name",
        ),
    ] = None,
    on_error: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="What a bad row does: fail ends the run before anything is scored; "
            "skip leaves the row out and records it in OUTPUT.errors.jsonl.",
            rich_help_panel=opt.FILES,
        ),
    ] = "fail",
    model: opt.ModelName = DEFAULT_MODEL,
    adapter: opt.Adapter = None,
    revision: opt.Revision = None,
    dtype: opt.DTypeName = "auto",
    quantize: opt.QuantizeHow = None,
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    allow_pickle: opt.AllowPickle = False,
    cache_dir: opt.CacheDir = None,
    task: opt.TaskName = None,
    template: opt.Template = None,
    answers: opt.WhichAnswers = "first",
    combine: opt.CombineHow = "max",
    seed: opt.Seed = 0,
    key_max_length: opt.KeyMaxLength = 512,
    overflow: opt.OverflowHow = "error",
    max_batch_tokens: opt.MaxBatchTokens = None,
    window_tokens: opt.WindowTokens = DEFAULT_WINDOW_TOKENS,
    deterministic: opt.Deterministic = False,
    attention: opt.Attention = "auto",
    forward: opt.ForwardHow = "auto",
    residual: opt.ResidualType = "auto",
    compiled: opt.Compiled = False,
    quiet: opt.Quiet = False,
) -> None:
    """Score every candidate of every row: how likely does it make the answer?

    Writes each row with teacher_scores added: the mean log-probability of the answer's tokens given each candidate, \
in the order pos + neg. At most 0; higher is better.
    """
    options = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    options["inputs"] = [str(path) for path in inputs]
    # Not before --help has been printed.
    from fastscore.run_files import plan_jobs, run_files
    from fastscore.terminal import Terminal, exit_status

    def run() -> None:
        skip_bad_rows = opt.skips_bad_rows(on_error)
        scorer_config, task_config = opt.make_configs(options)
        jobs = plan_jobs(inputs, output, file_safe(model) if save_name is None else save_name)
        terminal = Terminal(quiet)
        with terminal.live():
            tally = run_files(
                jobs, scorer_config, task_config, reporter=terminal, skip_bad_rows=skip_bad_rows, options=options
            )
        terminal.summary(tally, jobs)

    raise typer.Exit(exit_status(run))


def file_safe(model: str) -> str:
    """The last part of a model's name as a part of a file name."""
    path = Path(model).expanduser()
    name = (path.resolve() if path.is_dir() else path).name.removesuffix(".gguf")
    return re.sub(r"[^\w.+-]+", "_", name).lstrip(".") or "model"
