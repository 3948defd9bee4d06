"""Blocks of pairs where the tasks of a Ray cluster find them, and a Ray Data source of them."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from fastscore.block_scores import BlockScores
from fastscore.blocks import Block
from fastscore.dealt import Dealt, FinishedRow


class Shelf:
    """Blocks on their way: a thread puts them where Ray's tasks find them, as many as memory allows.

    ``changed`` is told of when there may be something to deal.
    """

    def __init__(self, dealt: Dealt, changed: threading.Condition) -> None:
        self.actor = _ShelfActor.options(num_cpus=0, max_concurrency=100).remote()
        self._dealt = dealt
        self._changed = changed
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

    def next_result(self) -> BlockScores | None:
        """What came of a block, each once. Nobody needs the block any more."""
        with self._changed:
            result = self._dealt.next_result()
        if result is not None:
            self.actor.drop.remote(result.index)
        return result

    def next_row(self) -> FinishedRow | None:
        """The row whose turn it is, when everything of it has come."""
        with self._changed:
            row = self._dealt.next_row()
            self._changed.notify_all()
        return row

    def check(self) -> None:
        """Raise what went wrong with reading rows.

        Raises:
            RuntimeError: Ray has ended, and something is missing.
        """
        if self._failure is not None:
            raise self._failure
        if not self._dealt.is_done:
            raise RuntimeError("Ray ended before all pairs were scored")

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


class _Blocks:
    """Holds blocks from when they were dealt until their scores have come."""

    def __init__(self) -> None:
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
        """The block, b"" when its scores have come already, None after the last one. Waits for it."""
        async with self._changed:
            await self._changed.wait_for(lambda: index < self._count or self._ended)
            return self._blocks.get(index, b"") if index < self._count else None


_ShelfActor: Any = ray.remote(_Blocks)


class Blocks(Datasource):  # type: ignore[misc]
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
