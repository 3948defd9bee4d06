"""Fields of a row: whether a value is what was expected, and a clear word where it is not."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from fastscore.types import InputError, Row

Message: TypeAlias = "dict[str, Any]"
"""What one speaker of a conversation says: ``role``, ``content``, and whatever else the chat template reads."""


def checked_text(row: Row, value: Any, field: str) -> str:
    """The value, if it is a text that a tokenizer takes as it is."""
    if not isinstance(value, str):
        raise mistyped(row, field, "a string", value)
    if "\0" in value:
        raise row.error(f"contains a NUL character at character {value.index(chr(0))}", field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise row.error(f"contains the lone surrogate U+{code:04X} at character {error.start}", field) from None
    return value


def checked_messages(row: Row, value: Any, field: str) -> list[Message]:
    """The value, if it is a conversation: a list of messages with a role, and texts that a tokenizer takes."""
    if not isinstance(value, list) or not value:
        raise mistyped(row, field, "a non-empty list of messages", value)
    for index, message in enumerate(value):
        place = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise mistyped(row, place, "a message (an object with 'role' and 'content')", message)
        if not isinstance(message.get("role"), str):
            raise row.error(f"expected a string, found {describe(message.get('role'))}", f"{place}.role")
        if isinstance(message.get("content"), str):
            checked_text(row, message["content"], f"{place}.content")
    return value


def mistyped(row: Row, field: str, expected: str, value: Any) -> InputError:
    """What to raise for a value of the wrong kind, or for one that is not there."""
    if value is None and field not in row.data and not field.endswith("]"):
        return row.error(f"missing; expected {expected}", field)
    return row.error(f"expected {expected}, found {describe(value)}", field)


def describe(value: object) -> str:
    """A value in a few words on one line, whatever its size."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:40]}…")
    if isinstance(value, int | float):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:40]}…"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "[]"
    return "an object" if isinstance(value, dict) else f"a value of type {type(value).__name__}"
