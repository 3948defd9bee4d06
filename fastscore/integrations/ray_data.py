"""Scoring on a Ray cluster: a Ray Data pipeline whose actors hold one scorer each; its ends are in this process.

Rows are read and written here, as in any run. In between, ``read_datasource`` gives blocks of neighbouring rows as
they are asked for, and ``map_batches`` scores them on a pool of actors. Blocks wait on a shelf (an actor) until their
scores are here, so that whatever Ray does again finds them.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import fastscore
from fastscore.block_scores import BlockScores, Dealt, Job, TotalStats, score_block, scored_rows, sendable
from fastscore.blocks import Block, cut_blocks
from fastscore.config import ScorerConfig, TaskConfig
from fastscore.types import InputError, Row, RunStats, ScoredRow
from fastscore.windows import OnBadRow

try:
    import pyarrow
    import ray
    from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
    from ray.data.block import BlockMetadata
except ImportError as missing:
    raise InputError("--engine ray needs Ray Data: pip install 'fastscore[ray]'") from missing

logger = logging.getLogger("fastscore")

BLOCKS_AHEAD = 4
"""Blocks for each worker that may be unwritten, because one before them is not finished."""

MOST_TRIES = 4
"""How often a block is begun that takes its worker with it; Ray itself would never give up."""


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
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **local)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster at {address} (RAY_ADDRESS): {str(error).splitlines()[0]}") from error


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
        self._total = TotalStats()
        self._description: dict[str, Any] = {}
        self.stats = self._total.stats

    def describe(self) -> dict[str, Any]:
        """Of a worker, and how many there are."""
        pool = self._total.describe("ray", self._pool.workers)
        return {**self._description, **pool, "gpus_per_worker": self._pool.gpus}

    def stream_rows(
        self,
        rows: Iterable[Row],
        task_config: TaskConfig,
        *,
        on_bad_row: OnBadRow | None = None,
        on_progress: Callable[[RunStats], None] | None = None,
    ) -> Generator[ScoredRow, None, None]:
        """As :meth:`fastscore.Scorer.stream_rows`; ``rows`` are read in a thread.

        A worker that dies is replaced by Ray, and the block that it had is scored again.
        """
        workers = self._pool.workers
        job = Job(self.config, task_config, on_bad_row is not None)
        blocks = cut_blocks(rows, task_config, workers, self.config.window_tokens)
        shelf = Shelf(Dealt(blocks, BLOCKS_AHEAD * workers))
        with shelf, closing(self._results(shelf, job)) as results:
            for _ in results:
                for block, result in shelf.finished():
                    self._total.add(result)
                    self._description = result.description or self._description
                    yield from scored_rows(block, result, on_bad_row)
                    if on_progress is not None:
                        on_progress(replace(self.stats))
        shelf.check()

    def _results(self, shelf: Shelf, job: Job) -> Generator[None, None, None]:
        """Each time a block is back on the shelf."""
        pool = self._pool
        context = DataContext.get_current()
        context.enable_progress_bars = False
        # One block of rows is one of Ray Data's: it would put small ones together, and wait for the next.
        context.target_max_block_size = 1
        dataset = ray.data.read_datasource(Blocks(shelf.actor), override_num_blocks=1, num_cpus=0).map_batches(
            ScoreBlocks,
            fn_constructor_args=(job, shelf.actor),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=2),
            num_gpus=pool.gpus or None,
            num_cpus=pool.cpus,
        )
        for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            for data in batch.column("scores").to_pylist():
                shelf.finish(pickle.loads(data))
                yield


class Shelf:
    """Blocks on their way: a thread cuts them and puts them where Ray's tasks find them, as many as memory allows."""

    def __init__(self, dealt: Dealt) -> None:
        self.actor = _ShelfActor.options(num_cpus=0, max_concurrency=100).remote()
        self._dealt = dealt
        self._changed = threading.Condition()
        self._closed = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._fill, name="fastscore-shelf", daemon=True)

    def __enter__(self) -> Shelf:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        ray.kill(self.actor)

    def finish(self, result: BlockScores) -> None:
        """Take what came of a block."""
        with self._changed:
            self._dealt.finish(result)

    def finished(self) -> Iterator[tuple[Block, BlockScores]]:
        """Blocks with their results, in the order of the rows, as far as they have come."""
        while True:
            with self._changed:
                found = self._dealt.next_finished()
                self._changed.notify_all()
            if found is None:
                return
            self.actor.drop.remote(found[0].index)
            yield found

    def check(self) -> None:
        """Raise what went wrong with reading rows."""
        if self._failure is not None:
            raise self._failure

    def _fill(self) -> None:
        try:
            while (block := self._next()) is not None:
                ray.get(self.actor.put.remote(block.index, pickle.dumps(block, protocol=5)))
        except Exception as error:  # noqa: BLE001 - raised by check, in the thread that writes
            self._failure = error
        ray.get(self.actor.end.remote())

    def _next(self) -> Block | None:
        with self._changed:
            while not self._closed and not self._dealt.is_done:
                if (block := self._dealt.claim()) is not None:
                    return block
                if self._dealt.is_exhausted:
                    return None
                self._changed.wait()
        return None


@ray.remote
class _ShelfActor:
    """Holds blocks from when they were cut until their scores are written."""

    def __init__(self) -> None:
        import asyncio

        self._blocks: dict[int, bytes] = {}
        self._tries: dict[int, int] = {}
        self._count = 0
        self._ended = False
        self._changed = asyncio.Condition()

    async def put(self, index: int, block: bytes) -> None:
        async with self._changed:
            self._blocks[index] = block
            self._count = index + 1
            self._changed.notify_all()

    async def drop(self, index: int) -> None:
        self._blocks.pop(index, None)
        self._tries.pop(index, None)

    async def end(self) -> None:
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def begin(self, index: int) -> int:
        """How often this block has been begun, this time among them."""
        self._tries[index] = self._tries.get(index, 0) + 1
        return self._tries[index]

    async def get(self, index: int) -> bytes | None:
        """The block, b"" when its scores are written already, None after the last one. Waits for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: index < self._count or self._ended)
            return self._blocks.get(index, b"") if index < self._count else None


class Blocks(Datasource):
    """A source for Ray Data: blocks in their order, when they are there. Read again, it gives those that matter."""

    def __init__(self, shelf: Any) -> None:
        super().__init__()
        self._shelf = shelf

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        shelf = self._shelf
        return [ReadTask(lambda: _read(shelf), metadata, schema=pyarrow.schema([("block", pyarrow.binary())]))]


def _read(shelf: Any) -> Iterator[Any]:
    index = 0
    while (block := ray.get(shelf.get.remote(index))) is not None:
        yield pyarrow.table({"block": pyarrow.array([block], pyarrow.binary())})
        index += 1


class ScoreBlocks:
    """An actor of the pool: one scorer, made when the first block is there, so that its errors can be told."""

    def __init__(self, job: Job, shelf: Any) -> None:
        self._job = job
        self._shelf = shelf
        self._scorer: Any = None

    def __call__(self, batch: Any) -> Any:
        results = [self._score(pickle.loads(data)) for data in batch.column("block").to_pylist() if data]
        scores = [pickle.dumps(result, protocol=5) for result in results]
        return pyarrow.table({"scores": pyarrow.array(scores, pyarrow.binary())})

    def _score(self, block: Block) -> BlockScores:
        worker = str(ray.get_runtime_context().get_actor_id())
        if (tries := ray.get(self._shelf.begin.remote(block.index))) > MOST_TRIES:
            place = block.rows[0].error(f"this row and those after it ended their worker {MOST_TRIES} times")
            return BlockScores(block.index, worker, error=RuntimeError(str(place)))
        result = score_block(self._open, self._job, block, lambda stats: None)
        return sendable(replace(result, worker=worker, tries=tries))

    def _open(self, config: ScorerConfig) -> Any:
        if self._scorer is None:
            self._scorer = fastscore.Scorer.from_config(config)
        return self._scorer
