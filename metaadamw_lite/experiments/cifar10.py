"""CIFAR-10: which of ten things is on a picture of 32 × 32 pixels? A ResNet-18 looks.

Data → model → loss → metric → configuration. Section 4.1 and Appendix B of the paper. The released code fills their
gaps (augmentation, normalisation, dropout on the output, epochs, early stopping).
"""

import io
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18
from torchvision.models.resnet import BasicBlock

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments.datasets import Table, data_folder, prepared, read_table
from metaadamw_lite.experiments.noise import human_labels, symmetric
from metaadamw_lite.experiments.task import (
    PROFILES,
    PROTOCOLS,
    SOURCES,
    Batch,
    Data,
    Score,
    Settings,
    Task,
    accuracy,
    classification_score,
    part_of,
)

# ---------------------------------------------------------------- data

CLASSES, SHARDS = 10, 3
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def _table(train: bool, shard: int, rows: int) -> Table:
    """Describe a shard of the train or test part. torchvision downloads it and compares MD5 sums."""
    name, shards = ("train", SHARDS) if train else ("test", 1)

    def download() -> pd.DataFrame:
        from torchvision.datasets import CIFAR10

        whole = CIFAR10(data_folder() / "cifar10", train=train, download=True)
        return shard_of(whole.data, np.array(whole.targets), shards, shard)

    source = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (as a shard in the layout of the hub's files)"
    return Table(f"cifar10/{name}-{shard:05}-of-{shards:05}.parquet", rows, ("img", "label"), source, download)


def shard_of(images: Any, labels: Any, shards: int, shard: int) -> pd.DataFrame:
    """Return one of several nearly equal parts of some images, as a table with the hub's columns."""
    mine = np.array_split(np.arange(len(images)), shards)[shard]
    return pd.DataFrame({"img": [{"bytes": png(images[i]), "path": None} for i in mine], "label": labels[mine]})


TRAIN = tuple(_table(True, shard, rows) for shard, rows in enumerate((16_667, 16_667, 16_666)))
TEST = (_table(False, 0, 10_000),)


def png(image: Any) -> bytes:
    """Encode an array (H, W, 3) of bytes as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def synthetic_images(count: int, size: int, seed: int) -> pd.DataFrame:
    """Make a stand-in with the columns of CIFAR-10: each of the ten classes has its own brightness, with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    images = (25 * labels[:, None, None, None] + rng.integers(0, 25, (count, size, size, 3))).astype(np.uint8)
    return shard_of(images, labels, 1, 0)


def load(protocol: str, settings: Settings, source: str) -> Data:
    """Load images and their classes.

    ``paper``: the training part trains. The official test part validates and is reported. ``clean``: the last tenth of
    the training part validates, and the official test part is the test part.

    Returns:
        Batches (image, class): images of shape (N, 3, 32, 32), uint8; classes of shape (N,), 0 to 9. Settings that ask
        for the labels of people (CIFAR-10N) put these into the training part, and the true ones into ``truth``.

    Raises:
        ValueError: for an unknown protocol or source.
        DataError: if the real data are missing and cannot be downloaded, or fail their check.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    check_choice("data", source, SOURCES)
    if source == "real":
        train, test = (prepared(pixels_of_the_tables, tables, tables is TRAIN) for tables in (TRAIN, TEST))
    else:
        train, test = (
            pixels(synthetic_images(settings.data.get("images", 2_000), settings.data.get("size", 32), s))
            for s in (1, 2)
        )
    images, truth = train
    human = settings.data.get("noise", {}).get("labels")
    observed = truth
    if human is not None:
        observed = human_labels(human, truth) if source == "real" else stand_in_for_people(truth)
    parts: list[Batch] = [tuple(torch.from_numpy(x) for x in part) for part in ((images, observed, truth), test)]
    if protocol == "clean":
        held_out = len(images) // 10
        parts = [tuple(x[:-held_out] for x in parts[0]), tuple(x[-held_out:] for x in parts[0]), parts[1]]
    samples = [
        part_of(part, settings.data.get(name)) for name, part in zip(("train", "val", "test"), parts, strict=False)
    ]
    (x, y, true), val = samples[0], samples[1][:2]
    test_part = samples[2] if protocol == "clean" else None
    name = "CIFAR-10" if source == "real" else "synthetic"
    return Data((x, y), val, test_part, name, truth=None if human is None else true)


def stand_in_for_people(labels: Any) -> Any:
    """Return labels of which 40 % are wrong, in place of people's labels for made-up images."""
    return symmetric(labels, 10, 0.4, seed=0)


def pixels_of_the_tables(train: bool) -> tuple[Any, Any]:
    """Decode the real data's train or test part."""
    return pixels(pd.concat([read_table(table) for table in (TRAIN if train else TEST)]))


def pixels(frame: pd.DataFrame) -> tuple[Any, Any]:
    """Decode images (N, 3, 32, 32), uint8, and return them with their classes (N,)."""
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in frame["img"]]
    return np.stack(images).transpose(0, 3, 1, 2).copy(), np.array(frame["label"], dtype=np.int64)


def augment(batch: Batch, generator: torch.Generator) -> Batch:
    """Shift each image by up to four pixels, black at the borders, and mirror it with probability ½."""
    images, labels = batch
    count, size = len(images), images.shape[-1]
    shift = torch.randint(0, 9, (2, count, 1), generator=generator) + torch.arange(size)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows, columns = shift[0], torch.where(mirrored, shift[1].flip(1), shift[1])
    padded = F.pad(images, (4, 4, 4, 4))
    rows, columns = rows.to(images.device), columns.to(images.device)
    one = torch.arange(count, device=images.device)[:, None, None]
    return padded[one, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2), labels


# ---------------------------------------------------------------- model


class Standardised(nn.Module):
    """Standardise images of bytes colour by colour, in the memory layout of the fastest convolutions."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map bytes (N, 3, H, W) to floats (N, 3, H, W)."""
        return ((images / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


class ResNet18(nn.Module):
    """torchvision's ResNet-18 for small images: a 3 × 3 first convolution, no pooling after it, dropout at the end.

    Args:
        dropout: probability on the output.
        width: channels of the first of four stages. Each stage has twice as many as the one before.
        blocks: residual blocks of each stage.
        pool: side of the squares of pixels whose means the first convolution sees.
    """

    def __init__(self, dropout: float, width: int = 64, blocks: int = 2, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.net = resnet18(num_classes=CLASSES)
        if (width, blocks) != (64, 2):
            resize(self.net, width, blocks)
        self.net.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.standardised = Standardised()

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (N, 10) of images (N, 3, 32, 32) of bytes."""
        x = self.standardised(images)
        if self.pool > 1:
            x = F.avg_pool2d(x, self.pool)
        scores: Tensor = self.dropout(self.net(x))
        return scores


def resize(net: ResNet, width: int, blocks: int) -> None:
    """Give torchvision's ResNet other stages of its own kind, with its own initialisation."""
    net.inplanes, net.bn1 = width, nn.BatchNorm2d(width)
    for stage in range(4):
        layers = net._make_layer(BasicBlock, width * 2**stage, blocks, stride=1 if stage == 0 else 2)
        for module in layers.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        setattr(net, f"layer{stage + 1}", layers)
    net.fc = nn.Linear(width * 2**3, CLASSES)


def build(settings: Settings, data: Data) -> nn.Module:
    """Build a freshly initialised model, in the memory layout of the fastest convolutions."""
    return ResNet18(**settings.model).to(memory_format=torch.channels_last)


# ---------------------------------------------------------------- loss and metric


def inputs_and_labels(batch: Batch) -> tuple[Batch, Tensor]:
    """Split a batch into the model's inputs and the classes (N,)."""
    images, labels = batch
    return (images,), labels


def score(model: nn.Module, batch: Batch) -> Score:
    """Return the mean cross-entropy in nats, and the number of right classes. The metric is their share."""
    inputs, labels = inputs_and_labels(batch)
    return classification_score(model(*inputs), labels)


# ---------------------------------------------------------------- configuration


def settings(profile: str) -> Settings:
    """``paper``: Tables 1 and 4. ``smoke``: a narrow model, a few made-up images of 8 × 8 pixels.

    ``lite``: a quarter of the paper's width, one block a stage instead of two, means of 2 × 2 pixels, and 4,000
    images. A step has 64 of them instead of 128, so that an epoch has 63 steps: with fewer, early stopping would come
    before the loss has stopped falling. At the paper's learning rate or a higher one the longest run
    of the search takes 20 epochs.

    Raises:
        ValueError: for an unknown profile.
    """
    check_choice("profile", profile, PROFILES)
    epochs, batch_size, meta_every, model, data = {
        "paper": (15, 128, 190, {}, {}),
        "lite": (20, 64, 31, {"width": 16, "blocks": 1, "pool": 2}, {"train": 4_000, "val": 2_000, "test": 5_000}),
        "smoke": (2, 8, 2, {"width": 8, "blocks": 1}, {"images": 60, "size": 8, "train": 32, "val": 16, "test": 16}),
    }[profile]
    return Settings(
        epochs=epochs,
        batch_size=batch_size,
        meta_every=meta_every,
        meta_per_epoch=2,
        metaadamw={
            "attn_layers": 64,
            "attn_hidden_dim": 64,
            "attn_heads": 6,
            "feature_version": "basic",
            "use_feature_gating": False,
            "huw_priorities": (5.0, 2.0, 1.0),
        },
        model={"dropout": 0.2, **model},
        data=data,
        scheduled_epochs=19 if profile == "lite" else None,
    )


CIFAR10 = Task(
    name="cifar10",
    title="CIFAR-10 classification",
    metric="accuracy",
    unit="accuracy (share of images)",
    lower_is_better=False,
    settings=settings,
    load=load,
    build=build,
    score=score,
    metric_of=accuracy,
    classes=CLASSES,
    inputs_and_labels=inputs_and_labels,
    augment=augment,
)
