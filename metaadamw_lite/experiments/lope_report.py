"""Tables and figures on LoPE: perplexities of its arms, the loss by masking, the cost of noise."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from metaadamw_lite.experiments import paired, relatives
from metaadamw_lite.experiments.figures import legend_below, student_interval
from metaadamw_lite.experiments.lope_study import NOISE
from metaadamw_lite.experiments.paired import PairedDifference
from metaadamw_lite.experiments.records import Record

LOPE_LABELS = {
    "lora": "LoRA (peft)",
    "asymmetric-lora": "asymmetric LoRA",
    "lope": "LoPE",
    "lope-without-noise": "LoPE, no noise in stage I",
    "lope-discrete": "LoPE, discrete noise only",
    "lope-continuous": "LoPE, continuous noise only",
    "lope-without-compensation": "LoPE, not compensated",
    "lope-brief": "LoPE, brief stage I",
}
"""The arms of ``lope_study``, for tables and figures."""


def noise_share(task: str) -> str:
    """Format the share of noisy words in a task's adaptation data, for headings: "5 %"."""
    return f"{100 * NOISE[task]:.0f} %"


def adaptations_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return a row for each adaptation and each of its tests on clean reviews.

    Columns beside the run's key: noise (share of noisy words in the adaptation data, as text), ``at`` ("pretrained",
    after stage "1" and "2", and "masked" where the arm has an expert to mask), ``final`` (the row is the run's result),
    perplexity, and accuracy in percent. The result of a failed run is NaN.
    """
    rows = []
    for r in records:
        entries = list(r["epochs"])
        if r["status"] == "failed":
            entries.append({"stage": "failed", "perplexity": math.nan, "accuracy": math.nan})
        for k, entry in enumerate(entries, start=1):
            rows.append(
                {
                    **r["run"],
                    "noise": noise_share(r["run"]["task"]),
                    "at": entry["stage"],
                    "final": k == len(entries),
                    "perplexity": entry["perplexity"],
                    "accuracy": 100 * entry["accuracy"],
                }
            )
    return pd.DataFrame(rows)


def adaptations_table(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Format the final tests, mean ± standard deviation over seeds: a row for each arm, a column for each noise.

    Args:
        runs: from ``adaptations_frame``.
        column: "perplexity" or "accuracy".
    """
    cells = runs[runs["final"]].groupby(["variant", "noise"], sort=False)[column].agg(["mean", "std"])
    text = cells.apply(
        lambda cell: f"{cell['mean']:.1f}" + (f" ± {cell['std']:.1f}" if cell["std"] >= 0 else ""), axis=1
    ).unstack()
    arms = [arm for arm in LOPE_LABELS if arm in text.index]
    return text.reindex(arms).fillna("–").rename(index=LOPE_LABELS).rename_axis(index=None, columns="noise")


def masking_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Format the share of adaptation's gain that masking loses, by mean perplexities, by arm and noise.

    Args:
        runs: from ``adaptations_frame``.
    """
    at = runs.groupby(["variant", "noise", "at"], sort=False)["perplexity"].mean().unstack()
    at = at.reindex(columns=["pretrained", "2", "masked"]).dropna()
    gained, taken = at["pretrained"] - at["2"], at["masked"] - at["2"]
    share = (100 * taken / gained).map("{:.0f} %".format).where(gained > 0, "nothing gained").unstack()
    arms = [arm for arm in LOPE_LABELS if arm in share.index]
    return share.reindex(arms).fillna("–").rename(index=LOPE_LABELS).rename_axis(index=None, columns="noise")


def noise_cost_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare the rise of the arms' final perplexity from 0 to 20 % noisy words, a row for each arm.

    Args:
        runs: from ``adaptations_frame``; only final tests count.

    Returns:
        Indexed by arm: noise costs (in percent of the perplexity without noise, mean ± standard deviation), difference
        (a ``PairedDifference`` in points; positive: noise costs LoPE less than this arm), p_holm (over the other
        arms) and the verdict by p_holm.
    """
    clean, noisy = (noise_share(min(NOISE, key=NOISE.__getitem__)), noise_share(max(NOISE, key=NOISE.__getitem__)))
    final = runs[runs["final"]].set_index("seed")

    def costs(arm: str) -> "pd.Series[float]":
        of_arm = final[final["variant"] == arm]
        without, with_noise = (of_arm[of_arm["noise"] == noise]["perplexity"] for noise in (clean, noisy))
        return paired.improvements_by_seed(with_noise, without, lower_is_better=False)

    lope, rows = costs("lope"), {}
    for arm, label in LOPE_LABELS.items():
        of_arm = costs(arm)
        if len(of_arm):
            difference = relatives.points_above(of_arm, lope if arm != "lope" else lope.iloc[:0])
            text = f"{of_arm.mean():+.1f}" + (f" ± {of_arm.std():.1f}" if len(of_arm) > 1 else "")
            rows[label] = {"noise costs (%)": text, "difference": difference}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["noise costs (%)", "difference"])
    table = relatives.corrected_table(table.rename_axis("LoPE against"))
    table.loc[table.index == LOPE_LABELS["lope"], "verdict"] = "–"  # LoPE is not compared with itself
    return table


def lope_against(runs: pd.DataFrame, arm: str) -> PairedDifference:
    """Compare LoPE's perplexity with another arm's, in percent, paired by seed; positive: LoPE's is lower.

    Args:
        runs: from ``adaptations_frame``, of one noise; only final tests count.
        arm: one of ``LOPE_LABELS``.
    """
    final = runs[runs["final"]]
    lope, other = (final[final["variant"] == v].set_index("seed")["perplexity"].astype(float) for v in ("lope", arm))
    return paired.improvement(lope, other, lower_is_better=True)


def lope_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare LoPE's perplexity with every other arm's, a row for each noise and arm.

    Returns:
        Indexed by noise and arm: difference (a ``PairedDifference`` in percent; positive: LoPE's is lower), p_holm
        (over the other arms and all noises), and the verdict by p_holm.
    """
    rows = {}
    for noise, part in runs.groupby("noise", sort=False):
        for arm, label in LOPE_LABELS.items():
            d = lope_against(part, arm)
            if arm != "lope" and d.pairs:
                rows[noise, label] = {"difference": d}
    index = pd.MultiIndex.from_tuples(rows, names=["noise", "LoPE against"])
    return relatives.corrected_table(pd.DataFrame(list(rows.values()), index=index, columns=["difference"]))


def plot_lope_against(runs: pd.DataFrame) -> Figure:
    """Draw the distance of LoPE's perplexity below each other arm's, with Student's 95 % interval, a dot a seed."""
    final = runs[runs["final"]]
    noises = list(dict.fromkeys(final[final["variant"] == "lope"]["noise"]))
    figure, axes = plt.subplots(
        1, len(noises), figsize=(2.4 * len(noises) + 2.2, 3.4), sharex=True, sharey=True, squeeze=False
    )
    order = [label for arm, label in LOPE_LABELS.items() if arm != "lope"]
    for ax, noise in zip(axes.flat, noises, strict=True):
        wide = final[final["noise"] == noise].pivot(index="seed", columns="variant", values="perplexity").astype(float)
        lower = wide.drop(columns="lope").apply(
            lambda other, lope=wide["lope"]: paired.improvements_by_seed(lope, other, lower_is_better=True)
        )
        long = lower.rename(columns=LOPE_LABELS).melt(var_name="arm", value_name="lower")
        sns.stripplot(long, x="lower", y="arm", order=order, color="grey", size=4, jitter=False, ax=ax)
        sns.pointplot(
            long, x="lower", y="arm", order=order, errorbar=student_interval, linestyle="none", markersize=4, ax=ax
        )
        ax.axvline(0, color="black", linewidth=0.7)
        ax.set(title=f"{noise} noise", xlabel="LoPE's perplexity\nis lower by (%)", ylabel="")
    return figure


def plot_stages(runs: pd.DataFrame) -> Figure:
    """Draw the perplexity of clean reviews after each stage and masking, mean and range over seeds, a panel a noise."""
    noises = list(dict.fromkeys(runs["noise"]))
    stages = {"1": "after stage I", "2": "after stage II", "masked": "expert masked"}
    shown = runs[runs["at"].isin(stages)]
    shown = shown.assign(stage=shown["at"].map(stages), arm=shown["variant"].map(LOPE_LABELS))
    figure, axes = plt.subplots(
        1, len(noises), figsize=(2.4 * len(noises) + 2.2, 3.8), sharex=True, sharey=True, squeeze=False
    )
    for ax, noise in zip(axes.flat, noises, strict=True):
        sns.pointplot(
            shown[shown["noise"] == noise],
            x="perplexity",
            y="arm",
            order=list(LOPE_LABELS.values()),
            hue="stage",
            hue_order=list(stages.values()),
            markers=["o", "D", "s"],
            markersize=4,
            dodge=0.4,
            errorbar=("pi", 100),
            linestyle="none",
            ax=ax,
            legend=ax is axes.flat[0],
        )
        ax.set(title=f"{noise} noise", xlabel="perplexity", ylabel="")
    legend_below(figure, axes.flat[0], columns=3)
    return figure


def plot_expert_use(records: Sequence[Record]) -> Figure:
    """Draw the router's weight of the poisoning expert for clean words and kinds of noise, a panel for each training.

    It shows mean and range over seeds, for the arms with a poisoning expert.
    """
    rows = [
        {"noise": noise_share(r["run"]["task"]), "arm": LOPE_LABELS[r["run"]["variant"]], "words": kind}
        | {"weight": weights[-1]}
        for r in records
        if r.get("router") and r["settings"]["arm"]["poisoning"]
        for kind, weights in r["router"].items()
    ]
    frame = pd.DataFrame(rows)
    noises = list(dict.fromkeys(frame["noise"]))
    figure, axes = plt.subplots(1, len(noises), figsize=(3.1 * len(noises) + 0.8, 3.8), sharey=True, squeeze=False)
    arms = [label for label in LOPE_LABELS.values() if (frame["arm"] == label).any()]
    for ax, noise in zip(axes.flat, noises, strict=True):
        sns.pointplot(
            frame[frame["noise"] == noise],
            x="words",
            y="weight",
            hue="arm",
            hue_order=arms,
            markers=["o", "D", "s", "^", "v", "P"][: len(arms)],
            markersize=4,
            dodge=0.5 if len(arms) > 1 else False,
            linestyle="none",
            errorbar=("pi", 100),
            ax=ax,
            legend=ax is axes.flat[0],
        )
        ax.axhline(0.25, color="black", linewidth=0.7)
        ax.set(title=f"{noise} noise in training", xlabel="words of test reviews", ylabel="router weight (no unit)")
        ax.tick_params(axis="x", labelsize="small")
    legend_below(figure, axes.flat[0], columns=2)
    return figure
