"""Equal budgets: every arm at every learning rate of the search, at a constant rate and with a cosine schedule.

AdamW has a warm-up with linear decay, too. A run with a schedule has a fixed length and no early stopping, which would
end it while its rate is still high: 1.5 times the epochs that AdamW at its best constant rate takes, by the search.
"""

from collections.abc import Sequence
from dataclasses import replace

from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Change, Variant, adamw, both, rate

BUDGETED = {"adamw": Variant(make=adamw), "metaadamw": Variant(), "metaadamw-frozen": Variant(updates=False)}
"""The three arms; all of them are searched."""

SEARCHES = (
    *((arm, schedule) for schedule in ("constant", "cosine") for arm in BUDGETED),
    ("adamw", "warmup-linear"),
)
"""The arms with their schedules, each of which has a search of its own."""

LEARNED = "ladder-phi"
"""Φ on a log scale, which learns the rate; beside the peers that need no search, either."""


def searched_as(arm: str, schedule: str, lr: float) -> str:
    """The name of an arm at a learning rate, with a schedule; at the paper's constant one it is the arm's own."""
    return arm + ("" if schedule == "constant" else f"-{schedule}") + ("" if lr == Settings.lr else f"-lr{lr:g}")


def budget_variants(rates: Sequence[float]) -> dict[str, Variant]:
    """Every arm with every schedule at every rate, but for those that other studies have: the arms, and tuned AdamW."""
    return {
        searched_as(arm, schedule, lr): replace(BUDGETED[arm], change=both(rate(lr), _with(schedule)))
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
