"""From records to tables: what was measured, with its spread.

``paired`` has the statistics, ``claims`` what the tables say of the paper's claims.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.null import PHI_SEEDS, frozen_phi
from metaadamw_lite.experiments.paired import (
    ENOUGH_SEEDS,
    MOST_PAIRS,
    Estimate,
    PairedDifference,
    corrected,
    expected_best,
    holm,
    improvement,
    improvements_by_seed,
    p_value,
    pairs_by_seed,
    power,
    share_as_good,
    share_of_phi,
    spread_ratio,
)
from metaadamw_lite.experiments.records import Records, papers_gain
from metaadamw_lite.experiments.records import paper_table as paper_table
from metaadamw_lite.experiments.records import repository as repository
from metaadamw_lite.experiments.studies import best_variant, search_runs, seeds_by_power
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variants import (
    ABLATIONS,
    ARMS,
    SEEDS,
    differs,
    learning_rate,
    learning_rates,
)
from metaadamw_lite.experiments.verdict import FAILS, HOLDS, count_decided, judge

OF_REAL_DATA = ("lite", "paper")
"""Profiles that are reported; the third, "smoke", runs on made-up data."""

TESTED = {"paper": "as published", "lite": "small, whole"}
"""How a task was tested, as readers see a profile."""


def recorded(task: str) -> list[dict[str, Any]]:
    """The committed records of a task, for ``null_gains``."""
    return Records().of(task)


def best_evidence(runs: pd.DataFrame, protocol: str, arm: str = "metaadamw", baseline: str = "adamw") -> str:
    """The profile to compare two arms by: "paper" where there are enough pairs, or no others, else "lite".

    A pair without a finite result counts: what is looked at must not depend on what comes out.

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


def runs_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row for each run: key, status, data, epochs, best and last metric, those of the test part, meta-updates, how
    far Φ moved, and the revision of the code.

    A meta-update that was refused, since a loss or a gradient was not finite, is not counted.
    """
    rows = []
    for record in records:
        last_update = (record.get("meta_updates") or [{}])[-1]
        rows.append(
            {
                **record["run"],
                "status": record["status"],
                "data": record["data"],
                "epochs": len(record["epochs"]),
                "best": record["best"] and record["best"]["metric"],
                "last": record["epochs"][-1]["metric"] if record["epochs"] else None,
                "test": record["test"] and record["test"]["metric"],
                "bleu": record["test"] and record["test"].get("bleu"),
                "meta_updates": sum("error" not in update for update in record.get("meta_updates") or []),
                "phi_moved": last_update.get("phi_moved"),
                "revision": record["environment"]["revision"],
            }
        )
    return pd.DataFrame(rows)


def outcomes(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a column ``outcome``: the test metric under ``clean``, else the best validation metric.

    A run that failed has none, and no last epoch: what it had reached when an accident ended it is not its result.
    """
    ended = runs["status"] != "failed"
    outcome = runs["test"].where(runs["protocol"] == "clean", runs["best"])
    return runs.assign(outcome=outcome.where(ended), last=runs["last"].where(ended))


def movement_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row for each meta-update of each run: how far Φ, its factors and log σ² are from their start."""
    rows = []
    for record in records:
        for k, entry in enumerate(record.get("meta_updates") or [], start=1):
            log_var = max((abs(s) for s in entry["log_var"]), default=0.0)
            rows.append({**record["run"], "update": k, **entry, "log_var_moved": log_var})
    return pd.DataFrame(rows)


def epochs_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row for each epoch of each run."""
    return pd.DataFrame([{**r["run"], **epoch} for r in records for epoch in r["epochs"]])


def factors_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row for each traced step, group and run that has factors: step, group, parameters (how many), alpha, beta."""
    rows = []
    for record in records:
        groups = [{"group": g["name"], "parameters": g["parameters"]} for g in record.get("groups", [])]
        for point in record.get("trace", []):
            for group, alpha, beta in zip(groups, point["alpha"], point["beta"], strict=True):
                rows.append({**record["run"], "step": point["step"], **group, "alpha": alpha, "beta": beta})
    return pd.DataFrame(rows)


def alphas_and_gains(records: Records, task: str, protocol: str) -> pd.DataFrame:
    """Whether a gain goes with a group's learning rate: one row for each pair of MetaAdamW and AdamW, and group.

    Returns:
        "profile", "seed", "group", "alpha" (the group's mean over MetaAdamW's run), "share" (of the model's parameters
        that the group holds, in percent) and "gain" (of the pair, in percent). Pairs without a finite result are left
        out.

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


def null_gains(task: str, name: Callable[[int], str] = frozen_phi) -> pd.DataFrame:
    """The gains of random Φ's over AdamW in percent, of small whole runs (``lite``) under the paper's protocol.

    Args:
        task: which.
        name: ``null.frozen_phi`` or ``null.trained_phi``.

    Returns:
        A row for each Φ (its seed), a column for each run seed; NaN for a run that is missing or lost, and no row for a
        Φ without any run. For ``paired.share_of_phi``, ``share_as_good`` and ``expected_best``.

    Raises:
        ValueError: for an unknown task.
    """
    records = [r for r in recorded(task) if r["run"]["profile"] == "lite"]
    if not records:
        return pd.DataFrame()
    outcome, gains = outcomes(runs_frame(records)), {}
    for phi in PHI_SEEDS:
        arm, adamw = by_seed(outcome, "paper", name(phi), "adamw")
        if len(arm):
            gains[phi] = improvements_by_seed(arm, adamw, TASKS[task].lower_is_better)
    return pd.DataFrame.from_dict(gains, orient="index").rename_axis("phi")


def logged_runs(task: str) -> int:
    """How many runs of MetaAdamW on a task the released code's logs have; one that stands there twice counts once."""
    log = pd.read_csv(repository() / "data" / "paper" / "released_log.csv").drop_duplicates()
    return int((log["task"] == task).sum())


def null_distribution(task: str, name: Callable[[int], str] = frozen_phi) -> "dict[str, Estimate]":
    """Where the paper's gain lies among those of random Φ's, and what a search among them finds by itself.

    Args:
        task, name: as for ``null_gains``.

    Returns:
        "share of Φ": of the variance of gains; "share as good": of the runs that gain at least as much as the paper's;
        and "best of k" for k = 1 and the number of logged runs: the expected gain (percent) of the best of k draws.
        Each with its 95 % interval.

    Raises:
        ValueError: for an unknown task, or with fewer than two Φ's that have a result with each of two run seeds.
    """
    gains = null_gains(task, name)
    return {
        "share of Φ": share_of_phi(gains),
        "share as good": share_as_good(gains, papers_gain(task)),
        **{f"best of {k}": expected_best(gains, k) for k in (1, logged_runs(task))},
    }


def compare(outcome: pd.DataFrame, protocol: str, arm: str, baseline: str, lower_is_better: bool) -> PairedDifference:
    """The improvement of one arm over another under a protocol, from a frame that ``outcomes`` made."""
    first, second = by_seed(outcome, protocol, arm, baseline)
    return improvement(first, second, lower_is_better)


def by_seed(outcome: pd.DataFrame, protocol: str, *arms: str) -> "list[pd.Series[float]]":
    """The outcomes of some arms under a protocol, each indexed by seed; NaN for runs without a finite one.

    Raises:
        ValueError: for an unknown protocol.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    part = outcome[outcome["protocol"] == protocol]
    return [part[part["variant"] == arm].set_index("seed")["outcome"].astype(float) for arm in arms]


def percent(share: float) -> str:
    """A share for a table, in whole percent; a dash for NaN."""
    return "–" if np.isnan(share) else f"{share:.0%}"


PAIRS = (("metaadamw", "adamw"), ("metaadamw-frozen", "adamw"), ("metaadamw", "metaadamw-frozen"))
"""The comparisons that every chapter makes: an arm and its baseline."""


ABOVE_CHANCE = 5.0
"""Percentage points above guessing that accuracies need to say anything."""


def near_chance(task: str, outcome: pd.DataFrame) -> bool:
    """Whether the task has classes, and MetaAdamW's runs under ``paper`` are not five points better than guessing.

    Args:
        task: which.
        outcome: from ``outcomes``, of the task and of one profile.
    """
    classes = TASKS[task].classes
    if classes is None:
        return False
    (accuracy,) = by_seed(outcome, "paper", "metaadamw")
    return bool(100 * accuracy.mean() < 100 / classes + ABOVE_CHANCE)


def comparison_table(task: str, outcome: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """The paired comparisons of the three arms under both protocols, one row each with its 95 % interval, as text."""
    lower_is_better = TASKS[task].lower_is_better
    rows = []
    for protocol in PROTOCOLS:
        for arm, baseline in PAIRS:
            d = compare(outcome, protocol, arm, baseline, lower_is_better)
            rows.append(
                {
                    "protocol": protocol,
                    "comparison": f"{labels[arm]} against {labels[baseline]}",
                    "improvement (%)": f"{d.mean_text} {d.interval}" if d.seeds else "–",
                    "t interval": d.t_interval,
                    "p (t)": p_value(d.p),
                    "p (Wilcoxon)": p_value(d.p_wilcoxon),
                    "p (TOST, ±1 %)": p_value(d.p_equivalent),
                    "power": percent(power_for_paper(task, d)),
                    "log ratio": d.log_text if d.seeds else "–",
                    "seeds": d.seeds,
                    "better?": judge(d).kind,
                }
            )
    return pd.DataFrame(rows).set_index(["protocol", "comparison"])


def common_profiles(records: Records, protocol: str = "paper") -> dict[str, str]:
    """For each task with records the best profile that all ``PAIRS`` of arms can be compared by."""
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
    """Table 2 again: for every task the arms' means, the paired improvement, its tests, and the profile it rests on.

    Args:
        records: of the runs.
        arm, baseline: variants.
        protocol: "paper" or "clean".
        profiles: by task; None for the best that these two arms can be compared by.

    Returns:
        Indexed by task: profile, seeds, "planned" (as many as there should be), the two means and standard deviations,
        "spread" (the ratio of the latter, an ``Estimate``), "difference" (a ``PairedDifference``), "power" (for the
        paper's gain, with these pairs), "last" (the difference of the last epochs' validation metric), p, p_wilcoxon,
        p_equivalent, the first and the third after Holm over the tasks (p_holm, p_equivalent_holm), and the
        improvements by seed.

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
    """Every pair of a ``table_of_tasks``, for a figure: task (and how tested), improvement and paper (percent; NaN
    for a task that the paper lacks)."""
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
    """When MetaAdamW gets to where AdamW is at its best: one row for each pair, those with a failed run left out.

    Args:
        records: of one task, and under each protocol of one profile.
        lower_is_better: direction of the metric.

    Returns:
        Indexed by protocol and seed: AdamW's best metric, the epoch it was reached in, MetaAdamW's first epoch that is
        as good (NaN if none is), and its last one.
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


def searched(records: Records, task: str, protocol: str, profile: str) -> pd.DataFrame:
    """The runs of the search for AdamW's learning rate: lr, seed, best metric."""
    search = search_runs(task, protocol, profile)
    runs = runs_frame(records.of(task))
    mine = runs[(runs["protocol"] == protocol) & (runs["profile"] == profile)]
    mine = mine[mine["seed"].isin({key.seed for key in search})]
    return mine.assign(lr=mine["variant"].map(learning_rate))[["lr", "seed", "best"]]


def tuned_table(records: Records) -> pd.DataFrame:
    """MetaAdamW at the paper's settings against AdamW with a searched learning rate; a row for each search done.

    Returns:
        Indexed by task, protocol and profile: learning_rate (the best), edge (it is the largest or smallest one tried),
        tuned (AdamW at that rate against AdamW at the paper's, None where they are the same), difference (MetaAdamW
        against the former), both a ``PairedDifference``, worse (in how many pairs it is worse), and p_holm, corrected
        over the rows. Empty as long as no search is complete.
    """
    rows = {}
    for name, task in TASKS.items():
        runs = runs_frame(records.of(name))
        for protocol in reversed(PROTOCOLS):
            for profile in ("paper", "lite"):
                best = best_variant(search_runs(name, protocol, profile), records)
                if best is None:
                    continue
                fresh = runs["seed"].isin(SEEDS)  # not those that the rate was chosen with
                outcome = outcomes(runs[fresh & (runs["profile"] == profile)])
                rate = learning_rate(best)
                arm, tuned = by_seed(outcome, protocol, "metaadamw", best)
                rows[name, protocol, profile] = {
                    "learning_rate": rate,
                    "edge": rate in (learning_rates(profile)[0], learning_rates(profile)[-1]),
                    "tuned": None
                    if best == "adamw"
                    else compare(outcome, protocol, best, "adamw", task.lower_is_better),
                    "difference": improvement(arm, tuned, task.lower_is_better),
                    "worse": int((improvements_by_seed(arm, tuned, task.lower_is_better) < 0).sum()),
                }
    index = pd.MultiIndex.from_tuples(list(rows), names=["task", "protocol", "profile"])
    columns = ["learning_rate", "edge", "tuned", "difference", "worse"]
    table = pd.DataFrame(list(rows.values()), index=index, columns=columns)
    return table.assign(p_holm=holm(table["difference"].map(lambda d: d.p)))


def tuned_statement(table: pd.DataFrame) -> str:
    """What a ``tuned_table`` says, in a few sentences (Markdown)."""

    def where(rows: pd.DataFrame) -> str:
        named = [f"{TASKS[str(task)].title} (`{rule}`, {profile} runs)" for task, rule, profile in rows.index]
        return ", ".join(named) or "none"

    kinds = table["difference"].map(lambda d: judge(d).kind)
    tested = table["p_holm"].notna()
    decided, left = (sum(count_decided(d)) for d in (table["difference"], corrected(table["difference"])))
    searches = table["tuned"].map(lambda d: judge(d).kind if d else "the same rate")
    lines = [
        f"* MetaAdamW is **better** than tuned AdamW: {where(table[kinds == HOLDS])}.",
        f"* It is **worse**: {where(table[kinds == FAILS])}.",
        f"* That is {decided} of {tested.sum()} comparisons; after Holm's correction for their number {left} of "
        "them are left. The others are **not decided**.",
        f"* The search gained AdamW something (not corrected): {where(table[searches == HOLDS])}; it cost something: "
        f"{where(table[searches == FAILS])}.",
    ]
    if not tested.all():
        lines.append(f"* Not tested yet: {where(table[~tested])}.")
    return "\n".join(lines)


def ablation_table(records: Records, task: str, profile: str) -> pd.DataFrame:
    """A task's part of Table 3 again: for each row the paper's number and ours, under the paper's protocol.

    Rows of ``ABLATIONS`` that the paper's table lacks come last.

    Returns:
        Indexed by factor and value, with the columns "paper" (text, as printed, or missing), "baseline" (the row is
        the task's own setting in Table 4), "variant" (missing where the row is the baseline), "mean" of ours and
        "metaadamw", that of MetaAdamW, both over the seeds that the two have, "difference": the paired change against
        MetaAdamW (a ``PairedDifference``; negative is worse), and "p_holm", its p after Holm's correction over the
        task's variants.

    Raises:
        ValueError: for a profile other than "lite" and "paper".
    """
    check_choice("profile", profile, OF_REAL_DATA)
    printed = paper_table(3)
    own = {(row.factor, row.value): name for name, row in ABLATIONS.items() if name not in {*printed["variant"]}}
    variants = printed["variant"].to_dict() | own
    index = pd.MultiIndex.from_tuples(list(variants), names=printed.index.names)
    settings, lower_is_better = TASKS[task].settings("paper"), TASKS[task].lower_is_better
    runs = runs_frame(records.of(task))
    outcome = outcomes(runs[runs["profile"] == profile])
    rows = []
    for variant in variants.values():
        baseline = pd.isna(variant) or variant == "metaadamw"
        baseline = baseline or (variant in ABLATIONS and not differs(settings, variant))
        name = "metaadamw" if baseline else str(variant)
        arm, metaadamw = by_seed(outcome, "paper", name, "metaadamw")
        difference = improvement(arm, metaadamw, lower_is_better)
        means = pairs_by_seed(arm, metaadamw).mean()
        rows.append((baseline, None if baseline else variant, means["arm"], means["baseline"], difference))
    columns = ["baseline", "variant", "mean", "metaadamw", "difference"]
    table = pd.DataFrame(rows, index=index, columns=columns)
    tested = table["difference"].map(lambda d: d.p).where(~table["baseline"])  # NaN with too few seeds
    return table.assign(paper=printed.reindex(index, columns=[task])[task], p_holm=holm(tested))


def reported(records: Records, task: str, profile: str) -> list[dict[str, Any]]:
    """The records of a task under the paper's protocol with the seeds that every study has, which no search has."""
    runs = ((record, record["run"]) for record in records.of(task))
    return [
        record
        for record, run in runs
        if (run["protocol"], run["profile"]) == ("paper", profile) and run["seed"] in SEEDS
    ]


def movement_table(records: Records, task: str, profile: str) -> pd.DataFrame:
    """How far meta-learning moved the factors in MetaAdamW and in each variant of Table 3, under the paper's protocol.

    Returns:
        A row for each run: "change" (the row of Table 3, or "MetaAdamW"), "variant", "seed", "meta_updates" (how many),
        "alpha_moved" (largest distance of a group's α from what Φ gave at its start, over groups and meta-updates), and
        "same_phi": whether the variant begins with the Φ of MetaAdamW and of the untrained control, so that it can be
        compared with the latter.

    Raises:
        ValueError: for an unknown task, or a profile other than "lite" and "paper".
    """
    check_choice("profile", profile, OF_REAL_DATA)
    chosen = reported(records, task, profile)
    moved = movement_frame(r for r in chosen if r["run"]["variant"] in ("metaadamw", *ABLATIONS))
    if moved.empty:
        return pd.DataFrame(columns=["change", "variant", "seed", "meta_updates", "alpha_moved", "same_phi"])
    names = {name: f"{row.factor}: {row.value}" for name, row in ABLATIONS.items()}
    same = {"metaadamw"} | {name for name, row in ABLATIONS.items() if row.factor in KEEP_PHI}
    counts = runs_frame(chosen).set_index(["variant", "seed"])["meta_updates"]
    runs = moved.groupby(["variant", "seed"])[["alpha_moved"]].max().join(counts).reset_index()
    change = runs["variant"].map({"metaadamw": "MetaAdamW"} | names)
    return runs.assign(change=change, same_phi=runs["variant"].isin(same))


KEEP_PHI = ("Meta-learning objective", "HUW priorities", "Meta-update frequency")
"""The blocks of Table 3 that change how Φ is trained and not what it is."""


def more_meta_learning(records: Records, task: str, profile: str) -> pd.DataFrame:
    """What training Φ in another way, or more often, gains over the same Φ left untrained.

    Returns:
        Indexed by change, from the least moved to the most: "meta_updates" in a run (median), "alpha_moved" (median
        over seeds), "largest" (over seeds), "difference": the improvement over the untrained control, paired by seed (a
        ``PairedDifference``), and "p_holm", its p after Holm's correction over the rows that move α at all.
    """
    runs = movement_table(records, task, profile)
    columns = ["meta_updates", "alpha_moved", "largest", "difference", "p_holm"]
    if runs.empty:
        return pd.DataFrame(columns=columns)
    outcome = outcomes(runs_frame(reported(records, task, profile)))
    rows = {}
    for (change, variant), group in runs[runs["same_phi"]].groupby(["change", "variant"]):
        difference = compare(outcome, "paper", str(variant), "metaadamw-frozen", TASKS[task].lower_is_better)
        moved = group["alpha_moved"]
        rows[change] = group["meta_updates"].median(), moved.median(), moved.max(), difference
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns[:-1]).sort_values("largest")
    tests = table["difference"].map(lambda d: d.p)
    return table.assign(p_holm=holm(tests.where(table["largest"] > 0)))  # what moves nothing is the control itself


def more_meta_learning_statement(table: pd.DataFrame) -> str:
    """What a ``more_meta_learning`` says, in two sentences (Markdown)."""
    last, d = table.iloc[-1], table["difference"].iloc[-1]
    moving = table[table["p_holm"].notna()]["difference"]
    return (
        f"The row that moved α furthest (**{table.index[-1]}**: {last['meta_updates']:.0f} meta-updates a run, "
        f"α by up to {last['largest']:.2g}) is {d} beside the same Φ untrained: {judge(d)}. Rows that move α and "
        f"differ after Holm's correction: {sum(count_decided(corrected(moving)))} of {len(moving)}."
    )


def main_records(records: Records, task: str, protocol: str, profile: str) -> list[dict[str, Any]]:
    """The records of the main study under a protocol and a profile.

    Raises:
        ValueError: for an unknown task or protocol, or a profile other than "lite" and "paper".
    """
    check_choice("protocol", protocol, PROTOCOLS)
    check_choice("profile", profile, OF_REAL_DATA)
    wanted = (protocol, profile)
    return [r for r in _of_main_study(records.of(task)) if (r["run"]["protocol"], r["run"]["profile"]) == wanted]


def main_runs(records: Records, task: str) -> pd.DataFrame:
    """A ``runs_frame`` of a task's runs of the main study."""
    return runs_frame(_of_main_study(records.of(task)))


def _of_main_study(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a task's three arms, with the study's seeds (AdamW has runs with the seeds of its search, too)."""
    return [r for r in records if r["run"]["variant"] in ARMS and r["run"]["seed"] < MOST_PAIRS]


def planned_pairs(task: str, runs: pd.DataFrame, protocol: str, profile: str) -> int:
    """How many pairs of the main study are planned: five as published; of small ones as many as the power asks for.

    Args:
        task: which.
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


def power_for_paper(task: str, difference: PairedDifference) -> float:
    """How likely these pairs are to tell a gain as the paper's on the task from none; NaN with fewer than three."""
    return power(difference, papers_gain(task))


def bench_records() -> dict[str, dict[str, Any]]:
    """The measurements of ``bench``, by the names of their files.

    The latest are named by the kind of device ("cpu", "cuda"), older ones that are kept to compare with by device and
    commit ("h200-1470adc").
    """
    paths = sorted((repository() / "data" / "bench").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def bench_record(name: str = "cpu") -> dict[str, Any] | None:
    """One of ``bench_records``; None where there is none of this name."""
    return bench_records().get(name)
