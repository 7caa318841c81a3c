"""Made records, and the tables that tests make from them."""

import pandas as pd

from metaadamw_lite.experiments.claims import claims_table
from metaadamw_lite.experiments.records import Records
from metaadamw_lite.experiments.variants import ARMS

COMMITTED = Records()


def made(variant, seed, metrics, task="etth1", profile="paper", protocol="paper"):
    """A record with a metric for each epoch, lower is better."""
    best = min(range(len(metrics)), key=metrics.__getitem__)
    return {
        "run": {"task": task, "variant": variant, "protocol": protocol, "profile": profile, "seed": seed},
        "status": "stopped early",
        "data": "made",
        "environment": {"revision": "made"},
        "epochs": [{"epoch": k, "metric": m} for k, m in enumerate(metrics, start=1)],
        "best": {"epoch": best + 1, "metric": metrics[best]},
        "test": None,
    }


def runs_of(profile, seeds, arms=ARMS):
    """Records of ETTh1 in which MetaAdamW's error is a tenth smaller and the control's as large as AdamW's."""
    errors = {"adamw": 2.0, "metaadamw": 1.8, "metaadamw-frozen": 2.0}
    return [
        made(arm, seed, [3.0, errors[arm] + seed / 1000], profile=profile, protocol=protocol)
        for arm in arms
        for seed in range(seeds)
        for protocol in ("paper", "clean")
    ]


def made_ablations():
    """AdamW, MetaAdamW and one row of Table 3 on ETTh1, three seeds each."""
    arms = {"adamw": 1.1, "metaadamw": 1.0, "gating-off": 0.8}
    return [made(arm, k, [x + k * k / 100], profile="lite") for arm, x in arms.items() for k in range(3)]


def claims_made(records):
    """The table of claims, with verdicts as they are shown."""
    table = claims_table(records).set_index("claim")
    return table.assign(verdict=table["verdict"].map(str))


def series(values, start=0):
    return pd.Series(values, index=range(start, start + len(values)))
