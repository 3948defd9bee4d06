"""What an error of foreign code says, on one line."""

from __future__ import annotations


def error_text(error: Exception) -> str:
    """Its kind, and its first line (with the next one where that ends in a colon)."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {' '.join(lines[:2] if lines[0].endswith(':') else lines[:1])}"
