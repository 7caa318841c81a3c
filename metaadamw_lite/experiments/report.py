"""From records to tables: what was measured, with its spread, and what it says about a claim.

Statistics are paired by seed: arms with the same seed share weights, batches and dropout masks, so only their
difference is evidence. They come from scipy, the Holm correction from statsmodels.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.records import read_records
from metaadamw_lite.experiments.studies import SEEDS, best_variant, search_runs
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variants import ABLATIONS, ARMS, LEARNING_RATES, learning_rate

CONFIDENCE = 0.95
ENOUGH_SEEDS = 3
"""Pairs that an interval needs."""
NEVER = "not yet tested"


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
    """A table of the paper: 2, 4 and 5 indexed by task, 1 by parameter, 3 by factor and value (as printed, text)."""
    index = {1: ["parameter"], 3: ["factor", "value"]}.get(number, ["task"])
    dtype = str if number in (1, 3) else None
    return pd.read_csv(repository() / "data" / "paper" / f"table{number}.csv", index_col=index, dtype=dtype)


def recorded(task: str) -> list[dict[str, Any]]:
    """The committed records of a task that were made from real data."""
    return [r for r in read_records(repository() / "data" / "results", task) if r["data"] != "synthetic"]


def best_evidence(runs: pd.DataFrame, protocol: str, arm: str = "metaadamw", baseline: str = "adamw") -> str:
    """The profile to compare two arms by: "paper" where there are enough pairs, or no others, else "lite".

    Args:
        runs: from ``runs_frame``, of one task.
        protocol: "paper" or "clean".
        arm, baseline: variants.
    """

    def pairs(profile: str) -> int:
        return len(
            pairs_by_seed(*by_seed(outcomes(runs[runs["profile"] == profile]), protocol, arm, baseline)).dropna()
        )

    return "paper" if pairs("paper") >= ENOUGH_SEEDS or not pairs("lite") else "lite"


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
                "bleu": record["test"] and record["test"].get("bleu"),
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
    """An improvement over a baseline, paired by seed (positive: better): relative and in percent, unless it says other.

    Attributes:
        mean: over the seeds.
        low, high: bootstrap interval (BCa) for the mean at 95 % confidence; NaN with fewer than three seeds. From so
            few pairs it is too narrow: its true coverage is below 90 %.
        p: of a paired t-test against no difference (of a sign test where all differences are equal); NaN with fewer
            than three seeds, as all tests and intervals.
        seeds: how many pairs.
        p_wilcoxon: of Wilcoxon's signed-rank test; with five pairs it cannot fall below 1/16.
        t_low, t_high: Student's interval, which goes with ``p``.
        log_ratio: of an ``improvement``: the mean logarithm of the ratios, times 100 (positive: better). Near zero it
            is a percentage; a factor of two is 69. With the arms exchanged it only changes its sign, which the mean of
            relative differences does not: with a large spread each arm can look worse than the other.
        p_log: of a t-test on these logarithms.
        lost: pairs that do not count, since a run of theirs has no finite result. With any, nothing is decided: those
            that are left may be left because they went well.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    p_wilcoxon: float = float("nan")
    unit: str = "%"
    t_low: float = float("nan")
    t_high: float = float("nan")
    log_ratio: float = float("nan")
    p_log: float = float("nan")
    lost: int = 0

    def __str__(self) -> str:
        lost = f"; lost without a finite result: {self.lost} of {self.seeds + self.lost}" if self.lost else ""
        if not self.seeds:
            return "no pairs yet" + lost
        return f"{self.mean:+.1f} {self.unit} {self.interval}, {self.seeds} seed{'s' if self.seeds > 1 else ''}{lost}"

    def reversed(self) -> "PairedDifference":
        """The same for the claim that the baseline is the better one: everything with the other sign."""
        t_low, t_high, log_ratio = -self.t_high, -self.t_low, -self.log_ratio
        low, high = -self.high, -self.low
        return replace(self, mean=-self.mean, low=low, high=high, t_low=t_low, t_high=t_high, log_ratio=log_ratio)

    @property
    def interval(self) -> str:
        """The bootstrap interval in the unit, or that there are too few seeds for one."""
        return "[no interval]" if np.isnan(self.low) else f"[{self.low:+.1f}, {self.high:+.1f}]"

    @property
    def t_interval(self) -> str:
        """Student's interval in the unit, or a dash."""
        return "–" if np.isnan(self.low) else f"[{self.t_low:+.1f}, {self.t_high:+.1f}]"


def improvement(arm: "pd.Series[float]", baseline: "pd.Series[float]", lower_is_better: bool) -> PairedDifference:
    """The improvement of an arm over a baseline, both indexed by seed; seeds that one of them lacks do not count.

    Each pair's difference is taken relative to its baseline run, as in the paper's Table 2.
    """
    difference = paired_difference(improvements_by_seed(arm, baseline, lower_is_better), "%")
    pairs = pairs_by_seed(arm, baseline).dropna()
    if not (len(pairs) and (pairs > 0).all(axis=None)):
        return difference
    logarithms = paired_difference((pairs["arm"] / pairs["baseline"]).map(math.log), "")
    log_ratio = (-1 if lower_is_better else 1) * 100 * logarithms.mean
    return replace(difference, log_ratio=log_ratio, p_log=logarithms.p)


def paired_difference(differences: "pd.Series[float]", unit: str) -> PairedDifference:
    """The mean of some differences, one for each seed, with its interval and tests; NaN is a pair that is lost."""
    values = np.sort(differences.dropna().to_numpy()) + 0.0  # which makes 0 of −0; the bootstrap minds the order
    low = high = t_low = t_high = p = p_wilcoxon = float("nan")
    if len(values) >= ENOUGH_SEEDS and np.ptp(values) == 0:  # no test is defined without any spread
        low = high = t_low = t_high = float(values[0])
        p = 2 * 0.5 ** len(values) if low else 1.0
    elif len(values) >= ENOUGH_SEEDS:
        test = stats.ttest_1samp(values, 0)
        p = float(test.pvalue)
        t_low, t_high = (float(x) for x in test.confidence_interval(CONFIDENCE))
        interval = stats.bootstrap(
            (values,), np.mean, confidence_level=CONFIDENCE, rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    if len(values) >= ENOUGH_SEEDS and values.any():
        p_wilcoxon = float(stats.wilcoxon(values).pvalue)
    mean = float(values.mean()) if len(values) else float("nan")
    lost = len(differences) - len(values)
    return PairedDifference(mean, low, high, p, len(values), p_wilcoxon, unit, t_low, t_high, lost=lost)


def pairs_by_seed(arm: "pd.Series[float]", baseline: "pd.Series[float]") -> pd.DataFrame:
    """The seeds that both have, a column for each; NaN where a run has no finite result."""
    return pd.concat([arm.rename("arm"), baseline.rename("baseline")], axis=1, join="inner").astype(float)


def improvements_by_seed(
    arm: "pd.Series[float]", baseline: "pd.Series[float]", lower_is_better: bool
) -> "pd.Series[float]":
    """The improvement of each pair in percent, by seed."""
    pairs = pairs_by_seed(arm, baseline)
    return (-1 if lower_is_better else 1) * 100 * (pairs["arm"] / pairs["baseline"] - 1)


def compare(outcome: pd.DataFrame, protocol: str, arm: str, baseline: str, lower_is_better: bool) -> PairedDifference:
    """The improvement of one arm over another under a protocol, from a frame that ``outcomes`` made."""
    first, second = by_seed(outcome, protocol, arm, baseline)
    return improvement(first, second, lower_is_better)


def by_seed(outcome: pd.DataFrame, protocol: str, *arms: str) -> "list[pd.Series[float]]":
    """The outcomes of some arms under a protocol, each indexed by seed; NaN for runs without a finite one."""
    part = outcome[outcome["protocol"] == protocol]
    return [part[part["variant"] == arm].set_index("seed")["outcome"].astype(float) for arm in arms]


def p_value(p: float) -> str:
    """A p-value for a table; a dash where there was no test."""
    return "–" if np.isnan(p) else f"{p:.3f}"


def verdict(difference: PairedDifference) -> str:
    """What a paired difference says about the claim "it is better".

    A decision takes both an interval without zero and p < 0.05, since with a handful of seeds the bootstrap interval
    alone is too narrow.
    """
    if difference.lost:
        return f"not decided: {difference.lost} of {difference.seeds + difference.lost} pairs lost"
    if np.isnan(difference.low):
        return NEVER
    if difference.p >= 1 - CONFIDENCE or difference.low <= 0 <= difference.high:
        return "not decided: within chance"
    return "holds" if difference.low > 0 else "does not hold: it is worse"


def worse(difference: PairedDifference) -> str:
    """What a paired difference says about the claim "it is worse"."""
    return verdict(difference.reversed()).replace("it is worse", "it is better")


PAIRS = (("metaadamw", "adamw"), ("metaadamw-frozen", "adamw"), ("metaadamw", "metaadamw-frozen"))
"""The comparisons that every chapter makes: an arm and its baseline."""


def comparison_table(outcome: pd.DataFrame, lower_is_better: bool, labels: dict[str, str]) -> pd.DataFrame:
    """The paired comparisons of the three arms under both protocols, one row each with its 95 % interval, as text."""
    rows = []
    for protocol in ("paper", "clean"):
        for arm, baseline in PAIRS:
            d = compare(outcome, protocol, arm, baseline, lower_is_better)
            rows.append(
                {
                    "protocol": protocol,
                    "comparison": f"{labels[arm]} against {labels[baseline]}",
                    "improvement (%)": f"{d.mean:+.1f} {d.interval}" if d.seeds else "–",
                    "t interval": d.t_interval,
                    "p (t)": p_value(d.p),
                    "p (Wilcoxon)": p_value(d.p_wilcoxon),
                    "log ratio": f"{d.log_ratio:+.1f}" if d.seeds else "–",
                    "seeds": d.seeds,
                    "better?": verdict(d).split(":")[0],
                }
            )
    return pd.DataFrame(rows).set_index(["protocol", "comparison"])


def holm(p_values: "pd.Series[float]") -> "pd.Series[float]":
    """The p-values of a family of tests after Holm's correction; NaN stay NaN and do not count."""
    known = p_values.dropna()
    corrected = multipletests(known, method="holm")[1] if len(known) else []
    return pd.Series(corrected, index=known.index, dtype=float).reindex(p_values.index)


def interquartile_mean(values: "np.ndarray[Any, Any]") -> float:
    """The mean of the middle half of some values (Agarwal et al., 2021)."""
    return float(stats.trim_mean(values, 0.25))


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def over_tasks(improvements: "dict[str, pd.Series[float]]") -> dict[str, Estimate]:
    """What many tasks say together, from the improvements (percent, by seed) of each.

    Intervals come from a bootstrap that is stratified by task: it draws seeds anew within each (Agarwal et al., 2021).

    Returns:
        "interquartile mean" of all improvements, in percent, and "probability of improvement": that a pair drawn at
        random from a task drawn at random is better than its baseline, ties counting half.
    """
    rng = np.random.default_rng(0)
    groups = [x.to_numpy() for x in improvements.values() if len(x)]
    draws = [[rng.choice(group, len(group)) for group in groups] for _ in range(2000)]
    statistics: dict[str, Callable[[list[Any]], float]] = {
        "interquartile mean": lambda parts: interquartile_mean(np.concatenate(parts)),
        "probability of improvement": lambda parts: float(np.mean([np.mean((x > 0) + (x == 0) / 2) for x in parts])),
    }
    result = {}
    for name, statistic in statistics.items():
        low, high = np.quantile([statistic(draw) for draw in draws], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        result[name] = Estimate(statistic(groups), float(low), float(high))
    return result


def table_of_tasks(arm: str = "metaadamw", baseline: str = "adamw", protocol: str = "paper") -> pd.DataFrame:
    """Table 2 again: for every task the arms' means, the paired improvement, its tests, and the profile it rests on.

    Returns:
        Indexed by task: profile, seeds, the two means and standard deviations, improvement (a ``PairedDifference``),
        p, p_wilcoxon, p after Holm over the tasks, and the improvements by seed.

    Raises:
        FileNotFoundError: without a record of any task.
    """
    rows = {}
    for name, task in TASKS.items():
        runs = runs_frame(recorded(name))
        if runs.empty:
            continue
        profile = best_evidence(runs, protocol, arm, baseline)
        outcome = outcomes(runs[runs["profile"] == profile])
        first, second = by_seed(outcome, protocol, arm, baseline)
        pairs = pairs_by_seed(first, second).dropna()  # AdamW has runs with the seeds of its search, too
        d = improvement(first, second, task.lower_is_better)
        rows[name] = {
            "profile": profile,
            "seeds": d.seeds,
            "baseline_mean": pairs["baseline"].mean(),
            "baseline_std": pairs["baseline"].std(),
            "arm_mean": pairs["arm"].mean(),
            "arm_std": pairs["arm"].std(),
            "difference": d,
            "p": d.p,
            "p_wilcoxon": d.p_wilcoxon,
            "improvements": improvements_by_seed(first, second, task.lower_is_better).dropna(),
        }
    if not rows:
        raise FileNotFoundError("no run is recorded; make them by `sweep main/lite`")
    table = pd.DataFrame.from_dict(rows, orient="index")
    table["p_holm"] = holm(table["p"])
    return table


def improvements_frame(table: pd.DataFrame) -> pd.DataFrame:
    """Every pair of a ``table_of_tasks``, for a figure: task (title and profile), improvement and paper (percent)."""
    paper: Any = paper_table(2)["improvement_percent"]
    return pd.concat(
        pd.DataFrame(
            {
                "task": f"{TASKS[str(task)].title} ({row['profile']})",
                "improvement": row["improvements"],
                "paper": paper[task],
            }
        )
        for task, row in table.iterrows()
    )


def time_to_best(epochs: pd.DataFrame, lower_is_better: bool) -> pd.DataFrame:
    """When MetaAdamW gets to where AdamW is at its best: one row for each pair.

    Args:
        epochs: from ``epochs_frame``, of one task, and under each protocol of one profile.
        lower_is_better: direction of the metric.

    Returns:
        Indexed by protocol and seed: AdamW's best metric, the epoch it was reached in, MetaAdamW's first epoch that is
        as good (NaN if none is), and its last one.
    """
    sign = 1 if lower_is_better else -1
    rows = []
    for (protocol, seed), part in epochs.groupby(["protocol", "seed"]):
        adamw, other = (part[part["variant"] == v].dropna(subset="metric") for v in ARMS[:2])
        if adamw.empty or other.empty:
            continue
        target = adamw.iloc[(sign * adamw["metric"]).argmin()]
        reached = other[sign * other["metric"] <= sign * target["metric"]]["epoch"]
        first = reached.min() if len(reached) else np.nan
        rows.append((protocol, seed, target["metric"], target["epoch"], first, other["epoch"].max()))
    columns = ["protocol", "seed", "AdamW's best", "AdamW, epoch", "MetaAdamW, epoch", "MetaAdamW, last epoch"]
    return pd.DataFrame(rows, columns=columns).set_index(["protocol", "seed"])


def searched(task: str, protocol: str, profile: str) -> tuple[pd.DataFrame, str | None]:
    """The search for AdamW's learning rate: its runs (lr, seed, best metric), and the best variant, if it is done."""
    search = search_runs(task, protocol, profile)
    runs = runs_frame(recorded(task))
    mine = runs[(runs["protocol"] == protocol) & (runs["profile"] == profile)]
    mine = mine[mine["seed"].isin({key.seed for key in search})]
    frame = mine.assign(lr=mine["variant"].map(learning_rate))[["lr", "seed", "best"]]
    return frame, best_variant(search, repository() / "data" / "results")


def tuned_table() -> pd.DataFrame:
    """MetaAdamW as published against AdamW with a searched learning rate: a row for each search that is done.

    Returns:
        Indexed by task, protocol and profile: learning_rate (the best), edge (it is the largest or smallest one tried),
        tuned (AdamW at that rate against AdamW at the paper's, None where they are the same), difference (MetaAdamW
        against the former), both a ``PairedDifference``, and p_holm, corrected over the rows.

    Raises:
        ValueError: if no search is complete.
    """
    rows = {}
    for name, task in TASKS.items():
        runs = runs_frame(recorded(name))
        for protocol in reversed(PROTOCOLS):
            for profile in ("paper", "lite"):
                _, best = searched(name, protocol, profile)
                if best is None:
                    continue
                fresh = runs["seed"].isin(SEEDS)  # not those that the rate was chosen with
                outcome = outcomes(runs[fresh & (runs["profile"] == profile)])
                rate = learning_rate(best)
                rows[name, protocol, profile] = {
                    "learning_rate": rate,
                    "edge": rate in (min(LEARNING_RATES), max(LEARNING_RATES)),
                    "tuned": None
                    if best == "adamw"
                    else compare(outcome, protocol, best, "adamw", task.lower_is_better),
                    "difference": compare(outcome, protocol, "metaadamw", best, task.lower_is_better),
                }
    if not rows:
        raise ValueError("no search is complete yet: `sweep baseline/lite` makes it")
    index = pd.MultiIndex.from_tuples(rows, names=["task", "protocol", "profile"])
    table = pd.DataFrame(list(rows.values()), index=index)
    return table.assign(p_holm=holm(table["difference"].map(lambda d: d.p)))


def tuned_statement(table: pd.DataFrame) -> str:
    """What a ``tuned_table`` says, in a few sentences (Markdown)."""

    def where(rows: pd.DataFrame) -> str:
        named = [f"{TASKS[str(task)].title} (`{rule}`, {profile} runs)" for task, rule, profile in rows.index]
        return ", ".join(named) or "none"

    verdicts = table["difference"].map(verdict)
    decided = (verdicts == "holds") | verdicts.str.startswith("does not")
    tested = table["p_holm"].notna()
    left = (decided & (table["p_holm"] < 1 - CONFIDENCE)).sum()
    searches = table["tuned"].map(lambda d: verdict(d) if d else "the same rate")
    lines = [
        f"* MetaAdamW is **better** than tuned AdamW: {where(table[verdicts == 'holds'])}.",
        f"* It is **worse**: {where(table[verdicts.str.startswith('does not')])}.",
        f"* That is {decided.sum()} of {tested.sum()} comparisons; after Holm's correction for their number {left} of "
        "them are left. The others are **not decided**.",
        f"* The search gained AdamW something: {where(table[searches == 'holds'])}; it cost something: "
        f"{where(table[searches.str.startswith('does not')])}.",
    ]
    if not tested.all():
        lines.append(f"* Not tested yet: {where(table[~tested])}.")
    return "\n".join(lines)


def ablation_table(task: str, profile: str) -> pd.DataFrame:
    """A task's part of Table 3 again: for each row the paper's number and ours, under the paper's protocol.

    Returns:
        Indexed by factor and value, with the columns "paper" (text, as printed, or missing), "baseline" (the row is
        the task's own setting in Table 4), "variant" (missing where the row is the baseline), "mean" of ours over the
        seeds that MetaAdamW has, too, "difference": the paired change against MetaAdamW (a ``PairedDifference``;
        negative is worse), and "p_holm", its p after Holm's correction over the task's variants.
    """
    printed = paper_table(3)
    settings, lower_is_better = TASKS[task].settings("paper"), TASKS[task].lower_is_better
    runs = runs_frame(recorded(task))
    outcome = outcomes(runs[runs["profile"] == profile])
    rows = []
    for variant in printed["variant"]:
        baseline = (
            pd.isna(variant)
            or variant == "metaadamw"
            or (variant in ABLATIONS and ABLATIONS[variant].change(settings) == settings)
        )
        name = "metaadamw" if baseline else str(variant)
        arm, metaadamw = by_seed(outcome, "paper", name, "metaadamw")
        difference = improvement(arm, metaadamw, lower_is_better)
        mean = arm[arm.index.intersection(metaadamw.index)].mean()
        rows.append((baseline, None if baseline else variant, mean, difference))
    table = pd.DataFrame(rows, index=printed.index, columns=["baseline", "variant", "mean", "difference"])
    tested = table["difference"].map(lambda d: d.p).where(~table["baseline"])  # NaN with too few seeds
    return table.assign(paper=printed[task], p_holm=holm(tested))


def movement_table(task: str, profile: str) -> pd.DataFrame:
    """How far meta-learning moved the factors in MetaAdamW and in each variant of Table 3, under the paper's protocol.

    Returns:
        A row for each run: "change" (the row of Table 3, or "MetaAdamW"), "variant", "seed", "meta_updates" (how many),
        "alpha_moved" (largest distance of a group's α from what Φ gave at its start, over groups and meta-updates), and
        "same_phi": whether the variant begins with the Φ of MetaAdamW and of the untrained control, so that it can be
        compared with the latter.
    """
    records = [r for r in recorded(task) if (r["run"]["profile"], r["run"]["protocol"]) == (profile, "paper")]
    moved = movement_frame(r for r in records if r["run"]["variant"] in ("metaadamw", *ABLATIONS))
    if moved.empty:
        return pd.DataFrame(columns=["change", "variant", "seed", "meta_updates", "alpha_moved", "same_phi"])
    names = {name: f"{row.factor}: {row.value}" for name, row in ABLATIONS.items()}
    same = {"metaadamw"} | {name for name, row in ABLATIONS.items() if row.factor in KEEP_PHI}
    runs = moved.groupby(["variant", "seed"]).agg(meta_updates=("update", "max"), alpha_moved=("alpha_moved", "max"))
    runs = runs.reset_index()
    change = runs["variant"].map({"metaadamw": "MetaAdamW"} | names)
    return runs.assign(change=change, same_phi=runs["variant"].isin(same))


KEEP_PHI = ("Meta-learning objective", "HUW priorities", "Meta-update frequency")
"""The blocks of Table 3 that change how Φ is trained and not what it is."""


def more_meta_learning(task: str, profile: str) -> pd.DataFrame:
    """What training Φ in another way, or more often, gains over the same Φ left untrained.

    Returns:
        Indexed by change, from the least moved to the most: "meta_updates" in a run (median), "alpha_moved" (median
        over seeds), "largest" (over seeds), "difference": the improvement over the untrained control, paired by seed (a
        ``PairedDifference``), and "p_holm", its p after Holm's correction over the rows.
    """
    runs = movement_table(task, profile)
    columns = ["meta_updates", "alpha_moved", "largest", "difference", "p_holm"]
    if runs.empty:
        return pd.DataFrame(columns=columns)
    outcome = outcomes(runs_frame(r for r in recorded(task) if r["run"]["profile"] == profile))
    rows = {}
    for (change, variant), group in runs[runs["same_phi"]].groupby(["change", "variant"]):
        difference = compare(outcome, "paper", str(variant), "metaadamw-frozen", TASKS[task].lower_is_better)
        moved = group["alpha_moved"]
        rows[change] = group["meta_updates"].median(), moved.median(), moved.max(), difference
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns[:-1]).sort_values("largest")
    return table.assign(p_holm=holm(table["difference"].map(lambda d: d.p)))


def more_meta_learning_statement(table: pd.DataFrame) -> str:
    """What a ``more_meta_learning`` says, in two sentences (Markdown)."""
    last, d = table.iloc[-1], table["difference"].iloc[-1]
    return (
        f"The row that moved α furthest (**{table.index[-1]}**: {last['meta_updates']:.0f} meta-updates a run, "
        f"α by up to {last['largest']:.2f}) is {d} beside the same Φ untrained: {verdict(d)}. After Holm's correction "
        f"{(table['p_holm'] < 1 - CONFIDENCE).sum()} of the {len(table)} rows differ."
    )


def claims_table() -> pd.DataFrame:
    """One row for each claim in ``data/paper/claims.csv``: the paper's number, ours, the verdict and the evidence.

    How the kinds of claims are judged, under the paper's protocol:

    * improvement: MetaAdamW against AdamW, paired by seed; ``all``: such a claim must hold on all tasks.
    * ablation: the variant's change against MetaAdamW; the claim is that the variant is worse.
    * necessary: the same for every variant of a task that takes something away, after Holm's correction.
    * epochs, longer: fewer, or more, epochs than AdamW until early stopping, paired by seed.
    * earlier: how many epochs earlier than AdamW MetaAdamW is as good as AdamW's best, paired by seed; where it never
      is, one after the last epoch that the task allows.
    * trained: MetaAdamW against itself with an untrained Φ, on all tasks.
    * memory, time, update, updates, statistics, module: the bench's record against the range that the paper gives.
    """
    claims = pd.read_csv(repository() / "data" / "paper" / "claims.csv", dtype=str)
    main = table_of_tasks()
    control = table_of_tasks(baseline="metaadamw-frozen")
    judged = [_judged(claim, main, control) for _, claim in claims.iterrows()]
    ours, says = ([j[k] for j in judged] for k in (0, 1))
    links = claims["evidence"].map(chapter_link)
    return claims[["section", "claim"]].assign(paper=claims["number"], ours=ours, verdict=says, evidence=links)


def chapter_link(page: Any) -> str:
    """A link to the notebook with the evidence for a claim (Markdown); a dash where there is none."""
    return "–" if pd.isna(page) else f"[chapter {int(page.split('_')[0])}]({page}.ipynb)"


def _judged(claim: "pd.Series[Any]", main: pd.DataFrame, control: pd.DataFrame) -> tuple[str, str]:
    kind, task = claim["kind"], claim["task"]
    if kind in ("memory", "time", "update", "updates", "statistics", "module"):
        return _judged_cost(claim)
    if kind in ("all", "trained"):
        table = main if kind == "all" else control
        verdicts = [noted(verdict(d), p) for d, p in zip(table["difference"], table["profile"], strict=True)]
        count = {v: verdicts.count(v) for v in sorted(set(verdicts))}
        says = "; ".join(f"{v} on {n}" for v, n in count.items())
        ours = "<br>".join(f"{TASKS[str(t)].title}: {d}" for t, d in table["difference"].items())
        return ours, f"of {len(TASKS)} tasks: {says}"
    if task not in main.index:
        return "–", NEVER
    if kind == "improvement":
        row = main.loc[task]
        return noted(str(row["difference"]), row["profile"]), noted(verdict(row["difference"]), row["profile"])
    runs = runs_frame(recorded(task))
    if kind == "ablation":
        for profile in ("paper", "lite"):
            variant, metaadamw = by_seed(
                outcomes(runs[runs["profile"] == profile]), "paper", claim["variant"], "metaadamw"
            )
            d = improvement(variant, metaadamw, TASKS[task].lower_is_better)
            if d.seeds >= ENOUGH_SEEDS:
                return noted(str(d), profile), noted(worse(d), profile)
        return "–", NEVER
    if kind == "necessary":
        return _judged_parts(task)
    check_choice("kind (of a claim)", kind, ("epochs", "longer", "earlier"))
    profile = best_evidence(runs, "paper")
    if profile == "lite":  # when a shortened run stops says nothing about a whole one
        return "–", NEVER
    mine = runs[runs["profile"] == profile]
    if kind == "earlier":
        reached = time_to_best(epochs_frame(main_records(task, "paper", profile)), TASKS[task].lower_is_better)
        never = TASKS[task].settings(profile).epochs + 1
        d = paired_difference(reached["AdamW, epoch"] - reached["MetaAdamW, epoch"].fillna(never), "epochs")
        return f"{d}; positive is earlier; never counts as epoch {never}", verdict(d).replace(
            "it is worse", "it is later or never"
        )
    whole = mine["status"].isin(["finished", "stopped early"])  # a run that diverges is not one that took less time
    arm, baseline = by_seed(mine.assign(outcome=mine["epochs"].where(whole)), "paper", "metaadamw", "adamw")
    d = improvement(arm, baseline, lower_is_better=False)
    says = verdict(d.reversed()) if kind == "epochs" else verdict(d)
    limit = TASKS[task].settings(profile).epochs
    pairs = pairs_by_seed(arm, baseline)
    cut = f"{int((pairs == limit).to_numpy().sum())} of {pairs.size} runs went on to the last epoch allowed, {limit}"
    return f"epochs: {d}; {cut}", says.replace("it is worse", "it is the other way round")


def main_records(task: str, protocol: str, profile: str) -> list[dict[str, Any]]:
    """The records of the main study under a protocol: of a task's three arms, with its seeds."""
    return [
        r
        for r in recorded(task)
        if (r["run"]["protocol"], r["run"]["profile"]) == (protocol, profile)
        and r["run"]["variant"] in ARMS
        and r["run"]["seed"] in SEEDS
    ]


REMOVALS = (
    "grouping-original",
    "features-basic",
    "objective-gradient",
    "objective-loss_decrease",
    "objective-gen_gap",
    "huw-none",
    "huw-equal",
    "gating-off",
)
"""The rows of Table 3 that take something away, where they are not a task's own setting."""


def _judged_parts(task: str) -> tuple[str, str]:
    """Every row of a task's Table 3 that is run and takes something away: is it worse, after Holm's correction?"""
    found = {}
    for profile in ("paper", "lite"):
        table = ablation_table(task, profile)
        differences = table[table["variant"].isin(REMOVALS)]["difference"]
        found[profile] = differences[differences.map(lambda d: d.seeds >= ENOUGH_SEEDS)]
    profile = max(found, key=lambda p: len(found[p]))  # "paper" once it has as many rows
    differences = found[profile]
    if differences.empty:
        return "–", NEVER
    corrected = holm(differences.map(lambda d: d.p))
    verdicts = pd.Series([worse(replace(d, p=p)) for d, p in zip(differences, corrected, strict=True)])
    counts = "; ".join(f"{v} for {n}" for v, n in verdicts.value_counts().items())
    return f"taken away one at a time: {len(differences)}", noted(f"after Holm's correction: {counts}", profile)


def bench_record(device: str = "cpu") -> dict[str, Any] | None:
    """What ``metaadamw_lite.bench`` measured on a "cpu" or a "gpu"; None where that is not recorded."""
    path = repository() / "data" / "bench" / f"{device}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _judged_cost(claim: "pd.Series[Any]") -> tuple[str, str]:
    """The range that the paper gives (columns "low" and "high") against what the bench measured on a CPU."""
    record = bench_record()
    if record is None:
        return "–", NEVER
    rows = pd.DataFrame(record["rows"])
    parts = pd.DataFrame(record["parts"]).pivot(index="measure", columns="part", values="seconds")
    found: dict[str, Any] = {}
    kind, unit, number = claim["kind"], "×", "{:.2f}"
    if kind == "memory":
        peaks = rows[rows["measure"].str.startswith("peak memory")]
        found = {
            f"{row['who']}, {row['measure'].split(', ')[2]}": pd.Series([row["ratio"]])
            for row in peaks.to_dict("records")
        }
    elif kind == "update":
        updates = rows[rows["measure"] == "meta-update / training step, ETTh1 model"]
        found = {row["who"]: pd.Series([row["ratio"]]) for row in updates.to_dict("records")}
    elif kind == "updates":
        unit, number = "%", "{:+.1f}"
        updates = rows[rows["measure"].str.startswith("meta-update / training step")]
        found = {f"{who}, every 100 steps": ratios for who, ratios in updates.groupby("who")["ratio"]}
    elif kind in ("statistics", "module"):
        part = "Φ" if kind == "module" else "statistics"
        found = {"ours, of an AdamW step": parts[part] / parts["AdamW"]}
    else:
        unit, number = "%", "{:+.0f}"
        epochs = rows[rows["measure"].str.startswith("whole epoch")]["ratio"]
        found = {"ours, epochs": 100 * (epochs - 1), "the paper's Table 5, totals": paper_table(5)["overhead_percent"]}
    low, high = float(claim["low"]), float(claim["high"])
    ours, says = [], []
    for what, values in found.items():
        span = " to ".join(number.format(value) for value in sorted({values.min(), values.max()}))
        ours.append(f"{what}: {span} {unit}")
        where = np.select([values < low, values > high], ["below the range", "above the range"], "holds")
        counts = pd.Series(where).value_counts()
        of = f" for {{}} of {len(values)}" if len(values) > 1 else ""
        says.append(f"{what}: " + ", ".join(f"{v}{of.format(n)}" for v, n in counts.items()))
    return "<br>".join(ours), "<br>".join(says)


def noted(text: str, profile: str) -> str:
    """A statement, with a note where it rests on shortened runs."""
    return text if profile == "paper" or text.startswith(NEVER) else f"{text} (lite runs)"
