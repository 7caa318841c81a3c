"""Equal budgets: every arm at every learning rate of the search, at a constant rate and with a cosine schedule."""

from collections.abc import Sequence
from dataclasses import replace

from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Change, Variant, adamw, both, rate

BUDGETED = {"adamw": Variant(make=adamw), "metaadamw": Variant(), "metaadamw-frozen": Variant(updates=False)}
"""The three arms; all of them are searched."""

SCHEDULES = ("constant", "cosine")


def searched_as(arm: str, schedule: str, lr: float) -> str:
    """The name of an arm at a learning rate, with a schedule; at the paper's constant one it is the arm's own."""
    return arm + ("" if schedule == "constant" else f"-{schedule}") + ("" if lr == Settings.lr else f"-lr{lr:g}")


def budget_variants(rates: Sequence[float]) -> dict[str, Variant]:
    """Every arm with every schedule at every rate, but for those that other studies have: the arms, and tuned AdamW."""
    return {
        searched_as(arm, schedule, lr): replace(variant, change=both(rate(lr), _with(schedule)))
        for arm, variant in BUDGETED.items()
        for schedule in SCHEDULES
        for lr in rates
        if schedule != "constant" or (arm != "adamw" and lr != Settings.lr)
    }


def _with(schedule: str) -> Change:
    return lambda settings: replace(settings, schedule=schedule)
