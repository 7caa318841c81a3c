"""What the chapters on LiLAW, LoPE and "Together" are made of: tables and figures from the records of their studies."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from metaadamw_lite import LiLAW
from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments import NOISY, paired, report
from metaadamw_lite.experiments.claims import chapter_link
from metaadamw_lite.experiments.figures import COLOURS, DASHES, LABELS
from metaadamw_lite.experiments.lope_study import NOISE
from metaadamw_lite.experiments.paired import NEVER, PairedDifference, paired_difference
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.studies import FEW_SEEDS, study_runs
from metaadamw_lite.lilaw import weights_of

Records = Sequence[dict[str, Any]]
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


def recorded(study: Sequence[RunKey]) -> list[dict[str, Any]]:
    """The committed records of a study's runs."""
    keys = set(study)
    records = [r for task in dict.fromkeys(key.task for key in study) for r in report.recorded(task)]
    return [r for r in records if RunKey(**r["run"]) in keys]


def runs_frame(records: Records) -> pd.DataFrame:
    """One row for each run, accuracies and shares in percent.

    Columns beside the run's key: noise (what is wrong), ``wrong`` (how many of the ``train`` labels are), ``best``
    (test accuracy in the epoch that validated best), ``last`` (in the last epoch), ``memorised`` (wrong training labels
    that the model repeats in the end), ``meta_steps`` of LiLAW after its warm-up, and its last alpha, delta and beta.
    A run that failed has no end, and no number of meta-steps.
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
    """What is wrong with a task's labels, for headings: "CIFAR-10, symmetric 40 %"."""
    data, _, kind = NOISY[task].title.partition(", ")
    return f"{data.split()[0]}, {kind}"


def points(runs: pd.DataFrame, column: str, arm: str, baseline: str) -> PairedDifference:
    """How many percentage points an arm is above another in a column, paired by seed."""
    first, second = (runs[runs["variant"] == v].set_index("seed")[column].astype(float) for v in (arm, baseline))
    return _difference(first, second)


def _difference(first: "pd.Series[float]", second: "pd.Series[float]") -> PairedDifference:
    """How many points the first is above the second, both indexed by seed."""
    pairs = paired.pairs_by_seed(first, second)
    return paired_difference(pairs["arm"] - pairs["baseline"], "points")


def accuracy_table(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Test accuracy with and without LiLAW, one row for each noise; the difference in points with its interval.

    Args:
        runs: from ``runs_frame``; only seeds that both arms have count.
        column: "best" or "last", the epoch.

    Returns:
        Indexed by noise: mean ± standard deviation of both arms, difference (a ``PairedDifference`` in points), p_holm
        (over the kinds of noise, those without any wrong label left out), and the verdict by that.
    """
    rows = {}
    arms = ("adamw", "adamw-lilaw")
    for noise, part in runs.groupby("noise", sort=False):
        d = points(part, column, arms[1], arms[0])
        paired = part.pivot(index="seed", columns="variant", values=column).reindex(columns=arms).dropna()
        row: dict[str, object] = {
            f"{LABELS[arm]} (%)": f"{paired[arm].mean():.1f} ± {paired[arm].std():.1f}" if d.seeds > 1 else "–"
            for arm in arms
        }
        rows[noise] = row | {"difference": d}
    right = runs[runs["wrong"] == 0]["noise"].unique()
    return _corrected(pd.DataFrame.from_dict(rows, orient="index"), control=right)


def chance_statement(runs: pd.DataFrame) -> str:
    """On which kinds of noise AdamW is not five points above chance, so that accuracies say little (Markdown)."""
    adamw = runs[runs["variant"] == "adamw"]
    chance = adamw["task"].map(lambda name: 100 / (NOISY[name].classes or math.nan))
    mean = adamw.assign(chance=chance).groupby("noise", sort=False)[["best", "chance"]].mean()
    blind = mean[~(mean["best"] >= mean["chance"] + 5)]  # NaN included
    if blind.empty:
        return "AdamW is more than five points above chance on every kind of noise."
    named = "; ".join(f"{noise}: {row['best']:.1f} %, chance {row['chance']:.0f} %" for noise, row in blind.iterrows())
    return f"**Hardly above chance** is AdamW on some kinds; their rows say little about accuracy. {named}."


def _corrected(table: pd.DataFrame, control: Iterable[object] = ()) -> pd.DataFrame:
    """A table with a column "difference", with p after Holm's correction over its rows, and the verdicts by that.

    Args:
        table: with any columns beside that one.
        control: rows that are no part of the question; they are neither corrected nor counted.
    """
    p = table["difference"].map(lambda d: d.p)
    corrected = paired.holm(p.where(~table.index.isin(list(control))))
    verdicts = [judged(d, q) for d, q in zip(table["difference"], corrected.fillna(p), strict=True)]
    return table.assign(p_holm=corrected, verdict=verdicts)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The same as text, for a page: mean with Student's interval, both p, number of seeds, verdict."""
    differences = table["difference"]
    unit = differences.iloc[0].unit if len(table) else "points"
    text = table.drop(columns=["difference", "p_holm", "verdict"])
    text[f"difference ({unit})"] = differences.map(student)
    text["p (t)"] = differences.map(lambda d: paired.p_value(d.p))
    text["p (Holm)"] = table["p_holm"].map(paired.p_value)
    text["seeds"] = differences.map(lambda d: d.seeds)
    return text.assign(**{"better?": table["verdict"]})


def student(difference: PairedDifference) -> str:
    """A mean with Student's interval, since one by bootstrap is far too narrow for three pairs."""
    if not difference.seeds:
        return "–"
    enough = difference.seeds >= paired.ENOUGH_SEEDS
    return f"{difference.mean_text} {difference.t_interval if enough else difference.interval}"


def judged(difference: PairedDifference, corrected: float) -> str:
    """The verdict on "it is better" by a corrected p, once all seeds that were planned are there."""
    planned = len(FEW_SEEDS)
    if difference.pairs < planned:
        return f"{NEVER}: {difference.seeds} of {planned} seeds"
    before, says = paired.verdict(difference), paired.verdict(replace(difference, p=corrected))
    return says if says == before else "not decided after the correction"


def sensitivity_table(runs: pd.DataFrame) -> pd.DataFrame:
    """LiLAW's meta rate and the batch size: a row for each setting, against AdamW with batches of that size.

    Args:
        runs: from ``runs_frame``, of one task; only seeds that every setting has count.

    Returns:
        Steps of the meta-descent, how far W got at most, where the scalars ended, differences (``PairedDifference`` in
        points), seeds.
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


def sensitivity_statement(table: pd.DataFrame) -> str:
    """How many of the differences of ``sensitivity_table`` are more than chance explains (Markdown)."""
    found = pd.Series([d for column in table for d in table[column] if isinstance(d, PairedDifference)], dtype=object)
    alone, left = (sum(paired.better_and_worse(d)) for d in (found, paired.corrected(found)))
    return f"Of these {len(found)} differences **{alone}** are decided, and **{left}** after Holm's correction."


def possible_probabilities(band: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """A grid of (s[ỹ], max s), and where on it such a pair is possible for some number of classes.

    Either the given label is the one believed most, s[ỹ] = max s (the diagonal), or the two probabilities belong to
    different classes and sum to at most one (the triangle). With C classes max s is 1/C at least.

    Args:
        band: how far from the diagonal still counts, so that a picture shows it.
    """
    grid = torch.linspace(0, 1, 201)
    given, largest = torch.meshgrid(grid, grid, indexing="xy")
    return given, largest, (given + largest <= 1) & (given <= largest) | ((given - largest).abs() <= band)


def weights_moved(runs: pd.DataFrame) -> "pd.Series[float]":
    """The largest change of W since the start, over all possible probabilities, for each run that has a LiLAW.

    Args:
        runs: from ``runs_frame``.
    """
    given, largest, possible = possible_probabilities()
    start = LiLAW()

    def total(*scalars: float) -> Tensor:
        return weights_of(given, largest, *(torch.tensor(x) for x in scalars)).total[possible]

    before = total(start.alpha.item(), start.delta.item(), start.beta.item())
    ends = runs.dropna(subset=["alpha", "delta", "beta"])[["alpha", "delta", "beta"]]
    return pd.Series({k: float((total(*end) - before).abs().max()) for k, *end in ends.itertuples()}, dtype=float)


def detection_frame(records: Records) -> pd.DataFrame:
    """One row for each run, method and measure ("auroc", "auprc") of finding wrong labels."""
    return pd.DataFrame(
        [
            {**r["run"], "noise": noise_name(r["run"]["task"]), "method": method, **areas}
            for r in records
            if r["status"] != "failed"
            for method, areas in (r["detection"] or {}).items()
        ]
    )


def detection_against(found: pd.DataFrame, area: str = "auroc") -> pd.DataFrame:
    """LiLAW's easy weight against the best of the other methods, for each noise.

    The others are taken from trainings with and from those without LiLAW, each by itself, and the best is the one with
    the highest mean area over the seeds: one method for all seeds, not the best of each.

    Args:
        found: from ``detection_frame``, of both arms.
        area: "auroc" or "auprc".

    Returns:
        Indexed by noise: best (the method, and what it was trained with), difference (a ``PairedDifference`` in
        points of the area; positive: LiLAW is better), p_holm (over the kinds of noise), and the verdict by that.
    """
    if found.empty:
        return _corrected(pd.DataFrame(columns=["best", "difference"]))
    found = found[found["variant"].isin(["adamw", "adamw-lilaw"])]
    lilaws = found["method"].str.startswith("LiLAW")
    easy = found[(found["method"] == "LiLAW, easy weight") & (found["variant"] == "adamw-lilaw")]
    others = found[~lilaws].assign(way=found["method"] + " (" + found["variant"].map(LABELS) + ")")
    rows = {}
    for noise, part in easy.groupby("noise", sort=False):
        lilaw = 100 * part.set_index("seed")[area].astype(float)
        same = others[(others["noise"] == noise) & others["seed"].isin(lilaw.index)]
        areas = 100 * same.pivot(index="seed", columns="way", values=area).astype(float)
        areas = areas.reindex(lilaw.index).dropna(axis=1)  # what has not all of these seeds yet cannot be the best
        best = str(areas.mean().idxmax())
        rows[noise] = {"best": best, "difference": paired_difference(lilaw - areas[best], "points")}
    return _corrected(pd.DataFrame.from_dict(rows, orient="index", columns=["best", "difference"]))


EPOCH_LABELS = {
    "memorised": "wrong labels repeated (%)",
    "val_loss": "validation loss (nats)",
    "metric": "validation accuracy (%)",
}


def plot_epochs(records: Records, column: str, arms: Sequence[str] = ("adamw", "adamw-lilaw")) -> Figure:
    """Epoch by epoch, mean over seeds and the band from lowest to highest; a panel for each noise.

    Args:
        records: of the runs.
        column: "memorised", how much of the wrong training labels is learned by heart, "val_loss", or "metric", the
            accuracy on validation labels.
        arms: the variants.
    """
    epochs = report.epochs_frame(r for r in records if r["run"]["variant"] in arms).dropna(subset=column)
    epochs = epochs.assign(value=epochs[column].astype(float) * (1 if column == "val_loss" else 100))
    tasks = list(dict.fromkeys(epochs["task"]))
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (2.5 * columns, 2.5 * rows + 0.4) if columns > 1 else (7.2, 3.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    for ax, task in zip(axes.flat, tasks, strict=False):
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
            legend=ax is axes.flat[0],
        )
        ax.set(title=noise_name(task).replace(", ", ",\n"), xlabel="epoch", ylabel=EPOCH_LABELS[column])
    axes.flat[0].set_ylim(bottom=0)
    _legend_below(figure, axes.flat[0], columns=len(arms))
    return figure


def plot_scalars(records: Records) -> Figure:
    """α, δ and β of LiLAW over the steps of every run, a panel for each, coloured by noise."""
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
    """How well each method finds wrong labels, by AUROC: a panel for each noise, a dot for each run and the mean.

    Args:
        found: from ``detection_frame``.
        order: the methods, from top to bottom.
    """
    noises = list(dict.fromkeys(found["noise"]))
    columns = min(4, len(noises))
    rows = -(-len(noises) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.1 * columns + 1.8, 2.8 * rows), sharex=True, sharey=True, squeeze=False
    )
    for ax in axes.flat[len(noises) :]:
        ax.set_axis_off()
    for ax, noise in zip(axes.flat, noises, strict=False):
        part = found[found["noise"] == noise]
        sns.stripplot(part, x="auroc", y="method", order=order, color="grey", size=4, jitter=False, ax=ax)
        sns.pointplot(
            part, x="auroc", y="method", order=order, errorbar=None, linestyle="none", marker="|", markersize=14, ax=ax
        )
        ax.axvline(0.5, color="black", linewidth=0.7)
        ax.set(title=noise.replace(", ", ",\n"), xlabel="AUROC", ylabel="")
    return figure


def plot_weights(lilaw: LiLAW) -> Figure:
    """W_α, W_δ, W_β and their sum over (s[ỹ], max s), where ``possible_probabilities`` has that pair."""
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
    """Test accuracy of several arms in the best and the last epoch, and what they learned by heart; a line a seed."""
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
        sns.pointplot(part, x="variant", y=column, order=arms, hue="variant", palette=COLOURS, linestyle="none", ax=ax)
        ax.set(xlabel="", ylabel=label)
        ax.set_xticks(
            range(len(arms)), [LABELS[arm].replace(" + ", "\n+ ") for arm in arms], fontsize="small", rotation=25
        )
    return figure


def _legend_below(figure: Figure, ax: Any, columns: int) -> None:
    """One legend for all panels, below them, with the arms by their names."""
    legend = ax.get_legend()
    if legend is None:
        return
    names = [LABELS.get(text.get_text(), text.get_text()) for text in legend.get_texts()]
    figure.legend(legend.legend_handles, names, loc="outside lower center", ncols=columns, frameon=False)
    legend.remove()


# ---------------------------------------------------------------- LoPE


def noise_share(task: str) -> str:
    """The share of noisy words in a task's adaptation data, for headings: "5 %"."""
    return f"{100 * NOISE[task]:.0f} %"


def adaptations_frame(records: Records) -> pd.DataFrame:
    """One row for each adaptation and each point at which it was tested on clean reviews.

    Columns beside the run's key: noise (share of the words of the adaptation data, as text), ``at`` ("pretrained",
    after stage "1" and "2", and "masked" where the arm has an expert to mask), ``final`` (whether that is the run's
    result), perplexity, and accuracy in percent. A run that failed has a result without numbers.
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
    """Final tests, mean ± standard deviation over seeds, as text: a row for each arm, a column for each noise.

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


def accuracy_statement(runs: pd.DataFrame) -> str:
    """Where the runs start from, and whether any of them tells good reviews from bad ones at all (Markdown)."""
    start = runs[runs["at"] == "pretrained"]
    before = start[["perplexity", "accuracy"]].mean()
    low, high = runs[runs["final"]]["accuracy"].agg(["min", "max"])
    says = (
        f"Before any adaptation: perplexity {before['perplexity']:.0f}, accuracy {before['accuracy']:.1f} %. "
        f"About half of the reviews are good ones, and the accuracy of all runs lies between {low:.1f} and {high:.1f} %"
    )
    if high < 55:
        says += ": **no arm reads the sentiment** at this size. What can be compared is perplexity"
    models = sorted(start["perplexity"].unique())
    if len(models) > 1:
        spread = 100 * (models[-1] / models[0] - 1)
        says += (
            f".\n\n**Not all arms start from the same model**: it was pretrained {len(models)} times, and perplexities "
            f"before adaptation differ by up to {spread:.1g} %. Small differences between arms may come from that"
        )
    return says + "."


def masking_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What masking takes of what adaptation had gained, by mean perplexities: a row for each arm, a column a noise.

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
    """How much more perplexity an arm ends with where a fifth of the words it adapts to are noisy, a row for each arm.

    Args:
        runs: from ``adaptations_frame``; only final tests count.

    Returns:
        Indexed by arm: noise costs (in percent of the perplexity without noise, mean ± standard deviation), difference
        (a ``PairedDifference`` in points; positive: noise costs LoPE less than this arm), p_holm (over the other
        arms) and the verdict by that.
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
            difference = _difference(of_arm, lope if arm != "lope" else lope.iloc[:0])
            text = f"{of_arm.mean():+.1f}" + (f" ± {of_arm.std():.1f}" if len(of_arm) > 1 else "")
            rows[label] = {"noise costs (%)": text, "difference": difference}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["noise costs (%)", "difference"])
    table = _corrected(table.rename_axis("LoPE against"))
    table.loc[table.index == LOPE_LABELS["lope"], "verdict"] = "–"
    return table


def lope_against(runs: pd.DataFrame, arm: str) -> PairedDifference:
    """How much lower LoPE's perplexity is than another arm's, in percent, paired by seed.

    Args:
        runs: from ``adaptations_frame``, of one noise; only final tests count.
        arm: one of ``LOPE_LABELS``.
    """
    final = runs[runs["final"]]
    lope, other = (final[final["variant"] == v].set_index("seed")["perplexity"].astype(float) for v in ("lope", arm))
    return paired.improvement(lope, other, lower_is_better=True)


def lope_table(runs: pd.DataFrame) -> pd.DataFrame:
    """LoPE's perplexity against that of every other arm, one row for each noise and arm.

    Returns:
        Indexed by noise and arm: difference (a ``PairedDifference`` in percent; positive: LoPE's is lower), p_holm
        (over the other arms and all noises), and the verdict by that.
    """
    rows = {}
    for noise, part in runs.groupby("noise", sort=False):
        for arm, label in LOPE_LABELS.items():
            d = lope_against(part, arm)
            if arm != "lope" and d.seeds:
                rows[noise, label] = {"difference": d}
    index = pd.MultiIndex.from_tuples(rows, names=["noise", "LoPE against"])
    return _corrected(pd.DataFrame(list(rows.values()), index=index, columns=["difference"]))


def plot_lope_against(runs: pd.DataFrame) -> Figure:
    """How much lower LoPE's perplexity is than each other arm's: a panel for each noise, a dot for each seed."""
    final = runs[runs["final"]]
    noises = list(dict.fromkeys(final[final["variant"] == "lope"]["noise"]))
    figure, axes = plt.subplots(
        1, len(noises), figsize=(2.4 * len(noises) + 2.2, 3.4), sharex=True, sharey=True, squeeze=False
    )
    order = [label for arm, label in LOPE_LABELS.items() if arm != "lope"]
    for ax, noise in zip(axes.flat, noises, strict=True):
        wide = final[final["noise"] == noise].pivot(index="seed", columns="variant", values="perplexity").astype(float)
        lower = 100 * (1 - wide.drop(columns="lope").rdiv(wide["lope"], axis=0))  # as ``lope_against``, pair by pair
        long = lower.rename(columns=LOPE_LABELS).melt(var_name="arm", value_name="lower")
        sns.stripplot(long, x="lower", y="arm", order=order, color="grey", size=4, jitter=False, ax=ax)
        sns.pointplot(
            long, x="lower", y="arm", order=order, errorbar=("ci", 95), seed=0, linestyle="none", markersize=4, ax=ax
        )
        ax.axvline(0, color="black", linewidth=0.7)
        ax.set(title=f"{noise} noise", xlabel="LoPE's perplexity\nis lower by (%)", ylabel="")
    return figure


def plot_stages(runs: pd.DataFrame) -> Figure:
    """Perplexity of clean reviews after each stage and after masking, with 95 % intervals; a panel for each noise."""
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
            errorbar=("ci", 95),
            seed=0,
            linestyle="none",
            ax=ax,
            legend=ax is axes.flat[0],
        )
        ax.set(title=f"{noise} noise", xlabel="perplexity", ylabel="")
    _legend_below(figure, axes.flat[0], columns=3)
    return figure


def plot_expert_use(records: Records) -> Figure:
    """The router's weight of the poisoning expert for clean words and for kinds of noise; a panel for each training.

    Mean and 95 % interval over seeds, for the arms that have such an expert.
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
            dodge=0.5,
            linestyle="none",
            errorbar=("ci", 95),
            seed=0,
            ax=ax,
            legend=ax is axes.flat[0],
        )
        ax.axhline(0.25, color="black", linewidth=0.7)
        ax.set(title=f"{noise} noise in training", xlabel="words of test reviews", ylabel="router weight (no unit)")
        ax.tick_params(axis="x", labelsize="small")
    _legend_below(figure, axes.flat[0], columns=2)
    return figure


# ---------------------------------------------------------------- claims


def claims_table() -> pd.DataFrame:
    """One row for each claim in ``data/paper/claims_relatives.csv``, judged as the claims on MetaAdamW are.

    * accuracy: test accuracy with LiLAW against without, in points, on the task; with p after Holm's correction over
      all kinds of noise.
    * detection: both areas of LiLAW's easy weight against the best other method, for each kind of noise.
    * adaptation: perplexity of LoPE against that of the arm named in ``against``, on the task.
    * noise cost: how much less LoPE's perplexity rises with noise than that of the arm named in ``against``.
    * scale: needs models or data that are not at hand; not tested.
    """
    claims = pd.read_csv(report.repository() / "data" / "paper" / "claims_relatives.csv", dtype=str)
    results = report.repository() / "data" / "results"
    records = {method: recorded(study_runs(f"{method.lower()}/lite", results)) for method in ("LiLAW", "LoPE")}
    rows = []
    for _, claim in claims.iterrows():
        ours, says = "–", f"not tested: {claim['why']}"
        if claim["kind"] != "scale":
            ours, says = _claimed(claim, records[claim["method"]])
        link = chapter_link(claim["evidence"])
        rows.append((claim["method"], claim["claim"], claim["number"], ours, says, link))
    return pd.DataFrame(rows, columns=["method", "claim", "paper", "ours", "verdict", "evidence"])


def _claimed(claim: "pd.Series[str]", records: Records) -> tuple[str, str]:
    """What the lite runs of a method's study show about a claim, with what it was measured on, and the verdict."""
    check_choice("kind (of a claim)", claim["kind"], ("accuracy", "detection", "adaptation", "noise cost"))
    if not records:
        return "–", NEVER
    row: Any
    if claim["kind"] == "adaptation":
        table = lope_table(adaptations_frame(records))
        row = noise_share(claim["task"]), LOPE_LABELS[claim["against"]]
        what = f"lower perplexity, {row[0]} noise"
    elif claim["kind"] == "noise cost":
        table, row = noise_cost_table(adaptations_frame(records)), LOPE_LABELS[claim["against"]]
        what = "less rise of perplexity from 0 to 20 % noise"
    elif claim["kind"] == "accuracy":
        runs = runs_frame([r for r in records if r["run"]["variant"] in ("adamw", "adamw-lilaw")])
        table, row = accuracy_table(runs, "best"), noise_name(claim["task"])
        what = row
    else:
        areas = detection_frame(records)
        tables = {area.upper(): detection_against(areas, area) for area in ("auroc", "auprc")}
        spans = pd.DataFrame({area: table["difference"].map(student) for area, table in tables.items()})
        lines = [f"{noise}: {'; '.join(row)}" for noise, *row in spans.itertuples()]
        counts = [
            f"{area}: {report.noted(str(says), 'lite')} on {n} of {len(table)} kinds"
            for area, table in tables.items()
            for says, n in table["verdict"].value_counts().items()
        ]
        if not lines:
            return "–", NEVER
        return "<br>".join([f"points of {' and of '.join(tables)}:", *lines]), "<br>".join(counts)
    if row not in table.index:
        return "–", NEVER
    found: Any = table.loc[row]
    d = found["difference"]
    p = f"{d.seeds} seeds, p {paired.p_value(d.p)}, after Holm's correction {paired.p_value(found['p_holm'])}"
    return f"{student(d)} {d.unit}, {p} ({what}; lite runs)", report.noted(found["verdict"], "lite")
