"""How exact scores are, for the README and docs/numerics.md, from the files of ``fidelity.py``, ``invariance.py`` and
``prefix_sharing.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import NO_TREE
from fidelity import FAST_BF16, FAST_FP32, FAST_INT8, FAST_MODEL, FAST_NARROW, PADDED_BF16, PADDED_UPCAST
from invariance import DETERMINISTIC
from readme_words import link, machine, read_result, wrapped

FIDELITY, QUANTIZED = "fidelity-smollm2-135m-cpu.json", "fidelity-int8-smollm2-135m-cpu.json"
SHARING = "prefix-sharing-smollm2-135m-cpu-bf16.json"
TOKEN, PAIR = "nats_per_answer_token", "nats_per_pair"
PARTS = {TOKEN: "per token", PAIR: "per pair"}
KEYS = {"mean": "mean", "p99": "99% below", "max": "largest"}
INVARIANCE = ("invariance-smollm2-135m-cpu-fp32.json", "invariance-smollm2-135m-cpu-bf16.json")

MEANING = {
    FAST_FP32: "fastscore, fp32",
    FAST_BF16: "fastscore, bf16",
    FAST_NARROW: "fastscore, bf16, `--residual model`",
    FAST_MODEL: "fastscore, bf16, `--forward model`",
    FAST_INT8: "fastscore, `--quantize int8`",
    PADDED_BF16: "padded batches, bf16, as the reference system",
    PADDED_UPCAST: "padded batches, bf16, logits in fp32",
}


def fidelity(folder: Path) -> str:
    """How far low-precision scores are from the truth."""
    report = read_result(folder, FIDELITY)
    if report is None:
        return "Distance from the truth has not been measured yet (`python bench/fidelity.py`)."
    task = report["workload"]
    lines = [
        wrapped(
            f"**Distance from the truth.** `python bench/fidelity.py --queries {task['queries']}`: {task['queries']} "
            f"Natural Questions queries with 16 passages each ({task['pairs']:,} pairs, {task['answer_tokens']:,} "
            f"answer tokens) with {report['model']}; {machine(report['environment'])}. The truth is each pair alone, "
            "unpadded, in plain transformers in fp32. Nats; tau is Kendall's, the mean over queries; the last column "
            f"says how often another candidate became the best ({link(FIDELITY)}):"
        ),
        "",
        *_distances(report, [(TOKEN, "mean"), (PAIR, "mean"), (PAIR, "max")]),
    ]
    return "\n".join(lines)


def fidelity_in_full(folder: Path) -> str:
    """The same for docs/numerics.md, with the tails."""
    report = read_result(folder, FIDELITY)
    if report is None:
        return "Distance from the truth has not been measured yet (`python bench/fidelity.py`)."
    task = report["workload"]
    lines = [
        wrapped(
            f"`python bench/fidelity.py --queries {task['queries']}`: {task['pairs']:,} pairs, "
            f"{task['answer_tokens']:,} answer tokens, {report['model']}; "
            f"{machine(report['environment'])} ({link(FIDELITY, '../')}). Absolute "
            "differences from the truth in nats, Kendall's tau over the candidates of a query (mean), and in how many "
            "queries another candidate became the best:"
        ),
        "",
        *_distances(report, [(part, key) for part in (TOKEN, PAIR) for key in KEYS]),
    ]
    return "\n".join(lines)


def quantized(folder: Path) -> str:
    """What eight bits cost, in the same figures."""
    report = read_result(folder, QUANTIZED)
    if report is None:
        return "What it costs in fidelity has not been measured yet (`python bench/fidelity.py`)."
    task = report["workload"]
    names = " ".join(f'"{name}"' for name in report["contenders"])
    lines = [
        wrapped(
            f"`python bench/fidelity.py --queries {task['queries']} --contenders {names}`: {task['pairs']:,} pairs, "
            f"{report['model']}; {machine(report['environment'])} ({link(QUANTIZED, '../')}). Distances from the truth "
            "in nats, as above:"
        ),
        "",
        *_distances(report, [(TOKEN, "mean"), (TOKEN, "max"), (PAIR, "mean"), (PAIR, "max")]),
    ]
    return "\n".join(lines)


def _distances(report: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The table of these figures: of answer tokens or pairs, and which."""
    heads = [f"{PARTS[part]}, {KEYS[key]}" for part, key in columns]
    yield f"| | {' | '.join(heads)} | tau | best changed |"
    yield "| --- |" + " --- |" * (len(columns) + 2)
    for name, values in report["contenders"].items():
        figures = " | ".join(f"{values[part][key]:.3g}" for part, key in columns)
        yield (
            f"| {MEANING.get(name, name)} | {figures} | {values['kendall_tau']['mean']:.4f} | "
            f"{values['best_candidate_changed']} of {values['queries']} |"
        )


def moved_by_sharing(folder: Path) -> str:
    """What computing shared prefixes once does to scores that are rounded."""
    report = read_result(folder, SHARING)
    if report is None:
        return "What sharing does to scores has not been measured yet (`python bench/prefix_sharing.py`)."
    moved = report["files"][0]["contenders"][NO_TREE]["difference_from_fastscore"]
    return wrapped(
        "`python bench/prefix_sharing.py`, in bf16: computing shared prefixes once instead of again for each pair "
        f"moved log-probabilities of answer tokens on Natural Questions by {moved['mean']:.3f} nats in the mean and "
        f"{moved['max']:.3f} at most ({link(SHARING, '../')}). Neither of the two is the truth."
    )


def invariance(folder: Path) -> str:
    """Whether scores depend on what else is in the file."""
    reports = [(name, report) for name in INVARIANCE if (report := read_result(folder, name)) is not None]
    if not reports:
        return "How much scores depend on their neighbours has not been measured yet (`python bench/invariance.py`)."
    first = reports[0][1]
    lines = [
        wrapped(
            f"**Neighbours.** `python bench/invariance.py`: {first['spread_nats'][DETERMINISTIC]['compositions']} "
            f"random choices, orders and budgets of the same {first['requests']} requests with {first['model']}; "
            f"{machine(first['environment'])}. The largest difference that any two made to an answer token, in nats, "
            f"and how long `--deterministic` takes ({', '.join(link(name, '../') for name, _ in reports)}):"
        ),
        "",
        "| | by default | `--deterministic` | its time as a multiple of the default's |",
        "| --- | --- | --- | --- |",
    ]
    for _, report in reports:
        default, fixed = (report["spread_nats"][name]["largest_spread"] for name in ("fastscore", DETERMINISTIC))
        cost = report["cost"]["deterministic_times_default"]
        lines.append(f"| {report['dtype']} | {default:.1e} | {fixed:.0g} | {cost:.2f} |")
    return "\n".join(lines)
