"""The claims of the three papers: each with its number, ours, and a verdict by a rule."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments import (
    TASKS,
    ablation_report,
    bench,
    frames,
    lilaw_report,
    lope_report,
    main_report,
    paired,
    relatives,
)
from metaadamw_lite.experiments.paired import (
    ENOUGH_SEEDS,
    PairedDifference,
    corrected,
    improvement,
    improvements_by_seed,
    p_value,
    paired_difference,
    pairs_by_seed,
    power,
)
from metaadamw_lite.experiments.records import Record, Records, paper_table, repository
from metaadamw_lite.experiments.studies import study_runs
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variants import ABLATIONS, SEEDS
from metaadamw_lite.experiments.verdict import NEVER, Verdict, annotate, judge

UNTESTED = Verdict(NEVER)


@dataclass(frozen=True)
class Finding:
    """Evidence of the records on a claim.

    Attributes:
        ours: our number, as text.
        says: the verdict without a test, or the text of several verdicts.
        test: the deciding difference, positive in favour of the claim; None with ``says``.
        opposite: meaning of a difference against the claim, in words.
        profile, planned: profile and planned number of the pairs of ``test``, for the verdict's notes.
    """

    ours: str
    says: Verdict | str = UNTESTED
    test: PairedDifference | None = None
    opposite: str = "it is worse"
    profile: str = "paper"
    planned: int = len(SEEDS)

    def verdict(self, correction: PairedDifference) -> Verdict:
        """Judge by ``test``, and by the same difference after ``corrected``."""
        assert self.test is not None
        return judge(self.test, correction, opposite=self.opposite, profile=self.profile, planned=self.planned)


def claims_table(records: Records) -> pd.DataFrame:
    """Judge each claim on MetaAdamW in ``data/paper/claims.csv``: a row with our number, the verdict and the evidence.

    A claim with a single test is judged by p after Holm's correction over all such rows, "p (Holm)", and by p of
    equivalence, "p (equivalent, Holm)". "power" is the chance of the uncorrected test to tell an effect of the claimed
    size from none, with the pairs at hand.

    Each kind of claim has a rule, under the paper's protocol:

    * improvement: MetaAdamW against AdamW, paired by seed. A claim of kind ``all`` must hold on all tasks.
    * ablation: the variant is worse than MetaAdamW.
    * no gain: the variant is not better than MetaAdamW by ``high`` percent.
    * necessary: every variant of a task that takes something away is worse, after Holm's correction.
    * epochs, longer: fewer, or more, epochs than AdamW until early stopping, paired by seed.
    * earlier: the number of epochs by which MetaAdamW reaches AdamW's best earlier than AdamW, paired by seed. A run
      that never reaches it counts as one epoch after the task's last.
    * trained: MetaAdamW against itself with an untrained Φ, on all tasks, under both protocols.
    * memory, time, update, updates, frequent, statistics, module: the bench's record against the paper's range.

    Claims over tasks (``all``, ``trained``) are corrected over the tasks of a protocol.
    """
    claims = pd.read_csv(repository() / "data" / "paper" / "claims.csv", dtype=str)
    main = _of_paper(main_report.table_of_tasks(records))
    against = {p: main_report.table_of_tasks(records, baseline="metaadamw-frozen", protocol=p) for p in PROTOCOLS}
    control = {protocol: _of_paper(table) for protocol, table in against.items()}
    findings = pd.Series([_found(records, claim, main, control) for _, claim in claims.iterrows()], index=claims.index)
    tests = findings.map(lambda f: f.test).dropna()
    after = corrected(tests)
    says = findings.map(lambda f: f.says)
    says[after.index] = [f.verdict(d) for f, d in zip(findings[after.index], after, strict=True)]
    claimed = claims["number"].str.extract(r"^([+-][\d.]+) %$")[0].astype(float)[tests.index]
    powers = pd.Series([power(d, x) for d, x in zip(tests, claimed, strict=True)], index=tests.index, dtype=float)
    return claims[["section", "claim"]].assign(
        paper=claims["number"],
        ours=findings.map(lambda f: f.ours),
        power=powers.reindex(claims.index).map(main_report.percent),
        **{
            "p (Holm)": after.map(lambda d: d.p).reindex(claims.index).map(p_value),
            "p (equivalent, Holm)": after.map(lambda d: d.p_equivalent).reindex(claims.index).map(p_value),
        },
        verdict=says,
        evidence=claims["evidence"].map(chapter_link),
    )


def _of_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the paper's tasks."""
    return table[table.index.isin(paper_table(2).index)]


def chapter_link(page: Any) -> str:
    """Link to the notebook with the evidence for a claim (Markdown), or return a dash without one."""
    return "–" if pd.isna(page) else f"[chapter {int(page.split('_')[0])}]({page}.ipynb)"


COSTS = ("memory", "time", "update", "updates", "frequent", "statistics", "module")
"""The kinds of claims that the bench's record decides."""

KINDS = (
    *("improvement", "all", "trained", "ablation", "no gain", "necessary", "epochs", "longer", "earlier"),
    *COSTS,
)
"""All kinds of claims; ``claims_table`` has their rules."""


def _found(records: Records, claim: "pd.Series[Any]", main: pd.DataFrame, control: dict[str, pd.DataFrame]) -> Finding:
    """Find the evidence on a claim."""
    kind, task = claim["kind"], claim["task"]
    check_choice("kind (of a claim)", kind, KINDS)
    if kind in COSTS:
        return _found_cost(claim)
    if kind in ("all", "trained"):
        return _found_over_tasks({"paper": main} if kind == "all" else control)
    if task not in main.index:
        return Finding("–")
    if kind == "improvement":
        d, profile, planned = main.loc[task, ["difference", "profile", "planned"]]
        ours = annotate(d, profile)
        if profile == "paper" and d.seeds >= ENOUGH_SEEDS:
            gain = float(paper_table(2).loc[task, "improvement_percent"])
            ours += f"; one more pair, as the paper's with {gain:+.2f} %: {d.one_more}"
        return Finding(ours, test=d, profile=profile, planned=planned)
    if kind in ("ablation", "no gain"):
        return _found_ablation(records, task, claim["variant"], None if kind == "ablation" else float(claim["high"]))
    if kind == "necessary":
        return _found_parts(records, task)
    runs = main_report.main_runs(records, task)
    if main_report.best_evidence(runs, "paper") == "lite":  # a small run's end tells nothing about one as published
        return Finding("–")
    return _found_optimum(records, task) if kind == "earlier" else _found_length(task, kind, runs)


def _found_over_tasks(tables: dict[str, pd.DataFrame]) -> Finding:
    """Count the verdicts on a claim about all tasks, under some protocols."""
    ours, says = [], []
    for protocol, table in tables.items():
        where = f", `{protocol}`" if len(tables) > 1 else ""
        verdicts = []
        columns = (table[name] for name in ("difference", "profile", "planned"))
        for task, correction, d, profile, planned in zip(
            table.index, corrected(table["difference"]), *columns, strict=True
        ):
            verdicts.append(str(judge(d, correction, profile=profile, planned=planned)))
            chance = main_report.percent(main_report.power_for_paper(str(task), d))
            what = f"{d}; power for the paper's gain: {chance}" if chance != "–" else str(d)
            ours.append(f"{TASKS[str(task)].title}{where}: {annotate(what, profile)}")
        count = {v: verdicts.count(v) for v in sorted(set(verdicts))}
        says.append(f"of {len(paper_table(2))} tasks{where}: " + "; ".join(f"{v} on {n}" for v, n in count.items()))
    return Finding("<br>".join(ours), "<br>".join(says))


def _found_ablation(records: Records, task: str, variant: str, gain: float | None) -> Finding:
    """Is the variant worse than MetaAdamW, or not better by some gain? Runs as published count, if there are enough."""
    runs = frames.outcomes(frames.runs_frame(records.of(task)))
    lower_is_better = TASKS[task].lower_is_better
    for profile in ("paper", "lite"):
        outcome = runs[runs["profile"] == profile]
        arm, metaadamw = frames.by_seed(outcome, "paper", variant, "metaadamw")
        d = improvement(arm, metaadamw, lower_is_better)
        if d.pairs < ENOUGH_SEEDS:
            continue
        guessing = "; these accuracies are hardly above guessing" if main_report.near_chance(task, outcome) else ""
        ours = annotate(d, profile) + guessing
        if gain is None:
            return Finding(ours, test=d.reversed(), opposite="it is better", profile=profile)
        short_of = paired_difference(gain - improvements_by_seed(arm, metaadamw, lower_is_better), "points")
        return Finding(ours, test=short_of, opposite="it helps", profile=profile)
    return Finding("–")


def _found_optimum(records: Records, task: str) -> Finding:
    """Is MetaAdamW as good as AdamW's best in an earlier epoch?"""
    runs = main_report.main_records(records, task, "paper", "paper")
    reached = main_report.time_to_best(runs, TASKS[task].lower_is_better)
    never = TASKS[task].settings("paper").epochs + 1
    d = paired_difference(reached["AdamW, epoch"] - reached["MetaAdamW, epoch"].fillna(never), "epochs")
    seeds = [{r["run"]["seed"] for r in runs if r["run"]["variant"] == arm} for arm in ("metaadamw", "adamw")]
    d = replace(d, lost=len(set.intersection(*seeds)) - len(reached))  # pairs without a finite epoch
    often = (reached["MetaAdamW, epoch"] < reached["AdamW, epoch"]).sum()
    ours = f"{d}; positive is earlier ({often} of {len(reached)} pairs); never counts as epoch {never}"
    return Finding(ours, test=d, opposite="it is later or never")


def _found_length(task: str, kind: str, runs: pd.DataFrame) -> Finding:
    """Does MetaAdamW take fewer epochs until it stops ("epochs"), or more ("longer")?"""
    runs = runs[runs["profile"] == "paper"]
    whole = runs["status"].isin(["finished", "stopped early"])  # a diverged run did not save time
    arm, baseline = frames.by_seed(runs.assign(outcome=runs["epochs"].where(whole)), "paper", "metaadamw", "adamw")
    d = improvement(arm, baseline, lower_is_better=False)
    limit = TASKS[task].settings("paper").epochs
    pairs = pairs_by_seed(arm, baseline)
    cut = f"{int((pairs == limit).to_numpy().sum())} of {pairs.size} runs went on to the last epoch allowed, {limit}"
    claimed = d.reversed() if kind == "epochs" else d
    return Finding(f"epochs: {d}; {cut}", test=claimed, opposite="it is the other way round")


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
"""The rows of Table 3 that take something away, unless they are a task's own setting."""


def _found_parts(records: Records, task: str) -> Finding:
    """Is every row of a task's Table 3 that takes something away worse, after Holm's correction?"""
    found = {}
    for profile in ("paper", "lite"):
        table = ablation_report.ablation_table(records, task, profile)
        differences = table[table["variant"].isin(REMOVALS)]["difference"]
        found[profile] = differences[differences.map(lambda d: d.pairs >= ENOUGH_SEEDS)]
    profile = max(found, key=lambda p: len(found[p]))  # "paper" once it has as many rows
    differences = found[profile]
    if differences.empty:
        return Finding("–")
    verdicts = corrected(differences).map(lambda d: str(judge(d.reversed(), opposite="it is better"))).value_counts()
    counts = "; ".join(f"{v} for {n}" for v, n in verdicts.items())
    says = annotate(f"after Holm's correction: {counts}", profile, min(d.pairs for d in differences), len(SEEDS))
    return Finding(f"taken away one at a time: {len(differences)}", says)


def _found_cost(claim: "pd.Series[Any]") -> Finding:
    """Compare the bench's measurements on a CPU with the paper's range (columns "low" and "high")."""
    record = bench.bench_record()
    if record is None:
        return Finding("–")
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
    return Finding("<br>".join(ours), "<br>".join(says))


def _measured_cost(kind: str, record: dict[str, Any]) -> "tuple[dict[str, pd.Series[float]], str]":
    """Return a bench record's numbers on a kind of claim, and their format: a sign means percent."""
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
        ratios = of_a_step["ratio"].rename(lambda measure: measure.split(", ")[1])
        timed = (task for task in TASKS.values() if task.title in ratios.index)
        every = {task.title: often(task.settings("paper")).meta_every for task in timed}
        added = {title: 100 * ratios[title] / steps for title, steps in every.items()}
        return {"ours, ten times an epoch, five tasks": pd.Series(added)}, "{:+.0f}"
    if kind == "time":
        epochs = 100 * (rows[rows.index.str.startswith("whole epoch")]["ratio"] - 1)
        totals = paper_table(5)["overhead_percent"]
        return {"ours, epochs": epochs, "the paper's Table 5, totals": totals}, "{:+.0f}"
    parts = pd.DataFrame(record["parts"]).pivot(index="measure", columns="part", values="seconds")
    part = "Φ" if kind == "module" else "statistics"
    return {"ours, of an AdamW step": parts[part] / parts["AdamW"]}, "{:.2f}"


def relatives_claims_table(records: Records) -> pd.DataFrame:
    """Judge each claim in ``data/paper/claims_relatives.csv``, as ``claims_table`` does.

    * accuracy: test accuracy with LiLAW against without, in points, on the task, with p after Holm's correction over
      all kinds of noise.
    * detection: both areas of LiLAW's easy weight against the best other method, for each kind of noise.
    * adaptation: LoPE's perplexity against the perplexity of the arm in ``against``, on the task.
    * noise cost: the rise of LoPE's perplexity with noise against the rise of the arm in ``against``.
    * scale: not tested, for want of such models or data.
    """
    claims = pd.read_csv(repository() / "data" / "paper" / "claims_relatives.csv", dtype=str)
    studies = {method: study_runs(f"{method.lower()}/lite", records) for method in ("LiLAW", "LoPE")}
    runs = {method: relatives.study_records(records, study) for method, study in studies.items()}
    rows = []
    for _, claim in claims.iterrows():
        ours: str
        says: Verdict | str
        ours, says = "–", f"not tested: {claim['why']}"
        if claim["kind"] != "scale":
            ours, says = _judged_relative(claim, runs[claim["method"]])
        link = chapter_link(claim["evidence"])
        rows.append((claim["method"], claim["claim"], claim["number"], ours, says, link))
    return pd.DataFrame(rows, columns=["method", "claim", "paper", "ours", "verdict", "evidence"])


def _judged_relative(claim: "pd.Series[str]", runs: Sequence[Record]) -> tuple[str, Verdict | str]:
    """Return the result of a method's lite runs on a claim, with its measure, and the verdict."""
    check_choice("kind (of a claim)", claim["kind"], ("accuracy", "detection", "adaptation", "noise cost"))
    if not runs:
        return "–", UNTESTED
    row: Any
    if claim["kind"] == "adaptation":
        table = lope_report.lope_table(lope_report.adaptations_frame(runs))
        row = lope_report.noise_share(claim["task"]), lope_report.LOPE_LABELS[claim["against"]]
        what = f"lower perplexity, {row[0]} noise"
    elif claim["kind"] == "noise cost":
        table = lope_report.noise_cost_table(lope_report.adaptations_frame(runs))
        row = lope_report.LOPE_LABELS[claim["against"]]
        what = "less rise of perplexity from 0 to 20 % noise"
    elif claim["kind"] == "accuracy":
        arms = [r for r in runs if r["run"]["variant"] in ("adamw", "adamw-lilaw")]
        table = lilaw_report.accuracy_table(lilaw_report.accuracies_frame(arms), "best")
        row = lilaw_report.noise_name(claim["task"])
        what = row
    else:
        areas = lilaw_report.detection_frame(runs)
        tables = {area.upper(): lilaw_report.detection_against(areas, area) for area in ("auroc", "auprc")}
        spans = pd.DataFrame({area: table["difference"].map(relatives.student) for area, table in tables.items()})
        lines = [f"{noise}: {'; '.join(row)}" for noise, *row in spans.itertuples()]
        counts = [
            f"{area}: {says} on {n} of {len(table)} kinds"
            for area, table in tables.items()
            for says, n in table["verdict"].map(lambda v: str(replace(v, profile="lite"))).value_counts().items()
        ]
        if not lines:
            return "–", UNTESTED
        return "<br>".join([f"points of {' and of '.join(tables)}:", *lines]), "<br>".join(counts)
    if row not in table.index:
        return "–", UNTESTED
    found: Any = table.loc[row]
    d = found["difference"]
    p = f"{d.seeds} seeds, p {paired.p_value(d.p)}, after Holm's correction {paired.p_value(found['p_holm'])}"
    return f"{relatives.student(d)} {d.unit}, {p} ({what}; lite runs)", replace(found["verdict"], profile="lite")
