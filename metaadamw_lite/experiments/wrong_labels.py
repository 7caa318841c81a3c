"""What the chapters on wrong labels are made of: tables and figures from the records of the studies that have them."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from metaadamw_lite import LiLAW
from metaadamw_lite.experiments import NOISY, report
from metaadamw_lite.experiments.figures import COLOURS, DASHES, LABELS
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.report import PairedDifference, paired_difference
from metaadamw_lite.experiments.studies import study_runs

Records = Sequence[dict[str, Any]]


def recorded(study: Sequence[RunKey]) -> list[dict[str, Any]]:
    """The committed records of a study's runs."""
    keys = set(study)
    records = [r for task in dict.fromkeys(key.task for key in study) for r in report.recorded(task)]
    return [r for r in records if RunKey(**r["run"]) in keys]


def runs_frame(records: Records) -> pd.DataFrame:
    """One row for each run, accuracies and shares in percent.

    Columns beside the run's key: noise (what is wrong), ``best`` (test accuracy in the epoch that validated best),
    ``last`` (in the last epoch), ``memorised`` (wrong training labels that the model repeats in the end), and the last
    alpha, delta and beta of LiLAW.
    """
    rows = []
    for r in records:
        end = (r.get("lilaw") or [{}])[-1]
        last = r["epochs"][-1] if r["epochs"] else {}
        rows.append(
            {
                **r["run"],
                "noise": noise_name(r["run"]["task"]),
                "status": r["status"],
                "best": 100 * r["test"]["metric"] if r["test"] else np.nan,
                "last": 100 * r["last"]["metric"] if "last" in r else np.nan,
                "memorised": 100 * (np.nan if last.get("memorised") is None else last["memorised"]),
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
    return paired_difference(first - second, "points")


def accuracy_table(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Test accuracy with and without LiLAW, one row for each noise; the difference in points with its interval.

    Args:
        runs: from ``runs_frame``.
        column: "best" or "last", the epoch.
    """
    rows = {}
    baseline, arm = "adamw", "adamw-lilaw"
    for noise, part in runs.groupby("noise", sort=False):
        d = points(part, column, arm, baseline)
        row: dict[str, object] = {}
        for variant in (baseline, arm):
            values = part[part["variant"] == variant][column]
            spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
            row[f"{LABELS[variant]} (%)"] = "–" if values.empty else f"{values.mean():.1f}{spread}"
        row["difference (points)"] = f"{d.mean:+.1f} {d.interval}" if d.seeds else "–"
        rows[noise] = row | {"p (t)": report.p_value(d.p), "seeds": d.seeds, "more accurate?": report.verdict(d)}
    return pd.DataFrame.from_dict(rows, orient="index")


def detection_frame(records: Records) -> pd.DataFrame:
    """One row for each run, method and measure ("auroc", "auprc") of finding wrong labels."""
    return pd.DataFrame(
        [
            {**r["run"], "noise": noise_name(r["run"]["task"]), "method": method, **areas}
            for r in records
            for method, areas in (r["detection"] or {}).items()
        ]
    )


def plot_epochs(records: Records, column: str, arms: Sequence[str] = ("adamw", "adamw-lilaw")) -> Figure:
    """Epoch by epoch, mean over seeds and the band from lowest to highest; a panel for each noise.

    Args:
        records: of the runs.
        column: "memorised", how much of the wrong training labels is learned by heart, or "val_loss".
        arms: the variants.
    """
    epochs = report.epochs_frame(r for r in records if r["run"]["variant"] in arms).dropna(subset=column)
    epochs = epochs.assign(value=epochs[column].astype(float) * (100 if column == "memorised" else 1))
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
        label = "wrong labels repeated (%)" if column == "memorised" else "validation loss (nats)"
        ax.set(title=noise_name(task).replace(", ", ",\n"), xlabel="epoch", ylabel=label)
    axes.flat[0].set_ylim(bottom=0)
    _name_arms(axes.flat[0], figure)
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
    """W_α, W_δ, W_β and their sum over (s[ỹ], max s), where that pair is possible at all.

    Either the given label is the one believed most, s[ỹ] = max s (the diagonal, drawn as a band), or the two
    probabilities belong to different classes and sum to at most one (the triangle).
    """
    grid = torch.linspace(0, 1, 201)
    given, largest = torch.meshgrid(grid, grid, indexing="xy")
    possible = (given + largest <= 1) & (given <= largest) | ((given - largest).abs() < 0.012)
    with torch.no_grad():
        easy = (lilaw.alpha * given - largest).sigmoid()
        moderate = (-(lilaw.delta * given - largest).square() / 2).exp()
        hard = (largest - lilaw.beta * given).sigmoid()
    panels = {"W_α (easy)": easy, "W_δ (moderate)": moderate, "W_β (hard)": hard, "W": easy + moderate + hard}
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


def _name_arms(ax: Any, figure: Figure) -> None:
    """One legend for all panels, below them."""
    legend = ax.get_legend()
    if legend is None:
        return
    names = [LABELS[text.get_text()] for text in legend.get_texts()]
    figure.legend(legend.legend_handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    legend.remove()


def claims_table() -> pd.DataFrame:
    """One row for each claim in ``data/paper/claims_relatives.csv``, judged as the claims on MetaAdamW are.

    * accuracy: test accuracy with LiLAW against without, in points, on the task.
    * detection: AUROC of LiLAW's easy weight against the best other method of the same run, on the task.
    * scale: needs models or data that are not at hand; not tested.
    * pending: no study yet.
    """
    claims = pd.read_csv(report.repository() / "data" / "paper" / "claims_relatives.csv", dtype=str)
    rows = []
    for _, claim in claims.iterrows():
        ours, says = "–", "not yet tested"
        if claim["kind"] == "scale":
            says = f"not tested: {claim['why']}"
        elif claim["kind"] != "pending":
            study = study_runs("lilaw/lite", report.repository() / "data" / "results", [claim["task"]])
            records = recorded(study)
            d = _claimed(str(claim["kind"]), records)
            if d is not None and not np.isnan(d.low):
                ours, says = f"{d} ({noise_name(claim['task'])}; lite runs)", f"{report.verdict(d)} (lite runs)"
        page = claim["evidence"]
        link = "–" if pd.isna(page) else f"[chapter {int(page.split('_')[0])}]({page}.ipynb)"
        rows.append((claim["method"], claim["claim"], claim["number"], ours, says, link))
    return pd.DataFrame(rows, columns=["method", "claim", "paper", "ours", "verdict", "evidence"])


def _claimed(kind: str, records: Records) -> PairedDifference | None:
    if not records:
        return None
    if kind == "accuracy":
        return points(runs_frame(records), "best", "adamw-lilaw", "adamw")
    found = detection_frame([r for r in records if r["run"]["variant"] == "adamw-lilaw"])
    if found.empty:
        return None
    areas = 100 * found.pivot(index="seed", columns="method", values="auroc").astype(float)
    others = areas.drop(columns=[name for name in areas if str(name).startswith("LiLAW")])
    return paired_difference(areas["LiLAW, easy weight"] - others.max(axis=1), "points")
