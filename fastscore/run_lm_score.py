"""A drop-in for the reference system's script ``run_lm_score.py``: its flags, its output, its functions."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastscore.config import ScorerConfig, TaskConfig
from fastscore.integrations.upstream import collate_scores, load_scores, process_lm_scoring
from fastscore.launched import as_one_run
from fastscore.run_files import OpenScorer, plan_jobs, run_files
from fastscore.terminal import Terminal, exit_status
from fastscore.types import InputError, Row

__all__ = ["collate_scores", "main", "process_lm_scoring"]

logger = logging.getLogger("fastscore")

DATA_PREFIX = "llm-embedder:"
WITHOUT_MEANING = (
    "lm_batch_size",
    "context_max_length",
    "padding_side",
    "truncation_side",
    "add_position_ids",
    "add_llama_inst",
    "dataset_cache_dir",
    "train_data",
    "corpus",
    "key_template",
    "metrics",
    "cutoffs",
    "filter_answers",
    "max_neg_num",
)


def main(argv: Sequence[str] | None = None, open_scorer: OpenScorer | None = None) -> None:
    """Run with the reference system's flags. ``open_scorer`` as for :func:`fastscore.run_files.run_files`.

    Raises:
        SystemExit: something went wrong and was told: status 2 for bad input, 1 for a run that failed.
    """
    if status := exit_status(lambda: _run(list(sys.argv[1:] if argv is None else argv), open_scorer)):
        raise SystemExit(status)


def has_own_flags(arguments: Sequence[str]) -> bool:
    """Whether one of the arguments is a flag of the reference system's."""
    known = _parser()._option_string_actions.keys() - {"-h", "--help"}
    return any(argument.partition("=")[0] in known for argument in arguments)


def _run(arguments: list[str], open_scorer: OpenScorer | None) -> None:
    args = _parser().parse_args(arguments)
    eval_data = _resolve(args.eval_data, args.data_root)
    terminal = Terminal()
    with terminal.live():
        ignored = [f"--{name}" for name in WITHOUT_MEANING if getattr(args, name) is not None]
        if ignored:
            logger.info("accepted, but without meaning here: %s", ", ".join(ignored))
        if args.load_score:
            collate_scores(eval_data, args.save_name)(*load_scores(eval_data, args.save_name))
            return
        cache = None if args.cache is None else Path(args.cache)
        jobs = plan_jobs([Path(eval_data)], None, args.save_name, cache=cache, no_cache=args.no_cache)
        tally = run_files(
            jobs,
            _scorer_config(args),
            _task_config(args),
            reporter=terminal,
            options={name: value for name, value in vars(args).items() if value is not None},
            on_row=_SeveralAnswers().see,
            open_scorer=open_scorer,
        )
    terminal.summary(tally, jobs)


def _scorer_config(args: argparse.Namespace) -> ScorerConfig:
    try:
        return ScorerConfig(
            model=_resolve(args.model_name_or_path, args.data_root),
            dtype=args.lm_dtype if args.lm_dtype in ("bf16", "fp16") else "fp32",
            device="cpu" if args.cpu else "auto",
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
            cache_dir=args.model_cache_dir,
            device_map=args.lm_device_map,
            overflow=args.overflow,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def _task_config(args: argparse.Namespace) -> TaskConfig:
    try:
        return TaskConfig(key_max_length=args.key_max_length)
    except ValueError as error:
        raise InputError(str(error)) from error


class _SeveralAnswers:
    """Says once that only the first of several answers is scored, where the reference system draws one."""

    def __init__(self) -> None:
        self._told = False

    def see(self, row: Row) -> None:
        answers = row.data.get("answers")
        if not self._told and row.data.get("task") != "lrlm" and isinstance(answers, list) and len(answers) > 1:
            self._told = True
            logger.info("rows have several answers: the first is scored (the reference system draws one at random)")


def _resolve(path: str, data_root: str) -> str:
    return os.path.join(data_root, path.replace(DATA_PREFIX, "")) if path.startswith(DATA_PREFIX) else path


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "t", "yes", "y", "1"):
        return True
    if lowered in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (fastscore.run_lm_score --help lists the flags)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else ""))
        return parsed


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m fastscore",
        description="Teacher scores with the flags of the reference system's run_lm_score.py. The output is "
        "NAME.scored.SAVE_NAME.EXT beside the input.",
        epilog="Accepted, but without meaning here: " + ", ".join(f"--{name}" for name in WITHOUT_MEANING),
        allow_abbrev=False,
    )

    def add(name: str, text: str, *, default: Any = None, **options: Any) -> None:
        names = list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(
            *names, dest=name, default=default, help=f"{text}{shown}" if text else argparse.SUPPRESS, **options
        )

    boolean: dict[str, Any] = {"type": _boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    add("eval_data", "rows to score: JSON Lines or a JSON array", required=True, metavar="FILE")
    add("model_name_or_path", "hub id, folder or .gguf file", default="meta-llama/Llama-2-7b-chat-hf", metavar="MODEL")
    add("save_name", "part of the output's name", default="llama2-7b-chat", metavar="NAME")
    add("key_max_length", "candidates are cut to this many tokens", default=512, type=int, metavar="TOKENS")
    add("lm_dtype", "bf16, fp16; anything else is fp32", default="bf16", metavar="DTYPE")
    add("lm_device_map", "spread the model over devices, for example auto", metavar="MAP")
    add("cpu", "run on the CPU", default=False, **boolean)
    add("load_score", "collate saved scores (NAME.SAVE_NAME.pkl) without a model", default=False, **boolean)
    add("data_root", f"what {DATA_PREFIX} in a path stands for", default="/data/llm-embedder", metavar="FOLDER")
    add("model_cache_dir", "where models from the hub are kept", metavar="FOLDER")
    add("trust_remote_code", "run Python code that comes with the model (fastscore's own)", default=False, **boolean)
    add("allow_pickle", "load weights that are pickles, .bin (fastscore's own)", default=False, **boolean)
    add(
        "overflow",
        "what a prompt longer than the model's context does: error, or truncate-left (fastscore's own)",
        default="error",
        metavar="HOW",
    )
    add("cache", "keep scores here (fastscore's own; default: beside the output)", metavar="FILE")
    add("no_cache", "keep no scores (fastscore's own)", default=False, **boolean)
    for name in WITHOUT_MEANING:
        if name in ("add_position_ids", "add_llama_inst", "filter_answers"):
            add(name, "", **boolean)
        elif name in ("train_data", "metrics", "cutoffs"):
            add(name, "", nargs="+", metavar="X")
        else:
            add(name, "", metavar="X")
    return parser


if __name__ == "__main__":
    as_one_run(lambda open_scorer: main(open_scorer=open_scorer))
