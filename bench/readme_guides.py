"""Measured tables of the guides: what several processes cost, for docs/scale-out.md, how long lm-evaluation-harness's
own model takes, for docs/lm-eval.md, and how fast the cache is, for docs/reliability.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_lm_eval import LM_EVAL
from readme_words import file_name, link, machine, ratio, read_result, wrapped
from scale_out import estimate

SCALE = "scale-out-smollm2-135m-cpu-fp32.json"
HARNESS = "prefix-sharing-lm-eval-smollm2-135m-cpu-fp32.json"
CACHE = "cache-cpu.json"
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
    command = f"python bench/scale_out.py {options['data']} --queries {options['queries']}"
    if int(options["rounds"]) > 1:
        command += f" --rounds {options['rounds']}"
    lines = [
        wrapped(
            f"`{command}`: {options['queries']} rows ({results['plain']['pairs']:,.0f} pairs) with "
            f"{Path(options['model']).name} in {options['dtype']}, one thread in every process; "
            f"{machine(report['environment'])} ({link(SCALE, '../')}). Starting is a run of one row. The overhead over "
            "a plain run is what all workers' time comes to, from the first batch to the end, beyond the plain run's "
            "tokens at the worker's own speed (tokenising, which the plain run does too, counts as overhead); that "
            "speed, as a multiple of the plain run's in the same round, says how two processes share this machine:"
        ),
        "",
        "| | whole run, s | start, s | tokens computed | busy | overhead | speed of a worker | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(name, run) for name, run in results.items()),
        "",
        wrapped(_lost_sharing(results)),
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


def cache(folder: Path) -> str:
    """Look-ups and inserts per second."""
    report = read_result(folder, CACHE)
    if report is None:
        return "Neither has been measured yet."
    cells = report["cells"]
    lines = [
        wrapped(
            f"`python bench/cache.py`: random keys, {report['portion']} scores in an insert, {report['window']:,} keys "
            f"in a look-up, SQLite {report['sqlite']}; {machine(report['environment'])} ({link(CACHE, '../')}). "
            "Thousands per second of one core:"
        ),
        "",
        "| | " + " | ".join(f"{cell['entries']:,} scores" for cell in cells) + " |",
        "| --- |" + " --- |" * len(cells),
    ]
    for name in cells[0]["rates"]:
        rates = (f"{cell['rates'][name]['per_cpu_second'] / 1e3:,.0f}" for cell in cells)
        lines.append(f"| {name} | {' | '.join(rates)} |")
    size = max(cell["bytes_per_entry"] for cell in cells)
    others = ", ".join(f"{each['what']} {each['per_cpu_second']:,.0f} {each['unit']}/s" for each in report["other"])
    lines += ["", wrapped(f"A score takes at most {size:.0f} bytes in the file. Beside that: {others}.")]
    return "\n".join(lines)


def _row(name: str, run: Mapping[str, Any]) -> str:
    by_round = run["worker by round"]
    cells = [MEANING[name], f"{run['seconds']:.1f}", f"{run['start']:.1f}", f"{run['tokens']:,.0f}"]
    cells += ["" if run[key] is None else f"{run[key]:.1%}" for key in ("busy", "overhead")]
    if name == "plain":
        cells += ["1", "1"]
    else:
        cells += [f"{run['worker']:.2f} ({min(by_round):.2f}-{max(by_round):.2f})", f"{run['speed-up']:.2f}"]
    return f"| {' | '.join(cells)} |"


def _lost_sharing(results: Mapping[str, Any]) -> str:
    plain = results["plain"]["tokens"]
    found = [
        f"{MEANING[name]} computed {run['tokens'] / plain - 1:.2%} more tokens than one process and was at work for "
        f"{run['busy']:.1%} of the time"
        for name, run in results.items()
        if run["busy"] is not None
    ]
    return (
        "Passages of this file come back all over it, and since pairs are dealt out sorted by their prompts, each is "
        f"computed by one worker all the same: {'; '.join(found)}. The rest is waiting for each other at the end, of "
        "which a longer file has less, and on CPUs tokenising, which a plain run does too."
    )


def _on_paper(report: Mapping[str, Any]) -> str:
    fed = report["fed pairs/s"]
    return (
        f"The process that reads and writes feeds {fed:,.0f} pairs/s. For {PAIRS:,.0f} pairs that is "
        f"{PAIRS / fed / 3600:.1f} hours at least, however many workers there are; with {WORKERS} of them it is the "
        f"first bottleneck when each scores more than {fed / WORKERS:,.0f} pairs/s; until then the workers are. The "
        "speed of a GPU has not been measured; on workers like the one measured here, a core of a CPU, it would be:"
    )
