"""Tables of the studies of random, constant and learned factors (``studies.STUDIES_OF_PHI``).

All of them are of small whole runs (``lite``) under the paper's protocol. A gain is the relative difference of two
runs' best validation metrics in percent; positive is better.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from metaadamw_lite.experiments import TASKS, frames, main_report
from metaadamw_lite.experiments.circularity import UNREPLACED
from metaadamw_lite.experiments.dose import TWINS
from metaadamw_lite.experiments.ladder import LADDER
from metaadamw_lite.experiments.null import PHI_SEEDS, frozen_phi, trained_phi
from metaadamw_lite.experiments.paired import (
    ENOUGH_SEEDS,
    MOST_PAIRS,
    Estimate,
    PairedDifference,
    best_of,
    improvement,
    percent_gain,
    share_as_good,
    share_of_phi,
)
from metaadamw_lite.experiments.records import Records, papers_gain
from metaadamw_lite.experiments.released import released_log
from metaadamw_lite.experiments.replay import REPLAY
from metaadamw_lite.experiments.studies import best_variant, search_runs
from metaadamw_lite.experiments.transfer import TRANSFER_TASKS, transfer_from
from metaadamw_lite.experiments.verdict import Verdict, judge, judge_family


def small_runs(records: Records, task: str) -> pd.DataFrame:
    """Return a task's small whole runs under the paper's protocol, without those of searches, with their outcomes.

    Raises:
        ValueError: for an unknown task.
    """
    small = _small_records(records, task)
    if not small:
        return pd.DataFrame(columns=["protocol", "variant", "seed", "outcome"])
    return frames.outcomes(frames.runs_frame(small))


def _small_records(records: Records, task: str) -> list[dict[str, Any]]:
    """Return the records of a task's small whole runs under the paper's protocol, without those of searches."""
    return main_report.reported_records(records, task, "lite", range(MOST_PAIRS))


def best_adamw(records: Records, task: str) -> str | None:
    """Return AdamW at the best constant rate of the search on small runs, or None while the search is incomplete."""
    return best_variant(search_runs(task, "paper", "lite"), records)


def compare_rows(records: Records, task: str, columns: Mapping[str, Mapping[str, tuple[str, str]]]) -> pd.DataFrame:
    """Compare arms pair by pair, a family of tests for each column.

    Args:
        records: of all runs.
        task: name.
        columns: arm and baseline, by column and row.

    Returns:
        A ``PairedDifference`` in each cell, and under "<column>, verdict" the verdicts on "it is better" after Holm's
        correction over the column. A cell without pairs is None, a row without pairs is left out.

    Raises:
        ValueError: for an unknown task.
    """
    runs, lower_is_better = small_runs(records, task), TASKS[task].lower_is_better
    parts = []
    for column, rows in columns.items():
        found = {row: main_report.compare(runs, "paper", *arms, lower_is_better) for row, arms in rows.items()}
        kept = pd.Series({row: d for row, d in found.items() if d.pairs}, dtype=object, name=column)
        parts += [kept, judge_family(kept).rename(f"{column}, verdict")]
    table = pd.concat(parts, axis=1) if parts else pd.DataFrame()
    order = [row for row in dict.fromkeys(row for rows in columns.values() for row in rows) if row in table.index]
    return table.reindex(order).astype(object).where(lambda t: t.notna(), None)


# ---------------------------------------------------------------- null: random, untrained Φ's


def null_results(records: Records, task: str, name: Callable[[int], str] = frozen_phi) -> pd.DataFrame:
    """Return the best validation metrics of random Φ's.

    Args:
        records: of all runs.
        task: name.
        name: ``null.frozen_phi`` or ``null.trained_phi``.

    Returns:
        A row for each Φ (its seed), a column for each run seed; NaN for a run without a finite result. A Φ counts once
        all its runs are recorded.

    Raises:
        ValueError: for an unknown task.
    """
    return _null_results(small_runs(records, task), name)


def _null_results(runs: pd.DataFrame, name: Callable[[int], str]) -> pd.DataFrame:
    rows = {phi: frames.by_seed(runs, "paper", name(phi))[0] for phi in PHI_SEEDS}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("phi")
    recorded = pd.Series({phi: len(row) for phi, row in rows.items()})
    whole = recorded[recorded == recorded.max()].index if recorded.max() else recorded[:0].index
    return table.loc[whole].sort_index(axis=1)


def null_gains(records: Records, task: str, name: Callable[[int], str] = frozen_phi) -> pd.DataFrame:
    """Return the gains of random Φ's over AdamW with the same run seed, shaped as ``null_results``."""
    runs = small_runs(records, task)
    results, (adamw,) = _null_results(runs, name), frames.by_seed(runs, "paper", "adamw")
    return percent_gain(results, adamw.reindex(results.columns), TASKS[task].lower_is_better)


def logged_runs(task: str) -> int:
    """Count the different runs of MetaAdamW on a task in the released code's logs."""
    return len(released_log(task))


def null_distribution(records: Records, task: str, name: Callable[[int], str] = frozen_phi) -> "dict[str, Estimate]":
    """Locate the paper's gain among those of random Φ's, and compute the best of a search among them.

    Args:
        records, task, name: as for ``null_results``.

    Returns:
        "share of Φ" in the variance of gains; "share as good": share of the runs that gain at least as much as the
        paper's; "best of k" for k = 1 and the number of logged runs: the expected gain (percent) of the best of k
        draws; and "95th percentile" of the best of the latter. Each has a 95 % interval that allows for the spread of
        AdamW's runs, too.

    Raises:
        ValueError: for an unknown task, or with fewer than two Φ's that have a result with each of two run seeds.
    """
    runs, lower_is_better, logged = small_runs(records, task), TASKS[task].lower_is_better, logged_runs(task)
    results, (adamw,) = _null_results(runs, name), frames.by_seed(runs, "paper", "adamw")
    (mean, _), (best, high) = (best_of(results, adamw, lower_is_better, k) for k in (1, logged))
    return {
        "share of Φ": share_of_phi(percent_gain(results, adamw.reindex(results.columns), lower_is_better)),
        "share as good": share_as_good(results, adamw, lower_is_better, papers_gain(task)),
        "best of 1": mean,
        f"best of {logged}": best,
        "95th percentile": high,
    }


def null_alphas(records: Records, task: str) -> pd.DataFrame:
    """Return the gains of random Φ's beside their learning rates.

    Returns:
        A row for each recorded run of an untrained Φ with a finite gain: "phi", "seed", "gain", and "alpha", the mean α
        of the run, in which a group counts by its parameters.
    """
    names = {frozen_phi(phi): phi for phi in PHI_SEEDS}
    factors = frames.factors_frame(r for r in _small_records(records, task) if r["run"]["variant"] in names)
    gains = null_gains(records, task).rename_axis(columns="seed").melt(ignore_index=False, value_name="gain").dropna()
    if factors.empty:
        return pd.DataFrame(columns=["phi", "seed", "gain", "alpha"])
    weighted = factors.assign(weighted=factors["alpha"] * factors["parameters"])
    sums = weighted.groupby([factors["variant"].map(names).rename("phi"), "seed"])[["weighted", "parameters"]].sum()
    alpha = (sums["weighted"] / sums["parameters"]).rename("alpha")
    return gains.set_index("seed", append=True).join(alpha, how="inner").reset_index()


def rank_correlation(table: pd.DataFrame, x: str, y: str) -> Estimate:
    """Correlate the Φ's means of two columns of ``null_alphas`` by Spearman, with a 95 % bootstrap interval."""
    means = table.groupby("phi")[[x, y]].mean()

    def spearman(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]") -> float:
        return float(stats.spearmanr(a, b).statistic)

    interval = stats.bootstrap(
        (means[x].to_numpy(), means[y].to_numpy()),
        spearman,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(spearman(means[x].to_numpy(), means[y].to_numpy()), float(interval.low), float(interval.high))


def trained_against_untrained(records: Records, task: str) -> pd.DataFrame:
    """Compare each fresh Φ trained as published with the same Φ untrained.

    Returns:
        One row as of ``compare_rows``, with the column "difference". A pair is a Φ, with the mean over its run seeds.
    """
    runs = small_runs(records, task)
    trained, frozen = (_null_results(runs, name).mean(axis=1) for name in (trained_phi, frozen_phi))
    d = improvement(trained, frozen, TASKS[task].lower_is_better)
    return pd.DataFrame({"difference": [d], "difference, verdict": [judge(d)]}, index=["trained Φ"])


# ---------------------------------------------------------------- ladder, dose, replay, circularity, transfer


def ladder_table(records: Records, task: str) -> pd.DataFrame:
    """Compare each rung with AdamW, with AdamW at its best constant rate, and with the rung below.

    Returns:
        As ``compare_rows``: the columns "over AdamW", "over the best AdamW" (once its search is complete) and "over the
        rung below".
    """
    rungs, best = list(LADDER), best_adamw(records, task)
    columns = {"over AdamW": {rung: (rung, "adamw") for rung in rungs}}
    if best is not None:
        columns["over the best AdamW"] = {rung: (rung, best) for rung in rungs}
    columns["over the rung below"] = {rung: (rung, below) for below, rung in pairwise(rungs)}
    return compare_rows(records, task, columns)


def dose_table(records: Records, task: str) -> pd.DataFrame:
    """Compare each dose with its untrained twin, and measure its movement of α.

    Returns:
        As ``compare_rows``: the columns "over its twin" and "over the best AdamW" (once its search is complete); and
        "moved", the largest change of a group's α by meta-learning in a run, as the median over the runs.
    """
    best = best_adamw(records, task)
    columns = {"over its twin": {variant: (variant, twin) for variant, twin in TWINS.items()}}
    if best is not None:
        columns["over the best AdamW"] = {variant: (variant, best) for variant in TWINS}
    table = compare_rows(records, task, columns)
    moved = frames.movement_frame(r for r in _small_records(records, task) if r["run"]["variant"] in TWINS)
    if moved.empty:
        return table.assign(moved=np.nan)
    largest = moved.groupby(["variant", "seed"])["alpha_moved"].max().groupby("variant").median()
    return table.assign(moved=largest.reindex(table.index))


def replay_table(records: Records, task: str) -> pd.DataFrame:
    """Compare AdamW with a run's own factors, held constant or as one schedule, with AdamW and with that run.

    Returns:
        As ``compare_rows``, a row for each source and each of its replays: the columns "over AdamW" and "over the
        source".
    """
    sources = ("metaadamw", "metaadamw-frozen", "ladder-phi")
    replays = {name: source for source in sources for name in REPLAY if name.endswith(f"-of-{source}")}
    rows = [row for s in sources for row in (s, *(name for name, source in replays.items() if source == s))]
    return compare_rows(
        records,
        task,
        {
            "over AdamW": {row: (row, "adamw") for row in rows},
            "over the source": {name: (name, source) for name, source in replays.items()},
        },
    )


def circularity_table(records: Records, task: str) -> pd.DataFrame:
    """Compare a Φ whose loss has nothing to do with training with a Φ that has the published loss.

    Returns:
        As ``compare_rows``: the column "over the loss itself".
    """
    return compare_rows(records, task, {"over the loss itself": {name: (name, of) for name, of in UNREPLACED.items()}})


def transfer_table(records: Records, tasks: Sequence[str] = TRANSFER_TASKS) -> pd.DataFrame:
    """Compare a Φ that was trained on one task and frozen on another with AdamW.

    Returns:
        A row for each task that uses Φ, a column for each task that trained it: a ``PairedDifference``, or None without
        a pair.
    """
    rows = {}
    for task in tasks:
        table = compare_rows(records, task, {"gain": {source: (transfer_from(source), "adamw") for source in tasks}})
        rows[task] = table["gain"] if len(table) else pd.Series(dtype=object)
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(index=list(tasks), columns=list(tasks)).astype(object)
    return table.where(table.notna(), None)


def format_column(table: pd.DataFrame, column: str) -> "pd.Series[str]":
    """Format a column of ``compare_rows`` as text: mean, Student's interval, pairs, verdict."""

    def cell(d: PairedDifference | None, verdict: Verdict) -> str:
        if d is None:
            return "–"
        interval = f" {d.t_interval}" if d.seeds >= ENOUGH_SEEDS else ""
        return f"{d.mean_text} %{interval}, {d.pairs} pair{'' if d.pairs == 1 else 's'}: {verdict}"

    cells = zip(table[column], table[f"{column}, verdict"], strict=True)
    return pd.Series([cell(*pair) for pair in cells], table.index)
