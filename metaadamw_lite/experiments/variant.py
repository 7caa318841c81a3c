"""What a variant of an experiment is: a change to a task's settings, and the optimizer that trains with them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.task import Settings

Change = Callable[[Settings], Settings]
Maker = Callable[..., torch.optim.Optimizer]
"""Makes the optimizer from (model, settings, total_steps, seed), in this order, and the record of the source if any."""


def of_both(settings: Settings) -> dict[str, Any]:
    """The arguments that AdamW and MetaAdamW share."""
    return {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def of_metaadamw(settings: Settings, total_steps: int, seed: int) -> dict[str, Any]:
    """All arguments of MetaAdamW. Φ's random start follows the run's seed, unless the settings have another."""
    return {**of_both(settings), "seed": seed, **settings.metaadamw, "total_steps": total_steps}


def adamw(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> torch.optim.Optimizer:
    """torch's AdamW."""
    return torch.optim.AdamW(model.parameters(), **of_both(settings))


def metaadamw(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> MetaAdamW:
    """MetaAdamW."""
    return MetaAdamW(model.named_parameters(), **of_metaadamw(settings, total_steps, seed))


def unchanged(settings: Settings) -> Settings:
    """The settings of the task itself."""
    return settings


@dataclass(frozen=True)
class Variant:
    """A named way to train the model of a task.

    Attributes:
        change: from the settings of a task to the variant's.
        make: the optimizer that trains with them; Φ's random start, if it has one, follows the seed.
        updates: whether Φ, if there is one, is trained by meta-updates.
        source: from a run of this variant to the run whose record ``make`` needs; None for none.
        keeps_phi: whether the record has the numbers that Φ ends with.
    """

    change: Change = unchanged
    make: Maker = metaadamw
    updates: bool = True
    source: Callable[[RunKey], RunKey] | None = None
    keeps_phi: bool = False


def arguments(**changes: Any) -> Change:
    """Other arguments for ``MetaAdamW``."""
    return lambda settings: replace(settings, metaadamw={**settings.metaadamw, **changes})


def both(first: Change, second: Change) -> Change:
    """One change after the other."""
    return lambda settings: second(first(settings))


def rate(lr: float) -> Change:
    """Another learning rate."""
    return lambda settings: replace(settings, lr=lr)
