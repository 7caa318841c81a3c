"""Variants: a change to a task's settings, and the optimizer that trains with them."""

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
"""A function of (model, settings, total_steps, seed), and the source's record if any, that makes the optimizer."""


def adamw_arguments(settings: Settings) -> dict[str, Any]:
    """Return the arguments that AdamW and MetaAdamW share."""
    return {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def metaadamw_arguments(settings: Settings, total_steps: int, seed: int) -> dict[str, Any]:
    """Return all arguments of MetaAdamW. Φ's random start follows the run's seed, unless the settings have another."""
    return {**adamw_arguments(settings), "seed": seed, **settings.metaadamw, "total_steps": total_steps}


def adamw(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> torch.optim.Optimizer:
    """Make torch's AdamW."""
    return torch.optim.AdamW(model.parameters(), **adamw_arguments(settings))


def metaadamw(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> MetaAdamW:
    """Make MetaAdamW."""
    return MetaAdamW(model.named_parameters(), **metaadamw_arguments(settings, total_steps, seed))


def unchanged(settings: Settings) -> Settings:
    """Return the settings of the task itself."""
    return settings


@dataclass(frozen=True)
class Variant:
    """A named way to train the model of a task.

    Attributes:
        change: from the settings of a task to the variant's.
        make: makes the optimizer for these settings; Φ's random start, if any, follows the seed.
        updates: train Φ, if any, by meta-updates.
        source: from a run of this variant to the run whose record ``make`` needs; None for none.
        keeps_phi: store the trained Φ in the record.
    """

    change: Change = unchanged
    make: Maker = metaadamw
    updates: bool = True
    source: Callable[[RunKey], RunKey] | None = None
    keeps_phi: bool = False


def arguments(**changes: Any) -> Change:
    """Return the change to other arguments of ``MetaAdamW``."""
    return lambda settings: replace(settings, metaadamw={**settings.metaadamw, **changes})


def chain(first: Change, second: Change) -> Change:
    """Return one change after the other."""
    return lambda settings: second(first(settings))


def at_rate(lr: float) -> Change:
    """Return the change to another learning rate."""
    return lambda settings: replace(settings, lr=lr)
