"""The book's figures: one style, one colour for each arm, intervals instead of bare means."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = dict(zip(("adamw", "metaadamw", "metaadamw-frozen"), sns.color_palette("colorblind", 3), strict=True))
"""Colour-blind-safe, and told apart by their dashes in print."""
DASHES = {"adamw": "", "metaadamw": (4, 1.5), "metaadamw-frozen": (1, 1)}
LABELS = {"adamw": "AdamW", "metaadamw": "MetaAdamW", "metaadamw-frozen": "MetaAdamW, Φ untrained"}


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


def plot_curves(
    epochs: pd.DataFrame, protocols: Sequence[str], metric: str, reference: dict[str, float] | None = None
) -> Figure:
    """Validation curves of the arms, a panel for each protocol: mean over seeds, the band from lowest to highest.

    Args:
        epochs: from ``report.epochs_frame``.
        protocols: the panels.
        metric: name of the metric, with its unit.
        reference: the paper's value for an arm, drawn as a thin line under the paper's protocol.
    """
    figure, axes = plt.subplots(1, len(protocols), figsize=(4.6 * len(protocols), 3.8), sharey=True, squeeze=False)
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
            legend=ax is axes[0][0],
        )
        if protocol == "paper":
            for arm, value in (reference or {}).items():
                ax.axhline(value, color=COLOURS[arm], linewidth=0.8)
        ax.set(yscale="log", xlabel="epoch", ylabel=f"validation {metric} (log scale)", title=f"protocol: {protocol}")
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend = axes[0][0].get_legend()
    if legend is not None:
        legend.set_title("")
        for text in legend.get_texts():
            text.set_text(LABELS[text.get_text()])
    return figure


def plot_factors(factors: pd.DataFrame, seed: int) -> Figure:
    """α and β of every group over the steps of one run of each trained arm; a panel a factor."""
    part = factors[factors["seed"] == seed]
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4.2), sharex=True)
    for ax, factor, symbol in zip(axes, ("alpha", "beta"), ("α", "β"), strict=True):
        sns.lineplot(
            part,
            x="step",
            y=factor,
            hue="group",
            units="variant",
            estimator=None,
            style="variant",
            ax=ax,
            linewidth=1.2,
        )
        ax.axhline(1, color="black", linewidth=0.6)
        ax.set(xlabel="step", ylabel=f"{symbol} (no unit)", title=f"{symbol} by group, seed {seed}", ylim=(0.45, 1.55))
        ax.get_legend().remove()
    return figure


def label_bars(ax: Axes, texts: Sequence[str]) -> None:
    """Write a text at the end of each bar of a horizontal bar chart."""
    for bar, text in zip(ax.patches, texts, strict=True):
        rectangle: Any = bar
        ax.annotate(
            text,
            (rectangle.get_width(), rectangle.get_y() + rectangle.get_height() / 2),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )


def spread(values: Sequence[float]) -> str:
    """Median and range, for a cell of a table."""
    return f"{np.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"
