"""What the scores of a file are, in words: the page must not call every number a mean log-probability."""

from __future__ import annotations

from collections.abc import Sequence

from fastscore.config import Reduce, ScoreConfig

_UNITS: dict[Reduce, str] = {"mean": "nats", "sum": "nats", "byte": "nats per byte", "char": "nats per character"}


def unit_of(score: ScoreConfig) -> str:
    """``nats`` and the like; nothing for shares."""
    return "" if score.normalize == "softmax" else _UNITS[score.reduce]


def with_unit(text: str, unit: str, separator: str = ", ") -> str:
    return f"{text}{separator}{unit}" if unit else text


def said(score: ScoreConfig) -> str:
    """The definition as a plural noun: ``mean log-probabilities of the answer in nats``."""
    scored = f"the {score.target} and its EOS token" if score.append_eos else f"the {score.target}"
    found = f"{'mean ' if score.reduce == 'mean' else ''}log-probabilities of {scored} in {_UNITS[score.reduce]}"
    if score.baseline == "no-context":
        found = f"gains over the same {score.target} without a passage, differences of {found}"
    if score.normalize == "softmax":
        found = (
            f"shares of a row's candidates (they add up to 1), softmax at temperature {score.temperature:g} of {found}"
        )
    return found


def definitions(files: Sequence[tuple[str, ScoreConfig, bool]]) -> list[str]:
    """A sentence for each file's name, definition, and whether its run says so; one for all where they agree."""
    sentences = [_sentence(score, known) for _, score, known in files]
    if len(set(sentences)) == 1:
        return [f"Scores are {sentences[0]}"]
    several = [f"In {name}, scores are {sentence}" for (name, *_), sentence in zip(files, sentences, strict=True)]
    if len({score for _, score, _ in files}) > 1:
        several.append("Scores of different kinds cannot be compared by their size.")
    return several


def _sentence(score: ScoreConfig, known: bool) -> str:
    bound = ""
    if (score.baseline, score.normalize) == ("none", "none"):
        bound = ": at most 0 unless answers were combined by logsumexp" if score.target == "answer" else ": at most 0"
    return f"{'' if known else 'taken to be '}{said(score)}{bound}, and higher is better."
