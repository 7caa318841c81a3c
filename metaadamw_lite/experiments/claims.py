"""The claims of the three papers, each with its number, ours, and the verdict that the records give by a rule."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments import TASKS, lilaw_report, lope_report, paired, relatives, report
from metaadamw_lite.experiments.paired import (
    ENOUGH_SEEDS,
    NEVER,
    corrected,
    improvement,
    paired_difference,
    pairs_by_seed,
    verdict,
    worse,
)
from metaadamw_lite.experiments.relatives import Records
from metaadamw_lite.experiments.studies import study_runs
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variants import ABLATIONS


def claims_table() -> pd.DataFrame:
    """One row for each claim on MetaAdamW in ``data/paper/claims.csv``, with our number, the verdict and the evidence.

    How the kinds of claims are judged, under the paper's protocol:

    * improvement: MetaAdamW against AdamW, paired by seed; ``all``: such a claim must hold on all tasks.
    * ablation: the variant's change against MetaAdamW; the claim is that the variant is worse.
    * no gain: that the variant is not better by as much as ``high`` percent, by Student's interval.
    * necessary: the same for every variant of a task that takes something away, after Holm's correction.
    * epochs, longer: fewer, or more, epochs than AdamW until early stopping, paired by seed.
    * earlier: how many epochs earlier than AdamW MetaAdamW is as good as AdamW's best, paired by seed; where it never
      is, one after the last epoch that the task allows.
    * trained: MetaAdamW against itself with an untrained Φ, on all tasks, under both protocols.
    * memory, time, update, updates, frequent, statistics, module: the bench's record against the range that the paper
      gives.
    """
    claims = pd.read_csv(report.repository() / "data" / "paper" / "claims.csv", dtype=str)
    main = report.table_of_tasks()
    control = {p: report.table_of_tasks(baseline="metaadamw-frozen", protocol=p) for p in PROTOCOLS}
    judged = [_judged(claim, main, control) for _, claim in claims.iterrows()]
    ours, says = ([j[k] for j in judged] for k in (0, 1))
    links = claims["evidence"].map(chapter_link)
    return claims[["section", "claim"]].assign(paper=claims["number"], ours=ours, verdict=says, evidence=links)


def chapter_link(page: Any) -> str:
    """A link to the notebook with the evidence for a claim (Markdown); a dash where there is none."""
    return "–" if pd.isna(page) else f"[chapter {int(page.split('_')[0])}]({page}.ipynb)"


COSTS = ("memory", "time", "update", "updates", "frequent", "statistics", "module")
"""Kinds of claims that the bench's record decides."""

KINDS = (
    *("improvement", "all", "trained", "ablation", "no gain", "necessary", "epochs", "longer", "earlier"),
    *COSTS,
)
"""Of claims; ``claims_table`` says what each is."""


def _judged(claim: "pd.Series[Any]", main: pd.DataFrame, control: dict[str, pd.DataFrame]) -> tuple[str, str]:
    """What we have on a claim, and the verdict."""
    kind, task = claim["kind"], claim["task"]
    check_choice("kind (of a claim)", kind, KINDS)
    if kind in COSTS:
        return _judged_cost(claim)
    if kind in ("all", "trained"):
        return _judged_over_tasks({"paper": main} if kind == "all" else control)
    if task not in main.index:
        return "–", NEVER
    if kind == "improvement":
        d, profile = main.loc[task, ["difference", "profile"]]
        ours = report.noted(str(d), profile)
        if profile == "paper" and d.seeds >= ENOUGH_SEEDS:
            gain = float(report.paper_table(2).loc[task, "improvement_percent"])
            ours += f"; one more pair, as the paper's with {gain:+.2f} %: {d.one_more}"
        return ours, report.noted(verdict(d), profile, d.pairs)
    if kind in ("ablation", "no gain"):
        return _judged_ablation(task, claim["variant"], None if kind == "ablation" else float(claim["high"]))
    if kind == "necessary":
        return _judged_parts(task)
    runs = report.main_runs(task)
    if report.best_evidence(runs, "paper") == "lite":  # when a shortened run stops says nothing about a whole one
        return "–", NEVER
    return _judged_optimum(task) if kind == "earlier" else _judged_length(task, kind, runs)


def _judged_over_tasks(tables: dict[str, pd.DataFrame]) -> tuple[str, str]:
    """A claim about all tasks, under some protocols: how often which verdict."""
    ours, says = [], []
    for protocol, table in tables.items():
        where = f", `{protocol}`" if len(tables) > 1 else ""
        rows = list(zip(table.index, table["difference"], table["profile"], strict=True))
        verdicts = [report.noted(verdict(d), profile, d.pairs) for _, d, profile in rows]
        count = {v: verdicts.count(v) for v in sorted(set(verdicts))}
        ours += [f"{TASKS[str(t)].title}{where}: {report.noted(str(d), profile)}" for t, d, profile in rows]
        says.append(f"of {len(TASKS)} tasks{where}: " + "; ".join(f"{v} on {n}" for v, n in count.items()))
    return "<br>".join(ours), "<br>".join(says)


def _judged_ablation(task: str, variant: str, gain: float | None) -> tuple[str, str]:
    """Is the variant worse than MetaAdamW, or not better by some gain? Whole runs count, where there are enough."""
    runs = report.outcomes(report.runs_frame(report.recorded(task)))
    for profile in ("paper", "lite"):
        outcome = runs[runs["profile"] == profile]
        d = report.compare(outcome, "paper", variant, "metaadamw", TASKS[task].lower_is_better)
        if d.pairs < ENOUGH_SEEDS:
            continue
        if gain is None:
            says = worse(d)
            if not says.startswith("not ") and profile == "lite" and abs(d.mean) <= _rounding(task):
                says += ", by no more than rounding makes"
        elif d.lost:
            says = verdict(d)
        else:
            inside = f"not decided: a gain of {gain:g} % is inside Student's interval"
            says = "holds" if d.t_high < gain else "does not hold: it helps" if d.t_low > gain else inside
        guessing = "; these accuracies are hardly above guessing" if report.near_chance(task, outcome) else ""
        return report.noted(str(d), profile) + guessing, report.noted(says, profile, d.pairs)
    return "–", NEVER


def _rounding(task: str) -> float:
    """By how many percent the last bits changed a shortened run of the task at most; NaN where that is not known."""
    runs = report.repeated_runs(task)
    return float(100 * (runs["again"] / runs["first"] - 1).abs().max())


def _judged_optimum(task: str) -> tuple[str, str]:
    """Is MetaAdamW as good as AdamW's best in an earlier epoch?"""
    records = report.main_records(task, "paper", "paper")
    reached = report.time_to_best(records, TASKS[task].lower_is_better)
    never = TASKS[task].settings("paper").epochs + 1
    d = paired_difference(reached["AdamW, epoch"] - reached["MetaAdamW, epoch"].fillna(never), "epochs")
    seeds = [{r["run"]["seed"] for r in records if r["run"]["variant"] == arm} for arm in ("metaadamw", "adamw")]
    d = replace(d, lost=len(set.intersection(*seeds)) - len(reached))  # those without a finite epoch
    says = report.noted(verdict(d).replace("it is worse", "it is later or never"), "paper", d.pairs)
    often = (reached["MetaAdamW, epoch"] < reached["AdamW, epoch"]).sum()
    return f"{d}; positive is earlier ({often} of {len(reached)} pairs); never counts as epoch {never}", says


def _judged_length(task: str, kind: str, runs: pd.DataFrame) -> tuple[str, str]:
    """Does MetaAdamW take fewer epochs until it stops ("epochs"), or more ("longer")?"""
    runs = runs[runs["profile"] == "paper"]
    whole = runs["status"].isin(["finished", "stopped early"])  # a run that diverges is not one that took less time
    arm, baseline = report.by_seed(runs.assign(outcome=runs["epochs"].where(whole)), "paper", "metaadamw", "adamw")
    d = improvement(arm, baseline, lower_is_better=False)
    says = verdict(d.reversed()) if kind == "epochs" else verdict(d)
    limit = TASKS[task].settings("paper").epochs
    pairs = pairs_by_seed(arm, baseline)
    cut = f"{int((pairs == limit).to_numpy().sum())} of {pairs.size} runs went on to the last epoch allowed, {limit}"
    says = report.noted(says.replace("it is worse", "it is the other way round"), "paper", d.pairs)
    return f"epochs: {d}; {cut}", says


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
        table = report.ablation_table(task, profile)
        differences = table[table["variant"].isin(REMOVALS)]["difference"]
        found[profile] = differences[differences.map(lambda d: d.pairs >= ENOUGH_SEEDS)]
    profile = max(found, key=lambda p: len(found[p]))  # "paper" once it has as many rows
    differences = found[profile]
    if differences.empty:
        return "–", NEVER
    verdicts = corrected(differences).map(worse).value_counts()
    counts = "; ".join(f"{v} for {n}" for v, n in verdicts.items())
    says = report.noted(f"after Holm's correction: {counts}", profile, min(d.pairs for d in differences))
    return f"taken away one at a time: {len(differences)}", says


def _judged_cost(claim: "pd.Series[Any]") -> tuple[str, str]:
    """The range that the paper gives (columns "low" and "high") against what the bench measured on a CPU."""
    record = report.bench_record()
    if record is None:
        return "–", NEVER
    found, text = _measured_cost(claim["kind"], record)
    low, high = float(claim["low"]), float(claim["high"])
    ours, says = [], []
    for what, values in found.items():
        span = " to ".join(text.format(value) for value in sorted({values.min(), values.max()}))
        ours.append(f"{what}: {span} {'%' if '+' in text else '×'}")
        where = np.select([values < low, values > high], ["below the range", "above the range"], "holds")
        counts = pd.Series(where).value_counts()
        of = f" for {{}} of {len(values)}" if len(values) > 1 else ""
        says.append(f"{what}: " + ", ".join(f"{v}{of.format(n)}" for v, n in counts.items()))
    return "<br>".join(ours), "<br>".join(says)


def _measured_cost(kind: str, record: dict[str, Any]) -> "tuple[dict[str, pd.Series[float]], str]":
    """What a bench's record has on a kind of claim, and how such a number is written: with a sign it is in percent."""
    rows = pd.DataFrame(record["rows"]).set_index("measure")
    of_a_step = rows.filter(like="meta-update / training step, ", axis=0)
    of_a_step = of_a_step[of_a_step.index.str.startswith("meta-update")]  # and not its memory
    if kind == "memory":
        peaks = rows[rows.index.str.startswith("peak memory")]
        names = peaks["who"] + ", " + peaks.index.str.split(", ").str[2]
        return {name: pd.Series([ratio]) for name, ratio in zip(names, peaks["ratio"], strict=True)}, "{:.2f}"
    if kind == "update":
        updates = of_a_step.loc[["meta-update / training step, ETTh1 model"]]
        return {who: pd.Series([ratio]) for who, ratio in zip(updates["who"], updates["ratio"], strict=True)}, "{:.2f}"
    if kind == "updates":
        return {f"{who}, every 100 steps": ratios for who, ratios in of_a_step.groupby("who")["ratio"]}, "{:+.1f}"
    if kind == "frequent":
        often = ABLATIONS["updates-10"].change
        every = {task.title: often(task.settings("paper")).meta_every for task in TASKS.values()}
        ratios = of_a_step["ratio"].rename(lambda measure: measure.split(", ")[1])
        added = {title: 100 * ratios[title] / steps for title, steps in every.items()}
        return {"ours, ten times an epoch, five tasks": pd.Series(added)}, "{:+.0f}"
    if kind == "time":
        epochs = 100 * (rows[rows.index.str.startswith("whole epoch")]["ratio"] - 1)
        totals = report.paper_table(5)["overhead_percent"]
        return {"ours, epochs": epochs, "the paper's Table 5, totals": totals}, "{:+.0f}"
    parts = pd.DataFrame(record["parts"]).pivot(index="measure", columns="part", values="seconds")
    part = "Φ" if kind == "module" else "statistics"
    return {"ours, of an AdamW step": parts[part] / parts["AdamW"]}, "{:.2f}"


def relatives_claims_table() -> pd.DataFrame:
    """One row for each claim in ``data/paper/claims_relatives.csv``, judged as the claims on MetaAdamW are.

    * accuracy: test accuracy with LiLAW against without, in points, on the task; with p after Holm's correction over
      all kinds of noise.
    * detection: both areas of LiLAW's easy weight against the best other method, for each kind of noise.
    * adaptation: perplexity of LoPE against that of the arm named in ``against``, on the task.
    * noise cost: how much less LoPE's perplexity rises with noise than that of the arm named in ``against``.
    * scale: needs models or data that are not at hand; not tested.
    """
    claims = pd.read_csv(report.repository() / "data" / "paper" / "claims_relatives.csv", dtype=str)
    results = report.repository() / "data" / "results"
    studies = {method: study_runs(f"{method.lower()}/lite", results) for method in ("LiLAW", "LoPE")}
    records = {method: relatives.study_records(study) for method, study in studies.items()}
    rows = []
    for _, claim in claims.iterrows():
        ours, says = "–", f"not tested: {claim['why']}"
        if claim["kind"] != "scale":
            ours, says = _judged_relative(claim, records[claim["method"]])
        link = chapter_link(claim["evidence"])
        rows.append((claim["method"], claim["claim"], claim["number"], ours, says, link))
    return pd.DataFrame(rows, columns=["method", "claim", "paper", "ours", "verdict", "evidence"])


def _judged_relative(claim: "pd.Series[str]", records: Records) -> tuple[str, str]:
    """What the lite runs of a method's study show about a claim, with what it was measured on, and the verdict."""
    check_choice("kind (of a claim)", claim["kind"], ("accuracy", "detection", "adaptation", "noise cost"))
    if not records:
        return "–", NEVER
    row: Any
    if claim["kind"] == "adaptation":
        table = lope_report.lope_table(lope_report.adaptations_frame(records))
        row = lope_report.noise_share(claim["task"]), lope_report.LOPE_LABELS[claim["against"]]
        what = f"lower perplexity, {row[0]} noise"
    elif claim["kind"] == "noise cost":
        table = lope_report.noise_cost_table(lope_report.adaptations_frame(records))
        row = lope_report.LOPE_LABELS[claim["against"]]
        what = "less rise of perplexity from 0 to 20 % noise"
    elif claim["kind"] == "accuracy":
        runs = lilaw_report.accuracies_frame([r for r in records if r["run"]["variant"] in ("adamw", "adamw-lilaw")])
        table, row = lilaw_report.accuracy_table(runs, "best"), lilaw_report.noise_name(claim["task"])
        what = row
    else:
        areas = lilaw_report.detection_frame(records)
        tables = {area.upper(): lilaw_report.detection_against(areas, area) for area in ("auroc", "auprc")}
        spans = pd.DataFrame({area: table["difference"].map(relatives.student) for area, table in tables.items()})
        lines = [f"{noise}: {'; '.join(row)}" for noise, *row in spans.itertuples()]
        counts = [
            f"{area}: {report.noted(str(says), 'lite')} on {n} of {len(table)} kinds"
            for area, table in tables.items()
            for says, n in table["verdict"].value_counts().items()
        ]
        if not lines:
            return "–", NEVER
        return "<br>".join([f"points of {' and of '.join(tables)}:", *lines]), "<br>".join(counts)
    if row not in table.index:
        return "–", NEVER
    found: Any = table.loc[row]
    d = found["difference"]
    p = f"{d.seeds} seeds, p {paired.p_value(d.p)}, after Holm's correction {paired.p_value(found['p_holm'])}"
    return f"{relatives.student(d)} {d.unit}, {p} ({what}; lite runs)", report.noted(found["verdict"], "lite")
