"""A coverage-guided fuzzer (atheris, which is libFuzzer) on the targets, each for its share of the time.

    python tests/fuzz/fuzz.py --seconds 60 [--target rows]

An input that a target fails on is kept in build/fuzz/TARGET/ and told; the exit status is then 1. What the fuzzer has
learnt is kept there as well, and the next run goes on from it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "fuzz"
LONGEST_INPUT = 4096
SLOWEST_SECONDS = 5
MOST_MEGABYTES = 2048
HERE = "--here"


def main() -> int:
    """Fuzz each target in a process of its own: libFuzzer ends the one it runs in."""
    if sys.argv[1:2] == [HERE]:
        _fuzz(sys.argv[2], int(sys.argv[3]))
    from targets import TARGETS  # not before: the fuzzer follows what is imported under its eyes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together (default: %(default)s)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="may be repeated; all without it")
    args = parser.parse_args()
    chosen = args.target or list(TARGETS)
    seconds = max(1, args.seconds // len(chosen))
    failed = []
    for name in chosen:
        print(f"fuzz: {name} for {seconds} s", flush=True)
        command = [sys.executable, __file__, HERE, name, str(seconds)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
            print(f"fuzz: {name} failed; the input is in {(KEPT / name).relative_to(ROOT)}", flush=True)
    return 1 if failed else 0


def _fuzz(name: str, seconds: int) -> NoReturn:
    import atheris

    with atheris.instrument_imports(include=["fastscore"]):
        from targets import TARGETS, seeds
    corpus = KEPT / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST_INPUT}",
        f"-timeout={SLOWEST_SECONDS}",
        f"-rss_limit_mb={MOST_MEGABYTES}",
        f"-artifact_prefix={KEPT / name}/",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()
    raise AssertionError("libFuzzer has ended the process")


if __name__ == "__main__":
    sys.exit(main())
