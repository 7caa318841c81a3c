"""Optimizers without a searched rate or schedule, from their own packages, at the packages' defaults.

The rate, decay and moments in a task's settings are not used.
"""

from importlib import import_module

import torch
from torch import nn

from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Maker, Variant


def _from(package: str, name: str) -> Maker:
    def make(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(import_module(package), name)(model.parameters())
        return optimizer

    return make


PEERS = {
    "schedulefree": Variant(make=_from("schedulefree", "AdamWScheduleFree")),
    "prodigy": Variant(make=_from("prodigyopt", "Prodigy")),
    "dadaptation": Variant(make=_from("dadaptation", "DAdaptAdam")),
}
"""Schedule-Free AdamW, Prodigy, and D-Adaptation for Adam; a package is imported when its arm is run."""
