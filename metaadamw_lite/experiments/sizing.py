"""Is the ``lite`` profile small and whole? The search for AdamW's learning rate answers.

A size is judged before any comparison, so no record of MetaAdamW is read here. A task must pass three checks: its
validation loss has flattened when early stopping ends a run, the best learning rate lies inside the searched grid, and
the metric is far from that of a guess that ignores the input.
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
    """The task's metric and mean loss of a guess, on the reported part of the data."""

    metric: float
    loss: float


def guess(task: Task, data: Data) -> Guess:
    """Guess without the input: the most frequent class, the mean, or the frequencies of words.

    The loss of classes is that of equal chances. Words are counted in the training part, plus one each.
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
    """Return the last third of the epochs' share in a loss's fall from ``start`` to the best epoch."""
    early = min(losses[: math.ceil(len(losses) * 2 / 3)])
    return (early - min(losses)) / (start - min(losses))


def sizing_table(results: Path, profile: str = "lite") -> pd.DataFrame:
    """Return a row for each task and protocol whose search has at least one record.

    Columns: "runs" of the search; "epochs", the most of a run at the paper's rate or a higher one, and their "cap"; the
    mean ``late_fall`` from a guess, at the paper's rate and at the best one; the "best rate", and whether it lies
    "inside" the grid (both empty until the search is complete); the "metric" of the best epoch on validation, at the
    best rate (until then, at the paper's), and that of the "guess". Seconds are left out, since they depend on the
    machine's load.

    Args:
        results: folder of the records.
        profile: profile of the search; the guesses of "smoke" are made from synthetic data.

    Raises:
        DataError: if the data of the guesses are missing and cannot be downloaded.
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
