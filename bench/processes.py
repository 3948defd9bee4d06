"""Programs as a user starts them: how long they take, and how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from environment import ROOT

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024

# A process begins as a copy of the one that starts it, and its peak is never told smaller than that one was. So a bare
# Python stands in between, which is smaller than any program measured here.
_LAUNCHER = """
import json, os, sys, time
begun, began = time.perf_counter(), time.time()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - begun
print()
print(json.dumps([seconds, usage.ru_maxrss, os.waitstatus_to_exitcode(status), began]))
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A program that has ended well."""

    seconds: float
    """Wall-clock, from its start to its end."""
    peak_bytes: int
    """Largest resident memory."""
    lines: list[str]
    """What it printed."""
    began: float
    """When it was started: ``time.time()``."""


class Failed(Exception):
    """A program ended badly: its last words."""


def run_python(*arguments: str) -> Ended:
    """Run this interpreter with these arguments, in the project's root.

    Raises:
        Failed: an exit status other than 0.
    """
    command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, sys.executable, *arguments]
    run = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, env=os.environ
    )
    *lines, _, told = run.stdout.splitlines()
    seconds, peak, status, began = json.loads(told)
    if status:
        last_words = next((line for line in reversed(lines) if line.strip()), "nothing")
        raise Failed(f"{' '.join(arguments[:4])} ended with {status}: {last_words}")
    return Ended(seconds, peak * _RSS_UNIT, [line for line in lines if line.strip()], began)
