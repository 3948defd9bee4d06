"""Pictures of files of figures (``pip install 'fastscore[bench]'`` for matplotlib).

python bench/plot.py kernel RESULT.json PICTURE.svg      of bench/gpu_kernel.py's results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kernel_peers import ANSWER_NLL, FUSED, GEMM_PATH, OURS, PEERS
from kernel_report import FEW_ROWS, LEAST_GEMM_SHARE, MANY_ROWS, MOST_TIMES_LIMIT, shape_of

# Ours in one hue and solid, peers in others and dashed; colours that the colour-blind can tell apart.
STYLES = {
    ANSWER_NLL: {"color": "#0b3c8c", "linewidth": 2.4, "marker": "o"},
    FUSED: {"color": "#3f8fd8", "linewidth": 1.2, "marker": "v"},
    GEMM_PATH: {"color": "#56b4e9", "linewidth": 1.2, "marker": "^"},
    **{
        name: {"color": color, "linewidth": 1.4, "linestyle": "--", "marker": marker}
        for name, color, marker in zip(
            PEERS, ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#666666"), "sDXP*", strict=True
        )
    },
}


def plot_kernel(result: Mapping[str, Any]) -> Any:
    """A panel for each shape: time over the limit against the number of rows, both logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cells = [cell for cell in result["cells"] if "contenders" in cell]
    if not cells:
        raise SystemExit("the file has no measured cells")
    shapes = list(dict.fromkeys(map(shape_of, cells)))
    columns = min(3, len(shapes))
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.5 * rows + 1.2), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for panel, shape in zip(axes, shapes, strict=False):
        here = sorted((cell for cell in cells if shape_of(cell) == shape), key=lambda cell: cell["num_rows"])
        numbers = [cell["num_rows"] for cell in here]
        for name in (*PEERS, *reversed(OURS)):
            points = [
                (cell["num_rows"], cell["contenders"][name]["times_limit"])
                for cell in here
                if "times_limit" in cell["contenders"].get(name, {})
            ]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, markersize=5, **STYLES[name])
        panel.axhline(1, color="black", linewidth=1, label="limit")
        for aim, inside in (
            (MOST_TIMES_LIMIT, [number for number in numbers if number <= FEW_ROWS]),
            (1 / LEAST_GEMM_SHARE, [number for number in numbers if number >= MANY_ROWS]),
        ):
            if inside:
                panel.hlines(aim, inside[0], inside[-1], color="black", linestyle=":", linewidth=1.2, label="aim")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(FixedLocator(numbers))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(FixedLocator([0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000]))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}x"))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(color="#dddddd", linewidth=0.6)
        hidden_size, vocab_size = shape.split("x")
        panel.set_xlabel("answer rows N")
        panel.set_title(f"D {hidden_size}, V {vocab_size}", fontsize=10)
    for panel in axes[::columns]:
        panel.set_ylabel("time / limit")
    environment = result["environment"]
    figure.suptitle(
        f"Answer NLL, {cells[0]['dtype']}, {result['device_limits']['name']}: time over the limit (lower is better)\n"
        f"torch {environment['versions']['torch']}, triton {environment['versions']['triton']}, "
        f"commit {environment['commit'][:10]}, {environment['date'][:10]}",
        fontsize=11,
    )
    used, empty = axes[: len(shapes)], axes[len(shapes) :]
    for panel in empty:
        panel.set_axis_off()
    by_label = {label: line for panel in used for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    order = [name for name in (*OURS, *PEERS, "limit", "aim") if name in by_label]
    place = {"loc": "center"} if empty else {"loc": "outside lower center", "ncols": 5}
    (empty[0] if empty else figure).legend([by_label[name] for name in order], order, fontsize=9, **place)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kernel = kinds.add_parser("kernel", help="a file of bench/gpu_kernel.py")
    kernel.set_defaults(plot=plot_kernel)
    kernel.add_argument("result", type=Path)
    kernel.add_argument("picture", type=Path, help="its ending (.svg, .png, .pdf) says what it becomes")
    options = parser.parse_args(arguments)
    figure = options.plot(json.loads(options.result.read_text(encoding="utf-8")))
    figure.savefig(options.picture, dpi=150, metadata={"Date": None} if options.picture.suffix == ".svg" else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
