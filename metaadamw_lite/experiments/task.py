"""The dataclasses of tasks, settings and data, and helpers that tasks share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROFILES = ("smoke", "lite", "paper")
PROTOCOLS = ("paper", "clean")
SOURCES = ("real", "synthetic")
SCHEDULES = ("constant", "cosine", "warmup-linear")
"""Schedules of the learning rate over all steps of a run. The last rises for 30 % of them, then falls to zero."""

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Settings:
    """The definition of a run, apart from task, variant, protocol and seed.

    Attributes:
        epochs: the most passes over the training data.
        batch_size: samples a step.
        patience: epochs in a row without an improvement that stop a run; None to train all epochs.
        min_delta: the fall of the validation loss that counts as an improvement.
        lr, weight_decay, betas, eps: arguments of AdamW and MetaAdamW alike.
        meta_every: K_meta, steps from one meta-update to the next.
        meta_per_epoch: about the number of meta-updates an epoch (a factor of Table 3).
        warmup_epochs: the first epoch with meta-updates. Table 1 calls it "warmup epochs (before meta)". The released
            code reads it so: with the value 1 meta-updates begin in the first epoch.
        metaadamw: further arguments of ``MetaAdamW`` (Table 4).
        model: the model's sizes.
        data: sizes of the data (empty for all), and under "noise" the injected label noise.
        lilaw: arguments of ``LiLAW``; None for samples of equal weight.
        schedule: one of ``SCHEDULES``.
        scheduled_epochs: of a profile: the epochs of a run with a schedule; None for ``epochs``. The change of a
            variant reads it, and the settings of a run have None.
    """

    epochs: int
    batch_size: int
    meta_every: int
    meta_per_epoch: int = 1
    patience: int | None = 2
    min_delta: float = 1e-3
    lr: float = 5e-4
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_epochs: int = 1
    metaadamw: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    lilaw: Mapping[str, Any] | None = None
    schedule: str = "constant"
    scheduled_epochs: int | None = None


@dataclass(frozen=True)
class Data:
    """The samples of a task, in memory; each part is a tuple of tensors with the sample as first dimension.

    Attributes:
        train: for the steps, and for the batches B₁ and B₂ of the meta-update.
        val: for early stopping and the meta-objective.
        test: measured once, after training; None under the paper's protocol.
        source: name of the data, for records and plots; "synthetic" for made-up ones.
        sizes: arguments of the model that the data decide, such as the size of the vocabulary.
        words: the target vocabulary in the order of its numbers, if the task translates.
        references: the test part's target sentences, if the task translates.
        truth: the true labels of the training part, if those in ``train`` are partly wrong.
    """

    train: Batch
    val: Batch
    test: Batch | None
    source: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    words: Sequence[str] = ()
    references: Sequence[str] = ()
    truth: Tensor | None = None

    def to(self, device: torch.device) -> "Data":
        """Copy the samples to a device."""

        def moved(part: Batch) -> Batch:
            return tuple(x.to(device) for x in part)

        test = None if self.test is None else moved(self.test)
        truth = None if self.truth is None else self.truth.to(device)
        return replace(self, train=moved(self.train), val=moved(self.val), test=test, truth=truth)


class Score(NamedTuple):
    """A model's result on a batch.

    Attributes:
        loss: mean over the batch's terms, a differentiable scalar.
        terms: number of predictions in the batch: samples or, for text, tokens.
        correct: number of right predictions; None without classes.
    """

    loss: Tensor
    terms: Tensor | int
    correct: Tensor | None = None


class Measured(NamedTuple):
    """A model's result on a part of the data: mean loss over terms, and the task's metric."""

    loss: float
    metric: float


@dataclass(frozen=True)
class Task:
    """A task: one of the paper's, or one with wrong labels.

    Attributes:
        name: as on the command line.
        title: as in headings.
        metric: name of the task's metric.
        unit: the metric with its unit, for axes.
        lower_is_better: direction of the metric.
        settings: from a profile to its settings.
        load: from protocol, settings and source ("real" or "synthetic") to the data.
        build: from settings and data to a model; initial weights follow torch's global generator.
        score: from a model and a batch to the ``Score``, whose loss training minimises.
        metric_of: from mean loss and share of correct predictions to the metric.
        classes: C, the number of classes; None without classes.
        inputs_and_labels: from a batch to the inputs of a model that returns logits (N, C), and the labels (N,); None
            without classes.
        augment: random changes to a training batch, drawn from the generator; None for none.
        translate: from a trained model and the data to further figures about the test part ("bleu"), or None.
    """

    name: str
    title: str
    metric: str
    unit: str
    lower_is_better: bool
    settings: Callable[[str], Settings]
    load: Callable[[str, Settings, str], Data]
    build: Callable[[Settings, Data], nn.Module]
    score: Callable[[nn.Module, Batch], Score]
    metric_of: Callable[[float, float], float]
    classes: int | None = None
    inputs_and_labels: Callable[[Batch], tuple[Batch, Tensor]] | None = None
    augment: Callable[[Batch, torch.Generator], Batch] | None = None
    translate: Callable[[nn.Module, Data], dict[str, float]] | None = None

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scalar that training minimises."""
        return self.score(model, batch).loss


def classification_score(logits: Tensor, labels: Tensor) -> Score:
    """Score logits (N, C) by labels (N,): the mean cross-entropy in nats, and the number of right predictions."""
    return Score(F.cross_entropy(logits, labels), len(labels), (logits.argmax(dim=1) == labels).sum())


# Functions for ``Task.metric_of``, of the mean loss and the share of correct predictions.


def mean_squared_error(loss: float, _: float) -> float:
    """Return the loss itself."""
    return loss


def perplexity(loss: float, _: float) -> float:
    """Return the exponential of the mean cross-entropy in nats, or infinity on overflow."""
    return math.exp(loss) if loss < 700 else math.inf if not math.isnan(loss) else math.nan


def accuracy(_: float, correct: float) -> float:
    """Return the share of correct predictions."""
    return correct


def part_of(samples: Batch, count: int | None) -> Batch:
    """Draw ``count`` samples, the same each time; None returns all, in their order."""
    if count is None:
        return samples
    chosen = torch.randperm(len(samples[0]), generator=torch.Generator().manual_seed(0))[:count]
    return tuple(x[chosen] for x in samples)
