"""Labels made wrong on purpose, reproducibly by a seed.

Every injector takes true labels, (N,), and returns observed ones. Exactly round(rate · N) of N samples change their
label.
"""

import io
import math
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metaadamw_lite.checks import check_choice, check_seed, check_share
from metaadamw_lite.experiments.datasets import DataError, file_from
from metaadamw_lite.experiments.task import Batch, Data

Array = np.ndarray[Any, np.dtype[Any]]

KINDS = ("symmetric", "asymmetric", "instance", "human")
CIFAR10_PAIRS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
"""Truck → automobile, bird → airplane, deer → horse, cat ↔ dog: the pairs that are common in the literature."""
HUMAN_LABELS = ("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3")
HUMAN_FILE = "cifar10n/cifar10n_labels.npz"
HUMAN_SOURCE = "https://github.com/UCSC-REAL/cifar-10-100-n/raw/main/data/CIFAR-10_human.pt"


def symmetric(labels: Array, classes: int, rate: float, seed: int) -> Array:
    """Give a share ``rate`` of all samples another class, each of the others equally likely.

    Raises:
        ValueError: for a rate outside [0, 1], a bad seed, or labels that are no class numbers.
    """
    rng = _generator_after_checks(labels, classes, rate, seed)
    chosen = _choose(np.arange(len(labels)), rate, rng)
    shift = rng.integers(1, classes, len(chosen))
    return _replace_labels(labels, chosen, (labels[chosen] + shift) % classes)


def asymmetric(labels: Array, pairs: Mapping[int, int], classes: int, rate: float, seed: int) -> Array:
    """Give a share ``rate`` of the samples of each class with a partner the partner's label.

    The share of all labels is smaller: rate/2 if five of ten classes have a partner.

    Raises:
        ValueError: as ``symmetric`` does, and for a pair that is not two different classes.
    """
    rng = _generator_after_checks(labels, classes, rate, seed)
    for a, b in pairs.items():
        if a == b or not (0 <= a < classes and 0 <= b < classes):
            raise ValueError(f"pair {a} → {b}; two different classes from 0 to {classes - 1} are needed")
    chosen = [_choose(np.flatnonzero(labels == a), rate, rng) for a in sorted(pairs)]
    numbers = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
    partner = np.arange(classes)
    partner[list(pairs)] = list(pairs.values())
    return _replace_labels(labels, numbers, partner[labels[numbers]])


def instance_dependent(labels: Array, inputs: Array, classes: int, rate: float, seed: int, maps_seed: int) -> Array:
    """Give a share ``rate`` of all samples a wrong class that depends on the sample.

    This follows Xia et al. (2020, "Part-dependent label noise"). Each class has a random linear map from inputs to
    scores of all classes, and a wrong label is drawn from the softmax of a sample's scores without its true class. The
    chance of a wrong label varies by sample (normal around the rate, standard deviation 0.1). Here the number of wrong
    labels is exact; theirs is exact on average.

    Args:
        labels: true labels, (N,).
        inputs: numbers (N, ...) of any scale, which are standardised.
        classes: number of classes.
        rate: share of wrong labels.
        seed: of all random choices but the maps.
        maps_seed: of the maps. Parts of one data set have the same kind of noise only if they share the maps.

    Raises:
        ValueError: as ``symmetric`` does, and if there is not one input for each label.
    """
    rng = _generator_after_checks(labels, classes, rate, seed)
    check_seed(maps_seed)
    if len(inputs) != len(labels):
        raise ValueError(f"{len(inputs)} inputs for {len(labels)} labels; one for each is needed")
    x = inputs.reshape(len(inputs), -1).astype(np.float64)
    x = (x - x.mean()) / max(float(x.std()), 1e-12) / np.sqrt(x.shape[1])
    proneness = np.clip(rng.normal(rate, 0.1, len(labels)), 1e-6, 1.0)
    count = round(rate * len(labels))
    # The largest keys are a draw without replacement with these odds (Efraimidis and Spirakis).
    keys = np.log(rng.random(len(labels))) / proneness
    chosen = np.sort(np.argsort(-keys, kind="stable")[:count])
    maps = np.random.default_rng((maps_seed, 1)).normal(size=(classes, x.shape[1], classes))
    scores = np.stack([x[i] @ maps[labels[i]] for i in chosen]) if count else np.zeros((0, classes))
    scores[np.arange(count), labels[chosen]] = -np.inf
    gumbel = -np.log(-np.log(rng.random(scores.shape)))  # the largest of scores + gumbel is a draw from the softmax
    return _replace_labels(labels, chosen, (scores + gumbel).argmax(axis=1))


def human_labels(name: str, truth: Array) -> Array:
    """Return people's labels of the 50,000 training images of CIFAR-10 (CIFAR-10N).

    Args:
        name: one of ``HUMAN_LABELS``: "worse_label" is a wrong one of three, if there is one (40 % are wrong).
        truth: the true labels of the images, (50,000,), in the order of the file.

    Raises:
        ValueError: for an unknown name.
        DataError: if the file is missing and cannot be downloaded, is broken, or has another order.
    """
    check_choice("human labels", name, HUMAN_LABELS)
    path = file_from(HUMAN_FILE, HUMAN_SOURCE, _download_human)
    try:
        with np.load(path, allow_pickle=False) as tables:
            labels: Array = tables[name].astype(np.int64)
            clean = tables["clean_label"]
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not the labels of CIFAR-10N ({error!r}); delete it to have it made again"
        ) from error
    if labels.shape != (50_000,):
        raise DataError(f"{path} has {labels.shape} labels {name!r}; expected 50,000")
    wrong = (labels != clean).mean()
    if not 0.05 < wrong < 0.5:
        raise DataError(f"of the labels {name!r} in {path} {100 * wrong:.0f} % are wrong; expected 9 to 40 %")
    if not np.array_equal(clean, truth):
        raise DataError(f"the images of CIFAR-10 are not in the order of {path}: their true labels differ")
    return labels


def _download_human(part: Path) -> None:
    with urllib.request.urlopen(HUMAN_SOURCE, timeout=60) as response:
        download = io.BytesIO(response.read())
    # The file holds NumPy arrays; these are all that reading them needs, so nothing else in it can run.
    reconstruct = np.array(0).__reduce__()[0]
    kinds = {type(np.dtype(t)) for t in ("i4", "i8", "u1", "f8")}
    names: list[Any] = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *kinds, *names]):
        tables = torch.load(download, weights_only=True)
    arrays: dict[str, Any] = {name: np.asarray(tables[name]) for name in ("clean_label", *HUMAN_LABELS)}
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)


def corrupted(data: Data, noise: Mapping[str, Any], classes: int, seed: int) -> Data:
    """Make training and validation labels wrong alike, and leave the test part right.

    Args:
        data: batches whose second tensor is the label. With "human" noise its labels are wrong already.
        noise: "kind", one of ``KINDS``; "rate"; "pairs" for "asymmetric"; "imbalance" to thin out classes first.
        classes: number of classes, also of those without a label here.
        seed: of all random choices.

    Returns:
        The data, with the true labels of the training part as ``truth``.

    Raises:
        ValueError: as the injectors do.
    """
    check_choice("noise", noise["kind"], KINDS)
    if noise["kind"] == "human":
        return data
    if "imbalance" in noise:
        data = imbalanced(data, noise["imbalance"], classes)
    train, val = (
        (part[0], torch.from_numpy(_injected(part, noise, classes, 2 * seed + k, 2 * seed)), *part[2:])
        for k, part in enumerate((data.train, data.val))
    )
    return replace(data, train=train, val=val, truth=data.train[1])


def imbalanced(data: Data, ratio: float, classes: int) -> Data:
    """Give training and validation part a long tail: of C classes, class c keeps a share ratio^(−c/(C−1)).

    Raises:
        ValueError: for a ratio below 1, or one that is not finite.
    """
    if not 1 <= ratio < math.inf:
        raise ValueError(f"ratio is {ratio}; it must be at least 1, and finite")

    def thinned(part: Batch) -> Batch:
        labels = part[1]
        rank = torch.zeros_like(labels)
        for c in range(classes):
            members = labels == c
            rank[members] = torch.arange(int(members.sum()))
        share = ratio ** (-labels.double() / max(1, classes - 1))
        kept = rank < (share * torch.bincount(labels, minlength=classes)[labels]).round()
        return tuple(x[kept] for x in part)

    return replace(data, train=thinned(data.train), val=thinned(data.val))


def _injected(part: Batch, noise: Mapping[str, Any], classes: int, seed: int, maps_seed: int) -> Array:
    labels, rate = part[1].numpy(), noise["rate"]
    if noise["kind"] == "symmetric":
        return symmetric(labels, classes, rate, seed)
    if noise["kind"] == "asymmetric":
        return asymmetric(labels, dict(noise["pairs"]), classes, rate, seed)
    return instance_dependent(labels, part[0].numpy(), classes, rate, seed, maps_seed)


def _generator_after_checks(labels: Array, classes: int, rate: float, seed: int) -> np.random.Generator:
    check_seed(seed)
    check_share(rate=rate)
    if classes < 2:
        raise ValueError(f"classes is {classes}; it must be at least 2")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype}; integers from 0 to {classes - 1} are needed")
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        bad = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f"a label is {bad}; allowed are 0 to {classes - 1}")
    return np.random.default_rng(seed)


def _choose(numbers: Array, rate: float, rng: np.random.Generator) -> Array:
    chosen: Array = np.sort(rng.choice(numbers, round(rate * len(numbers)), replace=False))
    return chosen


def _replace_labels(labels: Array, chosen: Array, becomes: Array) -> Array:
    observed = labels.copy()
    observed[chosen] = becomes
    return observed
