"""The charts of the page, as SVG.

They are drawn by Vega-Lite while the page is written (``vl-convert-python``: one wheel without dependencies, made by
the Vega project, that brings Vega and the engine it runs in, so nothing is fetched). What else was weighed, each of
which works offline too:

- Plotly, Bokeh and Vega drawing in the reader's browser put 4.8, 1.3 and 0.9 MB of script into every page, show
  nothing where scripts are off, and redraw for dark mode. Plotly's marks and Bokeh's canvas tell a screen reader
  nothing.
- Matplotlib's SVG is static as well, but its marks carry no labels, and every colour and size is written out.

Vega's SVG takes CSS variables for colours (one picture for light and dark) and gives each mark an ``aria-label``. A
chart has one unseen mark for each value, over the full height; ``chart.js`` shows its label to the mouse and to the
arrow keys. Nothing else needs that script. A file takes less than half a megabyte of the page, its texts included.

Only numbers and words of this file go into a chart, never a text of the scored file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastscore.report.collect import NEGATIVE, POSITIVE, UNLABELLED
from fastscore.report.definition import with_unit
from fastscore.report.figures import Figures, Lengths, RankGroup, ScoreBin
from fastscore.report.run_facts import COMPUTED
from fastscore.report.words import LABELS, count, number, say_bin, say_group, say_length_bin, size

Spec = dict[str, Any]

WIDE, NARROW = 816, 312
"""Pixels. The page shows one or the other, so that text keeps its size on small screens."""

_COLORS = {POSITIVE: "var(--pos)", NEGATIVE: "var(--neg)", UNLABELLED: "var(--other)"}
_DASHES = {POSITIVE: [1, 0], NEGATIVE: [5, 3], UNLABELLED: [1, 0]}
_LOG_FROM = 20
"""Lengths that differ by more than this factor get a logarithmic axis."""

_CONFIG: Spec = {
    "background": None,
    "padding": {"left": 2, "right": 6, "top": 4, "bottom": 2},
    "autosize": {"type": "fit", "contains": "padding"},
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domainColor": "var(--rule)",
        "gridColor": "var(--grid)",
        "tickColor": "var(--rule)",
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
    "axisX": {"grid": False, "labelOverlap": "greedy", "labelSeparation": 8, "tickCount": {"expr": "width / 65"}},
}


@dataclass(frozen=True, slots=True)
class Chart:
    """The same picture in two widths, and what it shows in one sentence."""

    wide: str
    narrow: str
    label: str


def score_chart(figures: Figures, unit: str) -> Chart:
    """Distributions over shared bins, each as shares of its own kind: negatives are usually many more."""
    totals = {summary.label: summary.count for summary in figures.summaries}
    layers: list[Spec] = []
    for label in sorted(totals):  # positives above negatives
        steps = _steps(figures.bins, label, totals[label])
        layers.append(
            {
                "data": {"values": steps},
                "mark": {
                    "type": "area",
                    "interpolate": "step-after",
                    "fill": _COLORS[label],
                    "fillOpacity": 0.22,
                    "line": {"stroke": _COLORS[label], "strokeWidth": 2, "strokeDash": _DASHES[label], "aria": False},
                    "aria": False,
                },
                "encoding": {"x": {"field": "score"}, "y": {"field": "share"}},
            }
        )
    for summary in figures.summaries:
        layers.append(
            _rule({"x": {"datum": summary.median}}, _COLORS[summary.label], strokeDash=[2, 2], strokeWidth=1.5)
        )
    values = [{"low": found.low, "high": found.high, "said": say_bin(found, totals)} for found in figures.bins]
    layers.append(_hits(values, {"x": {"field": "low"}, "x2": {"field": "high"}}))
    domain = [figures.bins[0].low, figures.bins[-1].high]
    encoding = {
        "x": _axis(with_unit("score", unit), domain=domain, nice=False),
        "y": _axis("share of its kind", format=".0%", tickCount=4),
    }
    medians = ", ".join(f"{LABELS[s.label]}s {number(s.median)}" for s in figures.summaries)
    return _chart(layers, encoding, 250, f"Distribution of scores. Medians: {medians}.")


def rank_chart(groups: Sequence[RankGroup], what: str, unit: str, label: int, num_below: int = 0) -> Chart:
    """Values from the highest to the lowest, as bars from a visible zero line; ``num_below`` of them are below it."""
    last = groups[-1].last
    gap = 0.08 if last <= 60 else 0
    values = [
        {
            "from": group.first - 0.5 + gap,
            "to": group.last + 0.5 - gap,
            "hit_from": group.first - 0.5,
            "hit_to": group.last + 0.5,
            "value": group.median,
            "said": say_group(group, last),
        }
        for group in groups
    ]
    color = {
        "condition": {"test": "datum.value < 0", "value": _COLORS[NEGATIVE]},
        "value": _COLORS[label],
    }
    bars: Spec = {
        "data": {"values": values},
        "mark": {"type": "rect", "strokeWidth": 1, "aria": False},  # the stroke lets the smallest be seen
        "encoding": {
            "x": {"field": "from"},
            "x2": {"field": "to"},
            "y": {"field": "value"},
            "y2": {"datum": 0},
            "fill": color,
            "stroke": color,
        },
    }
    zero = _rule({"y": {"datum": 0}}, "var(--ink)", strokeWidth=1.5)
    hits = _hits(values, {"x": {"field": "hit_from"}, "x2": {"field": "hit_to"}})
    encoding = {
        "x": _axis("rows, highest first", domain=[0.5, last + 0.5], nice=False, format=",d", tickMinStep=1),
        "y": _axis(with_unit(what, unit), tickCount=5),
    }
    said = f"{what.capitalize()} of {count(last, 'row')}, highest first, "
    said += f"from {number(groups[0].high)} to {number(groups[-1].low)}"
    said += f"; {count(num_below)} below zero." if num_below else "."
    return _chart([bars, zero, hits], encoding, 230, said)


def length_chart(lengths: Lengths, unit: str) -> Chart:
    """Single candidates as points, the median of every bin as a line."""
    layers: list[Spec] = []
    shapes: Mapping[int, Spec] = {
        NEGATIVE: {"filled": False, "size": 26, "strokeWidth": 1.1, "opacity": 0.55},
        POSITIVE: {"filled": True, "size": 34, "opacity": 0.75},
        UNLABELLED: {"filled": False, "size": 26, "strokeWidth": 1.1, "opacity": 0.55},
    }
    for label in sorted(lengths.points):
        points = [{"length": max(length, 1), "score": score} for length, score in lengths.points[label]]
        layers.append(
            {
                "data": {"values": points},
                "mark": {"type": "point", "color": _COLORS[label], "aria": False, **shapes[label]},
                "encoding": {"x": {"field": "length"}, "y": {"field": "score"}},
            }
        )
    low, high = max(lengths.bins[0].low, 1), max(lengths.bins[-1].high, 1)
    log = high > _LOG_FROM * low
    for label in sorted(lengths.points):
        medians = [
            {"length": max(b.median, 1), "score": b.quartiles[label][2]} for b in lengths.bins if label in b.quartiles
        ]
        for color, width, dash in (
            () if len(lengths.bins) < 2 else (("var(--paper)", 5, [1, 0]), (_COLORS[label], 2.5, _DASHES[label]))
        ):
            layers.append(
                {
                    "data": {"values": medians},
                    "mark": {"type": "line", "stroke": color, "strokeWidth": width, "strokeDash": dash, "aria": False},
                    "encoding": {"x": {"field": "length"}, "y": {"field": "score"}},
                }
            )
    tops = [max(b.high, 1) for b in lengths.bins]
    values = [
        {"low": bottom, "high": top, "said": say_length_bin(b)}
        for b, bottom, top in zip(lengths.bins, [low, *tops[:-1]], tops, strict=True)
    ]
    layers.append(_hits(values, {"x": {"field": "low"}, "x2": {"field": "high"}}))
    scale = {"type": "log"} if log else {"zero": False}
    encoding = {
        "x": _axis("length of the candidate, characters", domain=[low, high], nice=False, **scale),
        "y": _axis(with_unit("score", unit), tickCount=5, zero=False),
    }
    said = "Length of candidates against their scores"
    if lengths.correlation is not None:
        said += f"; rank correlation {number(lengths.correlation)}"
    return _chart(layers, encoding, 280, f"{said}.")


def token_chart(counts: Mapping[str, int]) -> Chart:
    """Numbers of tokens as horizontal bars."""
    values = [
        {"name": name, "tokens": tokens, "text": f"{name}: {size(tokens)}", "said": f"{name}: {count(tokens, 'token')}"}
        for name, tokens in counts.items()
    ]
    y = {
        "field": "name",
        "type": "nominal",
        "sort": None,
        "axis": None,
        "scale": {"paddingInner": 0, "paddingOuter": 0},
    }
    fill = {"condition": {"test": f"datum.name == '{COMPUTED}'", "value": "var(--pos)"}, "value": "var(--rule)"}
    bars: Spec = {
        "data": {"values": values},
        "mark": {"type": "bar", "height": 12, "yOffset": 10, "fill": "var(--rule)", "aria": False},
        "encoding": {"x": {"field": "tokens"}, "y": y, "fill": fill},
    }
    texts: Spec = {
        "data": {"values": values},
        "mark": {
            "type": "text",
            "align": "left",
            "dx": 1,
            "dy": -7,
            "fontSize": 12.5,
            "fill": "var(--ink)",
            "aria": False,
        },
        "encoding": {"x": {"datum": 0}, "y": y, "text": {"field": "text"}},
    }
    hits = _hits(values, {"y": y})
    encoding = {
        "x": {"type": "quantitative", "axis": None, "scale": {"domain": [0, max(*counts.values(), 1)], "nice": False}}
    }
    said = "; ".join(f"{name}: {count(tokens, 'token')}" for name, tokens in counts.items())
    return _chart([bars, texts, hits], encoding, 44 * len(counts) + 6, f"Tokens through the model. {said}.")


def _steps(bins: Sequence[ScoreBin], label: int, total: int) -> list[Spec]:
    """Corners of a stepped outline from the first bin that holds something to the last."""
    held = [index for index, found in enumerate(bins) if found.counts[label]]
    inner = bins[held[0] : held[-1] + 1]
    corners = [(found.low, found.counts[label] / total) for found in inner]
    corners = [(inner[0].low, 0.0), *corners, (inner[-1].high, 0.0)]
    return [{"score": score, "share": part} for score, part in corners]


def _axis(title: str | None, *, format: str | None = None, tickCount: int | None = None, **scale: Any) -> Spec:
    axis = {"format": format, "tickCount": tickCount, "tickMinStep": scale.pop("tickMinStep", None)}
    axis = {name: value for name, value in axis.items() if value is not None}
    return {"type": "quantitative", "title": title, "axis": axis, "scale": scale}


def _rule(encoding: Spec, color: str, **mark: Any) -> Spec:
    return {"data": {"values": [{}]}, "mark": {"type": "rule", "stroke": color, "aria": False, **mark}} | {
        "encoding": encoding
    }


def _hits(values: Sequence[Spec], encoding: Spec) -> Spec:
    """Unseen marks that carry the words for each value."""
    mark = {"type": "rect", "fill": "var(--ink)", "fillOpacity": 0, "ariaRoleDescription": "value"}
    return {"data": {"values": list(values)}, "mark": mark, "encoding": {**encoding, "description": {"field": "said"}}}


def _chart(layers: list[Spec], encoding: Spec, height: int, label: str) -> Chart:
    wide, narrow = (
        _draw({"width": width, "height": height, "config": _CONFIG, "encoding": encoding, "layer": layers})
        for width in (WIDE, NARROW)
    )
    return Chart(wide, narrow, label)


def _draw(spec: Spec) -> str:
    import vl_convert

    return vl_convert.vegalite_to_svg(spec)
