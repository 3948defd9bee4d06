"""Whether torchrun started this process, with others. Nothing here waits for torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any


def world_size(environment: Mapping[str, str]) -> int:
    """How many processes torchrun started, this one among them; 1 without it."""
    if not all(environment.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return 1
    return int(environment["WORLD_SIZE"])


def as_one_run(program: Callable[[Any], None], share_model: bool = False) -> None:
    """Run the program. It is given what makes its scorer where torchrun started several processes, otherwise None.
    ``share_model``: these are going to hold one model together.

    Then one of them runs the program, and the others score for it until it ends.

    Raises:
        SystemExit: of several processes, in all of them with the same status.
    """
    if world_size(os.environ) == 1:
        program(None)
        return
    from fastscore.distributed import run_ranks

    raise SystemExit(run_ranks(lambda lead: program(lead.open_scorer), share_model))
