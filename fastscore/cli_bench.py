"""``fastscore bench``: what would it cost to score these files with this model?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastscore import cli_definitions as definition
from fastscore import cli_options as opt
from fastscore.config import DEFAULT_MODEL, DEFAULT_WINDOW_TOKENS

EPILOG = """[bold]Example[/bold]

  [cyan]fastscore bench train.jsonl --task qa -m Qwen/Qwen3-0.6B[/cyan]
"""


def bench(
    inputs: opt.Inputs,
    on_error: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="What a bad row does: fail ends the run; skip leaves the row out.",
            rich_help_panel=opt.FILES,
        ),
    ] = "fail",
    max_rows: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokenise the first rows only, and take the others to be like them.",
            rich_help_panel=opt.FILES,
            show_default="all",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="N", help="How long the model is measured.", rich_help_panel=opt.RUNNING)
    ] = 20.0,
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
    quiet: opt.Quiet = False,
    json: Annotated[
        bool,
        typer.Option("--json", metavar=opt.NO_VALUE, help="Print it as JSON.", rich_help_panel=opt.FILES),
    ] = False,
) -> None:
    """Estimate what it would cost to score files: tokens, time and memory.

    Reads and tokenises the files, scores a sample of them, and writes nothing.
    """
    options = dict(locals())
    # Not before --help has been printed.
    from fastscore.estimate import estimate
    from fastscore.terminal import Terminal, exit_status

    def run() -> None:
        skip_bad_rows = opt.skips_bad_rows(on_error)
        scorer_config, task_config = opt.make_configs(options)
        terminal = Terminal(quiet)
        with terminal.live():
            found = estimate(
                inputs,
                scorer_config,
                task_config,
                reporter=terminal,
                seconds=seconds,
                max_rows=max_rows,
                skip_bad_rows=skip_bad_rows,
            )
        if json:
            _print_json(found)
        else:
            _show(found)

    raise typer.Exit(exit_status(run))


def _print_json(found: dict[str, Any]) -> None:
    import json

    print(json.dumps(found, indent=2))


def _show(found: dict[str, Any]) -> None:
    import sys

    from rich.box import ROUNDED
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=ROUNDED)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(found):
        table.add_row(name, Text(value, "bold" if name == "time" else ""))
    Console(file=sys.stdout, highlight=False).print(table)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    read, sample, seconds, memory = (found[name] for name in ("read", "sample", "seconds", "memory_bytes"))
    part = found["pairs"] != read["pairs"]
    about = "about " if part else ""
    saved = 1 - found["tokens_computed"] / found["tokens"]
    speed = f"{found['tokens_per_second']:,.0f} tokens/s"
    time = _duration(seconds["total"])
    if found["tokens_per_second_bounds"] is None:
        speed += ", too few packs to say how sure that is"
    elif sample["packs"] < sample["of_packs"]:
        low, high = found["tokens_per_second_bounds"]
        speed += f" ({low:,.0f} to {high:,.0f})" if high else f" (at least {low:,.0f})"
        time += f" ({_duration(seconds['total_bounds'][0])} to {_duration(seconds['total_bounds'][1])})"
    beside = " beside the device" if found["prepared_beside_the_device"] else ""
    lines = [
        ("model", f"{found['model']}, {found['device']}, {found['dtype']}, {found['mode']}"),
        ("rows read", f"{read['rows']:,}" + (f", {read['bad_rows']:,} bad ones left out" if read["bad_rows"] else "")),
        ("pairs", f"{about}{found['pairs']:,}"),
        ("tokens", f"{about}{found['tokens']:,}, {found['answer_tokens']:,} of them answers"),
        ("computed", f"{about}{found['tokens_computed']:,}, {saved:.1%} fewer"),
        ("speed", f"{speed}, measured on {sample['packs']:,} of {sample['of_packs']:,} packs"),
        ("time", f"{about or 'about '}{time}"),
        ("", f"start-up {_duration(seconds['start_up'])}, checking rows {_duration(seconds['checking'])}"),
        ("", f"tokenising{beside} {_duration(seconds['preparing'])}, model {_duration(seconds['model'])}"),
        ("memory", f"weights {_size(memory['weights'])}"),
    ]
    if memory["peak"] is not None:
        lines[-1] = "memory", f"{lines[-1][1]}, peak of the {memory['of']} {_size(memory['peak'])}"
    return lines


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds / 60:.1f} min" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours < 100 else f"{seconds / 86400:,.1f} days"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"
