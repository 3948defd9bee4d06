"""What the documents say about the program is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import click
import pytest
import tiny_models
import typer
from test_rooms import ROOMS

from fastscore.cli import app
from fastscore.config import Baseline, Normalize, Reduce, Target

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", *GUIDES)
OPTION = r"--[a-z][a-z-]+"
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}


def score_options() -> dict[str, click.Option]:
    command = typer.main.get_command(app).commands["score"]  # type: ignore[attr-defined]
    return {max(option.opts, key=len): option for option in command.params if option.param_type_name == "option"}


def test_every_option_is_in_its_table_and_no_other() -> None:
    table = TEXT["docs/command.md"].split("## Options")[1].split("## ")[0]
    options = score_options()
    named = set(re.findall(OPTION, table))
    assert named == set(options) - {"--help"}
    for line in table.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if len(cells) == 5 and (default := re.fullmatch(r"`([\w-]+)`|(off)|([\d,]+)", cells[2])):
            [name, *_] = [name for name in re.findall(OPTION, cells[1]) if name in options]
            said = default[1] or ("False" if default[2] else default[3].replace(",", ""))
            assert str(options[name].default) == said, line


def test_every_definition_of_a_score_has_its_line() -> None:
    text = TEXT["docs/scores.md"]
    named = re.findall(r"^\| `([^`]+)`", text.split("\n## ")[0], re.MULTILINE)
    choices = {"target": Target, "reduce": Reduce, "baseline": Baseline}
    expected = {f"--{name} {value}" for name, literal in choices.items() for value in get_args(literal)}
    expected |= {f"--normalize {value} --temperature T" for value in get_args(Normalize) if value != "none"}
    assert set(named) == (expected - {"--baseline none"}) | {"--append-eos", "--keep-raw"}


def test_the_models_that_are_named_are_tested() -> None:
    said = " ".join(
        TEXT["docs/models.md"].split("The tests hold, with small random models:")[1].split("\n\n")[0].split()
    )
    match = re.fullmatch(r"packed, (.+?); padded, (.+?); encoder-decoder, (.+?)\.", said)
    assert match is not None, said
    lists = [re.split(r", | and ", names) for names in match.groups()]
    for names, tested in zip(
        lists, (tiny_models.PACKED_FAMILIES, tiny_models.PADDED_FAMILIES, tiny_models.SEQ2SEQ_FAMILIES), strict=True
    ):
        assert {name.strip("`") for name in names} <= set(tested)


def test_every_room_has_its_line() -> None:
    table = TEXT["CONTRIBUTING.md"].split("## Rooms")[1].split("\n## ")[0]
    rooms = {
        name: int(level)
        for level, names in re.findall(r"^\| (\d) \| ([^|]+) \|", table, re.MULTILINE)
        for name in re.findall(r"`([\w/]+)`", names)
    }
    assert rooms == {name: room.level for name, room in ROOMS.items()}


def headings_of(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text, folder = TEXT[name], (ROOT / name).parent
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        assert not file or (folder / file).exists(), target
        if heading:
            there = (folder / file).read_text(encoding="utf-8") if file else text
            assert heading in headings_of(there), target
    for target in re.findall(r"make (\w+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_every_guide_is_in_the_index() -> None:
    named = re.findall(r"^\| \[[\w.-]+\]\(([\w.-]+)\) \|", TEXT["docs/README.md"], re.MULTILINE)
    assert sorted([*named, "README.md"]) == [Path(name).name for name in GUIDES]
