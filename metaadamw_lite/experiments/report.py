"""From records to tables: what was measured, with its spread, and what it says about a claim.

Statistics are paired by seed: arms with the same seed share weights, batches and dropout masks, so only their
difference is evidence. All of them come from scipy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


def repository() -> Path:
    """The checkout that the current directory is in, for notebooks: the nearest folder up that has ``data/paper``.

    Raises:
        FileNotFoundError: outside a checkout.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "data" / "paper").is_dir():
            return folder
    raise FileNotFoundError(f"{here} is not inside a checkout of metaadamw_lite (no data/paper above it)")


def paper_table(number: int) -> pd.DataFrame:
    """A table of the paper, indexed by task."""
    return pd.read_csv(repository() / "data" / "paper" / f"table{number}.csv", index_col="task")


def runs_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row for each run: key, status, epochs, best and last metric, test metric, and how far Φ moved."""
    rows = []
    for record in records:
        last_update = (record.get("meta_updates") or [{}])[-1]
        rows.append(
            {
                **record["run"],
                "status": record["status"],
                "data": record["data"],
                "epochs": len(record["epochs"]),
                "best_epoch": record["best"] and record["best"]["epoch"],
                "best": record["best"] and record["best"]["metric"],
                "last": record["epochs"][-1]["metric"] if record["epochs"] else None,
                "test": record["test"] and record["test"]["metric"],
                "meta_updates": len(record.get("meta_updates") or []),
                "phi_moved": last_update.get("phi_moved"),
                "alpha_moved": last_update.get("alpha_moved"),
                "beta_moved": last_update.get("beta_moved"),
                "log_var_moved": max((abs(s) for s in last_update.get("log_var", [])), default=None),
                "revision": record["environment"]["revision"],
            }
        )
    return pd.DataFrame(rows)


def outcomes(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a column ``outcome``: the test metric under ``clean``, else the best validation metric."""
    return runs.assign(outcome=runs["test"].where(runs["protocol"] == "clean", runs["best"]))


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
    """One row for each traced step, group and run that has factors: step, group, alpha, beta."""
    rows = []
    for record in records:
        names = [group["name"] for group in record.get("groups", [])]
        for point in record.get("trace", []):
            for name, alpha, beta in zip(names, point["alpha"], point["beta"], strict=True):
                rows.append({**record["run"], "step": point["step"], "group": name, "alpha": alpha, "beta": beta})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class PairedDifference:
    """A relative improvement over a baseline, paired by seed, in percent (positive: better).

    Attributes:
        mean: over the seeds.
        low, high: bootstrap interval (BCa) for the mean at 95 % confidence; NaN with fewer than three seeds.
        p: of a paired t-test against no difference; NaN with fewer than two seeds.
        seeds: how many pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} % [{self.low:+.1f}, {self.high:+.1f}], {self.seeds} seeds"


def improvement(arm: "pd.Series[float]", baseline: "pd.Series[float]", lower_is_better: bool) -> PairedDifference:
    """The improvement of an arm over a baseline, both indexed by seed; seeds that one of them lacks are left out.

    Each pair's difference is taken relative to its baseline run, as in the paper's Table 2.
    """
    pairs = pd.DataFrame({"arm": arm, "baseline": baseline}).dropna()
    sign = -1 if lower_is_better else 1
    percent = (sign * 100 * (pairs["arm"] / pairs["baseline"] - 1)).to_numpy()
    low = high = p = float("nan")
    if len(percent) >= 3 and np.ptp(percent) == 0:  # neither test is defined without any spread
        low = high = float(percent[0])
        p = 0.0 if low else 1.0
    elif len(percent) >= 2:
        p = float(stats.ttest_1samp(percent, 0).pvalue)
    if len(percent) >= 3 and np.ptp(percent) > 0:
        interval = stats.bootstrap(
            (percent,), np.mean, confidence_level=CONFIDENCE, rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return PairedDifference(float(percent.mean()) if len(percent) else float("nan"), low, high, p, len(percent))


def compare(outcome: pd.DataFrame, protocol: str, arm: str, baseline: str, lower_is_better: bool) -> PairedDifference:
    """The improvement of one arm over another under a protocol, from a frame that ``outcomes`` made."""
    table = outcome[outcome["protocol"] == protocol].pivot(index="seed", columns="variant", values="outcome")
    return improvement(table[arm], table[baseline], lower_is_better)


def verdict(difference: PairedDifference) -> str:
    """What a paired difference says about the claim "it is better".

    A decision takes both an interval without zero and p < 0.05, since with a handful of seeds the bootstrap interval
    alone is too narrow.
    """
    if np.isnan(difference.low):
        return "not yet tested"
    if difference.p >= 1 - CONFIDENCE or difference.low <= 0 <= difference.high:
        return "not decided: within chance"
    return "holds" if difference.low > 0 else "does not hold: it is worse"
