"""Is the ``lite`` profile small and whole? AdamW alone answers, in the runs that its learning rate is searched by.

A size is judged before any comparison, so no record of MetaAdamW is read here. Three things are asked of a task: that
its validation loss has flattened when early stopping ends a run, that the best learning rate lies inside the searched
grid, and that the metric is far from that of a guess that looks at no input.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd
import torch

from metaadamw_lite.experiments import TASKS, multi30k
from metaadamw_lite.experiments.records import read_record
from metaadamw_lite.experiments.studies import best_variant, search_runs
from metaadamw_lite.experiments.task import PROTOCOLS, Data, Task
from metaadamw_lite.experiments.text import PAD
from metaadamw_lite.experiments.variants import at_learning_rate, learning_rate, learning_rates


class Guess(NamedTuple):
    """How well a guess does on the part of the data that is reported: the task's metric, and the mean loss."""

    metric: float
    loss: float


def guess(task: Task, data: Data) -> Guess:
    """What can be had without looking at the input: the most frequent class, the mean, or the frequencies of words.

    The loss of classes is that of equal chances. Words are counted in the training part, each once more than it occurs.
    """
    part = data.val if data.test is None else data.test
    if task.classes is not None:
        right = (part[1] == data.train[1].bincount().argmax()).double()
        return Guess(float(right.mean()), math.log(task.classes))
    if task.name == "etth1":
        loss = float((part[1] - data.train[1].mean()).double().square().mean())
        return Guess(task.metric_of(loss, math.nan), loss)
    seen, expected = (p[-1][:, 1:].flatten().long() for p in (data.train, part))
    counts = torch.bincount(seen, minlength=int(expected.max()) + 1).double() + 1
    if task is multi30k.MULTI30K:  # padding is no word there
        counts[PAD], expected = 0, expected[expected != PAD]
    loss = float(-(counts / counts.sum()).log()[expected].mean())
    return Guess(task.metric_of(loss, math.nan), loss)


def late_fall(losses: list[float], start: float) -> float:
    """The share of a loss's fall, from ``start`` to its best epoch, that the last third of the epochs have made."""
    early = min(losses[: math.ceil(len(losses) * 2 / 3)])
    return (early - min(losses)) / (start - min(losses))


def sizing_table(results: Path, profile: str = "lite") -> pd.DataFrame:
    """One row for each task and protocol whose search has at least one record.

    Columns: how many runs of the search there are; the most epochs that a run at the paper's rate or a higher one has
    taken, and the cap; the mean ``late_fall`` from a guess, at the paper's rate and at the best one; the best rate, and
    whether it lies inside the grid (both empty while the search goes on); and the best epoch's metric on validation, at
    the best rate (until then, at the paper's), and that of the guess. There are no seconds: those of the records tell
    how busy the machine was.

    Args:
        results: folder of the records.
        profile: whose search it is; the guesses of "smoke" are made from synthetic data.

    Raises:
        DataError: if the data, which the guesses are made from, cannot be had.
    """
    rows = [_row(task, protocol, profile, results) for task in TASKS.values() for protocol in PROTOCOLS]
    found = [row for row in rows if row]
    return pd.DataFrame(found).set_index(["task", "protocol"]) if found else pd.DataFrame()


def _row(task: Task, protocol: str, profile: str, results: Path) -> dict[str, Any]:
    search = search_runs(task.name, protocol, profile)
    records = {key: read_record(key.path(results)) for key in search if key.path(results).exists()}
    if not records:
        return {}
    settings, grid = task.settings(profile), learning_rates(profile)
    guessed = guess(task, task.load(protocol, settings, "synthetic" if profile == "smoke" else "real"))
    best = best_variant(search, results)

    def of(variant: str | None) -> list[dict[str, Any]]:
        return [record for key, record in records.items() if key.variant == variant and record["epochs"]]

    def fall(variant: str | None) -> float:
        return _mean([late_fall([e["val_loss"] for e in r["epochs"]], guessed.loss) for r in of(variant)])

    at_paper = at_learning_rate(settings.lr)
    return {
        "task": task.name,
        "protocol": protocol,
        "runs": f"{len(records)}/{len(search)}",
        "epochs": max((len(r["epochs"]) for r in records.values() if r["settings"]["lr"] >= settings.lr), default=0),
        "cap": settings.epochs,
        "late fall": fall(at_paper),
        "late fall, best": fall(best),
        "best rate": None if best is None else learning_rate(best),
        "inside": None if best is None else learning_rate(best) not in (grid[0], grid[-1]),
        "metric": _mean([r["best"]["metric"] for r in of(best or at_paper) if r["best"]]),
        "guess": guessed.metric,
    }


def _mean(numbers: list[float]) -> float:
    return fmean(numbers) if numbers else math.nan
