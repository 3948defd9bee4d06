"""What several processes cost, for docs/scale-out.md, and how long lm-evaluation-harness's own model takes, for
docs/lm-eval.md, from the files of ``scale_out.py`` and ``prefix_sharing.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_lm_eval import LM_EVAL
from readme_words import file_name, link, machine, ratio, read_result, wrapped
from scale_out import estimate

SCALE = "scale-out-smollm2-135m-cpu-fp32.json"
HARNESS = "prefix-sharing-lm-eval-smollm2-135m-cpu-fp32.json"
PAIRS, WORKERS = 1e8, 64
MEANING = {
    "plain": "`fastscore score`",
    "torchrun 1": "torchrun, one process",
    "torchrun 2": "torchrun, two",
    "ray 1": "Ray, one worker",
    "ray 2": "Ray, two",
}


def scale_out(folder: Path) -> str:
    """The measured table, and the estimate that follows from it."""
    report = read_result(folder, SCALE)
    if report is None:
        return "Neither has been measured yet."
    options, results = report["options"], report["results"]
    command = f"python bench/scale_out.py {Path(options['data']).name} --queries {options['queries']}"
    if int(options["rounds"]) > 1:
        command += f" --rounds {options['rounds']}"
    rows = 2 * int(options["queries"])
    lines = [
        wrapped(
            f"`{command}`: {rows} rows with {Path(options['model']).name} in {options['dtype']}, one thread in every "
            f'process; {machine(report["environment"])} ({link(SCALE, "../")}). "Without start" is what the second '
            "half of the rows took; efficiency is the speed-up of that over the number of workers:"
        ),
        "",
        "| | whole run, s | pairs/s without start | speed-up | efficiency | start, s |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(name, run) for name, run in results.items()),
        "",
        wrapped(_on_paper(report)),
        "",
        "```text",
        estimate(report, PAIRS, WORKERS),
        "```",
    ]
    return "\n".join(lines)


def harness(folder: Path) -> str:
    """The harness's own model beside ours on the same requests."""
    report = read_result(folder, HARNESS)
    if report is None:
        return "That has not been measured yet."
    tasks = [file["workload"] for file in report["files"]]
    lines = [
        wrapped(
            f"`python bench/prefix_sharing.py --lm-eval --dtype {report['files'][0]['dtype']} --queries "
            f"{tasks[0]['queries']} --questions {tasks[1]['queries']} --rounds {report['rounds']}`: {report['model']}; "
            f"{machine(report['environment'])} ({link(HARNESS, '../')}). HFLM with the fastest of its batch sizes, on "
            "the same token ids, once its answers agree:"
        ),
        "",
        "| | tokens over distinct prefixes | HFLM's time over fastscore's |",
        "| --- | --- | --- |",
    ]
    for file, task in zip(report["files"], tasks, strict=True):
        name = f"{file_name(task)}, {task['pairs']} requests"
        lines.append(f"| {name} | {file['sharing_factor']:.2f} | {ratio(file['contenders'][LM_EVAL])} |")
    return "\n".join(lines)


def _row(name: str, run: Mapping[str, Any]) -> str:
    return (
        f"| {MEANING[name]} | {run['seconds']:.1f} | {1 / run['seconds per pair']:.2f} | {run['speed-up']:.2f} | "
        f"{run['efficiency']:.0%} | {run['start']:.1f} |"
    )


def _on_paper(report: Mapping[str, Any]) -> str:
    fed = report["fed pairs/s"]
    return (
        f"The process that reads and writes feeds {fed:,.0f} pairs/s. For {PAIRS:,.0f} pairs that is "
        f"{PAIRS / fed / 3600:.1f} hours at least, however many workers there are; with {WORKERS} of them it is the "
        f"first bottleneck when each scores more than {fed / WORKERS:,.0f} pairs/s; until then the workers are. The "
        "speed of a GPU has not been measured; on workers like the one measured here, a core of a CPU, it would be:"
    )
