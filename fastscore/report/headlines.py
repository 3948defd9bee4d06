"""A file's figures in a few large numbers, and in sentences that say what applies to it and what does not."""

from __future__ import annotations

from dataclasses import dataclass

from fastscore.report.collect import Collected
from fastscore.report.definition import unit_of, with_unit
from fastscore.report.figures import Figures
from fastscore.report.run_facts import PADDED, RunFacts
from fastscore.report.scored_row import KINDS, RANKED
from fastscore.report.words import count, number, share, size


@dataclass(frozen=True, slots=True)
class Headline:
    """A large figure, what it is, and what it comes from."""

    figure: str
    name: str
    note: str


def positive_best(collected: Collected) -> int:
    """Rows whose best score is a positive's, a level one included: as ``fastscore score`` counts them."""
    return len(collected.margin_R) - collected.num_above


def headlines(collected: Collected, figures: Figures, run: RunFacts) -> list[Headline]:
    """What is known of the file, the most telling first."""
    found = []
    unit = unit_of(run.task.score)
    ranked, candidates = len(collected.margin_R), len(collected.score_C)
    if ranked:
        best = positive_best(collected)
        level = f", {count(collected.num_level)} level with a negative" if collected.num_level else ""
        found.append(Headline(share(best, ranked), "positive is best", f"{best:,} of {count(ranked, 'row')}{level}"))
    if figures.median_margin is not None:
        note = "best positive minus best negative"
        found.append(Headline(number(figures.median_margin), with_unit("median margin", unit), note))
    elif figures.median_lead is not None:
        found.append(
            Headline(number(figures.median_lead), with_unit("median lead", unit), "best minus second candidate")
        )
    found.append(Headline(size(candidates), "scores", f"of {count(collected.rows, 'row')}"))
    if run.saved is not None:
        padded = run.tokens[PADDED]
        note = f"{size(run.saved)} of {size(padded)}, against {PADDED}"
        if run.saved < 0:
            note = f"{size(-run.saved)} more than {PADDED}"
        found.append(Headline(share(max(run.saved, 0), padded), "tokens saved", note))
    if run.speed:
        figure, _, unit = run.speed.partition(" tokens/s")
        where = dict(run.headline)
        found.append(
            Headline(
                figure, f"tokens a second{unit}", ", ".join(where[key] for key in ("device", "dtype") if key in where)
            )
        )
    return found


def lede(collected: Collected, run: RunFacts) -> str:
    """The result in a sentence or two."""
    ranked = len(collected.margin_R)
    if not ranked:
        return (
            f"{count(len(collected.score_C), 'score')} of {count(collected.rows, 'row')}. No row has both positives "
            "and negatives, so nothing says which candidate should win: margins and upsets do not apply."
        )
    best = positive_best(collected)
    said = f"A positive has the best score in {best:,} of {count(ranked, 'row')} ({share(best, ranked)})"
    if collected.num_level:
        said += f", {count(collected.num_level)} of them level with a negative"
    if not collected.num_above:
        return f"{said}. No negative is ahead."
    worst = with_unit(number(-min(collected.margin_R)), unit_of(run.task.score), " ")
    return f"{said}. In {count(collected.num_above)} a negative is ahead, by {worst} at most."


def kinds(collected: Collected) -> str:
    """Which rows there are, unless all have positives and negatives."""
    if set(collected.kinds) == {RANKED}:
        return ""
    parts = [f"{count(collected.kinds[kind], 'row')} of {kind}" for kind in KINDS if collected.kinds[kind]]
    return f"The file has {', '.join(parts)}."
