"""Verdicts of the studies of LiLAW and LoPE: paired differences, Holm's correction over a table, and verdicts by it.

``lilaw_report`` and ``lope_report`` have the tables and figures of each.
"""

from collections.abc import Iterable, Sequence

import pandas as pd

from metaadamw_lite.experiments import paired, verdict
from metaadamw_lite.experiments.paired import PairedDifference, paired_difference
from metaadamw_lite.experiments.records import Record, Records, RunKey
from metaadamw_lite.experiments.studies import FEW_SEEDS
from metaadamw_lite.experiments.verdict import NEVER, Verdict


def study_records(records: Records, study: Sequence[RunKey]) -> list[Record]:
    """Return the records of a study's runs, task by task."""
    keys, tasks = set(study), dict.fromkeys(key.task for key in study)
    return [record for task in tasks for record in records.of(task) if RunKey(**record["run"]) in keys]


def points_above(first: "pd.Series[float]", second: "pd.Series[float]") -> PairedDifference:
    """Return the first minus the second in points, both indexed by seed."""
    pairs = paired.pairs_by_seed(first, second)
    return paired_difference(pairs["arm"] - pairs["baseline"], "points")


def corrected_table(table: pd.DataFrame, control: Iterable[object] = ()) -> pd.DataFrame:
    """Add "p_holm", corrected over the rows of a table, and the verdicts by it.

    Args:
        table: with a column "difference" of ``PairedDifference``.
        control: rows apart from the question, which are neither corrected nor counted.
    """
    asked = ~table.index.isin(list(control))
    after = table["difference"].copy()
    after[asked] = paired.corrected(after[asked])
    verdicts = [judge_when_complete(d, c) for d, c in zip(table["difference"], after, strict=True)]
    p_holm = after.map(lambda d: d.p).where(asked)
    return table.assign(p_holm=p_holm, verdict=pd.Series(verdicts, index=table.index, dtype=object))


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """Format a ``corrected_table`` as text: mean with Student's interval, p after Holm's correction, verdict."""
    differences = table["difference"]
    unit = differences.iloc[0].unit if len(table) else "points"
    text = table.drop(columns=["difference", "p_holm", "verdict"])
    text[f"difference ({unit})"] = differences.map(student)
    text["p (Holm)"] = table["p_holm"].map(paired.p_value)
    return text.assign(**{"better?": table["verdict"]})


def student(difference: PairedDifference) -> str:
    """Format a mean with Student's interval, since the bootstrap's is far too narrow for three pairs."""
    if not difference.seeds:
        return "–"
    enough = difference.seeds >= paired.ENOUGH_SEEDS
    return f"{difference.mean_text} {difference.t_interval if enough else difference.interval}"


def judge_when_complete(difference: PairedDifference, correction: PairedDifference) -> Verdict:
    """Judge "it is better" by corrected p-values, once all planned seeds are there."""
    planned = len(FEW_SEEDS)
    if difference.pairs < planned:
        return Verdict(NEVER, f"{difference.seeds} of {planned} seeds")
    return verdict.judge(difference, correction)
