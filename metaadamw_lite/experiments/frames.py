"""Records as frames: a row for each run, epoch, meta-update, or step and group."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments.task import PROTOCOLS


def runs_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return a row for each run.

    Columns beside the run's key: "status", "data", "epochs" (how many), "best" and "last" validation metric, "test"
    metric, "bleu", "meta_updates" (how many were not refused for a loss or gradient that is not finite), "phi_moved"
    (relative distance of Φ from its start) and "revision" of the code.
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
    """Add a column ``outcome``: the test metric under ``clean``, else the best validation metric.

    A failed run has neither outcome nor "last" metric, since an accident ended it.
    """
    ended = runs["status"] != "failed"
    outcome = runs["test"].where(runs["protocol"] == "clean", runs["best"])
    return runs.assign(outcome=outcome.where(ended), last=runs["last"].where(ended))


def by_seed(outcome: pd.DataFrame, protocol: str, *arms: str) -> "list[pd.Series[float]]":
    """Return the outcomes of some arms under a protocol, each indexed by seed; NaN for runs without a finite one.

    Raises:
        ValueError: for an unknown protocol.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    part = outcome[outcome["protocol"] == protocol]
    return [part[part["variant"] == arm].set_index("seed")["outcome"].astype(float) for arm in arms]


def epochs_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return a row for each epoch of each run, with the entries of its record."""
    return pd.DataFrame([{**r["run"], **epoch} for r in records for epoch in r["epochs"]])


def movement_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return a row for each meta-update of each run: the distances of Φ, its factors and log σ² from their start."""
    rows = []
    for record in records:
        for k, entry in enumerate(record.get("meta_updates") or [], start=1):
            log_var = max((abs(s) for s in entry["log_var"]), default=0.0)
            rows.append({**record["run"], "update": k, **entry, "log_var_moved": log_var})
    return pd.DataFrame(rows)


def factors_frame(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return a row for each traced step and group of each run with factors: step, group, parameters, alpha, beta."""
    rows = []
    for record in records:
        groups = [{"group": g["name"], "parameters": g["parameters"]} for g in record.get("groups", [])]
        for point in record.get("trace", []):
            for group, alpha, beta in zip(groups, point["alpha"], point["beta"], strict=True):
                rows.append({**record["run"], "step": point["step"], **group, "alpha": alpha, "beta": beta})
    return pd.DataFrame(rows)
