"""Is the ``lite`` profile small and whole? AdamW alone answers, in the runs that its learning rate is searched by.

A size is judged before any comparison, so no record of MetaAdamW is read here. Three things are asked of a task: that
its validation loss has flattened when early stopping ends a run, that the best learning rate lies inside the searched
grid, and that the metric is far from what a guess gives that looks at no input (``guesses``).
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metaadamw_lite.experiments import TASKS, multi30k, report
from metaadamw_lite.experiments.records import read_record
from metaadamw_lite.experiments.studies import best_variant, search_runs
from metaadamw_lite.experiments.task import PROTOCOLS, Data, Task
from metaadamw_lite.experiments.text import PAD
from metaadamw_lite.experiments.variants import at_learning_rate, learning_rate, learning_rates

FLAT = 0.05
"""Of the whole fall of a validation loss, the last third of the epochs may have so much."""


class Guess(NamedTuple):
    """How well a guess does on the part of the data that is reported.

    Attributes:
        metric: the task's metric.
        error: its standard error, which comes of the part's having a limited number of samples.
        loss: what the fall of the validation loss is measured from.
    """

    metric: float
    error: float
    loss: float


def guesses(task: Task, data: Data) -> dict[str, Guess]:
    """What can be had without looking at the input, by the name of the guess; for ETTh1 also with its last hour alone.

    Perplexities are those of word frequencies in the training part, with one added to each count.
    """
    part = data.val if data.test is None else data.test
    if task.classes is not None:
        labels, observed = part[1], data.train[1]
        right = (labels == observed.bincount().argmax()).double()
        share, loss = float(right.mean()), math.log(task.classes)
        return {"most frequent class": Guess(share, _standard_error(right, torch.ones_like(right)), loss)}
    if task.name == "etth1":
        x, y = part
        ones = torch.ones(len(y), dtype=torch.float64)
        errors = {
            "mean": (y - data.train[1].mean()).double().square().flatten(),
            "last hour": (y - x[:, -1:]).double().square().flatten(),
        }
        return {n: Guess(float(e.mean()), _standard_error(e, ones), float(e.mean())) for n, e in errors.items()}
    seen, expected = (p[-1][:, 1:].long() for p in (data.train, part))
    ignored = [PAD] if task is multi30k.MULTI30K else []
    counts = torch.bincount(seen.flatten(), minlength=int(expected.max()) + 1).double() + 1
    counts[ignored] = 0
    losses = -(counts / counts.sum()).log()[expected]
    counted = torch.ones_like(losses) if not ignored else (expected != PAD).double()
    sums, terms = losses.where(counted > 0, 0).sum(dim=1), counted.sum(dim=1)
    loss = float(sums.sum() / terms.sum())
    metric = task.metric_of(loss, math.nan)
    return {"word frequencies": Guess(metric, metric * _standard_error(sums, terms), loss)}


def _standard_error(sums: Tensor, terms: Tensor) -> float:
    """Of the mean over all terms of independent samples, each with a sum of some terms."""
    residuals = sums - terms * (sums.sum() / terms.sum())
    return float(residuals.square().sum().sqrt() / terms.sum())


def late_fall(losses: list[float], start: float) -> float:
    """The share of a loss's fall, from ``start`` to its best epoch, that the last third of the epochs have made."""
    early = min(losses[: math.ceil(len(losses) * 2 / 3)])
    return (early - min(losses)) / (start - min(losses))


def sizing_table(results: Path, profile: str = "lite") -> pd.DataFrame:
    """One row for each task and protocol whose search has at least one record.

    Columns: how many runs of the search there are, and how many of these early stopping has ended; the longest one's
    epochs and the cap; the ``late_fall`` at the paper's rate and at the best one, whichever is larger, and whether it
    is below ``FLAT``; the best rate, and whether it lies inside the grid (both empty while the search goes on); the
    validation metric there (until then, at the paper's rate); guesses; the standard error that the number of reported
    samples gives the metric, in percent of it, beside the paper's gain in percent (for losses that of the best guess,
    whose errors spread more than a trained model's); and the seconds of a run at the paper's rate, reckoned from the
    fastest epoch, since whatever else a machine does makes epochs longer.

    Args:
        results: folder of the records.
        profile: whose search it is; the guesses of "smoke" are made from synthetic data.

    Raises:
        DataError: if the data, which the guesses are made from, cannot be had.
    """
    rows = [
        row | {"paper's gain (%)": report.paper_table(2).loc[name, "improvement_percent"]}
        for name, task in TASKS.items()
        for protocol in PROTOCOLS
        if (row := _row(task, protocol, profile, results)) is not None
    ]
    return pd.DataFrame(rows).set_index(["task", "protocol"]) if rows else pd.DataFrame()


def _row(task: Task, protocol: str, profile: str, results: Path) -> dict[str, Any] | None:
    search = search_runs(task.name, protocol, profile)
    records = {key: read_record(key.path(results)) for key in search if key.path(results).exists()}
    if not records:
        return None
    settings, grid = task.settings(profile), learning_rates(profile)
    guessed = guesses(task, task.load(protocol, settings, "synthetic" if profile == "smoke" else "real"))
    best = best_variant(search, results)
    at_paper = at_learning_rate(settings.lr)
    shown = best or at_paper
    falls = {
        variant: fmean(of_it)
        for variant in (at_paper, shown)
        if (of_it := [_late_fall(r, guessed) for key, r in records.items() if key.variant == variant])
    }
    metrics = [r["best"]["metric"] for key, r in records.items() if key.variant == shown and r["best"]]
    metric = fmean(metrics) if metrics else math.nan
    seconds = min(e["seconds"] for r in records.values() for e in r["epochs"])
    epochs = [len(r["epochs"]) for key, r in records.items() if key.variant == at_paper]
    fall = max(falls.values(), default=math.nan)
    return {
        "task": task.name,
        "protocol": protocol,
        "runs": f"{len(records)}/{len(search)}",
        "stopped early": sum(r["status"] == "stopped early" for r in records.values()),
        "epochs, longest": max(len(r["epochs"]) for r in records.values()),
        "epochs, cap": settings.epochs,
        "late fall": fall,
        "flat": None if math.isnan(fall) else fall < FLAT,
        "best rate": None if best is None else learning_rate(best),
        "inside": None if best is None else learning_rate(best) not in (grid[0], grid[-1]),
        "metric": metric,
        "guesses": "; ".join(f"{name} {guess.metric:.4g}" for name, guess in guessed.items()),
        "sampling error (%)": 100 * _sampling_error(task, metric, guessed, next(iter(records.values()))),
        "seconds": seconds * fmean(epochs) if epochs else math.nan,
    }


def _late_fall(record: dict[str, Any], guessed: dict[str, Guess]) -> float:
    losses = [e["val_loss"] for e in record["epochs"] if e["val_loss"] is not None]
    return late_fall(losses, max(guess.loss for guess in guessed.values())) if losses else math.nan


def _sampling_error(task: Task, metric: float, guessed: dict[str, Guess], record: dict[str, Any]) -> float:
    """Relative to the metric."""
    if task.classes is not None:
        return math.sqrt((1 - metric) / metric / (record["samples"]["test"] or record["samples"]["val"]))
    best = min(guessed.values(), key=lambda guess: guess.metric)
    return best.error / best.metric
