"""CIFAR-10 and IMDB with labels that are partly wrong: the tasks of the chapters on LiLAW.

Each is a task of the paper with other settings, under the ``clean`` protocol: training and validation labels are wrong
alike, and the official test part is right and measured after training. The run's seed also draws the wrong labels
(people's labels are fixed), so runs vary in these, too. Nothing stops a run early, since models memorise late.

On a CPU (``lite``) a small convolutional network can memorise 2,000 images in forty epochs, wrong labels included, and
the paper's LSTM reads 1,920 reviews. The ``paper`` profile has ResNet-18 and all of CIFAR-10.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metaadamw_lite.experiments import cifar10, imdb
from metaadamw_lite.experiments.noise import CIFAR10_PAIRS
from metaadamw_lite.experiments.task import Data, Settings, Task

EPOCHS = {
    "cifar10": {"paper": 60, "lite": 40, "smoke": 2},
    "imdb": {"paper": 15, "lite": 15, "smoke": 2},
}
LITE_LEARNING_RATE = 2e-3
"""The small network's learning rate, four times the paper's, so that it memorises in forty epochs."""


class SmallConvNet(nn.Module):
    """Three stages of two 3 × 3 convolutions with batch norm; each stage halves the image; a linear layer at the end.

    Args:
        widths: channels of each stage.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for before, width in zip((3, *widths), widths, strict=False):
            layers: list[nn.Module] = []
            for channels in (before, width):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        self.head = nn.Linear(widths[-1], cifar10.CLASSES)
        self.standardised = cifar10.Standardised()

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, 10) of images (N, 3, H, W) of bytes."""
        x = self.standardised(images)
        for stage in self.stages:
            x = stage(x)
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


def _build(settings: Settings, data: Data) -> nn.Module:
    if "widths" in settings.model:
        return SmallConvNet(tuple(settings.model["widths"])).to(memory_format=torch.channels_last)
    return cifar10.build(settings, data)


def make_noisy(task: Task, name: str, noise: Mapping[str, Any], percent: int) -> Task:
    """Return a task with wrong labels.

    Args:
        task: CIFAR-10 or IMDB.
        name: of the noise, in the task's name ``TASK-NAMEPERCENT``.
        noise: as ``noise.corrupted`` takes it, without the rate.
        percent: the rate, in percent.

    Raises:
        ValueError: for a ``percent`` that is not an integer from 0 to 100.
    """
    if percent not in range(101):
        raise ValueError(f"percent is {percent}; it must be an integer from 0 to 100")

    def settings(profile: str) -> Settings:
        base = task.settings("paper" if profile == "lite" else profile)
        data = dict(base.data) | {"noise": {**noise, "rate": percent / 100}}
        epochs = EPOCHS[task.name][profile]
        changed = replace(base, epochs=epochs, patience=epochs, data=data)
        if profile == "lite" and task is imdb.IMDB:
            return replace(changed, meta_every=3, data=data | {"train": 1_920, "val": 512, "test": 1_024})
        if task is imdb.IMDB or profile == "paper":
            return changed
        sizes = {"widths": (16, 32, 64)} if profile == "lite" else {"widths": (4, 4)}
        if profile == "lite":
            count = 4_000 if "imbalance" in noise else 2_000  # thinning leaves about two fifths
            data |= {"train": count, "val": count // 4, "test": 2_000}
            changed = replace(changed, batch_size=64, meta_every=16, lr=LITE_LEARNING_RATE)
        return replace(changed, model=sizes, data=data)

    return replace(
        task,
        name=f"{task.name}-{name}{percent}",
        title=f"{task.title}, {name} {percent} %",
        settings=settings,
        build=_build if task is cifar10.CIFAR10 else task.build,
        augment=None,  # augmentation would keep a small network from memorising
    )


_PAIRS = {"kind": "asymmetric", "pairs": tuple(CIFAR10_PAIRS.items())}
NOISY: dict[str, Task] = {
    task.name: task
    for task in (
        *(make_noisy(cifar10.CIFAR10, "symmetric", {"kind": "symmetric"}, percent) for percent in (0, 20, 40, 50)),
        make_noisy(cifar10.CIFAR10, "asymmetric", _PAIRS, 40),
        make_noisy(cifar10.CIFAR10, "instance", {"kind": "instance"}, 40),
        make_noisy(cifar10.CIFAR10, "human", {"kind": "human", "labels": "worse_label"}, 40),
        make_noisy(cifar10.CIFAR10, "longtail", {"kind": "symmetric", "imbalance": 10.0}, 40),
        make_noisy(imdb.IMDB, "symmetric", {"kind": "symmetric"}, 40),
        make_noisy(imdb.IMDB, "asymmetric", {"kind": "asymmetric", "pairs": ((1, 0),)}, 40),
    )
}
"""Asymmetric noise makes 40 % of each class that has a partner wrong, so about 20 % of all labels."""
