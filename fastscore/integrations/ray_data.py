"""Scoring on a Ray cluster: a Ray Data pipeline whose actors hold one scorer each; its ends are in this process.

Rows are read and written here, as in any run. In between, ``read_datasource`` gives blocks of pairs as they are asked
for, and ``map_batches`` scores them on a pool of actors. Blocks wait on a shelf (an actor) until their
scores are here, so that whatever Ray does again finds them.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import socket
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import fastscore
from fastscore.block_scores import BlockScores, Job, score_block, sendable
from fastscore.blocks import Block, CutWindow, cut_windows
from fastscore.cache_file import CacheAt
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.dealt import Dealt, FinishedRow, hand_on
from fastscore.read_ahead import ReadAhead, locked, until
from fastscore.run_stats import RunStats
from fastscore.total_stats import TotalStats
from fastscore.types import InputError, Row, ScoredRow
from fastscore.windows import OnBadRow

try:
    import pyarrow
    import ray
    from ray.data import ActorPoolStrategy

    from fastscore.ray_cache import ClusterCache, WorkerCache
    from fastscore.ray_shelf import Blocks, Shelf
except ImportError as missing:
    raise InputError("--engine ray needs Ray Data: pip install 'fastscore[ray]'") from missing

MOST_TRIES = 4
"""How often a block is begun that takes its worker with it; Ray itself would never give up."""

REACHED_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors score, and what each of them has."""

    workers: int
    gpus: float
    cpus: float


@contextmanager
def ray_engine(
    num_workers: int | None = None, gpus_per_worker: float | None = None
) -> Iterator[Callable[[ScorerConfig], RayScorer]]:
    """What :func:`fastscore.run_files.run_files` makes its scorer with: one that scores on Ray.

    The cluster is the one at ``RAY_ADDRESS``, or one that is started on this machine and ended here; a program that is
    connected to one already goes on with that.

    num_workers: by default as many as the GPUs allow; on a cluster without GPUs one for each machine.
    gpus_per_worker: 1 by default where there are GPUs. More than one are used with a ``device_map``.

    Raises:
        InputError: more is asked for than there is.
    """
    mine = not ray.is_initialized()
    if mine:
        _connect()
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        pool = choose_pool(num_workers, gpus_per_worker, nodes)
        yield lambda config: RayScorer(config, pool)
    finally:
        if mine:
            ray.shutdown()


def _connect() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    logging.getLogger("ray").setLevel(logging.ERROR)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # that of its log files is of another kind
            handler.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors")  # there is one source, of many blocks
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **local)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster at {address} (RAY_ADDRESS): {str(error).splitlines()[0]}") from error


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?(?P<host>[^/\]]+)\]?:(?P<port>\d+)", address)
    if match is None:  # "local", "auto"
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=REACHED_SECONDS).close()
    except OSError as error:
        raise InputError(f"no Ray cluster at {address} (RAY_ADDRESS): {error.strerror or error}") from error


def choose_pool(num_workers: int | None, gpus_per_worker: float | None, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """A pool that the machines have room for, given their resources.

    Raises:
        InputError: they have not.
    """
    if num_workers is not None and num_workers < 1:
        raise InputError(f"num_workers must be at least 1; found {num_workers}")
    if gpus_per_worker is not None and gpus_per_worker < 0:
        raise InputError(f"gpus_per_worker must not be negative; found {gpus_per_worker:g}")
    num_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = float(num_gpus > 0) if gpus_per_worker is None else gpus_per_worker
    room = _room(nodes, "GPU", gpus) if gpus else len(nodes)
    workers = num_workers or max(1, room)
    if gpus and workers > room:
        raise InputError(
            f"{workers} workers with {gpus:g} GPUs each: the {num_gpus:g} GPUs of the cluster allow {room}"
        )
    # A worker on a CPU has its share of the threads; one with a GPU needs one. Less than one is a matter of form.
    most = 1 if gpus else int(max(node.get("CPU", 0.0) for node in nodes))
    shares = [*range(most, 0, -1), *(2.0**-power for power in range(1, 10))]
    cpus = next((float(share) for share in shares if _room(nodes, "CPU", share) >= workers), None)
    if cpus is None:
        raise InputError(f"the cluster has no CPUs for {workers} workers")
    return Pool(workers, gpus, cpus)


def _room(nodes: Sequence[Mapping[str, float]], resource: str, each: float) -> int:
    """How many workers the machines have that resource for."""
    return sum(int(node.get(resource, 0.0) / each) for node in nodes)


class RayScorer:
    """What :func:`fastscore.run_files.run_files` asks of a scorer, done by actors on a Ray cluster.

    It needs no model here: where it does not exist for a worker, the first block says so.
    """

    def __init__(self, config: ScorerConfig, pool: Pool) -> None:
        self.config = config
        self._pool = pool
        self._total = TotalStats(pool.workers)
        self._description: dict[str, Any] = {}
        self.stats = self._total.stats

    def cache_at(self, place: CacheAt | None) -> ClusterCache:
        """A cache in this process's own file."""
        return ClusterCache(place)

    def describe(self) -> dict[str, Any]:
        """Of a worker, and how many there are."""
        return {**self._description, **self._total.describe("ray"), "gpus_per_worker": self._pool.gpus}

    def stream_rows(
        self,
        rows: Iterable[Row],
        task_config: TaskConfig,
        *,
        on_bad_row: OnBadRow | None = None,
        on_progress: Callable[[RunStats], None] | None = None,
        cache: ClusterCache | None = None,
    ) -> Generator[ScoredRow, None, None]:
        """As :meth:`fastscore.Scorer.stream_rows`; ``rows`` are read in a thread, a window and a half ahead.

        A worker that dies is replaced by Ray, and the block that it had is scored again.
        """
        workers = self._pool.workers
        cache = ClusterCache(None) if cache is None else cache
        job = Job(self.config, task_config, on_bad_row is not None, cache.place)
        cache.start()
        reading = threading.Lock()  # held where a bad row is told of
        changed = threading.Condition()

        def look() -> None:
            with changed:
                changed.notify_all()

        def windows(stopped: threading.Event) -> Iterator[CutWindow]:
            wanted = until(stopped, locked(reading, rows))
            return cut_windows(wanted, task_config, workers, self.config.window_tokens)

        with (
            ReadAhead(windows, look) as ahead,
            Shelf(Dealt(iter(ahead), ahead.is_ready), changed) as shelf,
            closing(self._results(shelf, job, cache)) as results,
        ):
            for _ in results:
                yield from hand_on(self._finished(shelf, cache), task_config, on_bad_row, reading)
                if on_progress is not None:
                    on_progress(replace(self.stats))
            shelf.check()
        self._total.end_job()

    def _finished(self, shelf: Shelf, cache: ClusterCache) -> Iterator[FinishedRow]:
        """Rows in their order, as far as everything of them has come.

        Raises:
            Exception: what ended a block.
        """
        while (result := shelf.next_result()) is not None:
            self._total.add(result)
            self._description = result.description or self._description
            cache.told(result.cache_trouble)
            if result.error is not None:
                raise result.error
        while (row := shelf.next_row()) is not None:
            yield row

    def _results(self, shelf: Shelf, job: Job, cache: ClusterCache) -> Generator[None, None, None]:
        """Each time a block is back on the shelf."""
        pool = self._pool
        dataset = ray.data.read_datasource(Blocks(shelf.actor), override_num_blocks=1, num_cpus=0).map_batches(
            ScoreBlocks,
            fn_constructor_args=(job, shelf.actor, cache.actor),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=2),
            num_gpus=pool.gpus or None,
            num_cpus=pool.cpus,
        )
        dataset.context.enable_progress_bars = False
        # One block of pairs is one of Ray Data's: it would put small ones together, and wait for the next.
        dataset.context.target_max_block_size = 1
        for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            for data in batch.column("scores").to_pylist():
                shelf.finish(pickle.loads(data))
                yield


class ScoreBlocks:
    """An actor of the pool: one scorer, made when the first block is there, so that its errors can be told."""

    def __init__(self, job: Job, shelf: Any, cache: Any) -> None:
        self._job = job
        self._shelf = shelf
        self._cache_actor = cache
        self._cache: WorkerCache | None = None
        self._scorer: Any = None

    def __call__(self, batch: Any) -> Any:
        results = [self._score(pickle.loads(data)) for data in batch.column("block").to_pylist() if data]
        scores = [pickle.dumps(sendable(result), protocol=5) for result in results]
        return pyarrow.table({"scores": pyarrow.array(scores, pyarrow.binary())})

    def _score(self, block: Block) -> BlockScores:
        worker = str(ray.get_runtime_context().get_actor_id())
        if (tries := ray.get(self._shelf.begin.remote(block.index))) > MOST_TRIES:
            place = block.rows[0].error(f"this row and others of its block ended their worker {MOST_TRIES} times")
            return BlockScores(block.index, worker, error=RuntimeError(str(place)))
        try:
            self._load()
        except Exception as error:  # noqa: BLE001 - raised where the rows are written
            return BlockScores(block.index, worker, error=error)
        result = score_block(self._scorer, self._cache, self._job, block, lambda stats: None)
        trouble = None if self._cache is None else self._cache.trouble
        return replace(result, worker=worker, tries=tries, cache_trouble=trouble)

    def _load(self) -> None:
        if self._scorer is None:
            self._scorer = fastscore.Scorer.from_config(self._job.scorer_config)
        if self._cache is None and self._job.cache is not None:
            self._cache = WorkerCache(self._cache_actor, self._job.cache.is_asked_for, self._scorer.identity)
