"""Random Φ's: how their gains spread, and where the paper's lies among them."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.frames import by_seed, outcomes, runs_frame
from metaadamw_lite.experiments.null import PHI_SEEDS, frozen_phi
from metaadamw_lite.experiments.paired import Estimate, expected_best, improvements_by_seed, share_as_good, share_of_phi
from metaadamw_lite.experiments.records import Records, papers_gain, repository


def recorded(task: str) -> list[dict[str, Any]]:
    """The committed records of a task."""
    return Records().of(task)


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
