"""``fastscore lm-eval``: the program of EleutherAI's lm-evaluation-harness, with fastscore as its model."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import typer

COMMANDS = ("run", "ls", "validate")
MODEL = "fastscore"

EPILOG = """[bold]Examples[/bold]

  [cyan]fastscore lm-eval --model_args pretrained=smollm2-135m --tasks examples/lm_eval/choices.yaml[/cyan]

  [cyan]fastscore lm-eval --model_args pretrained=Qwen/Qwen3-0.6B --tasks hellaswag --num_fewshot 5[/cyan]

  [cyan]fastscore lm-eval run --help[/cyan]   shows the harness's flags
"""

SETTINGS: dict[str, Any] = {
    "epilog": EPILOG,
    "options_metavar": "[run|ls|validate] [FLAGS]",
    # All flags are the harness's: none is looked for here.
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with fastscore as its model.

    The arguments are those of the program lm-eval, with --model fastscore filled in: run (may be left out), ls or \
validate, and their flags.

    --model_args names the model, pretrained=NAME. It may hold revision, dtype, max_length, add_bos_token, \
prefix_token_id, tokenizer, trust_remote_code, peft, chat_template_args and enable_thinking as for the harness's own \
model hf, and device_map, attention, deterministic, max_batch_tokens, window_tokens, cache and \
allow_pickle as for fastscore score. --batch_size has no meaning. Tasks that generate text (generate_until) are refused.
    """
    if not context.args or context.args[0] in ("--help", "-h"):
        typer.echo(context.get_help())
        return
    # Not before --help has been printed.
    from fastscore.terminal import exit_status

    raise typer.Exit(exit_status(lambda: run_harness(context.args)))


def run_harness(arguments: Sequence[str]) -> None:
    """What the program ``lm-eval`` does with the arguments, with our model registered and named.

    Raises:
        InputError: a missing package, or arguments, tasks and files that the harness cannot use, in its words.
    """
    from fastscore.types import InputError

    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError as error:
        raise InputError(f"lm-eval is needed ({error}): pip install 'fastscore[lm-eval]'") from error

    harness = HarnessCLI()
    parsed = _parsed(harness, arguments)
    setup_logging()
    with _logged_as_the_harness_does():
        try:
            if parsed.command == "run":
                if parsed.model not in (None, MODEL):
                    raise InputError(f"--model {parsed.model}: here it is {MODEL}; lm_eval runs the other models")
                parsed.model = MODEL
                import fastscore.integrations.lm_eval  # noqa: F401 - registers the model
            harness.execute(parsed)
        except InputError:
            raise
        except (ValueError, FileNotFoundError, ImportError) as error:
            # With these the harness and datasets tell of flags, tasks and files, and of packages that a task needs.
            raise InputError(str(error)) from error


def _parsed(harness: Any, arguments: Sequence[str]) -> Any:
    """The harness's own reading of the arguments; its complaint is told without its usage lines."""
    from fastscore.types import InputError

    given, complaint = sys.argv, io.StringIO()
    command = [] if arguments[0] in COMMANDS else ["run"]
    sys.argv = ["lm-eval", *command, *arguments]
    try:
        with contextlib.redirect_stderr(complaint):
            return harness.parse_args()
    except SystemExit as stop:
        if not stop.code:  # its help has been printed
            raise
        raise InputError(complaint.getvalue().rpartition("error: ")[2].strip()) from stop
    finally:
        sys.argv = given


@contextlib.contextmanager
def _logged_as_the_harness_does() -> Iterator[None]:
    """Log lines of fastscore among the harness's, in its form."""
    logger, level = logging.getLogger("fastscore"), logging.getLogger("fastscore").level
    handlers = list(logging.getLogger("lm_eval").handlers)
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        logger.setLevel(level)
