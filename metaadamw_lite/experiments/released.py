"""The logs in the released code's comments: single runs of MetaAdamW, each with all of its settings.

They hold more runs than the paper's Table 3, among them the run behind each of its numbers, and pairs of runs that
differ in one setting only. ``data/paper/released_log.csv`` has them as facts; none of that code is here.
"""

from itertools import combinations
from typing import Any

import pandas as pd

from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.records import paper_table, repository

SETTINGS = {
    "max_epochs": "limit of epochs",
    "meta_every": "meta-update every (steps)",
    "warmup_epochs": "first epoch with meta-updates",
    "group_strategy": "groups",
    "features": "features (columns)",
    "include_time_step": "time column",
    "use_v_norms": "norm of v",
    "use_feature_gating": "gates",
    "attn_layers": "layers of Φ",
    "attn_hidden_dim": "hidden size of Φ",
    "attn_heads": "heads of Φ",
    "encoder_dropout": "dropout in Φ",
    "total_steps": "length of the run",
    "lambdas": "λ₁, λ₂",
    "objective": "objective",
}
"""Columns of ``released_log`` and their names in tables. The time column of Φ's features depends on the limit of
epochs, and the loss weights belong to the objective."""


def released_log(task: str) -> pd.DataFrame:
    """Return the different logged runs of a task, as text, in the log's order.

    Returns:
        A row for each run: "value" (best validation metric, as printed), "best_epoch", and the columns of ``SETTINGS``.
    """
    path = repository() / "data" / "paper" / "released_log.csv"
    log = pd.read_csv(path, dtype=str, keep_default_na=False).query("task == @task")
    weights = log["fixed_weights"].radd("plain sum ").where(log["huw"] == "No", log["huw_priorities"].radd("HUW "))
    combined = log["meta_objective"] == "combined"
    log = log.assign(
        objective=log["meta_objective"].where(~combined, "combined, " + weights),
        features=log["feature_version"] + " (" + log["feature_dim"] + ")",
        lambdas=log["lambdas"].replace("auto", "by Φ"),
    )
    return log[["value", "best_epoch", *SETTINGS]].drop_duplicates(ignore_index=True)


def different_settings(first: "pd.Series[Any]", second: "pd.Series[Any]") -> list[str]:
    """List the ``SETTINGS`` in which two runs of a ``released_log`` differ.

    If both have a head for each column, as everywhere in Table 4, the number of heads is no setting of its own.
    """
    names = [name for name in SETTINGS if first[name] != second[name]]
    head_for_each_column = all(run["features"].endswith(f"({run['attn_heads']})") for run in (first, second))
    return [name for name in names if name != "attn_heads" or not head_for_each_column]


def one_setting_apart() -> pd.DataFrame:
    """Return all pairs of logged runs of a task that differ in one setting.

    Returns:
        A row for each pair, in the log's order: "task", "setting" (as in tables), "first", "second" (its two values),
        "value_first", "value_second" (the runs' metrics, as printed), "change": from the first to the second, in
        percent of the first (negative is worse), and "of_gain": its size over the task's gain in Table 2.
    """
    gains: Any = paper_table(2)["improvement_percent"]
    rows = []
    for task in TASKS.values():
        sign = -1 if task.lower_is_better else 1
        for (_, first), (_, second) in combinations(released_log(task.name).iterrows(), 2):
            different = different_settings(first, second)
            if len(different) == 1:
                (name,) = different
                change = sign * 100 * (float(second["value"]) / float(first["value"]) - 1)
                values = first[name], second[name], first["value"], second["value"]
                rows.append((task.title, SETTINGS[name], *values, change, abs(change) / gains[task.name]))
    columns = ["task", "setting", "first", "second", "value_first", "value_second", "change", "of_gain"]
    return pd.DataFrame(rows, columns=columns)


def behind_table3() -> pd.DataFrame:
    """Find the logged run behind each number of Table 3, and its differences from the task's published best run.

    The result identifies a run. Of runs with the same result, the one with fewer differences counts.

    Returns:
        A row for each number of an ablation: "task", "row" (factor and value), "number" (as printed), "settings" (the
        number of differences; missing without a logged run of that result) and "which" (their names and values).
    """
    printed: Any = paper_table(3)
    rows = []
    for name, task in TASKS.items():
        if name not in printed:  # a task that the paper lacks
            continue
        log = released_log(name)
        values = log["value"].astype(float)
        cells = printed[name].drop(index="MetaAdamW", level="factor").dropna()
        best = log[values == float(printed.loc[("MetaAdamW", "MetaAdamW (baseline)"), name])].iloc[0]
        for (factor, value), number in cells[cells != "baseline"].items():
            row = {"task": task.title, "row": f"{factor}: {value}", "number": number}
            runs = [run for _, run in log[values == float(number)].iterrows()]
            if runs:
                run = min(runs, key=lambda r: len(different_settings(best, r)))
                different = different_settings(best, run)
                which = "; ".join(f"{SETTINGS[setting]}: {run[setting]}" for setting in different)
                row |= {"settings": len(different), "which": which}
            rows.append(row)
    return pd.DataFrame(rows, columns=["task", "row", "number", "settings", "which"])


def changes_to(pairs: pd.DataFrame, setting: str, value: str) -> "pd.Series[float]":
    """Return the changes to a value of a setting, in percent, whichever run of a pair has it; negative is worse.

    Args:
        pairs: from ``one_setting_apart``.
        setting: a name in its column "setting".
        value: of that setting.
    """
    chosen = pairs[pairs["setting"] == setting]
    chosen = chosen[(chosen["first"] == value) | (chosen["second"] == value)]
    return chosen["change"].where(chosen["second"] == value, -chosen["change"]).astype(float)
