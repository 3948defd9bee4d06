"""A plan on its way through a model and its LM head, batch by batch.

Where several processes hold a model together (:mod:`fastscore.shared_model`), one of them decides what is next, and the
others are told before it happens: they take the same step, since each has a part of every product.
"""

from __future__ import annotations

from itertools import count

from fastscore.answer_head import AnswerHead
from fastscore.language_model import LanguageModel, Plan
from fastscore.types import Batch

_numbers = count()


class Execution:
    """Batches of a plan, and the NLL of its slots in ``head.scores``."""

    def __init__(self, model: LanguageModel, plan: Plan) -> None:
        self._batches = model.run(plan)
        self.head = AnswerHead(model.head, plan.slots.count, fixed_rows=model.deterministic)
        self._followers = model.followers
        self._number = next(_numbers)
        self._tell("plan", plan)

    def step(self) -> Batch | None:
        """Run the next batch and give its answer rows to the head; None when there is no other."""
        self._tell("step")
        batch, hidden_AD = next(self._batches, (None, None))
        if batch is None or hidden_AD is None:
            return None
        self.head.add(batch, hidden_AD)
        return batch

    def flush(self) -> None:
        """Let the head compute the rows that wait for it."""
        if self.head.num_rows:
            self._tell("flush")
            self.head.flush()

    def finish(self) -> None:
        """The last flush."""
        self.flush()
        self._tell("finish")

    def _tell(self, what: str, *more: Plan) -> None:
        if self._followers is not None:
            self._followers(what, self._number, *more)
