"""``fastscore score``: its options, and from them the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fastscore import cli_definitions as definition
from fastscore import cli_engine
from fastscore import cli_options as opt
from fastscore.config import DEFAULT_MODEL, DEFAULT_WINDOW_TOKENS, FORMATS

EPILOG = """[bold]Examples[/bold]

  [cyan]fastscore score train.jsonl --task qa[/cyan]

  [cyan]fastscore score a.jsonl b.jsonl.gz -o scored.jsonl -m Qwen/Qwen3-0.6B[/cyan]

  [cyan]fastscore score train.parquet --format bge -o train.scored.jsonl[/cyan]
"""


def score(
    context: typer.Context,
    inputs: opt.Inputs,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the rows of all inputs here: JSON Lines (gzip if it ends in .gz), "
            ".parquet, .arrow or .feather. "
            "Without it, each input gets NAME.scored.SAVE_NAME.EXT beside it.",
            rich_help_panel=opt.FILES,
            show_default=False,
        ),
    ] = None,
    output_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"What a row is written as: {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.",
            rich_help_panel=opt.FILES,
        ),
    ] = "teacher",
    negatives: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --format sentence-transformers, negatives in each row of the table.",
            rich_help_panel=opt.FILES,
            show_default="as many as in the first row",
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
    cache: opt.Cache = None,
    no_cache: opt.NoCache = False,
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
    chat_template: opt.ChatTemplate = False,
    system_prompt: opt.SystemPrompt = None,
    max_length: opt.MaxLength = None,
    target: definition.TargetText = "answer",
    reduce: definition.ReduceHow = "mean",
    baseline: definition.BaselineKind = "none",
    normalize: definition.NormalizeHow = "none",
    temperature: definition.Temperature = 1.0,
    append_eos: definition.AppendEos = False,
    keep_raw: definition.KeepRaw = False,
    overflow: opt.OverflowHow = "error",
    max_batch_tokens: opt.MaxBatchTokens = None,
    window_tokens: opt.WindowTokens = DEFAULT_WINDOW_TOKENS,
    deterministic: opt.Deterministic = False,
    attention: opt.Attention = "auto",
    forward: opt.ForwardHow = "auto",
    residual: opt.ResidualType = "auto",
    compiled: opt.Compiled = False,
    engine: cli_engine.Engine = "local",
    num_workers: cli_engine.NumWorkers = None,
    gpus_per_worker: cli_engine.GpusPerWorker = None,
    tensor_parallel: cli_engine.TensorParallel = False,
    quiet: opt.Quiet = False,
) -> None:
    """Score every candidate of every row: how likely does it make the answer?

    Writes each row with teacher_scores added: the mean log-probability of the answer's tokens given each candidate, \
in the order pos + neg. At most 0; higher is better. The options under "What a score is" ask for other definitions.
    """
    options = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    del options["context"]
    options["inputs"] = [str(path) for path in inputs]
    # Not before --help has been printed.
    from fastscore.output_formats import make_format
    from fastscore.run_files import plan_jobs, run_files
    from fastscore.terminal import Terminal, exit_status

    def run() -> None:
        skip_bad_rows = opt.skips_bad_rows(on_error)
        scorer_config, task_config = opt.make_configs(options)
        name = file_safe(model) if save_name is None else save_name
        jobs = plan_jobs(inputs, output, name, cache=cache, no_cache=no_cache)
        terminal = Terminal(quiet)
        where = cli_engine.chosen_engine(engine, num_workers, gpus_per_worker, tensor_parallel, context.obj)
        with terminal.live(), where as open_scorer:
            tally = run_files(
                jobs,
                scorer_config,
                task_config,
                reporter=terminal,
                skip_bad_rows=skip_bad_rows,
                options=options,
                open_scorer=open_scorer,
                output_format=make_format(output_format, negatives),
            )
        terminal.summary(tally, jobs)

    raise typer.Exit(exit_status(run))


def file_safe(model: str) -> str:
    """The last part of a model's name as a part of a file name."""
    path = Path(model).expanduser()
    name = (path.resolve() if path.is_dir() else path).name.removesuffix(".gguf")
    return re.sub(r"[^\w.+-]+", "_", name).lstrip(".") or "model"
