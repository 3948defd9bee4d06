"""Options that say where a run is computed, and what scores there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

import typer

from fastscore.cli_options import NO_VALUE
from fastscore.types import InputError

SCALE = "Several GPUs and machines"
ENGINES = ("local", "ray")

Engine = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="local (this process; several under torchrun), or ray: the cluster at RAY_ADDRESS, or this machine.",
        rich_help_panel=SCALE,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --engine ray: how many workers hold the model.",
        rich_help_panel=SCALE,
        show_default="as many as the GPUs allow",
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        help="With --engine ray: GPUs of each worker; more than one with --device-map auto.",
        rich_help_panel=SCALE,
        show_default="1 where there are GPUs",
    ),
]
TensorParallel = Annotated[
    bool,
    typer.Option(
        "--tensor-parallel",
        metavar=NO_VALUE,
        help="Under torchrun: all processes hold one model together, instead of one each.",
        rich_help_panel=SCALE,
    ),
]


@contextmanager
def chosen_engine(
    engine: str, num_workers: int | None, gpus_per_worker: float | None, tensor_parallel: bool, launched: Any
) -> Iterator[Any]:
    """What :func:`fastscore.run_files.run_files` makes its scorer with; ``launched`` is that of torchrun, or None.

    Raises:
        InputError: options that do not go together.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}; found {engine!r}")
    if engine == "local":
        if num_workers is not None or gpus_per_worker is not None:
            raise InputError(
                "--num-workers and --gpus-per-worker belong to --engine ray; torchrun has --nproc_per_node"
            )
        if tensor_parallel and launched is None:
            raise InputError(
                "--tensor-parallel needs several processes: torchrun --nproc_per_node N -m fastscore score ..."
            )
        yield launched
        return
    if tensor_parallel:
        raise InputError("--tensor-parallel belongs to torchrun, not to --engine ray")
    if launched is not None:
        raise InputError("--engine ray starts its workers itself: leave torchrun out")
    from fastscore.integrations.ray_data import ray_engine

    with ExitStack() as stack:  # Ray is started when the rows have been checked
        yield lambda config: stack.enter_context(ray_engine(num_workers, gpus_per_worker))(config)
