"""What a task is, and which settings a run of it has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PROFILES = ("smoke", "lite", "paper")
PROTOCOLS = ("paper", "clean")
SOURCES = ("real", "synthetic")

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Settings:
    """Everything that defines a run, apart from task, variant, protocol and seed.

    Attributes:
        epochs: at most so many passes over the training data.
        batch_size: samples a step.
        patience: stop after so many epochs in a row without an improvement.
        min_delta: by how much the validation loss must fall to count as an improvement.
        lr, weight_decay, betas, eps: of AdamW and MetaAdamW alike.
        meta_every: K_meta, steps from one meta-update to the next.
        warmup_epochs: no meta-update before the last step of this epoch.
        metaadamw: further arguments of ``MetaAdamW`` (Table 4).
        model: the model's sizes.
        data: how much of the data is used; empty for all.
    """

    epochs: int
    batch_size: int
    meta_every: int
    patience: int = 2
    min_delta: float = 1e-3
    lr: float = 5e-4
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_epochs: int = 1
    metaadamw: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """The samples of a task, in memory; each part is a tuple of tensors with the sample as first dimension.

    Attributes:
        train: for the steps, and for the batches B₁ and B₂ of the meta-update.
        val: for early stopping and the meta-objective.
        test: looked at once, after training; None under the paper's protocol, which has no such part.
        source: what the samples are, for records and plots: a file name, or "synthetic".
    """

    train: Batch
    val: Batch
    test: Batch | None
    source: str

    def to(self, device: torch.device) -> "Data":
        """The same samples on a device."""

        def moved(part: Batch) -> Batch:
            return tuple(x.to(device) for x in part)

        return Data(moved(self.train), moved(self.val), None if self.test is None else moved(self.test), self.source)


@dataclass(frozen=True)
class Task:
    """One of the paper's tasks.

    Attributes:
        name: as on the command line.
        title: as in headings.
        metric: name of the task's metric.
        lower_is_better: direction of the metric.
        settings: from a profile to its settings.
        load: from protocol, settings and source ("real" or "synthetic") to the data.
        build: from settings to a model; initial weights follow torch's global generator.
        loss: scalar training loss of a model on a batch.
        metric_from_loss: from a mean validation loss to the metric.
    """

    name: str
    title: str
    metric: str
    lower_is_better: bool
    settings: Callable[[str], Settings]
    load: Callable[[str, Settings, str], Data]
    build: Callable[[Settings], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    metric_from_loss: Callable[[float], float]
