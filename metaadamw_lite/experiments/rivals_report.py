"""Tables of the studies ``published`` and ``budget``: the published code, equal searches, peers, time to a target."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from metaadamw_lite.experiments import TASKS, frames, main_report
from metaadamw_lite.experiments.budget import LEARNED, SEARCHES, searched_as
from metaadamw_lite.experiments.departures import DEPARTED
from metaadamw_lite.experiments.paired import PairedDifference, improvement, median_time, power
from metaadamw_lite.experiments.peers import PEERS
from metaadamw_lite.experiments.published import RELEASED
from metaadamw_lite.experiments.records import Records, papers_gain
from metaadamw_lite.experiments.studies import best_variant, search_runs
from metaadamw_lite.experiments.variants import learning_rates
from metaadamw_lite.experiments.verdict import judge_family

TRAINED_RELEASE = "released against released-frozen"


def published_table(records: Records, task: str) -> pd.DataFrame:
    """Compare each departure of the released code, and the released optimizer itself, in small whole runs.

    Returns:
        A row for each variant with runs: "difference" (against the paper's MetaAdamW, a ``PairedDifference``; positive
        is better), "adamw" (the same against AdamW), "verdict" on "it is better than MetaAdamW", after Holm's
        correction over the rows, and "power" to tell a gain like the paper's from none. The last row,
        ``TRAINED_RELEASE``, compares the released optimizer with itself without meta-updates.

    Raises:
        ValueError: for an unknown task.
    """
    columns = ["difference", "adamw", "verdict", "power"]
    runs = main_report.reported_records(records, task, "lite")
    if not runs:
        return pd.DataFrame(columns=columns)
    outcome, lower_is_better = frames.outcomes(frames.runs_frame(runs)), TASKS[task].lower_is_better
    rows = dict[str, tuple[PairedDifference, PairedDifference | None]]()
    for variant in (*DEPARTED, *RELEASED):
        arm, metaadamw, adamw = frames.by_seed(outcome, "paper", variant, "metaadamw", "adamw")
        if len(arm):
            rows[variant] = improvement(arm, metaadamw, lower_is_better), improvement(arm, adamw, lower_is_better)
    trained, frozen = frames.by_seed(outcome, "paper", *RELEASED)
    if len(trained) and len(frozen):
        rows[TRAINED_RELEASE] = improvement(trained, frozen, lower_is_better), None
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns[:2], dtype=object)
    return _judged(table, task)


def budget_table(records: Records, task: str) -> pd.DataFrame:
    """Compare every arm after the same search, and the peers, in small whole runs with seeds apart from the searches.

    Returns:
        A row for each arm with each schedule whose search is done, and for each peer with runs: "variant",
        "learning_rate" (the best; NaN for a peer), "edge" (the rate is the largest or smallest of the search),
        "difference" (against AdamW at its best constant rate, a ``PairedDifference``; None for that row itself),
        "verdict" after Holm's correction over the rows, "power" to tell a gain like the paper's from none, and "alike"
        (against AdamW with the same schedule; None for that row itself, or without one). From ``time_to_target``, with
        the median best metric of AdamW at its best constant rate as target: "reached" (runs of runs), "steps" and
        "seconds" (``Estimate``s of the median).

    Raises:
        ValueError: for an unknown task, or while the search for AdamW's constant rate is not complete.
    """
    grid, chosen = learning_rates("lite"), dict[str, tuple[str, float]]()
    for arm, schedule in SEARCHES:
        best = best_variant(search_runs(task, "paper", "lite", arm, schedule), records)
        if best is not None:
            rates = {searched_as(arm, schedule, lr): lr for lr in grid}
            chosen[f"{arm}, {schedule}"] = best, rates[best]
    baseline = "adamw, constant"
    if baseline not in chosen:
        raise ValueError(f"the search for AdamW's rate on {task} is not complete: `sweep budget/lite` makes it")
    runs, lower_is_better = main_report.reported_records(records, task, "lite"), TASKS[task].lower_is_better
    outcome = frames.outcomes(frames.runs_frame(runs))
    chosen |= {name: (name, math.nan) for name in (*PEERS, LEARNED) if (outcome["variant"] == name).any()}
    by_name = {name: frames.by_seed(outcome, "paper", variant)[0] for name, (variant, _) in chosen.items()}
    reference = by_name[baseline]
    variants = {variant for variant, _ in chosen.values()}
    compared = [record for record in runs if record["run"]["variant"] in variants]
    times = time_to_target(compared, float(reference.median()), lower_is_better)
    rows = {}
    for name, (variant, rate) in chosen.items():
        mine, like = times[times["variant"] == variant], f"adamw, {name.partition(', ')[2]}"
        rows[name] = {
            "variant": variant,
            "learning_rate": rate,
            "edge": rate in (grid[0], grid[-1]),
            "difference": None if name == baseline else improvement(by_name[name], reference, lower_is_better),
            "alike": improvement(by_name[name], by_name[like], lower_is_better)
            if name != like and like in by_name
            else None,
            "reached": f"{mine['reached'].sum()} of {len(mine)}",
            "steps": median_time(mine["steps"], mine["reached"]),
            "seconds": median_time(mine["seconds"], mine["reached"]),
        }
    return _judged(pd.DataFrame.from_dict(rows, orient="index"), task)


def time_to_target(records: Iterable[dict[str, Any]], target: float, lower_is_better: bool) -> pd.DataFrame:
    """Find the time at which each run first has a validation metric as good as a target.

    Args:
        records: of one task.
        target: the metric to reach.
        lower_is_better: direction of the metric.

    Returns:
        A row for each run: "variant", "seed", "reached", and "steps" and "seconds" of training (of the processor,
        without evaluation) until then, or until the end of a run that never reaches it. Seconds are NaN for records
        without the processor's time, such as the oldest.
    """
    sign = 1 if lower_is_better else -1
    rows = []
    for record in records:
        epochs = record["epochs"]
        metric = [math.inf if e["metric"] is None else sign * e["metric"] for e in epochs]
        hits = np.flatnonzero(np.asarray(metric) <= sign * target)
        count = int(hits[0]) + 1 if len(hits) else len(epochs)
        a_pass = math.ceil(record["samples"]["train"] / record["settings"]["batch_size"])
        seconds = sum(e.get("cpu_seconds", math.nan) for e in epochs[:count])
        rows.append((record["run"]["variant"], record["run"]["seed"], bool(len(hits)), count * a_pass, seconds))
    return pd.DataFrame(rows, columns=["variant", "seed", "reached", "steps", "seconds"])


def _judged(table: pd.DataFrame, task: str) -> pd.DataFrame:
    """Add "verdict" on "it is better", after Holm's correction, and "power" for the paper's gain."""
    tested = table["difference"].dropna()
    powers = pd.Series([power(d, papers_gain(task)) for d in tested], index=tested.index, dtype=float)
    return table.assign(
        verdict=judge_family(tested).reindex(table.index, fill_value="–"), power=powers.reindex(table.index)
    )
