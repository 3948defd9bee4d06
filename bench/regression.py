"""Has fastscore become slower? Ratios of a run of the suite against those of a stored baseline.

    python bench/regression.py compare RUN.json       exit status 1 when a ratio is worse than the baseline allows
    python bench/regression.py baseline RUN.json      make this run the baseline

RUN.json is pytest-benchmark's record of ``bench/`` (``make bench-compare`` and ``make bench-baseline`` make one). Every
ratio is the time of a part of fastscore over that of something else in the same run: lower is better, and absolute
times, which differ between machines, are not looked at. The baseline carries its own tolerance, for all ratios or one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import ROOT, one_line, write_json
from rounds import table

BASELINE = ROOT / "bench" / "results" / "baseline.json"
TOLERANCE = 0.15
"""How much larger than the baseline's a ratio may be."""


class NotComparable(Exception):
    """A file that is no record or no baseline, in words."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A ratio of the baseline or of the run, and what became of it."""

    name: str
    before: float | None
    now: float | None
    tolerance: float
    verdict: str
    failed: bool


def ratios_of(run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per ratio of a pytest-benchmark record its value, and the task it was measured on.

    Raises:
        NotComparable: there are none.
    """
    found: dict[str, dict[str, Any]] = {}
    for benchmark in run.get("benchmarks", ()):
        info = benchmark["extra_info"]
        for name, ratio in info.get("ratios", {}).items():
            found[name] = {"ratio": ratio, "task": info["task"]}
    if not found:
        raise NotComparable("the run has no ratios: is it pytest-benchmark's record of bench/?")
    return found


def make_baseline(run: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The run's ratios, with the tolerances of the baseline that it takes the place of."""
    before = before or {}
    ratios = ratios_of(run)
    for name, entry in ratios.items():
        if (own := before.get("ratios", {}).get(name, {}).get("tolerance")) is not None:
            entry["tolerance"] = own
    return {
        "environment": run["machine_info"],
        "tolerance": before.get("tolerance", TOLERANCE),
        "ratios": dict(sorted(ratios.items())),
    }


def compare_ratios(run: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Finding]:
    """All ratios of both. One of the baseline that the run lacks, or took from another task, is a failure, too.

    Raises:
        NotComparable: either has no ratios.
    """
    if not baseline.get("ratios"):
        raise NotComparable("the baseline has no ratios")
    now, findings = ratios_of(run), []
    for name, before in baseline["ratios"].items():
        tolerance = before.get("tolerance", baseline["tolerance"])
        entry = now.pop(name, None)
        value = None if entry is None else entry["ratio"]
        if entry is None:
            verdict, failed = "not measured", True
        elif entry["task"] != before["task"]:
            verdict, failed = f"another task: {entry['task']}; the baseline's: {before['task']}", True
        elif value > before["ratio"] * (1 + tolerance):
            verdict, failed = "WORSE", True
        elif value < before["ratio"] / (1 + tolerance):
            verdict, failed = "better: worth a new baseline", False
        else:
            verdict, failed = "ok", False
        findings.append(Finding(name, before["ratio"], value, tolerance, verdict, failed))
    findings += [Finding(name, None, entry["ratio"], 0.0, "not in the baseline", False) for name, entry in now.items()]
    return findings


def show(findings: Sequence[Finding]) -> str:
    """A line for each ratio."""
    rows = [
        [
            each.name,
            "" if each.before is None else f"{each.before:.3f}",
            "" if each.now is None else f"{each.now:.3f}",
            "" if each.before is None or each.now is None else f"{each.now / each.before - 1:+.0%}",
            "" if each.before is None else f"{each.tolerance:+.0%}",
            each.verdict,
        ]
        for each in findings
    ]
    return table(["time over time, lower is better", "baseline", "now", "change", "allowed", ""], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """1 for a regression, 2 for files that cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("compare", "baseline"))
    parser.add_argument("run", type=Path, help="record of pytest-benchmark (--benchmark-json)")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    options = parser.parse_args(arguments)
    try:
        run = _read(options.run)
        if options.action == "baseline":
            before = _read(options.baseline) if options.baseline.exists() else None
            write_json(options.baseline, make_baseline(run, before))
            print(f"{options.baseline.name}: {len(ratios_of(run))} ratios, measured on {one_line(run['machine_info'])}")
            return 0
        baseline = _read(options.baseline)
        findings = compare_ratios(run, baseline)
    except NotComparable as error:
        print(error, file=sys.stderr)
        return 2
    print(f"baseline: {one_line(baseline['environment'])}\nnow:      {one_line(run['machine_info'])}")
    print(show(findings))
    failed = sum(each.failed for each in findings)
    if failed:
        print(f"{failed} of {len(findings)} ratios are worse than the baseline allows, or missing", file=sys.stderr)
    return int(failed > 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotComparable(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise NotComparable(f"{path}: expected a JSON object")
    return value


if __name__ == "__main__":
    sys.exit(main())
