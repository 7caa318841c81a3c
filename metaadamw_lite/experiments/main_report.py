"""The main study as tables: each arm against each other, task by task, paired by seed."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.frames import by_seed, epochs_frame, factors_frame, outcomes, runs_frame
from metaadamw_lite.experiments.paired import (
    ENOUGH_SEEDS,
    MOST_PAIRS,
    PairedDifference,
    holm,
    improvement,
    improvements_by_seed,
    p_value,
    pairs_by_seed,
    power,
    spread_ratio,
)
from metaadamw_lite.experiments.records import Records, papers_gain
from metaadamw_lite.experiments.studies import seeds_by_power
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variants import ARMS, SEEDS
from metaadamw_lite.experiments.verdict import judge

OF_REAL_DATA = ("lite", "paper")
"""Profiles that are reported; the third, "smoke", runs on made-up data."""

TESTED = {"paper": "as published", "lite": "small, whole"}
"""The readers' names of the profiles."""

PAIRS = (("metaadamw", "adamw"), ("metaadamw-frozen", "adamw"), ("metaadamw", "metaadamw-frozen"))
"""The comparisons of every chapter: an arm and its baseline."""

ABOVE_CHANCE = 5.0
"""Percentage points above guessing that accuracies need to say anything."""


def main_records(records: Records, task: str, protocol: str, profile: str) -> list[dict[str, Any]]:
    """Return the main study's records of a task under a protocol and a profile.

    Raises:
        ValueError: for an unknown task or protocol, or a profile other than "lite" and "paper".
    """
    check_choice("protocol", protocol, PROTOCOLS)
    check_choice("profile", profile, OF_REAL_DATA)
    wanted = (protocol, profile)
    return [r for r in _of_main_study(records.of(task)) if (r["run"]["protocol"], r["run"]["profile"]) == wanted]


def main_runs(records: Records, task: str) -> pd.DataFrame:
    """Return a ``runs_frame`` of a task's runs of the main study."""
    return runs_frame(_of_main_study(records.of(task)))


def _of_main_study(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the records of the three arms with the study's seeds; AdamW's search has others."""
    return [r for r in records if r["run"]["variant"] in ARMS and r["run"]["seed"] < MOST_PAIRS]


def reported_records(records: Records, task: str, profile: str, seeds: Container[int] = SEEDS) -> list[dict[str, Any]]:
    """Return a task's records under the paper's protocol with some seeds; those of searches have others.

    Raises:
        ValueError: for an unknown task.
    """
    runs = ((record, record["run"]) for record in records.of(task))
    return [r for r, run in runs if (run["protocol"], run["profile"]) == ("paper", profile) and run["seed"] in seeds]


def best_evidence(runs: pd.DataFrame, protocol: str, arm: str = "metaadamw", baseline: str = "adamw") -> str:
    """Choose the profile to compare two arms by: "paper" with enough pairs, or without others, else "lite".

    A pair without a finite result counts, since the choice must not depend on the results.

    Args:
        runs: from ``runs_frame``, of one task.
        protocol: "paper" or "clean".
        arm, baseline: variants.

    Raises:
        ValueError: for an unknown protocol.
    """

    def pairs(profile: str) -> int:
        return len(pairs_by_seed(*by_seed(outcomes(runs[runs["profile"] == profile]), protocol, arm, baseline)))

    return "paper" if pairs("paper") >= ENOUGH_SEEDS or not pairs("lite") else "lite"


def compare(outcome: pd.DataFrame, protocol: str, arm: str, baseline: str, lower_is_better: bool) -> PairedDifference:
    """Return the improvement of one arm over another under a protocol, from a frame of ``outcomes``."""
    first, second = by_seed(outcome, protocol, arm, baseline)
    return improvement(first, second, lower_is_better)


def near_chance(task: str, outcome: pd.DataFrame) -> bool:
    """Tell whether MetaAdamW's mean accuracy under ``paper`` is less than ``ABOVE_CHANCE`` points above guessing.

    A task without classes is never near chance.

    Args:
        task: name.
        outcome: from ``outcomes``, of the task and of one profile.
    """
    classes = TASKS[task].classes
    if classes is None:
        return False
    (accuracy,) = by_seed(outcome, "paper", "metaadamw")
    return bool(100 * accuracy.mean() < 100 / classes + ABOVE_CHANCE)


def power_for_paper(task: str, difference: PairedDifference) -> float:
    """Return the power of these pairs to tell the paper's gain on the task from none; NaN with fewer than three."""
    return power(difference, papers_gain(task))


def planned_pairs(task: str, runs: pd.DataFrame, protocol: str, profile: str) -> int:
    """Return the planned number of pairs of the main study: five as published, as many as the power asks for if small.

    Args:
        task: name.
        runs: from ``main_runs``, of the task.
        protocol: "paper" or "clean".
        profile: "paper" or "lite".
    """
    if profile == "paper":
        return len(SEEDS)
    first = outcomes(runs[(runs["profile"] == profile) & runs["seed"].isin(SEEDS)])
    arm, baseline = by_seed(first, "paper", "metaadamw", "adamw")
    gains = improvements_by_seed(arm, baseline, TASKS[task].lower_is_better)
    return len(seeds_by_power(task, gains)[protocol])


def percent(share: float) -> str:
    """Format a share in whole percent, NaN as a dash."""
    return "–" if np.isnan(share) else f"{share:.0%}"


def comparison_table(task: str, outcome: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Format the paired comparisons of the three arms under both protocols, a row for each.

    Student's 95 % interval stands in the column of the gain, the bootstrap interval in one of its own.
    """
    lower_is_better = TASKS[task].lower_is_better
    rows = []
    for protocol in PROTOCOLS:
        for arm, baseline in PAIRS:
            d = compare(outcome, protocol, arm, baseline, lower_is_better)
            rows.append(
                {
                    "protocol": protocol,
                    "comparison": f"{labels[arm]} against {labels[baseline]}",
                    "gain (%)": f"{d.mean_text} {d.t_interval}" if d.seeds else "–",
                    "p (t)": p_value(d.p),
                    "pairs": d.pairs,
                    "better?": judge(d).label,
                    "bootstrap": d.interval,
                    "p (Wilcoxon)": p_value(d.p_wilcoxon),
                    "p (±1 %)": p_value(d.p_equivalent),
                    "log ratio": d.log_text if d.seeds else "–",
                }
            )
    return pd.DataFrame(rows).set_index(["protocol", "comparison"])


def common_profiles(records: Records, protocol: str = "paper") -> dict[str, str]:
    """Return the best profile to compare all ``PAIRS`` of arms by, for each task with records."""
    runs = {name: main_runs(records, name) for name in TASKS}
    return {
        name: min(best_evidence(frame, protocol, arm, baseline) for arm, baseline in PAIRS)  # "lite" < "paper"
        for name, frame in runs.items()
        if len(frame)
    }


def table_of_tasks(
    records: Records,
    arm: str = "metaadamw",
    baseline: str = "adamw",
    protocol: str = "paper",
    profiles: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Return Table 2 again: for every task the arms' means, the paired improvement, its tests, and its profile.

    Args:
        records: of the runs.
        arm, baseline: variants.
        protocol: "paper" or "clean".
        profiles: by task; None for the ``best_evidence`` on these two arms.

    Returns:
        Indexed by task: profile, seeds, "planned" (number of pairs), the two means and standard deviations, "spread"
        (ratio of the standard deviations, an ``Estimate``), "difference" (a ``PairedDifference``), "power" (for the
        paper's gain, with these pairs), "last" (the difference of the last epochs' validation metric), p, p_wilcoxon,
        p_equivalent, p and p_equivalent after Holm over the tasks (p_holm, p_equivalent_holm), and the improvements by
        seed.

    Raises:
        ValueError: for an unknown protocol.
        FileNotFoundError: without a record of any task.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    rows = {}
    for name, task in TASKS.items():
        runs = main_runs(records, name)
        if runs.empty:
            continue
        profile = best_evidence(runs, protocol, arm, baseline) if profiles is None else profiles[name]
        outcome = outcomes(runs[runs["profile"] == profile])
        first, second = by_seed(outcome, protocol, arm, baseline)
        pairs = pairs_by_seed(first, second).dropna()
        d = improvement(first, second, task.lower_is_better)
        last = outcome.assign(outcome=outcome["last"])
        rows[name] = {
            "profile": profile,
            "seeds": d.seeds,
            "planned": planned_pairs(name, runs, protocol, profile),
            "baseline_mean": pairs["baseline"].mean(),
            "baseline_std": pairs["baseline"].std(),
            "arm_mean": pairs["arm"].mean(),
            "arm_std": pairs["arm"].std(),
            "spread": spread_ratio(first, second),
            "difference": d,
            "power": power_for_paper(name, d),
            "last": compare(last, protocol, arm, baseline, task.lower_is_better),
            "p": d.p,
            "p_wilcoxon": d.p_wilcoxon,
            "p_equivalent": d.p_equivalent,
            "improvements": improvements_by_seed(first, second, task.lower_is_better).dropna(),
        }
    if not rows:
        raise FileNotFoundError("no run is recorded; make them by `sweep main/lite`")
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(p_holm=holm(table["p"]), p_equivalent_holm=holm(table["p_equivalent"]))


def improvements_frame(table: pd.DataFrame) -> pd.DataFrame:
    """Return every pair of a ``table_of_tasks``, for a figure: task (with its profile), improvement and paper.

    Both are in percent; "paper" is NaN for a task that the paper lacks.
    """
    return pd.concat(
        pd.DataFrame(
            {
                "task": f"{TASKS[str(task)].title} ({TESTED[row['profile']]})",
                "improvement": row["improvements"],
                "paper": papers_gain(str(task)),
            }
        )
        for task, row in table.iterrows()
    )


def time_to_best(records: Iterable[dict[str, Any]], lower_is_better: bool) -> pd.DataFrame:
    """Find the epoch in which MetaAdamW reaches AdamW's best, for each pair without a failed run.

    Args:
        records: of one task, and under each protocol of one profile.
        lower_is_better: direction of the metric.

    Returns:
        Indexed by protocol and seed: AdamW's best metric and its epoch, MetaAdamW's first epoch with a metric as good
        (NaN without one), and MetaAdamW's last epoch.
    """
    sign = 1 if lower_is_better else -1
    rows = []
    epochs = epochs_frame(r for r in records if r["status"] != "failed")
    for (protocol, seed), part in epochs.groupby(["protocol", "seed"]) if len(epochs) else ():
        adamw, other = (part[part["variant"] == v].dropna(subset="metric") for v in ARMS[:2])
        if adamw.empty or other.empty:
            continue
        target = adamw.iloc[(sign * adamw["metric"]).argmin()]
        reached = other[sign * other["metric"] <= sign * target["metric"]]["epoch"]
        first = reached.min() if len(reached) else np.nan
        rows.append((protocol, seed, target["metric"], target["epoch"], first, other["epoch"].max()))
    columns = ["protocol", "seed", "AdamW's best", "AdamW, epoch", "MetaAdamW, epoch", "MetaAdamW, last epoch"]
    return pd.DataFrame(rows, columns=columns).set_index(["protocol", "seed"])


def alphas_and_gains(records: Records, task: str, protocol: str) -> pd.DataFrame:
    """Return gains beside the groups' learning rates: a row for each pair of MetaAdamW and AdamW, and group.

    Returns:
        "profile", "seed", "group", "alpha" (the group's mean over MetaAdamW's run), "share" (of the model's parameters
        in the group, percent) and "gain" (of the pair, percent). Pairs without a finite result are left out.

    Raises:
        ValueError: for an unknown task or protocol.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    chosen = [r for r in _of_main_study(records.of(task)) if r["run"]["protocol"] == protocol]
    runs = outcomes(runs_frame(chosen))
    factors = factors_frame(r for r in chosen if r["run"]["variant"] == "metaadamw")
    alpha = factors.groupby(["profile", "seed", "group"], sort=False)["alpha"].mean().reset_index()
    gains = {}
    for profile, part in runs.groupby("profile"):
        arm, baseline = by_seed(part, protocol, "metaadamw", "adamw")
        gains[profile] = improvements_by_seed(arm, baseline, TASKS[task].lower_is_better)
    gain = pd.concat(gains, names=["profile", "seed"]).dropna().rename("gain")
    shares = {g["name"]: 100 * g["parameters"] / r["parameters"] for r in chosen for g in r.get("groups", [])}
    table = alpha.join(gain, on=["profile", "seed"], how="inner")
    return table.assign(share=table["group"].map(shares))
