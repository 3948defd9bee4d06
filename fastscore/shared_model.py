"""One model held by the processes of a run together: rank 0 decides what is next, and the others do the same.

Rank 0 runs the program as if it were alone. Each time it loads the model, plans a window, or gives a batch to the model
or rows to the head, it tells the others first, and all of them come to the same collective operations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from functools import cached_property
from typing import Any

import torch.distributed as dist

from fastscore.config import ScorerConfig
from fastscore.execution import Execution
from fastscore.interrupts import Interrupted, held_back
from fastscore.language_model import LanguageModel
from fastscore.rank_messages import GOODBYE_SECONDS, Lost, hear, tell_all
from fastscore.scorer import Scorer
from fastscore.types import ScoredRow


class SharedScorer(Scorer):
    """Rank 0's scorer, whose model is held by all ranks together."""

    _check_lost: Callable[..., None]

    @classmethod
    def on_rank_0(cls, config: ScorerConfig, check_lost: Callable[..., None]) -> SharedScorer:
        """``check_lost`` raises what went wrong with another rank."""
        scorer = cls.from_config(config)
        assert isinstance(scorer, SharedScorer), "of this class"
        scorer._check_lost = check_lost
        return scorer

    @cached_property
    def _model(self) -> LanguageModel:
        with held_back():  # all of it is told
            tell_all("load")
        model = super()._model
        model.followers = tell_all
        return model

    def describe(self) -> dict[str, Any]:
        """With the number of ranks."""
        return {**super().describe(), "engine": "torchrun", "workers": 1, "tensor_parallel": dist.get_world_size()}

    def stream_rows(self, *args: Any, **kwargs: Any) -> Generator[ScoredRow, None, None]:
        """As the scorer of one process.

        Raises:
            RuntimeError: a rank is gone.
        """
        try:
            yield from super().stream_rows(*args, **kwargs)
        except Exception:  # this one may say only that somebody does not answer
            self._check_lost(by_signal=False)
            raise
        except (KeyboardInterrupt, SystemExit):
            self._check_lost()
            raise


def end_following() -> bool:
    """Tell the others that nothing more will come; whether they were there to hear it. One that is in the middle of
    something is not waited for."""
    heard = threading.Event()

    def tell() -> None:
        try:
            tell_all("end")
        except Lost:
            return
        heard.set()

    thread = threading.Thread(target=tell, name="fastscore-end", daemon=True)
    thread.start()
    thread.join(GOODBYE_SECONDS)
    return heard.is_set()


def follow_model(load: Callable[[], LanguageModel]) -> None:
    """Do what rank 0 does, until it ends. Once the model is there, a signal that ends the run is for rank 0 to hear.

    Raises:
        Lost: rank 0 is gone.
        Interrupted: by a signal, before the model was there; or by the second one.
    """
    if hear() == ("end",):  # the other order is "load"
        return
    model = load()
    model.followers = _nobody
    try:
        with held_back():
            _follow(model)
    except Interrupted as stop:
        if stop.at_once:
            raise


def _follow(model: LanguageModel) -> None:
    executions: dict[int, Execution] = {}
    while True:
        match hear():
            case ("end",):
                return
            case ("plan", number, plan):
                executions[number] = Execution(model, plan)
            case ("step", number):
                executions[number].step()
            case ("flush", number):
                executions[number].flush()
            case ("finish", number):
                del executions[number]
            case order:
                raise RuntimeError(f"no such order: {order[0]}")


def _nobody(*_: Any) -> None:
    """A follower tells nobody."""
