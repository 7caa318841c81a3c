"""Figures of the studies of random, constant and learned factors, from the tables of ``phi_report``."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from metaadamw_lite.experiments.figures import means_and_bars
from metaadamw_lite.experiments.paired import ENOUGH_SEEDS, EQUIVALENT, Estimate

BLUE, ORANGE = sns.color_palette("colorblind", 2)


def plot_null(gains: Mapping[str, pd.DataFrame], papers: Mapping[str, float]) -> Figure:
    """Draw the gains of random, untrained Φ's over AdamW, a panel for each task and a dot for each run.

    Args:
        gains: from ``phi_report.null_gains``, by title.
        papers: the paper's gain in percent, by title.
    """
    figure, axes = plt.subplots(len(gains), 1, figsize=(7.2, 1.5 * len(gains) + 0.5), squeeze=False)
    for ax, (title, table) in zip(axes[:, 0], gains.items(), strict=True):
        values = table.to_numpy(dtype=float).ravel()
        sns.boxplot(x=values, ax=ax, color="white", linecolor="black", fliersize=0, whis=(2.5, 97.5), width=0.5)
        sns.stripplot(x=values, ax=ax, color=BLUE, alpha=0.6, size=5, jitter=False)
        ax.axvline(0, color="black", linewidth=0.7)
        ax.axvline(papers[title], color=ORANGE, linestyle="--", label=f"the paper's gain, {papers[title]:+.1f} %")
        ax.set(title=f"{title}: {len(table)} random Φ's", xlabel="")
        ax.legend(fontsize="x-small", loc="upper left")
    axes[-1, 0].set_xlabel("gain over AdamW with the same run seed (%)\nbox: quartiles; whiskers: 95 % of the runs")
    return figure


def plot_best_of(curve: Mapping[int, Estimate], logged: int, papers: float) -> Figure:
    """Draw the expected gain of the best of k random Φ's over k, with its 95 % interval.

    Args:
        curve: from ``paired.best_of``, by k.
        logged: number of logged runs.
        papers: the paper's gain in percent.
    """
    figure, ax = plt.subplots(figsize=(6.0, 3.4))
    draws = list(curve)
    values, low, high = (np.array([getattr(e, name) for e in curve.values()]) for name in ("value", "low", "high"))
    ax.plot(draws, values, color=BLUE, label="best of k random Φ's")
    ax.fill_between(draws, low, high, color=BLUE, alpha=0.2, label="95 % interval")
    ax.plot([logged], [papers], "D", color=ORANGE, label=f"the paper: best of {logged} logged runs")
    ax.axhline(0, color="black", linewidth=0.7)
    ax.set(xscale="log", xlabel="k, how many Φ's are tried (log scale)", ylabel="expected gain over AdamW (%)")
    ticks = [k for k in (1, 2, 5, 10, 20, 50) if k <= max(draws)]
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.set_xticks([], minor=True)
    ax.legend(fontsize="small")
    return figure


def plot_alpha_and_gain(table: pd.DataFrame) -> Figure:
    """Draw the gains of random, untrained Φ's over their mean α.

    Args:
        table: from ``phi_report.null_alphas``.
    """
    figure, ax = plt.subplots(figsize=(6.0, 3.4))
    seeds = table["seed"].astype(str)
    sns.scatterplot(
        table.assign(seed=seeds), x="alpha", y="gain", hue="seed", style="seed", palette="colorblind", ax=ax
    )
    ax.axhline(0, color="black", linewidth=0.7)
    ax.axvline(1, color="black", linewidth=0.7, linestyle="--")
    ax.set(xlabel="mean α of the run, weighted by parameters (no unit)", ylabel="gain over AdamW (%)")
    ax.legend(title="run seed", fontsize="small", title_fontsize="small")
    return figure


def plot_differences(table: pd.DataFrame, columns: Mapping[str, str]) -> Figure:
    """Draw the mean differences of ``phi_report.compare_rows`` with Student's 95 % intervals, a row for each variant.

    Args:
        table: with a ``PairedDifference`` in each cell; those with too few pairs for an interval are left out.
        columns: labels of the panels' axes, by column of the table.
    """
    height = 0.32 * len(table) + 1.3
    figure, axes = plt.subplots(1, len(columns), figsize=(3.4 * len(columns) + 1.6, height), sharey=True, squeeze=False)
    for ax, (column, label) in zip(axes[0], columns.items(), strict=True):
        rows = {k: d for k, d in enumerate(table[column]) if d is not None and d.seeds >= ENOUGH_SEEDS}
        if rows:
            mean, bars = means_and_bars(rows.values())
            ax.errorbar(mean, list(rows), xerr=bars, fmt="o", color=BLUE, capsize=3)
        ax.axvspan(-EQUIVALENT, EQUIVALENT, color="grey", alpha=0.15)
        ax.axvline(0, color="black", linewidth=0.7)
        ax.set(xlabel=label, ylim=(len(table) - 0.5, -0.5))
        ax.set_yticks(range(len(table)), table.index)
        ax.grid(visible=False, axis="y")
    return figure


def plot_dose(table: pd.DataFrame) -> Figure:
    """Draw gains over the movement of α: over the untrained twin, and over AdamW at its best constant rate.

    Args:
        table: from ``phi_report.dose_table``; variants whose α did not move are left out.
    """
    columns = [c for c in ("over its twin", "over the best AdamW") if c in table]
    figure, axes = plt.subplots(1, len(columns), figsize=(4.6 * len(columns), 3.8), sharey=True, squeeze=False)
    table = table[table["moved"] > 0]
    for ax, column in zip(axes[0], columns, strict=True):
        for marker, colour, kind, logarithmic in (("o", BLUE, "α bounded", False), ("s", ORANGE, "α = exp(raw)", True)):
            log = table.index.str.startswith(("dose-log", "ladder"))
            rows = table[(log == logarithmic) & table[column].notna()]
            if rows.empty:
                continue
            mean, bars = means_and_bars(rows[column])
            bars = np.nan_to_num(bars)
            ax.errorbar(rows["moved"], mean, yerr=bars, fmt=marker, color=colour, capsize=2, label=kind, alpha=0.8)
        ax.axhline(0, color="black", linewidth=0.7)
        ax.set(xscale="log", xlabel="largest change of α by meta-learning (log scale)", title=column)
    axes[0][0].set_ylabel("gain (%), mean and\nStudent's 95 % interval")
    axes[0][0].legend(fontsize="small")
    return figure


def plot_transfer(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Draw the mean gain over AdamW of a Φ that was trained on one task (column) and frozen on another (row).

    Args:
        table: from ``phi_report.transfer_table``.
        titles: titles of the tasks, by name.
    """
    means = table.map(lambda d: np.nan if d is None else d.mean).astype(float)
    means = means.rename(index=titles, columns=titles)
    figure, ax = plt.subplots(figsize=(5.6, 3.6))
    limit = float(np.nanmax(np.abs(means.to_numpy()))) if means.notna().any(axis=None) else 1.0
    sns.heatmap(
        means, annot=True, fmt="+.1f", cmap="vlag_r", vmin=-limit, vmax=limit, ax=ax, cbar_kws={"label": "gain (%)"}
    )
    ax.set(xlabel="Φ trained on", ylabel="Φ frozen on")
    return figure
