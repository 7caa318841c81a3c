"""Verdicts on claims, from paired differences. A verdict is data; its text is made once, where it is shown."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from metaadamw_lite.experiments.paired import CONFIDENCE, EQUIVALENT, PairedDifference

HOLDS, FAILS, SAME, OPEN, NEVER = KINDS = (
    "holds",
    "does not hold",
    "equivalent",
    "not decided",
    "not yet tested",
)
"""Kinds of verdicts on the claim "it is better": it is, it is worse, it is neither, unknown, and no test."""

CORRECTED = "after the correction"
"""Reason of a verdict that is open only since several tests were made."""


@dataclass(frozen=True)
class Verdict:
    """A verdict on a claim.

    Attributes:
        kind: one of ``KINDS``.
        reason: why, in words; empty where the kind says all.
        profile: of the runs, "paper" or "lite".
        pairs: how many there are.
        planned: how many there should be. A verdict that is given before may be another one with the next seed.
    """

    kind: str
    reason: str = ""
    profile: str = "paper"
    pairs: int = 0
    planned: int = 0

    @property
    def decided(self) -> bool:
        """Whether it holds or does not."""
        return self.kind in (HOLDS, FAILS)

    @property
    def label(self) -> str:
        """The kind, and how much an equivalence allows."""
        return f"{SAME} (±{EQUIVALENT:g} %)" if self.kind == SAME else self.kind

    @property
    def text(self) -> str:
        """Kind and reason."""
        between = " " if self.reason == CORRECTED else ", " if self.kind == SAME else ": "
        return self.label + between + self.reason if self.reason else self.label

    def __str__(self) -> str:
        if self.kind == NEVER:  # which rests on nothing
            return self.text
        return annotate(self.text, self.profile, self.pairs, self.planned)


def annotate(text: object, profile: str, pairs: int = 0, planned: int = 0) -> str:
    """Add a note to a statement where it rests on small runs (``lite``), or on fewer pairs than planned."""
    notes = ["lite runs"] if profile == "lite" else []
    if pairs < planned:
        notes.append(f"interim: {pairs} of {planned} planned seeds")
    return f"{text} ({'; '.join(notes)})" if notes else str(text)


def judge(
    difference: PairedDifference,
    correction: PairedDifference | None = None,
    *,
    opposite: str = "it is worse",
    profile: str = "paper",
    planned: int = 0,
) -> Verdict:
    """Judge the claim "it is better" by a paired difference.

    A decision takes both an interval without zero and p < 0.05, since with a handful of seeds the bootstrap interval
    alone is too narrow. A difference that is smaller than ±1 % by the equivalence test is no improvement, also where it
    can be told from zero.

    Args:
        difference: positive in favour of the claim.
        correction: the same from ``paired.corrected``, whose p-values count; a claim that only the uncorrected ones
            decide is not decided.
        opposite: what a difference against the claim means.
        profile, planned: of the pairs, for the verdict's notes.
    """
    before, after = (_judged(d, opposite) for d in (difference, correction or difference))
    kind, reason = after if after == before or after[0] == SAME else (OPEN, CORRECTED)
    return Verdict(kind, reason, profile, difference.pairs, planned)


def _judged(difference: PairedDifference, opposite: str) -> tuple[str, str]:
    """Kind and reason."""
    if difference.lost:
        return OPEN, f"{difference.lost} of {difference.pairs} pairs lost"
    if np.isnan(difference.low):
        return NEVER, ""
    told = difference.p < 1 - CONFIDENCE and not difference.low <= 0 <= difference.high
    if difference.p_equivalent < 1 - CONFIDENCE:
        return SAME, "though not zero" if told else ""
    if not (difference.low or difference.high):
        return OPEN, "identical results"
    if not told:
        return OPEN, "cannot be told from chance"
    return (HOLDS, "") if difference.low > 0 else (FAILS, opposite)


def count_decided(differences: "pd.Series[Any]") -> tuple[int, int]:
    """Count those of some ``PairedDifference`` that are better, and those that are worse."""
    kinds = [judge(d).kind for d in differences]
    return kinds.count(HOLDS), kinds.count(FAILS)
