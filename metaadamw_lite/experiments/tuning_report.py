"""MetaAdamW beside AdamW with a learning rate that was searched for."""

import pandas as pd

from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.frames import by_seed, outcomes, runs_frame
from metaadamw_lite.experiments.main_report import compare
from metaadamw_lite.experiments.paired import holm, improvement, improvements_by_seed
from metaadamw_lite.experiments.records import Records
from metaadamw_lite.experiments.studies import best_variant, search_runs
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variants import SEEDS, learning_rate, learning_rates


def searched(records: Records, task: str, protocol: str, profile: str) -> pd.DataFrame:
    """Return the runs of the search for AdamW's learning rate: lr, seed, best metric."""
    search = search_runs(task, protocol, profile)
    runs = runs_frame(records.of(task))
    mine = runs[(runs["protocol"] == protocol) & (runs["profile"] == profile)]
    mine = mine[mine["seed"].isin({key.seed for key in search})]
    return mine.assign(lr=mine["variant"].map(learning_rate))[["lr", "seed", "best"]]


def tuned_table(records: Records) -> pd.DataFrame:
    """Compare MetaAdamW at the paper's settings with AdamW at its best learning rate, a row for each complete search.

    Returns:
        Indexed by task, protocol and profile: learning_rate (the best), edge (the rate is the largest or smallest of
        the search), tuned (AdamW at that rate against AdamW at the paper's, None if they are the same), difference
        (MetaAdamW against AdamW at that rate), both a ``PairedDifference``, worse (number of pairs in which MetaAdamW
        is worse), and p_holm, corrected over the rows. Empty until a search is complete.
    """
    rows = {}
    for name, task in TASKS.items():
        runs = runs_frame(records.of(name))
        for protocol in reversed(PROTOCOLS):
            for profile in ("paper", "lite"):
                best = best_variant(search_runs(name, protocol, profile), records)
                if best is None:
                    continue
                fresh = runs["seed"].isin(SEEDS)  # apart from the seeds of the search
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
