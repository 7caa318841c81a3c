"""Does a trained Φ help on other tasks? ``ladder-phi``, trained on one task and frozen on another."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments.ladder import log_phi, small_phi, with_phi
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Variant

TRANSFER_TASKS = ("wikitext2", "etth1", "cifar10", "imdb")
"""Tasks that train Φ, and tasks that use it."""


def _trained(
    model: nn.Module, settings: Settings, total_steps: int, seed: int, record: dict[str, Any]
) -> torch.optim.Optimizer:
    """Make MetaAdamW with the last Φ of the recorded run.

    Raises:
        ValueError: if the record has no Φ, since the run failed.
    """
    if "phi" not in record:
        raise ValueError(f"the record of {RunKey(**record['run'])} has no Φ ({record['status']})")

    def phi(optimizer: MetaAdamW, settings: Settings, generator: torch.Generator) -> nn.Module:
        module = log_phi(optimizer, settings, generator)
        nn.utils.vector_to_parameters(torch.tensor(record["phi"]), module.parameters())
        return module

    return with_phi(phi)(model, settings, total_steps, seed)


def transfer_from(task: str) -> str:
    """Name MetaAdamW with the Φ that was trained on a task."""
    return f"transfer-from-{task}"


def _from(task: str) -> Variant:
    return Variant(small_phi, _trained, updates=False, source=lambda key: replace(key, task=task, variant="ladder-phi"))


TRANSFER = {transfer_from(task): _from(task) for task in TRANSFER_TASKS}
