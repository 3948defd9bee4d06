"""The program ``fastscore``, also ``python -m fastscore``. Nothing here waits for torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from fastscore import __version__, cli_bench, cli_cache, cli_lm_eval, cli_report, cli_score
from fastscore.cli_options import NO_VALUE
from fastscore.garbage import left_at_exit
from fastscore.launched import as_one_run

app = typer.Typer(
    name="fastscore",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("score", epilog=cli_score.EPILOG)(cli_score.score)
app.command("bench", epilog=cli_bench.EPILOG)(cli_bench.bench)
app.command("lm-eval", **cli_lm_eval.SETTINGS)(cli_lm_eval.lm_eval)
app.command("report", epilog=cli_report.EPILOG)(cli_report.report)
app.add_typer(cli_cache.app, name="cache")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; ends with SystemExit. Started by torchrun, all processes run it as one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    left_at_exit()
    as_one_run(partial(_program, arguments), share_model="--tensor-parallel" in arguments)


def _program(arguments: list[str], open_scorer: Any) -> None:
    if arguments and arguments[0].startswith("-"):
        from fastscore.run_lm_score import has_own_flags
        from fastscore.run_lm_score import main as run_lm_score

        if has_own_flags(arguments):
            run_lm_score(arguments, open_scorer)
            raise SystemExit(0)
    app(args=arguments, prog_name="fastscore", obj=open_scorer)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"fastscore {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", metavar=NO_VALUE, help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Score text with a language model: the log-probability of answers given prompts, fast.

    The reference system's run_lm_score flags (--eval_data ...) work here unchanged.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", metavar=NO_VALUE, help="Print it as JSON.")] = False,
) -> None:
    """Show versions, devices, what would be used for a run, and what is missing."""
    from fastscore.doctor import doctor
    from fastscore.terminal import exit_status

    raise typer.Exit(exit_status(lambda: doctor(as_json=json)))
