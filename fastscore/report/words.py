"""Figures as they are written on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastscore.report.collect import NEGATIVE, POSITIVE, UNLABELLED
from fastscore.report.figures import LengthBin, RankGroup, ScoreBin

LABELS = {POSITIVE: "positive", NEGATIVE: "negative", UNLABELLED: "candidate"}
MINUS = "−"


def label(value: int) -> str:
    """What a candidate is called."""
    return LABELS[value]


def labels(value: int) -> str:
    """What several candidates are called."""
    return f"{LABELS[value]}s"


def number(value: float, digits: int = 2) -> str:
    """A score or a margin, with a real minus sign; what rounds to nothing is not negative."""
    text = f"{value:,.{digits}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def edge(value: float) -> str:
    """The edge of a bin, which is a round number."""
    return f"{value:g}".replace("-", MINUS)


def count(value: int, noun: str = "", plural: str = "") -> str:
    """``1,234``; with a noun, ``1 row`` or ``1,234 rows``."""
    if not noun:
        return f"{value:,}"
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


def share(part: float, whole: float, digits: int = 1) -> str:
    """Percent; 100% and 0% only where nothing is missing and nothing there."""
    if not whole:
        return "–"
    ratio = part / whole
    step = 10.0**-digits
    percent = 100 * ratio
    if 0 < ratio < 1:
        percent = min(max(percent, step), 100 - step)
    return f"{percent:.{digits}f}%"


def duration(seconds: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def size(value: float) -> str:
    """A count that may be large, to three digits: ``59,730``, ``1.25 million``."""
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= unit:
            digits = max(2 - math.floor(math.log10(value / unit)), 0)
            return f"{value / unit:.{digits}f} {name}"
    return f"{value:,.0f}"


def say_bin(found: ScoreBin, totals: Mapping[int, int]) -> str:
    """A bin of scores in words."""
    parts = [
        f"{count(found.counts[label], LABELS[label])} ({share(found.counts[label], total)})"
        for label, total in totals.items()
    ]
    return f"{edge(found.low)} to {edge(found.high)}: {', '.join(parts)}"


def say_group(group: RankGroup, last: int) -> str:
    """One value or a group of neighbours in words."""
    if group.first == group.last:
        return f"row {count(group.first)} of {count(last)}, line {count(group.line)}: {number(group.median, 3)}"
    between = f"{number(group.low, 3)} to {number(group.high, 3)}"
    return f"rows {count(group.first)} to {count(group.last)} of {count(last)}: {between}"


def say_length_bin(found: LengthBin) -> str:
    """A bin of lengths in words."""
    parts = [
        f"{LABELS[label]}s {number(median)} ({count(num)})" for label, (num, _, median, _) in found.quartiles.items()
    ]
    return f"{count(found.low)} to {count(found.high)} characters: median of {', '.join(parts)}"
