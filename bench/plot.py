"""Pictures of files of figures (``pip install 'fastscore[bench]'`` for matplotlib).

python bench/plot.py end-to-end RESULT.json PICTURE.svg  of bench/end_to_end.py's results
python bench/plot.py kernel RESULT.json PICTURE.svg      of bench/gpu_kernel.py's results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import LIMIT
from contenders import OURS as FASTSCORE
from contenders import PADDED, TUNED
from kernel_peers import ANSWER_NLL, FUSED, GEMM_PATH, OURS, PEERS
from kernel_report import FEW_ROWS, LEAST_GEMM_SHARE, MANY_ROWS, MOST_TIMES_LIMIT, shape_of
from peer_lm_eval import LM_EVAL
from peer_vllm import VLLM, VLLM_PREFILL

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


BAR_LABELS = {
    FASTSCORE: "fastscore",
    PADDED: "padded batches of 4",
    TUNED: "padded, tuned",
    LM_EVAL: "lm-evaluation-harness",
    VLLM: "vLLM, prompt_logprobs",
    VLLM_PREFILL: "vLLM, prefill without scores",
    LIMIT: "useful work at the GEMM rate",
}
INK, QUIET, ACCENT, GREY, LIMIT_FILL = "#1f2328", "#59636e", "#0969da", "#aeb6bf", "#eef1f4"


def plot_end_to_end(result: Mapping[str, Any]) -> Any:
    """A bar for each contender, the slowest first; what gives no scores is drawn as an outline.

    On white of its own: it stands in pages that are light or dark.
    """
    from matplotlib.figure import Figure

    timed = {name: each for name, each in result["contenders"].items() if "median_seconds" in each}
    seconds = {name: each["median_seconds"] for name, each in timed.items()}
    seconds[LIMIT] = result["limit_seconds"]
    names = sorted(seconds, key=lambda name: seconds[name])
    ours, longest = seconds[FASTSCORE], max(seconds.values())
    figure = Figure(figsize=(8.2, 0.46 * len(names) + 1.5), facecolor="white")
    panel = figure.add_axes((0.27, 0.62 / figure.get_figheight(), 0.70, 1 - 1.18 / figure.get_figheight()))
    for place, name in enumerate(names):
        gives_scores = name not in (VLLM_PREFILL, LIMIT)
        panel.barh(
            place,
            seconds[name],
            height=0.66,
            color=(ACCENT if name == FASTSCORE else GREY) if gives_scores else LIMIT_FILL,
            edgecolor="none" if gives_scores else GREY,
            linestyle="-" if gives_scores else "--",
        )
        if name in timed and len(each := timed[name]["seconds"]) > 1:
            panel.plot([min(each), max(each)], [place, place], color=INK, linewidth=0.9, solid_capstyle="butt")
        right = max([seconds[name], *(timed[name]["seconds"] if name in timed else [])])
        weight = "bold" if name == FASTSCORE else "normal"
        times = "" if name == FASTSCORE else f"   {seconds[name] / ours:.2f}x"
        panel.text(
            right + 0.012 * longest, place, f"{seconds[name]:.1f} s{times}", va="center", color=INK, weight=weight
        )
        panel.text(
            -0.015 * longest, place, BAR_LABELS.get(name, name), va="center", ha="right", color=INK, weight=weight
        )
    most = max([longest, *(max(each["seconds"]) for each in timed.values())])
    panel.set_xlim(0, most * 1.25)
    panel.set_ylim(-0.6, len(names) - 0.4)
    panel.invert_yaxis()
    panel.set_yticks([])
    panel.set_xticks([])
    for side in ("top", "right", "bottom"):
        panel.spines[side].set_visible(False)
    panel.spines["left"].set_color(QUIET)
    task, where = result["workload"], result["environment"]
    height = figure.get_figheight()
    figure.text(
        0.025,
        1 - 0.2 / height,
        f"Seconds to score {task['pairs']:,} pairs with {result['model']} in {result['dtype']}; shorter is better",
        color=INK,
        fontsize=11.5,
        weight="bold",
        va="top",
    )
    device = where["gpus"][0]["name"] if where["gpus"] else f"{where['cpu']}, {where['threads']} threads"
    figure.text(
        0.025,
        0.14 / height,
        f"{task['tokens']:,} tokens of {task['source']}; {device}; medians of {result['rounds']} rounds by turns, "
        "lines span the rounds\n"
        f"torch {where['versions']['torch']}, transformers {where['versions']['transformers']}, commit "
        f"{where['commit'][:10]}, {where['date'][:10]}. Dashed: no scores come out.",
        color=QUIET,
        fontsize=8,
        va="bottom",
    )
    return figure


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
    for name, plot, made_by in (
        ("end-to-end", plot_end_to_end, "bench/end_to_end.py"),
        ("kernel", plot_kernel, "bench/gpu_kernel.py"),
    ):
        kind = kinds.add_parser(name, help=f"a file of {made_by}")
        kind.set_defaults(plot=plot)
        kind.add_argument("result", type=Path)
        kind.add_argument("picture", type=Path, help="its ending (.svg, .png, .pdf) says what it becomes")
    options = parser.parse_args(arguments)
    figure = options.plot(json.loads(options.result.read_text(encoding="utf-8")))
    figure.savefig(options.picture, dpi=150, metadata={"Date": None} if options.picture.suffix == ".svg" else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
