"""Equal budgets: every arm at every learning rate of the search, at a constant rate and with a cosine schedule.

AdamW has a warm-up with linear decay, too. A run with a schedule has a fixed length: 1.5 times the epochs that AdamW
takes at its best constant rate, by the search. Early stopping would end such a run while its rate is still high.
"""

from collections.abc import Sequence
from dataclasses import replace

from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Change, Variant, adamw, at_rate, chain

BUDGETED = {"adamw": Variant(make=adamw), "metaadamw": Variant(), "metaadamw-frozen": Variant(updates=False)}
"""The three arms, each of which is searched."""

SEARCHES = (
    *((arm, schedule) for schedule in ("constant", "cosine") for arm in BUDGETED),
    ("adamw", "warmup-linear"),
)
"""Each arm with a schedule has its own search."""

LEARNED = "ladder-phi"
"""Φ on a log scale. It learns the rate and needs no search, like the peers."""


def searched_as(arm: str, schedule: str, lr: float) -> str:
    """Name an arm with a schedule at a learning rate. At the paper's constant rate the name is the arm's own."""
    return arm + ("" if schedule == "constant" else f"-{schedule}") + ("" if lr == Settings.lr else f"-lr{lr:g}")


def budget_variants(rates: Sequence[float]) -> dict[str, Variant]:
    """Return every arm with every schedule at every rate, except those of other studies: the arms, and tuned AdamW."""
    return {
        searched_as(arm, schedule, lr): replace(BUDGETED[arm], change=chain(at_rate(lr), _with(schedule)))
        for arm, schedule in SEARCHES
        for lr in rates
        if schedule != "constant" or (arm != "adamw" and lr != Settings.lr)
    }


def _with(schedule: str) -> Change:
    def change(settings: Settings) -> Settings:
        if schedule == "constant":
            return settings
        return replace(settings, schedule=schedule, epochs=settings.scheduled_epochs or settings.epochs, patience=None)

    return change
