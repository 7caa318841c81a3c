"""Tables and figures on LiLAW: test accuracies, wrong labels found or memorised, and the weights W."""

import math
import re
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metaadamw_lite import LiLAW
from metaadamw_lite.experiments import NOISY, frames, relatives
from metaadamw_lite.experiments.figures import COLOURS, DASHES, LABELS, legend_below, student_interval
from metaadamw_lite.experiments.main_report import ABOVE_CHANCE
from metaadamw_lite.experiments.paired import PairedDifference, paired_difference
from metaadamw_lite.experiments.records import Record
from metaadamw_lite.lilaw import weights_of


def accuracies_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return a row for each run, accuracies and shares in percent.

    Columns beside the run's key: noise (its kind), ``wrong`` (number of wrong labels), ``train`` (number of training
    labels), ``best`` (test accuracy in the epoch that validated best), ``last`` (in the last epoch), ``memorised``
    (wrong training labels that the model repeats in the end), ``meta_steps`` of LiLAW after its warm-up, and its last
    alpha, delta and beta. A failed run has NaN for its end and its meta-steps.
    """
    rows = []
    for r in records:
        failed = r["status"] == "failed"
        end = {} if failed else (r.get("lilaw") or [{}])[-1]
        last = r["epochs"][-1] if r["epochs"] and not failed else {}
        steps_per_epoch = -(-r["samples"]["train"] // r["settings"]["batch_size"])
        rows.append(
            {
                **r["run"],
                "noise": noise_name(r["run"]["task"]),
                "wrong": r["wrong_labels"],
                "train": r["samples"]["train"],
                "status": r["status"],
                "best": 100 * r["test"]["metric"] if r["test"] else np.nan,
                "last": 100 * r["last"]["metric"] if "last" in r else np.nan,
                "memorised": 100 * (np.nan if last.get("memorised") is None else last["memorised"]),
                "meta_steps": np.nan if failed else (len(r["epochs"]) - 1) * steps_per_epoch,
                **{name: end.get(name, np.nan) for name in ("alpha", "delta", "beta")},
            }
        )
    return pd.DataFrame(rows)


def noise_name(task: str) -> str:
    """Name a task's data and noise for headings: "CIFAR-10, symmetric 40 %"."""
    data, _, kind = NOISY[task].title.partition(", ")
    return f"{data.split()[0]}, {kind}"


def points(runs: pd.DataFrame, column: str, arm: str, baseline: str) -> PairedDifference:
    """Compare an arm with another by a column, in percentage points, paired by seed."""
    first, second = (runs[runs["variant"] == v].set_index("seed")[column].astype(float) for v in (arm, baseline))
    return relatives.points_above(first, second)


def accuracy_table(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Compare test accuracy with and without LiLAW, a row for each noise.

    Args:
        runs: from ``accuracies_frame``; only seeds of both arms count.
        column: "best" or "last", the epoch.

    Returns:
        Indexed by noise: mean ± standard deviation of both arms, difference (a ``PairedDifference`` in points), p_holm
        (over the kinds of noise with any wrong label), and the verdict by p_holm.
    """
    rows = {}
    arms = ("adamw", "adamw-lilaw")
    for noise, part in runs.groupby("noise", sort=False):
        d = points(part, column, arms[1], arms[0])
        both = part.pivot(index="seed", columns="variant", values=column).reindex(columns=arms).dropna()
        row: dict[str, object] = {
            f"{LABELS[arm]} (%)": f"{both[arm].mean():.1f} ± {both[arm].std():.1f}" if d.seeds > 1 else "–"
            for arm in arms
        }
        rows[noise] = row | {"difference": d}
    right = runs[runs["wrong"] == 0]["noise"].unique()
    return relatives.corrected_table(pd.DataFrame.from_dict(rows, orient="index"), control=right)


def hardly_above_chance(runs: pd.DataFrame) -> pd.DataFrame:
    """List the kinds of noise on which AdamW is hardly above chance, so that accuracies tell little.

    Args:
        runs: from ``accuracies_frame``.

    Returns:
        Indexed by noise: "best", AdamW's mean test accuracy, and "chance", both in percent.
    """
    adamw = runs[runs["variant"] == "adamw"]
    chance = adamw["task"].map(lambda name: 100 / (NOISY[name].classes or math.nan))
    mean = adamw.assign(chance=chance).groupby("noise", sort=False)[["best", "chance"]].mean()
    return mean[~(mean["best"] >= mean["chance"] + ABOVE_CHANCE)]  # NaN included


def sensitivity_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare LiLAW's meta rates and batch sizes with AdamW at the same batch size, a row for each setting.

    Args:
        runs: from ``accuracies_frame``, of one task; only seeds of every setting count.

    Returns:
        Steps of the meta-descent, the last values of the scalars, the largest change of W, differences
        (``PairedDifference`` in points), number of seeds.
    """
    seeds = runs.groupby("seed")["variant"].nunique()
    runs = runs[runs["seed"].isin(seeds[seeds == runs["variant"].nunique()].index)]
    names = {"": "as it is (rate 0.005, batches of 64)", "-lr": "rate ", "-batch": "batches of "}
    rows = {}
    for variant in runs["variant"].unique():
        setting = re.fullmatch(r"adamw-lilaw(|-lr|-batch)([\d.]*)", variant)
        if not setting:
            continue
        baseline = f"adamw-batch{setting[2]}" if setting[1] == "-batch" else "adamw"
        part = runs[runs["variant"] == variant]
        row: dict[str, object] = {"meta-steps": f"{part['meta_steps'].mean():.0f}"}
        row |= {
            f"{symbol} at the end": f"{part[column].mean():.2f}"
            for symbol, column in {"α": "alpha", "δ": "delta", "β": "beta"}.items()
        }
        row["largest change of W"] = f"{weights_moved(part).max():.2f}"
        for column in ("best", "last", "memorised"):
            what = "wrong labels repeated" if column == "memorised" else f"accuracy, {column} epoch"
            row[f"{what} (points)"] = points(runs, column, variant, baseline)
        rows[names[setting[1]] + setting[2]] = row | {"seeds": part["seed"].nunique()}
    return pd.DataFrame.from_dict(rows, orient="index")


def possible_probabilities(band: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a grid of s[ỹ] and max s, and a mask of the pairs that are possible for some number of classes.

    The given label may have the largest probability, s[ỹ] = max s (the diagonal). Otherwise the two probabilities
    belong to different classes and sum to at most one (the triangle). With C classes max s is 1/C at least.

    Args:
        band: distance from the diagonal that still counts, so that a picture shows the diagonal.
    """
    grid = torch.linspace(0, 1, 201)
    given, largest = torch.meshgrid(grid, grid, indexing="xy")
    return given, largest, (given + largest <= 1) & (given <= largest) | ((given - largest).abs() <= band)


def weights_moved(runs: pd.DataFrame) -> "pd.Series[float]":
    """Return the largest change of W since the start, over all possible probabilities, for each run with LiLAW.

    Args:
        runs: from ``accuracies_frame``.
    """
    given, largest, possible = possible_probabilities()
    start = LiLAW()

    def total(*scalars: float) -> Tensor:
        return weights_of(given, largest, *(torch.tensor(x) for x in scalars)).total[possible]

    before = total(start.alpha.item(), start.delta.item(), start.beta.item())
    ends = runs.dropna(subset=["alpha", "delta", "beta"])[["alpha", "delta", "beta"]]
    return pd.Series({k: float((total(*end) - before).abs().max()) for k, *end in ends.itertuples()}, dtype=float)


def detection_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return a row for each run and method of finding wrong labels, with its "auroc" and "auprc"."""
    return pd.DataFrame(
        [
            {**r["run"], "noise": noise_name(r["run"]["task"]), "method": method, **areas}
            for r in records
            if r["status"] != "failed"
            for method, areas in (r["detection"] or {}).items()
        ]
    )


def detection_against(found: pd.DataFrame, area: str = "auroc") -> pd.DataFrame:
    """Compare LiLAW's easy weight with the best other method, for each noise.

    The other methods come from trainings with and without LiLAW, each by itself. The best has the highest mean area
    over the seeds: one method for all seeds.

    Args:
        found: from ``detection_frame``, of both arms.
        area: "auroc" or "auprc".

    Returns:
        Indexed by noise: best (the method and its training), difference (a ``PairedDifference`` in points of the
        area; positive: LiLAW is better), p_holm (over the kinds of noise), and the verdict by p_holm.
    """
    if found.empty:
        return relatives.corrected_table(pd.DataFrame(columns=["best", "difference"]))
    found = found[found["variant"].isin(["adamw", "adamw-lilaw"])]
    lilaws = found["method"].str.startswith("LiLAW")
    easy = found[(found["method"] == "LiLAW, easy weight") & (found["variant"] == "adamw-lilaw")]
    others = found[~lilaws].assign(way=found["method"] + " (" + found["variant"].map(LABELS) + ")")
    rows = {}
    for noise, part in easy.groupby("noise", sort=False):
        lilaw = 100 * part.set_index("seed")[area].astype(float)
        same = others[(others["noise"] == noise) & others["seed"].isin(lilaw.index)]
        areas = 100 * same.pivot(index="seed", columns="way", values=area).astype(float)
        areas = areas.reindex(lilaw.index).dropna(axis=1)  # a method that lacks a seed cannot be the best
        best = str(areas.mean().idxmax())
        rows[noise] = {"best": best, "difference": paired_difference(lilaw - areas[best], "points")}
    return relatives.corrected_table(pd.DataFrame.from_dict(rows, orient="index", columns=["best", "difference"]))


EPOCH_LABELS = {
    "memorised": "wrong labels repeated (%)",
    "val_loss": "validation loss (nats)",
    "metric": "validation accuracy (%)",
}


def plot_epochs(records: Sequence[Record], column: str, arms: Sequence[str] = ("adamw", "adamw-lilaw")) -> Figure:
    """Draw a column over the epochs: mean over seeds, band from lowest to highest, a panel for each noise.

    Args:
        records: of the runs.
        column: "memorised" (share of wrong training labels that the model repeats), "val_loss", or "metric" (accuracy
            on validation labels).
        arms: the variants.
    """
    epochs = frames.epochs_frame(r for r in records if r["run"]["variant"] in arms).dropna(subset=column)
    epochs = epochs.assign(value=epochs[column].astype(float) * (1 if column == "val_loss" else 100))
    tasks = list(dict.fromkeys(epochs["task"]))
    figure, axes = _panels(len(tasks), (2.5, 2.5) if len(tasks) > 1 else (7.2, 3.8))
    for ax, task in zip(axes, tasks, strict=True):
        sns.lineplot(
            epochs[epochs["task"] == task],
            x="epoch",
            y="value",
            hue="variant",
            style="variant",
            hue_order=arms,
            style_order=arms,
            palette=COLOURS,
            dashes=DASHES,
            errorbar=("pi", 100),
            ax=ax,
            legend=ax is axes[0],
        )
        ax.set(title=noise_name(task).replace(", ", ",\n"), xlabel="epoch", ylabel=EPOCH_LABELS[column])
    axes[0].set_ylim(bottom=0)
    legend_below(figure, axes[0], columns=len(arms))
    return figure


def _panels(count: int, size: tuple[float, float], sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels of a size (inches) and one height axis, four in a row, the last places empty."""
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), sharex=sharex, sharey=True, squeeze=False
    )
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def plot_scalars(records: Sequence[Record]) -> Figure:
    """Draw α, δ and β of LiLAW over the steps of every run, a panel for each, coloured by noise."""
    rows = [
        {"noise": noise_name(r["run"]["task"]), "run": i, **point}
        for i, r in enumerate(records)
        for point in r.get("lilaw", [])
    ]
    frame = pd.DataFrame(rows)
    figure, axes = plt.subplots(1, 3, figsize=(10.0, 3.8))
    for ax, name, symbol in zip(axes, ("alpha", "delta", "beta"), "αδβ", strict=True):
        sns.lineplot(
            frame,
            x="step",
            y=name,
            hue="noise",
            units="run",
            estimator=None,
            linewidth=1,
            palette="colorblind",
            ax=ax,
            legend=ax is axes[2],
        )
        ax.set(xlabel="step", ylabel=f"{symbol} (no unit)", title=symbol)
    sns.move_legend(axes[2], "upper left", bbox_to_anchor=(1, 1), title="", fontsize="small")
    return figure


def plot_detection(found: pd.DataFrame, order: Sequence[str]) -> Figure:
    """Draw the AUROC of each method of finding wrong labels: a panel for each noise, a dot for each run, the mean.

    Args:
        found: from ``detection_frame``.
        order: the methods, from top to bottom.
    """
    noises = list(dict.fromkeys(found["noise"]))
    figure, axes = _panels(len(noises), (2.6, 2.8), sharex=True)
    for ax, noise in zip(axes, noises, strict=True):
        part = found[found["noise"] == noise]
        sns.stripplot(part, x="auroc", y="method", order=order, color="grey", size=4, jitter=False, ax=ax)
        sns.pointplot(
            part, x="auroc", y="method", order=order, errorbar=None, linestyle="none", marker="|", markersize=14, ax=ax
        )
        ax.axvline(0.5, color="black", linewidth=0.7)
        ax.set(title=noise.replace(", ", ",\n"), xlabel="AUROC", ylabel="")
    return figure


def plot_weights(lilaw: LiLAW) -> Figure:
    """Draw W_α, W_δ, W_β and their sum over the ``possible_probabilities`` (s[ỹ], max s)."""
    given, largest, possible = possible_probabilities(band=0.012)
    with torch.no_grad():
        w = weights_of(given, largest, lilaw.alpha, lilaw.delta, lilaw.beta)
    panels = {"W_α (easy)": w.easy, "W_δ (moderate)": w.moderate, "W_β (hard)": w.hard, "W": w.total}
    figure, axes = plt.subplots(1, 4, figsize=(10.4, 3.0), sharex=True, sharey=True)
    for ax, (title, weights) in zip(axes, panels.items(), strict=True):
        shown = np.ma.masked_array(weights.numpy(), ~possible.numpy())
        top = 3 if title == "W" else 1
        image = ax.imshow(shown, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=top, cmap="cividis")
        ax.set(title=title, xlabel="s[ỹ]", ylabel="max s" if ax is axes[0] else "")
        ax.grid(visible=False)
        if title in ("W_β (hard)", "W"):
            figure.colorbar(image, ax=ax, label="weight (no unit)", shrink=0.8)
    return figure


def plot_arms(runs: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """Draw several arms' test accuracy in the best and the last epoch, and their memorised wrong labels.

    Each line is a seed, each dot the mean, with Student's 95 % interval.
    """
    panels = {
        "best": "test accuracy, best epoch (%)",
        "last": "test accuracy, last epoch (%)",
        "memorised": "wrong labels repeated (%)",
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.8))
    for ax, (column, label) in zip(axes, panels.items(), strict=True):
        part = runs[runs["variant"].isin(arms)]
        sns.lineplot(
            part.assign(arm=part["variant"].map(list(arms).index)),
            x="arm",
            y=column,
            units="seed",
            estimator=None,
            color="grey",
            linewidth=0.8,
            ax=ax,
        )
        sns.pointplot(
            part,
            x="variant",
            y=column,
            order=arms,
            hue="variant",
            palette=COLOURS,
            errorbar=student_interval,
            linestyle="none",
            ax=ax,
        )
        ax.set(xlabel="", ylabel=label)
        ax.set_xticks(
            range(len(arms)), [LABELS[arm].replace(" + ", "\n+ ") for arm in arms], fontsize="small", rotation=25
        )
    return figure
