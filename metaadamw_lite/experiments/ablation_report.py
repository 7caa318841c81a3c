"""Table 3 again: the effect of each change to MetaAdamW, and the movement of its factors by meta-learning."""

from typing import Any

import pandas as pd

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.frames import by_seed, movement_frame, outcomes, runs_frame
from metaadamw_lite.experiments.main_report import OF_REAL_DATA, compare, reported_records
from metaadamw_lite.experiments.paired import holm, improvement, pairs_by_seed
from metaadamw_lite.experiments.records import Records, paper_table
from metaadamw_lite.experiments.variants import ABLATIONS, changes_settings


def ablation_table(records: Records, task: str, profile: str) -> pd.DataFrame:
    """Return a task's part of Table 3: the paper's number and ours for each row, under the paper's protocol.

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
    variants: dict[Any, Any] = printed["variant"].to_dict()
    papers = {*variants.values()}
    variants |= {(row.factor, row.value): name for name, row in ABLATIONS.items() if name not in papers}
    index = pd.MultiIndex.from_tuples(list(variants), names=printed.index.names)
    settings, lower_is_better = TASKS[task].settings("paper"), TASKS[task].lower_is_better
    runs = runs_frame(records.of(task))
    outcome = outcomes(runs[runs["profile"] == profile])
    rows = []
    for variant in variants.values():
        baseline = pd.isna(variant) or variant == "metaadamw"
        baseline = baseline or (variant in ABLATIONS and not changes_settings(settings, variant))
        name = "metaadamw" if baseline else str(variant)
        arm, metaadamw = by_seed(outcome, "paper", name, "metaadamw")
        difference = improvement(arm, metaadamw, lower_is_better)
        means = pairs_by_seed(arm, metaadamw).mean()
        rows.append((baseline, None if baseline else variant, means["arm"], means["baseline"], difference))
    columns = ["baseline", "variant", "mean", "metaadamw", "difference"]
    table = pd.DataFrame(rows, index=index, columns=columns)
    tested = table["difference"].map(lambda d: d.p).where(~table["baseline"])  # NaN with too few seeds
    return table.assign(paper=printed.reindex(index, columns=[task])[task], p_holm=holm(tested))


KEEP_PHI = ("Meta-learning objective", "HUW priorities", "Meta-update frequency")
"""The blocks of Table 3 that change the training of Φ and not Φ itself."""


def movement_table(records: Records, task: str, profile: str) -> pd.DataFrame:
    """Measure how far meta-learning moved α in MetaAdamW and each variant of Table 3, under the paper's protocol.

    Returns:
        A row for each run: "change" (the row of Table 3, or "MetaAdamW"), "variant", "seed", "meta_updates" (how many),
        "alpha_moved" (largest distance of a group's α from that of Φ's random start, over groups and meta-updates), and
        "same_phi": whether the variant begins with the Φ of MetaAdamW and of the untrained control, so that it can be
        compared with the latter.

    Raises:
        ValueError: for an unknown task, or a profile other than "lite" and "paper".
    """
    check_choice("profile", profile, OF_REAL_DATA)
    chosen = reported_records(records, task, profile)
    moved = movement_frame(r for r in chosen if r["run"]["variant"] in ("metaadamw", *ABLATIONS))
    if moved.empty:
        return pd.DataFrame(columns=["change", "variant", "seed", "meta_updates", "alpha_moved", "same_phi"])
    names = {name: f"{row.factor}: {row.value}" for name, row in ABLATIONS.items()}
    same = {"metaadamw"} | {name for name, row in ABLATIONS.items() if row.factor in KEEP_PHI}
    counts = runs_frame(chosen).set_index(["variant", "seed"])["meta_updates"]
    runs = moved.groupby(["variant", "seed"])[["alpha_moved"]].max().join(counts).reset_index()
    change = runs["variant"].map({"metaadamw": "MetaAdamW"} | names)
    return runs.assign(change=change, same_phi=runs["variant"].isin(same))


def more_meta_learning(records: Records, task: str, profile: str) -> pd.DataFrame:
    """Compare each other way of training Φ, or of training it more often, with the same Φ left untrained.

    Returns:
        Indexed by change, from the least moved to the most: "meta_updates" in a run (median), "alpha_moved" (median
        over seeds), "largest" (over seeds), "difference": the improvement over the untrained control, paired by seed (a
        ``PairedDifference``), and "p_holm", its p after Holm's correction over the rows that move α at all.
    """
    runs = movement_table(records, task, profile)
    columns = ["meta_updates", "alpha_moved", "largest", "difference", "p_holm"]
    if runs.empty:
        return pd.DataFrame(columns=columns)
    outcome = outcomes(runs_frame(reported_records(records, task, profile)))
    rows = {}
    for (change, variant), group in runs[runs["same_phi"]].groupby(["change", "variant"]):
        difference = compare(outcome, "paper", str(variant), "metaadamw-frozen", TASKS[task].lower_is_better)
        moved = group["alpha_moved"]
        rows[change] = group["meta_updates"].median(), moved.median(), moved.max(), difference
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns[:-1]).sort_values("largest")
    tests = table["difference"].map(lambda d: d.p)
    return table.assign(
        p_holm=holm(tests.where(table["largest"] > 0))
    )  # a row that moves nothing is the control itself
