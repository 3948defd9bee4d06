"""Templates: named fields put into a text that ends with the answer. Nothing in them is evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from fastscore.config import Target
from fastscore.types import InputError

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_PIECE = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")
_NOT_IN_A_NAME = {
    ".": "attributes are not looked up",
    "[": "items are not looked up",
    "]": "items are not looked up",
    "!": "conversions are not supported",
    ":": "format specifications are not supported",
}


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template. ``strip``: white space around each value is dropped, as the reference system's qa does it.

    ``pieces`` are (literal text, name of the field after it or None); ``{answer}`` stands after them all, and
    ``answer_prefix`` is the space before it, which belongs to the answer: tokenizers put it into the word's token.
    """

    pieces: tuple[tuple[str, str | None], ...]
    answer_prefix: str
    strip: bool = False

    @property
    def has_key(self) -> bool:
        """Whether a row has candidates, or is its own only one."""
        return any(field == "key" for _, field in self.pieces)

    @property
    def row_fields(self) -> tuple[str, ...]:
        """The fields that are taken from the row, each once, in order."""
        fields = (field for _, field in self.pieces if field is not None and field != "key")
        return tuple(dict.fromkeys(fields))

    def without_key(self) -> Template:
        """The same template without a passage.

        Lines that hold ``{key}`` and no other field go, with the blank lines after them; elsewhere ``{key}`` is empty.
        """
        lines: list[list[tuple[str, str | None]]] = [[]]
        for literal, field in self.pieces:
            for part in _LINE.findall(literal):
                lines[-1].append((part, None))
                if part.endswith("\n"):
                    lines.append([])
            if field is not None:
                lines[-1].append(("", field))
        *whole, last = lines  # the last one goes on with what is scored
        kept: list[tuple[str, str | None]] = []
        dropping = False
        for line in whole:
            fields = {field for _, field in line if field is not None}
            blank = not fields and not "".join(text for text, _ in line).strip()
            dropping = fields == {"key"} or (dropping and blank)
            if not dropping:
                kept += line
        return replace(self, pieces=tuple(piece for piece in (*kept, *last) if piece[1] != "key"))

    def prompt(self, values: Mapping[str, str]) -> str:
        """The text before the answer."""
        return "".join(
            literal + ("" if field is None else self._clean(values[field])) for literal, field in self.pieces
        )

    def answer(self, answer: str) -> str:
        """The answer as it follows the prompt."""
        return self.answer_prefix + self._clean(answer)

    def _clean(self, value: str) -> str:
        return value.strip() if self.strip else value


@lru_cache(maxsize=32)
def parse_template(source: str, strip: bool = False, target: Target = "answer") -> Template:
    """Parse ``"Q: {query}\\nA: {answer}"``: ``{name}`` is a field, ``{{`` and ``}}`` are literal braces.

    ``{answer}``, or whatever the ``target`` is, stands once, at the very end. ``{key}`` is the candidate.

    Raises:
        InputError: with ``field="template"``: anything else.
    """
    pieces: list[tuple[str, str | None]] = []
    literal = ""
    for match in _PIECE.finditer(source):
        piece = match[0]
        if piece in ("{{", "}}"):
            literal += piece[0]
        elif piece in ("{", "}"):
            raise _error(f"single {piece!r} at character {match.start()}; a literal brace is written twice", source)
        elif piece.startswith("{"):
            pieces.append((literal, _field_name(piece, source)))
            literal = ""
        else:
            literal += piece
    found = sum(field == target for _, field in pieces)
    if found != 1:
        raise _error(f"expected {{{target}}} exactly once, found it {found} times", source)
    if literal or pieces[-1][1] != target:
        raise _error(f"expected {{{target}}} at the very end", source)
    if target == "query" and any(field == "answer" for _, field in pieces):
        raise _error("{answer} has no place where the query is scored", source)
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in source):
        raise _error("contains a NUL character or a lone surrogate", source)
    before_answer = pieces.pop()[0]
    prefix = " " if before_answer.endswith(" ") else ""
    if last := before_answer.removesuffix(prefix):
        pieces.append((last, None))
    return Template(tuple(pieces), prefix, strip)


def _field_name(piece: str, source: str) -> str:
    name = piece[1:-1]
    if not name.strip() or name != name.strip():
        raise _error(f"expected a field's name between the braces of {piece!r}, without white space around it", source)
    for character, reason in _NOT_IN_A_NAME.items():
        if character in name:
            raise _error(f"{piece!r} is not a field's name: {reason}", source)
    return name


def _error(message: str, source: str) -> InputError:
    return InputError(f"{message} (in {source!r})", field="template")
