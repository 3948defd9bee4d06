"""``fastscore cache``: what is in a cache of scores, and making it smaller."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastscore.cli_options import NO_VALUE

if TYPE_CHECKING:
    from fastscore.cache_upkeep import CacheInfo, Pruned

app = typer.Typer(
    help="Look into a cache of scores, or make it smaller.", no_args_is_help=True, rich_markup_mode="rich"
)

PATH = typer.Argument(metavar="CACHE", help="The file; OUTPUT.cache.sqlite where no other was chosen.")
JSON = typer.Option("--json", metavar=NO_VALUE, help="Print it as JSON.")

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@app.command()
def info(path: Annotated[Path, PATH], json: Annotated[bool, JSON] = False) -> None:
    """Show how much is in a cache, and of which models."""
    from fastscore.cache_upkeep import cache_info
    from fastscore.terminal import exit_status

    def run() -> None:
        found = cache_info(path)
        if json:
            _print_json(found)
        else:
            _show(found)

    raise typer.Exit(exit_status(run))


@app.command()
def prune(
    path: Annotated[Path, PATH],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only scores of this model: its name, or the start of its fingerprint, as fastscore cache info "
            "shows them.",
            show_default=False,
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Only scores stored longer ago, as 12h, 30d or 8w (also s, m).", show_default=False
        ),
    ] = None,
    keep_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Only the oldest, until the file is no larger than this, as 500MB or 2GiB.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar=NO_VALUE, help="Only say how much would be removed.")
    ] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Remove scores from a cache and give the room back to the disk.

    At least one of --model, --older-than and --keep-size says which; of several, a score must meet all.
    """
    import time

    from fastscore.cache_upkeep import prune_cache
    from fastscore.terminal import exit_status

    def run() -> None:
        before = None if older_than is None else time.time() - parse_age(older_than)
        keep = None if keep_size is None else parse_size(keep_size)
        done = prune_cache(path, model=model, before=before, keep_bytes=keep, dry_run=dry_run)
        if json:
            _print_json(done)
        else:
            typer.echo(_in_words(done, is_estimate=keep is not None))

    raise typer.Exit(exit_status(run))


def parse_age(text: str) -> float:
    """Seconds.

    Raises:
        InputError: anything but a number and a unit.
    """
    return _number(text, _SECONDS, "--older-than: expected an age such as 12h, 30d or 8w")


def parse_size(text: str) -> int:
    """Bytes.

    Raises:
        InputError: anything but a number and, where it is not bytes, a unit.
    """
    return int(_number(text, _BYTES, "--keep-size: expected a size such as 500MB or 2GiB", "b?"))


def _number(text: str, units: dict[str, int], expected: str, ending: str = "") -> float:
    from fastscore.types import InputError

    match = re.fullmatch(rf"(\d{{1,15}}(?:\.\d{{1,9}})?)\s*([a-z]*?){ending}", text.strip().lower(), re.ASCII)
    if match is None or match[2] not in units:
        raise InputError(f"{expected}; found {text!r}")
    return float(match[1]) * units[match[2]]


def _print_json(value: CacheInfo | Pruned) -> None:
    import json
    from dataclasses import asdict

    plain = asdict(value)
    if "models" in plain:
        plain = {**plain, "entries": sum(model["entries"] for model in plain["models"])}
    typer.echo(json.dumps(plain, indent=2))


def _show(found: CacheInfo) -> None:
    import sys

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    console.print(Text(found.path, "bold"), soft_wrap=True)
    console.print(f"{found.entries:,} scores, {_size(found.file_bytes)}, format {found.format}")
    if not found.models:
        return
    console.print()
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("model", header_style="dim", overflow="fold", ratio=1)
    table.add_column("how", header_style="dim", overflow="fold")
    table.add_column("scores", header_style="dim", justify="right")
    for column in ("first", "last", "fingerprint"):
        table.add_column(column, header_style="dim", no_wrap=True)
    for model in found.models:
        name = Text(model.name)
        if model.about.get("adapter"):
            name.append(f" + {model.about['adapter']}", "dim")
        how = [str(model.about.get(key, "?")) for key in ("device", "dtype", "attention")]
        how += ["deterministic"] if model.about.get("machine") else []
        table.add_row(
            name,
            Text(", ".join(how)),
            f"{model.entries:,}",
            _date(model.first),
            _date(model.last),
            model.fingerprint[:8],
        )
    console.print(table)


def _in_words(done: Pruned, is_estimate: bool) -> str:
    total = done.removed + done.kept
    if done.bytes_after is None:
        about = "about " if is_estimate else ""  # what room the rest will take shows when the file is written anew
        return f"would remove {about}{done.removed:,} of {total:,} scores; the file has {_size(done.bytes_before)}"
    sizes = f"{_size(done.bytes_before)} before, {_size(done.bytes_after)} now"
    return f"removed {done.removed:,} of {total:,} scores: {sizes}"


def _date(seconds: int | None) -> str:
    from datetime import datetime, timezone

    return "" if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
