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
