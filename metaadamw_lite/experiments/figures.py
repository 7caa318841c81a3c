"""The book's figures, in one style. Each mean stands beside the runs, their range or an interval."""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from metaadamw_lite.experiments.paired import ENOUGH_SEEDS, PairedDifference, paired_difference
from metaadamw_lite.experiments.task import Task

LABELS = {
    "adamw": "AdamW",
    "metaadamw": "MetaAdamW",
    "metaadamw-frozen": "MetaAdamW, Φ untrained",
    "adamw-lilaw": "AdamW + LiLAW",
    "metaadamw-lilaw": "MetaAdamW + LiLAW",
}
COLOURS = dict(zip(LABELS, sns.color_palette("colorblind", len(LABELS)), strict=True))
"""Colour-blind-safe, and told apart by their dashes in print."""
DASHES = {
    "adamw": "",
    "metaadamw": (4, 1.5),
    "metaadamw-frozen": (1, 1),
    "adamw-lilaw": (6, 1, 1, 1),
    "metaadamw-lilaw": (3, 1, 1, 1, 1, 1),
}
LINEAR_TO = 10
"""Percent up to which improvements are drawn on a linear scale."""


def use_style() -> None:
    """Set the book's figure style: white ground (legible on light and dark pages and in print), sizes for a column."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.6),
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "axes.titlesize": "medium",
            "svg.hashsalt": "metaadamw_lite",
        }
    )


def student_interval(values: "pd.Series[float]") -> tuple[float, float]:
    """Return Student's 95 % interval for the mean of some values, for seaborn's ``errorbar``; NaN for too few."""
    d = paired_difference(values, "")
    return d.t_low, d.t_high


def means_and_bars(differences: Iterable[PairedDifference]) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """Return the means (N,) of paired differences, and the lengths (2, N) of Student's 95 % intervals on both sides."""
    mean, low, high = np.array([(d.mean, d.t_low, d.t_high) for d in differences]).reshape(-1, 3).T
    return mean, np.array([mean - low, high - mean])


def plot_curves(
    epochs: pd.DataFrame,
    protocols: Sequence[str],
    task: Task,
    reference: dict[str, float] | None = None,
    share_y: bool = True,
) -> Figure:
    """Draw validation curves of the arms, a panel for each protocol: mean over seeds, band from lowest to highest.

    Args:
        epochs: from ``frames.epochs_frame``.
        protocols: the panels.
        task: the task of the epochs; an error has a logarithmic axis.
        reference: the paper's value for an arm, drawn as a thin line under the paper's protocol.
        share_y: give all panels one range.
    """
    size = (4.6 * len(protocols), 3.8)
    figure, axes = plt.subplots(1, len(protocols), figsize=size, sharey=share_y, squeeze=False)
    scale = "log" if task.lower_is_better else "linear"
    for ax, protocol in zip(axes[0], protocols, strict=True):
        part = epochs[epochs["protocol"] == protocol].rename(columns={"variant": "arm"})
        sns.lineplot(
            part,
            x="epoch",
            y="metric",
            hue="arm",
            style="arm",
            dashes=DASHES,
            palette=COLOURS,
            errorbar=("pi", 100),
            ax=ax,
            legend=ax is axes[0][-1],
        )
        if protocol == "paper":
            for arm, value in (reference or {}).items():
                ax.axhline(value, color=COLOURS[arm], linewidth=0.8)
        note = " (log scale)" if scale == "log" else ""
        ax.set(yscale=scale, xlabel="epoch", ylabel=f"validation {task.unit}", title=f"protocol: {protocol}{note}")
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend = axes[0][-1].get_legend()
    if legend is not None:
        for text in legend.get_texts():
            text.set_text(LABELS[text.get_text()])
        sns.move_legend(axes[0][-1], "upper left", bbox_to_anchor=(1, 1), title="")  # beside the curves, not over them
    return figure


def plot_factors(factors: pd.DataFrame) -> Figure:
    """Draw α and β of every group over the steps of one run, coloured by layer type, a panel for each factor.

    Args:
        factors: from ``frames.factors_frame``, of one run.
    """
    factors = factors.assign(type=factors["group"].str.split("/").str[0], kind=factors["group"].str.split("/").str[2])
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4.0), sharex=True, sharey=True)
    for ax, factor, symbol in zip(axes, ("alpha", "beta"), ("α", "β"), strict=True):
        sns.lineplot(
            factors,
            x="step",
            y=factor,
            hue="type",
            style="kind",
            units="group",
            estimator=None,
            palette="colorblind",
            linewidth=1,
            ax=ax,
            legend=ax is axes[1],
        )
        ax.axhline(1, color="black", linewidth=0.6)
        ax.set(xlabel="step", ylabel="factor (no unit)", title=f"{symbol}, a line for each group", ylim=(0.45, 1.55))
    sns.move_legend(axes[1], "upper left", bbox_to_anchor=(1, 1), title="", fontsize="small")
    return figure


def plot_pairs(outcome: pd.DataFrame, titles: dict[str, str], task: Task, reference: dict[str, float]) -> Figure:
    """Draw the outcome of every run, runs of one seed connected, a panel for each protocol.

    Args:
        outcome: from ``frames.outcomes``.
        titles: titles of the panels, by protocol.
        task: the task of the runs.
        reference: the paper's value for an arm, drawn as a line in the panel of the paper's protocol.
    """
    labels = {arm: label.replace(", ", ",\n") for arm, label in LABELS.items()}
    arms = pd.Categorical(outcome["variant"].map(labels), list(labels.values()))
    outcome = outcome.assign(arm=arms, seed=outcome["seed"].astype(str)).sort_values(["seed", "arm"])
    figure, axes = plt.subplots(1, len(titles), figsize=(4.8 * len(titles), 3.8), squeeze=False)
    for ax, (protocol, title) in zip(axes[0], titles.items(), strict=True):
        sns.lineplot(
            outcome[outcome["protocol"] == protocol],
            x="arm",
            y="outcome",
            hue="seed",
            style="seed",
            palette="colorblind",
            markers=True,
            dashes=False,
            linewidth=0.9,
            markersize=7,
            ax=ax,
            legend=ax is axes[0][-1],
        )
        for (name, value), dash in zip(reference.items() if protocol == "paper" else (), ("-", "--"), strict=False):
            ax.axhline(value, color="black", linewidth=0.7, linestyle=dash, label=f"paper, {LABELS[name]}")
        ax.set(xlabel="", ylabel=task.unit, title=title, xlim=(-0.3, 2.3))
        ax.tick_params(axis="x", labelsize="small")
    if "paper" in titles and reference:
        axes[0][0].legend(fontsize="x-small")
    sns.move_legend(axes[0][-1], "upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_learning_rates(search: pd.DataFrame, task: Task, reference: float) -> Figure:
    """Draw AdamW's best validation metric over its learning rate: mean and range over the seeds of the search.

    Args:
        search: from ``tuning_report.searched``.
        task: the task of the search; an error has a logarithmic axis.
        reference: the paper's learning rate, drawn as a line.
    """
    figure, ax = plt.subplots(figsize=(6.0, 3.6))
    sns.lineplot(search, x="lr", y="best", marker="o", color=COLOURS["adamw"], errorbar=("pi", 100), ax=ax)
    ax.axvline(reference, color="black", linewidth=0.7, linestyle="--", label="the paper's")
    better = "lower" if task.lower_is_better else "higher"
    ylabel = f"best validation {task.unit}\n({better} is better)"
    ax.set(xscale="log", xlabel="learning rate (log scale)", ylabel=ylabel)
    rates = sorted(search["lr"].unique())
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=30)
    ax.set_xticks([], minor=True)
    if task.lower_is_better:
        ax.set_yscale("log")
    ax.legend(fontsize="small")
    return figure


def plot_improvements(improvements: pd.DataFrame) -> Figure:
    """Draw the improvement of every pair, a row for each task, with the mean and the paper's number.

    Args:
        improvements: from ``main_report.improvements_frame``.
    """
    figure, ax = plt.subplots(figsize=(7.6, 0.7 * improvements["task"].nunique() + 1.4))
    sns.stripplot(
        improvements, x="improvement", y="task", color=COLOURS["adamw"], size=7, jitter=False, alpha=0.6, ax=ax
    )
    sns.pointplot(
        improvements,
        x="improvement",
        y="task",
        errorbar=None,
        linestyle="none",
        marker="|",
        markersize=22,
        color="black",
        ax=ax,
    )
    sns.stripplot(
        improvements, x="paper", y="task", marker="D", color=COLOURS["metaadamw"], size=7, jitter=False, ax=ax
    )
    ax.axvline(0, color="black", linewidth=0.7)
    ax.set_xscale("symlog", linthresh=LINEAR_TO)
    ticks = [tick for size in (5, 10, 30, 100) for tick in (-size, size)]
    values = improvements[["improvement", "paper"]].to_numpy(dtype=float)
    left, right = 1.3 * min(np.nanmin(values), -LINEAR_TO), 1.3 * max(np.nanmax(values), LINEAR_TO)
    ax.set(xlim=(left, right), ylabel="")
    ax.set_xticks([0, *(tick for tick in ticks if left < tick < right)])
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    ax.set_xlabel(f"improvement of MetaAdamW over AdamW (%)\nlog scale beyond ±{LINEAR_TO}")
    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLOURS["adamw"], label="a seed"),
        Line2D([], [], linestyle="", marker="|", markersize=18, color="black", label="mean"),
        Line2D([], [], linestyle="", marker="D", color=COLOURS["metaadamw"], label="the paper's"),
    ]
    ax.legend(handles=handles, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_gains(rows: pd.DataFrame, dark: bool = False) -> Figure:
    """Draw the gain of MetaAdamW over AdamW in each comparison: pairs, mean with interval, the paper's, random Φ's.

    Args:
        rows: a row for each comparison: "label", "improvements" (by seed, percent), "gain" (a ``PairedDifference``),
            "paper" (percent) and "band" (the range of 95 % of the gains of random, untrained Φ's, or None).
        dark: draw for a dark page.
    """
    ink, ground = ("#e8e8e8", "#121212") if dark else ("black", "white")
    colours = {"pair": "#7fb8e6" if dark else "#56a0d3", "mean": ink, "paper": "#ffa64d" if dark else "#d55e00"}
    band = "#4a4a4a" if dark else "#d9d9d9"
    with plt.rc_context({**dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)}):
        figure, ax = plt.subplots(figsize=(5.8, 0.5 * len(rows) + 1.9), facecolor=ground)
        ax.set_facecolor(ground)
        for y, row in enumerate(rows.to_dict("records")):
            if row["band"] is not None:
                low, high = row["band"]
                ax.barh(y, high - low, left=low, height=0.7, color=band, edgecolor="none", zorder=1)
            ax.plot(
                row["improvements"], [y] * len(row["improvements"]), "o", color=colours["pair"], alpha=0.7, zorder=3
            )
            if row["gain"].seeds >= ENOUGH_SEEDS:
                mean, bars = means_and_bars([row["gain"]])
                ax.errorbar(mean, [y], xerr=bars, fmt="|", color=ink, capsize=4, zorder=4, markersize=13, linewidth=1.6)
            ax.plot(row["paper"], y, "D", color=colours["paper"], zorder=5)
        ax.axvline(0, color=ink, linewidth=0.8, zorder=2)
        ax.set_yticks(range(len(rows)), rows["label"])
        ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="gain of MetaAdamW over AdamW (%); right is better")
        ax.grid(visible=False, axis="y")
        ax.grid(visible=True, axis="x", color=band, linewidth=0.6)
        for spine in ax.spines.values():
            spine.set_color(band)
        handles: list[Artist] = [
            Line2D([], [], linestyle="", marker="o", color=colours["pair"], label="a pair of runs, same seed"),
            Line2D([], [], marker="|", markersize=10, color=ink, label="their mean, 95 % interval"),
            Line2D([], [], linestyle="", marker="D", color=colours["paper"], label="the paper's number, one pair"),
        ]
        if rows["band"].notna().any():
            handles.append(Patch(color=band, label="95 % of random, untrained Φ's"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def plot_alpha_and_gain(pairs: pd.DataFrame) -> Figure:
    """Draw the gain of each pair of runs over the output layer's α in its MetaAdamW run, a panel for each task.

    Args:
        pairs: the rows of that group from ``main_report.alphas_and_gains``, with a column "task", the panel's title.
    """
    tasks = pairs["task"].unique()
    figure, axes = plt.subplots(1, len(tasks), figsize=(2.5 * len(tasks), 2.9), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        part = pairs[pairs["task"] == task]
        sns.scatterplot(part, x="alpha", y="gain", color=COLOURS["metaadamw"], s=60, ax=ax)
        ax.axhline(0, color="black", linewidth=0.7)
        ax.axvline(1, color="black", linewidth=0.7, linestyle="--")
        ax.set_title(task.replace(" (", "\n("), fontsize="small")
        ax.set(xlim=(0.4, 1.6), xlabel="α, output layer", ylabel="improvement (%)" if ax is axes[0][0] else "")
    return figure


def plot_ablations(table: pd.DataFrame) -> Figure:
    """Draw the change of each ablation against MetaAdamW with Student's 95 % interval, a row for each variant.

    Args:
        table: from ``ablation_report.ablation_table``; rows without a variant or without an interval are left out.
    """
    rows = table[table["variant"].notna() & (table["variant"] != "metaadamw")]
    rows = rows[[d.seeds >= ENOUGH_SEEDS for d in rows["difference"]]]
    labels = [f"{value}" if factor == "MetaAdamW" else f"{factor}: {value}" for factor, value in rows.index]
    mean, bars = means_and_bars(rows["difference"])
    figure, ax = plt.subplots(figsize=(7.6, 0.3 * len(rows) + 1.2))
    ax.errorbar(mean, labels, xerr=bars, fmt="o", color=COLOURS["metaadamw"], capsize=3)
    ax.axvline(0, color="black", linewidth=0.7)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="change against MetaAdamW (%; negative is worse)\nmean and Student's 95 % interval")
    return figure


def plot_one_setting_apart(pairs: pd.DataFrame) -> Figure:
    """Draw the distance of logged runs that differ in one setting, in units of the paper's gain: a dot for each pair.

    Args:
        pairs: from ``released.one_setting_apart``.
    """
    order = pairs.groupby("setting")["of_gain"].max().sort_values().index
    figure, ax = plt.subplots(figsize=(7.6, 0.3 * len(order) + 1.4))
    sns.stripplot(
        pairs, x="of_gain", y="setting", order=order, hue="task", palette="colorblind", jitter=False, alpha=0.8, ax=ax
    )
    ax.axvline(1, color="black", linewidth=0.8, linestyle="--")
    ax.set_xscale("symlog", linthresh=0.1)
    ticks = [0, 0.1, 0.3, 1, 3]
    ax.set_xticks(ticks, map(str, ticks))
    ax.set(xlim=(-0.01, 1.2 * pairs["of_gain"].max()), ylabel="")
    ax.set_xlabel("change / the paper's gain on the task (log scale from 0.1 on)")
    ax.grid(visible=True, axis="y")
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title="", fontsize="small")
    return figure


def plot_moved(runs: pd.DataFrame) -> Figure:
    """Draw the largest change of α by meta-learning in each variant of Table 3: a dot for each run, on a log axis.

    Args:
        runs: from ``ablation_report.movement_table``; runs that did not move α are left out.
    """
    moved = runs[runs["alpha_moved"] > 0]
    order = moved.groupby("change")["alpha_moved"].max().sort_values().index
    figure, ax = plt.subplots(figsize=(7.6, 0.3 * len(order) + 1.2))
    sns.stripplot(moved, x="alpha_moved", y="change", order=order, color=COLOURS["metaadamw"], jitter=False, ax=ax)
    ax.set(xscale="log", xlabel="largest change of a group's α by meta-learning (no unit, log scale)", ylabel="")
    ax.grid(visible=True, axis="y")
    return figure


def plot_movement(movement: pd.DataFrame) -> Figure:
    """Draw the distances of Φ, α and log σ² from their start after each meta-update: means and ranges over seeds.

    Args:
        movement: from ``frames.movement_frame``.
    """
    titles = {
        "phi_moved": "Φ: distance / norm at the start",
        "alpha_moved": "α: largest change of a group",
        "log_var_moved": "log σ²: largest change",
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.4), sharex=True)
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        sns.lineplot(
            movement,
            x="update",
            y=column,
            hue="protocol",
            style="protocol",
            markers=True,
            palette="colorblind",
            errorbar=("pi", 100),
            ax=ax,
            legend=ax is axes[0],
        )
        moved = bool((movement[column] > 0).any())  # α that is cut off at the end of its range does not move at all
        ax.set(xlabel="meta-update", ylabel=f"no unit{' (log scale)' if moved else ''}", title=title)
        ax.set_yscale("log" if moved else "linear")
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """Draw one legend for all panels, below them, with the names of the arms."""
    legend = ax.get_legend()
    if legend is None:
        return
    names = [LABELS.get(text.get_text(), text.get_text()) for text in legend.get_texts()]
    handles = [handle for handle in legend.legend_handles if handle is not None]
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    legend.remove()
