"""Writes measured tables of the README and of docs/ from ``results/``: ``python bench/readme_table.py``.

What stands between ``<!-- measured: NAME -->`` and ``<!-- end of measured: NAME -->`` is made by the function of that
name below, from its files alone, and says on what they were measured. Where a file is absent, so does the README.
``--check`` writes nothing and has exit status 1 when the README says something else than the files.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import LIMIT, ways, why_not_measured
from contenders import NO_TREE, OURS, PADDED, TUNED
from end_to_end import PEERS
from environment import ROOT
from peer_lm_eval import LM_EVAL
from peer_vllm import VLLM, VLLM_PREFILL
from readme_guides import cache, harness, scale_out
from readme_numerics import SHARING, fidelity, fidelity_in_full, invariance, moved_by_sharing, quantized
from readme_words import amount, emulated, file_name, link, machine, ratio, read_result, rounds_told, wrapped
from startup import FIRST_SCORE, HELP, NEW_MODEL, ONE_ROW

README = ROOT / "README.md"
NUMERICS, SCALE_OUT, HARNESS, RELIABILITY = (
    ROOT / "docs" / f"{name}.md" for name in ("numerics", "scale-out", "lm-eval", "reliability")
)
RESULTS = ROOT / "bench" / "results"
END_TO_END = {name: f"end-to-end-smollm2-135m-cpu-{name}.json" for name in ("bf16", "fp32", "bf16-avx2")}
SHARING_EMULATED = "prefix-sharing-smollm2-135m-cpu-bf16-avx2.json"
LINEAR, STARTUP = "linear-smollm2-135m-cpu.json", "startup-smollm2-135m-cpu.json"
GPU = "gpu-end-to-end.json"

MEANING = {
    PADDED: "padded batches of four, file order, full logits",
    TUNED: "padded, sorted, batch size picked, logits of answers only",
    NO_TREE: "fastscore, nothing shared",
    LM_EVAL: "lm-evaluation-harness, batch size picked",
    VLLM: "vLLM, `prompt_logprobs`",
    VLLM_PREFILL: "vLLM, plain prefill without scores",
    LIMIT: "the useful work at the GEMM rate (computed)",
}


def end_to_end(folder: Path) -> str:
    """All contenders on one file, with the limit, in each dtype that was measured (bf16 on CPUs of two kinds)."""
    found = {name: report for name in END_TO_END.values() if (report := read_result(folder, name)) is not None}
    if not found:
        return "Against its peers, fastscore has not been measured yet (`python bench/end_to_end.py`)."
    return "\n\n".join(_against_peers(folder, name, report) for name, report in found.items())


def _against_peers(folder: Path, file: str, report: Mapping[str, Any]) -> str:
    task, where = report["workload"], report["environment"]
    command = f"python bench/end_to_end.py --dtype {report['dtype']} --queries {task['queries']}"
    command += f" --rounds {report['rounds']}"
    took_part = [peer for peer in PEERS if peer in report["contenders"] or peer in report["left_out"]]
    if took_part != list(PEERS):
        command += f" --peers {' '.join(took_part)}"
    lines = [
        wrapped(
            f"**Against other ways.** `{command}`: {task['queries']} queries of {file_name(task)}, {task['pairs']:,} "
            f"pairs, {task['tokens']:,} tokens, with {report['model']} in {report['dtype']}; {machine(where)}. "
            f"Contenders by turns on the same token ids; {rounds_told(report['rounds'])} ({link(file)})."
            f"{emulated(report, report['dtype'])}"
        ),
        "",
        "| | seconds | tokens/s | times fastscore's time | of the GEMM rate | mean distance from fastscore, nats |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, values in report["contenders"].items():
        apart = values.get("difference_from_fastscore")
        distance = "" if apart is None else f"{apart['mean']:.2g}" + ("" if apart["per_token"] else " per pair's mean")
        if "median_seconds" not in values:
            lines.append(f"| {MEANING.get(name, name)} | {ratio(values)} | | | | {distance} |")
            continue
        lines.append(
            f"| {MEANING.get(name, name)} | {values['median_seconds']:.1f} | {values['pair_tokens_per_s']:,.0f} | "
            f"{ratio(values)} | {values['useful_flop_efficiency']:.0%} | {distance} |"
        )
    limit, ours = report["limit_seconds"], report["contenders"][OURS]
    lines += [
        f"| {MEANING[LIMIT]} | {limit:.1f} | {report['pair_tokens'] / limit:,.0f} | "
        f"{limit / ours['median_seconds']:.2f} | 100% | |",
        "",
        wrapped(
            '"Of the GEMM rate" is useful work over time and the rate of the model\'s own matrix products, '
            f"{report['gemm_tflops_per_s'] * 1e3:,.0f} GFLOP/s in this run ([bench/](bench/README.md)); it counts the "
            f"last layer at all tokens, of which fastscore skips a part: {ours['efficiency_without_skippable']:.0%} "
            "without."
        ),
    ]
    lines += [f"Left out: {name}, {reason}." for name, reason in report["left_out"].items()]
    picture = Path(file).with_suffix(".svg").name
    if (folder / picture).exists():
        lines += ["", f"![Seconds of each contender](bench/results/{picture})"]
    return "\n".join(lines)


def costs(folder: Path) -> str:
    """Start-up, and how cost and memory grow."""
    start, growth = read_result(folder, STARTUP), read_result(folder, LINEAR)
    lines = []
    if start is None:
        lines.append("Start-up has not been measured yet (`python bench/startup.py`).")
    else:
        median = start["median_seconds"]
        lines.append(
            wrapped(
                "**Start.** `python bench/startup.py`: from the start of Python to the first score "
                f"{median[FIRST_SCORE]:.1f} s with {start['model']} in the cache ({median[NEW_MODEL]:.1f} s when it is "
                "loaded for the first time: nothing is noted of it then, and transformers' code for models is "
                "imported), a whole `fastscore score` of one row "
                f"{median[ONE_ROW]:.1f} s, `fastscore --help` {median[HELP]:.2f} s; {machine(start['environment'])} "
                f"({link(STARTUP)})."
            )
        )
    lines.append("")
    if growth is None:
        lines.append("How cost grows has not been measured yet (`python bench/linear.py`).")
    else:
        begun, layers = statistics.median(growth["start_seconds"]), growth["layers"]
        command, model = "python bench/linear.py", growth["model"]
        if layers is not None:
            command, model = f"{command} --layers {layers}", f"the first {layers} layers of {model}"
        if (window := growth["window_tokens"]) is not None:
            command += f" --window-tokens {window}"
        if growth["rounds"] > 1:
            command += f" --rounds {growth['rounds']}"
        lines += [
            wrapped(
                f"**Growth.** `{command}`: `fastscore score` from file to file with {model}; "
                f"{machine(growth['environment'])} ({link(LINEAR)}). The start, {begun:.1f} s, is taken off the "
                "times per pair and per token; a prefix that occurs in two windows is computed twice:"
            ),
            "",
            "| pairs | tokens computed | seconds | ms per pair | ms per 1,000 tokens | peak memory, MiB |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {file['pairs']:,} | {file['tokens_computed']:,} | {file['median_seconds']:.1f} | "
                f"{file['seconds_per_pair'] * 1e3:.2f} | "
                f"{file['seconds_per_pair'] * file['pairs'] / file['tokens_computed'] * 1e6:.0f} | "
                f"{file['peak_bytes'] / 2**20:,.0f} |"
                for file in growth["files"]
            ),
        ]
    return "\n".join(lines)


def sharing(folder: Path) -> str:
    """What the prefix tree brings, with bf16 instructions and without."""
    found = {name: report for name in (SHARING, SHARING_EMULATED) if (report := read_result(folder, name)) is not None}
    if not found:
        return "What sharing brings has not been measured yet (`python bench/prefix_sharing.py`)."
    return "\n\n".join(_by_sharing(name, report) for name, report in found.items())


def _by_sharing(name: str, report: Mapping[str, Any]) -> str:
    tasks, dtype = [file["workload"] for file in report["files"]], report["files"][0]["dtype"]
    told = rounds_told(report["rounds"], " as multiples of fastscore's")
    lines = [
        wrapped(
            f"**What sharing brings.** `python bench/prefix_sharing.py --dtype {dtype} --queries {tasks[0]['queries']} "
            f"--questions {tasks[1]['queries']} --rounds {report['rounds']}`: {report['model']} in {dtype}; "
            f"{machine(report['environment'])}; {' and '.join(map(amount, tasks))}. By turns; "
            f"{told} ({link(name)})."
            f"{emulated(report['files'][0], dtype)}"
        ),
        "",
        f"| | {' | '.join(map(file_name, tasks))} |",
        "| --- |" + " --- |" * len(tasks),
    ]
    shared = [f"{f['sharing_factor']:.2f} (whole file {f['whole_file_sharing_factor']:.2f})" for f in report["files"]]
    lines.append(f"| tokens over distinct prefixes | {' | '.join(shared)} |")
    for contender in report["files"][0]["contenders"]:
        times = [ratio(file["contenders"][contender]) for file in report["files"]]
        lines.append(f"| {MEANING.get(contender, contender)} | {' | '.join(times)} |")
    return "\n".join(lines)


def gpu(folder: Path) -> str:
    """Shapes of large models on one GPU."""
    report = read_result(folder, GPU)
    if report is None:
        return "Not yet measured on a GPU."
    setting = report["setting"]
    told = rounds_told(setting["rounds"], " as multiples of fastscore's time")
    lines = [
        wrapped(
            f"**On a GPU.** `python bench/gpu_end_to_end.py`: random weights in {setting['dtype']}, about "
            f"{setting['tokens']:,} tokens in each cell; {machine(report['environment'])}. By turns; {told}; after "
            "them the share of the GEMM rate and the peak of memory beyond the weights. fastscore runs with "
            f"{' and '.join(ways(report['cells']))} ({link(GPU)}):"
        ),
        "",
        f"| model, passage + answer tokens | {OURS}, seconds | {PADDED} | {TUNED} |",
        "| --- | --- | --- | --- |",
    ]
    for cell in report["cells"]:
        name = f"{cell['model']}, {cell['passage']} + {cell['answer']}"
        if why := why_not_measured(cell):
            lines.append(f"| {name} | {why} | | |")
            continue
        found = cell["contenders"]
        peers = " | ".join(_share(found[p], ratio(found[p])) if p in found else "" for p in (PADDED, TUNED))
        lines.append(f"| {name} | {_share(found[OURS], format(found[OURS]['median_seconds'], '.3f'))} | {peers} |")
    return "\n".join(lines)


def _share(values: Mapping[str, Any], time: str) -> str:
    if "useful_flop_efficiency" not in values:
        return time
    peak = values.get("peak_bytes_beyond_weights")
    memory = "" if peak is None else f", {peak / 2**30:.1f} GiB"
    return f"{time}, {values['useful_flop_efficiency']:.0%}{memory}"


SECTIONS: dict[str, Callable[[Path], str]] = {
    "end to end": end_to_end,
    "costs": costs,
    "sharing": sharing,
    "fidelity": fidelity,
    "gpu": gpu,
}
DOCUMENTS: dict[Path, dict[str, Callable[[Path], str]]] = {
    README: SECTIONS,
    NUMERICS: {
        "fidelity in full": fidelity_in_full,
        "invariance": invariance,
        "moved by sharing": moved_by_sharing,
        "quantized": quantized,
    },
    SCALE_OUT: {"scale out": scale_out},
    HARNESS: {"harness": harness},
    RELIABILITY: {"cache": cache},
}


def rewritten(text: str, folder: Path = RESULTS, sections: dict[str, Callable[[Path], str]] = SECTIONS) -> str:
    """A document's text with every section as the files in the folder give it.

    Raises:
        ValueError: a section has no place, or more than one.
    """
    for name, section in sections.items():
        begin, end = f"<!-- measured: {name} -->", f"<!-- end of measured: {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the document needs {begin} and {end} once each")
        made = f"{begin}\n{section(folder)}\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    stale = 0
    for path, sections in DOCUMENTS.items():
        before = path.read_text(encoding="utf-8")
        after = rewritten(before, sections=sections)
        if not options.check:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            print(f"{path.name} does not say what bench/results/ says: python bench/readme_table.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
