"""The peer ``lm-eval``: lm-evaluation-harness's HFLM on the same weights and ids (``fastscore[lm-eval]``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from contenders import BATCH_SIZE_SAMPLE, Computed, Contender, Unavailable, batch_settings, padded_tokens
from padded import pick_batch_size
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from workload import TokenPair, spread_sample

LM_EVAL = "lm-eval"


class LMEval(Contender):
    """Requests sorted by length and padded on the right, logits of every position, log-softmax in the model's dtype.

    What ``HFLM.loglikelihood`` does once its texts are tokens: it begins here where those are given. It tells the sum
    over an answer's tokens, not each.
    """

    name = LM_EVAL
    sums_only = True

    def __init__(self, harness: Any, batch_size: int, batch_size_seconds: Mapping[int, float]) -> None:
        super().__init__()
        self.harness, self.batch_size, self.batch_size_seconds = harness, batch_size, batch_size_seconds

    @classmethod
    def picked(cls, plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[TokenPair]) -> LMEval:
        """With the batch size that is fastest on a sample of the pairs.

        Raises:
            Unavailable: the package is not installed.
        """
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise Unavailable(f"not installed: pip install 'fastscore[lm-eval]' ({error})") from error
        harness = HFLM(pretrained=plain, tokenizer=tokenizer, backend="causal", batch_size=1)
        score: Callable[[int, Sequence[TokenPair]], object] = lambda size, some: _sums(harness, size, some)  # noqa: E731
        return cls(harness, *pick_batch_size(score, spread_sample(pairs, BATCH_SIZE_SAMPLE)))

    def score(self, pairs: Sequence[TokenPair]) -> None:
        self.scores = [[value] for value in _sums(self.harness, self.batch_size, pairs)]

    def computed(self, pairs: Sequence[TokenPair]) -> Computed:
        # Requests that differ in their last token only are one.
        inputs = {(*prompt, *answer[:-1]) for prompt, answer in pairs}
        return padded_tokens(sorted(map(len, inputs), reverse=True), self.batch_size)

    def settings(self) -> dict[str, Any]:
        return {"version": version("lm-eval"), **batch_settings(self.batch_size, self.batch_size_seconds)}


def _sums(harness: Any, batch_size: int, pairs: Sequence[TokenPair]) -> list[float]:
    """Log-probability of each answer as a whole, in nats."""
    harness.batch_size_per_gpu = batch_size
    requests = [(None, list(prompt), list(answer)) for prompt, answer in pairs]
    return [value for value, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
