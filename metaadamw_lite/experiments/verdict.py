"""Verdicts on claims, from paired differences. A verdict is data; its text is made where it is shown."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from metaadamw_lite.experiments.paired import CONFIDENCE, EQUIVALENT, PairedDifference, corrected

HOLDS, FAILS, SAME, OPEN, NEVER = KINDS = (
    "holds",
    "does not hold",
    "equivalent",
    "not decided",
    "not yet tested",
)
"""Kinds of verdicts on the claim "it is better": it is, it is worse, it is equivalent, unknown, no test."""

CORRECTED = "after the correction"
"""Reason of a verdict that only the correction for several tests leaves open."""


@dataclass(frozen=True)
class Verdict:
    """A verdict on a claim.

    Attributes:
        kind: one of ``KINDS``.
        reason: of the kind, in words; may be empty.
        profile: of the runs, "paper" or "lite".
        pairs: number of pairs.
        planned: planned number of pairs. A verdict on fewer may change with the next seed.
    """

    kind: str
    reason: str = ""
    profile: str = "paper"
    pairs: int = 0
    planned: int = 0

    @property
    def decided(self) -> bool:
        """True if the claim holds or does not hold."""
        return self.kind in (HOLDS, FAILS)

    @property
    def label(self) -> str:
        """The kind, with the bounds of an equivalence."""
        return f"{SAME} (±{EQUIVALENT:g} %)" if self.kind == SAME else self.kind

    @property
    def text(self) -> str:
        """Kind and reason."""
        between = " " if self.reason == CORRECTED else ", " if self.kind == SAME else ": "
        return self.label + between + self.reason if self.reason else self.label

    def __str__(self) -> str:
        if self.kind == NEVER:  # no runs to note
            return self.text
        return annotate(self.text, self.profile, self.pairs, self.planned)


def annotate(text: object, profile: str, pairs: int = 0, planned: int = 0) -> str:
    """Add a note to a statement from small runs (``lite``), or from fewer pairs than planned."""
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
    alone is too narrow. A difference within ±1 % by the equivalence test is no improvement, even if it differs from
    zero.

    Args:
        difference: positive in favour of the claim.
        correction: the same from ``paired.corrected``, whose p-values count. A claim that only the uncorrected ones
            decide is not decided.
        opposite: meaning of a difference against the claim, in words.
        profile, planned: profile and planned number of the pairs, for the verdict's notes.
    """
    before, after = (_judged(d, opposite) for d in (difference, correction or difference))
    kind, reason = after if after == before or after[0] == SAME else (OPEN, CORRECTED)
    return Verdict(kind, reason, profile, difference.pairs, planned)


def judge_family(differences: "pd.Series[Any]") -> "pd.Series[Any]":
    """Judge "it is better" by each of some ``PairedDifference``, after Holm's correction over all of them."""
    after: list[PairedDifference] = [*corrected(differences)]
    verdicts = [judge(d, c) for d, c in zip(differences, after, strict=True)]
    return pd.Series(verdicts, index=differences.index, dtype=object)


def _judged(difference: PairedDifference, opposite: str) -> tuple[str, str]:
    """Return the kind and reason of a verdict."""
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
    """Count the better and the worse of some ``PairedDifference``."""
    kinds = [judge(d).kind for d in differences]
    return kinds.count(HOLDS), kinds.count(FAILS)
