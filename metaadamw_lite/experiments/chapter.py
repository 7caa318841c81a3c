"""The common part of the chapters about single tasks: evidence, its tables, figures and verdict, and live runs."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from metaadamw_lite.experiments import bench, figures, frames, main_report, paired
from metaadamw_lite.experiments.records import NotRecordedError, Records, RunKey, environment, paper_table
from metaadamw_lite.experiments.task import PROTOCOLS, Task
from metaadamw_lite.experiments.training import pick_device, run
from metaadamw_lite.experiments.variants import ARMS
from metaadamw_lite.experiments.verdict import Verdict, judge


class Evidence:
    """The committed runs of a task's three arms, under each protocol at the best profile with enough seeds.

    Args:
        records: of all runs.
        task: which.

    Raises:
        NotRecordedError: if no run of the task is recorded; so do the tables and figures that lack the runs they need.

    Attributes:
        profiles: "paper" or "lite", by protocol.
        paper: the task's row of the paper's Table 2; NaN throughout for a task that the paper lacks.
        records: those of the runs.
        runs: a row for each, with its ``outcome``.
    """

    def __init__(self, records: Records, task: Task) -> None:
        self.task = task
        self._recorded = records.of(task.name)
        self.paper: Any = paper_table(2).reindex([task.name]).loc[task.name]
        runs = main_report.main_runs(records, task.name)
        if runs.empty:
            raise self.missing()
        self.profiles = {protocol: main_report.best_evidence(runs, protocol) for protocol in PROTOCOLS}
        self._all = frames.outcomes(runs)
        shown = (main_report.main_records(records, task.name, p, profile) for p, profile in self.profiles.items())
        self.records = [record for part in shown for record in part]
        if not self.records:  # no pair of any profile
            raise self.missing()
        self.runs = frames.outcomes(frames.runs_frame(self.records))
        self._movement = frames.movement_frame(self.records)
        self._traced = frames.factors_frame(r for r in self.records if r["run"]["variant"] == "metaadamw")

    def missing(self) -> NotRecordedError:
        """An error that names the command for runs that are not recorded."""
        return NotRecordedError(f"python -m metaadamw_lite.experiments sweep main/lite --task {self.task.name}")

    def label(self) -> str:
        """Which runs the page rests on, with a warning where they are small ones (Markdown)."""
        what = f"Profile: {self._profile('`')}; {len(self.runs)} runs; data: {', '.join(self.runs['data'].unique())}."
        small = self._small()
        if not small:
            return what
        everything = len(small) == len(self.profiles)
        recorded = "Everything recorded on this page" if everything else f"What is under protocol `{small[0]}`"
        return (
            f"**{what} {recorded} comes from small whole runs**: a part of the real data and a narrow model of the "
            "paper's kind. Early stopping or the limit of epochs ends them. Their numbers cannot be compared "
            f"with {'the paper' if everything else 'those under the other protocol or with the paper'}'s; gains can."
        )

    def _small(self) -> list[str]:
        """The protocols that are shown by small whole runs (profile "lite")."""
        return [protocol for protocol, profile in self.profiles.items() if profile == "lite"]

    def _profile(self, quote: str = "") -> str:
        """The profile, or that under each protocol where they differ."""
        if len(set(self.profiles.values())) == 1:
            return f"{quote}{self.profiles['paper']}{quote}"
        parts = (f"{quote}{profile}{quote} (protocol {quote}{p}{quote})" for p, profile in self.profiles.items())
        return ", ".join(parts)

    def chance_level(self) -> str:
        """For a task with classes: what guessing gives, and how exactly an accuracy is measured at all (Markdown)."""
        assert self.task.classes is not None
        arm = self.runs[(self.runs["variant"] == "adamw") & (self.runs["protocol"] == "paper")]
        if arm["outcome"].isna().all():
            raise self.missing()
        mean = arm["outcome"].mean()
        samples = next(r["samples"]["val"] for r in self.records if r["run"]["protocol"] == "paper")
        error = math.sqrt(mean * (1 - mean) / samples)
        return (
            f"Guessing is right in {100 / self.task.classes:.0f} % of cases, AdamW's runs are in {100 * mean:.1f} %. "
            f"On {samples:,} validation samples, the standard error of one such accuracy is {100 * error:.1f} points."
        )

    def answer(self) -> str:
        """Whether MetaAdamW is better than AdamW, and training Φ matters, by protocol; and Φ's factors (Markdown)."""
        claims = {
            "MetaAdamW is better than AdamW": ("metaadamw", "adamw"),
            "A trained Φ is better than an untrained one": ("metaadamw", "metaadamw-frozen"),
        }
        lines = []
        for claim, (arm, baseline) in claims.items():
            found: dict[str, list[str]] = {}
            for protocol in self.profiles:
                label = self._judge(self._compare(protocol, arm, baseline), protocol).label
                found.setdefault(label, []).append(f"`{protocol}`")
            says = "; ".join(f"{label} under {' and '.join(where)}" for label, where in found.items())
            lines.append(f"* **{claim}:** {says}.")
        factors = [] if self._traced.empty else [f"* **The factors:** {self._describe_factors()}"]
        return "\n".join(lines + factors)

    def conclusion(self) -> str:
        """Results of the arms beside the paper's, and the runs that are still to be made (Markdown)."""
        lines = []
        if self.profiles["paper"] == "paper":
            whole = self._pairs("paper", "paper").dropna()
            if whole.empty:
                raise self.missing()
            arms = [
                f"{figures.LABELS[arm]} {whole[column].min():.4g} to {whole[column].max():.4g} "
                f"(the paper's run: {_printed(self.paper[arm], '.4g')})"
                for arm, column in (("adamw", "baseline"), ("metaadamw", "arm"))
            ]
            lines.append(f"* {self.task.unit[0].upper()}{self.task.unit[1:]}, protocol `paper`: {'; '.join(arms)}.")
        lines += [f"* {few}" for few in self._whole_but_few()]
        if "lite" in self.profiles.values():
            lines.append(
                f"* `python -m metaadamw_lite.experiments sweep main/paper --task {self.task.name}` makes the runs "
                "that are as published."
            )
        return "\n".join(lines)

    def _compare(self, protocol: str, arm: str, baseline: str) -> paired.PairedDifference:
        return main_report.compare(self.runs, protocol, arm, baseline, self.task.lower_is_better)

    def _judge(self, difference: paired.PairedDifference, protocol: str) -> Verdict:
        """Judge a difference under a protocol."""
        profile = self.profiles[protocol]
        planned = main_report.planned_pairs(self.task.name, self._all, protocol, profile)
        return judge(difference, profile=profile, planned=planned)

    def _pairs(self, protocol: str, profile: str) -> pd.DataFrame:
        """The outcomes of MetaAdamW ("arm") and AdamW ("baseline") by seed, and the "gain" in percent."""
        runs = self._all[self._all["profile"] == profile]
        arm, baseline = frames.by_seed(runs, protocol, "metaadamw", "adamw")
        gain = paired.improvements_by_seed(arm, baseline, self.task.lower_is_better)
        return paired.pairs_by_seed(arm, baseline).assign(gain=gain)

    def _whole_but_few(self) -> list[str]:
        """List the runs as published where small ones are shown, since these are too few to judge by."""
        says = []
        for protocol in self._small():
            rows = [
                f"seed {seed}: AdamW {baseline:.5g}, MetaAdamW {arm:.5g} ({gain:+.1f} %)"
                for seed, arm, baseline, gain in self._pairs(protocol, "paper").itertuples(name=None)
            ]
            if rows:
                says.append(f"Runs as published under `{protocol}`, too few to judge by: {'; '.join(rows)}.")
        return says

    def summary(self) -> pd.DataFrame:
        """Number of runs of each arm, medians of their epochs and meta-updates, number that diverged or failed."""
        table = self.runs.groupby(["protocol", "variant"]).agg(
            runs=("seed", "count"),
            epochs=("epochs", "median"),
            updates=("meta_updates", "median"),
            lost=("status", lambda s: int(s.isin(["diverged", "failed"]).sum())),
        )
        return self._named(table.map("{:g}".format))

    def curves(self) -> Figure:
        """Validation curves, with the paper's two numbers where the runs have the paper's settings."""
        epochs = frames.epochs_frame(self.records)
        if epochs.empty:
            raise self.missing()
        alike = len(set(self.profiles.values())) == 1  # runs of both profiles end far from each other
        return self._titled(
            figures.plot_curves(epochs, _protocols(epochs), self.task, self._reference(), share_y=alike)
        )

    def pairs(self) -> Figure:
        """What every run reports, runs of one seed connected."""
        if self.runs["outcome"].isna().all():
            raise self.missing()
        titles = {"paper": "best of all epochs (paper)", "clean": "test part, once (clean)"}
        titles = {protocol: titles[protocol] for protocol in _protocols(self.runs)}
        return self._titled(figures.plot_pairs(self.runs, titles, self.task, self._reference()))

    def spread(self) -> pd.DataFrame:
        """Mean and spread over seeds of the results of each arm, as text."""
        spread = self.runs.groupby(["protocol", "variant"])["outcome"].agg(["mean", "std", "min", "max"])
        shown = spread.map("{:.4g}".format).replace("nan", "–")
        return self._named(shown.rename(columns={"min": "lowest", "max": "highest"}))

    def comparisons(self) -> pd.DataFrame:
        """The arms against each other, paired by seed: gain with Student's interval, p, pairs and verdict."""
        return self._comparisons()[["gain (%)", "p (t)", "pairs", "better?"]]

    def other_tests(self) -> pd.DataFrame:
        """The same comparisons by bootstrap, Wilcoxon's test, a test of equivalence, and the mean of logarithms."""
        return self._comparisons().drop(columns=["gain (%)", "p (t)", "pairs", "better?"])

    def _comparisons(self) -> pd.DataFrame:
        short = {**figures.LABELS, "metaadamw-frozen": "untrained Φ"}
        return self._named(main_report.comparison_table(self.task.name, self.runs, short))

    def last_epoch(self) -> str:
        """The comparisons of the last epochs instead of the best ones, under the paper's protocol (Markdown)."""
        last = self.runs.assign(outcome=self.runs["last"])
        lines = []
        for arm, baseline in main_report.PAIRS:
            d = main_report.compare(last, "paper", arm, baseline, self.task.lower_is_better)
            who = f"{figures.LABELS[arm]} against {figures.LABELS[baseline]}"
            lines.append(f"* Last epoch, {who}: {_gain(d)}; better: {self._judge(d, 'paper')}.")
        return "\n".join(lines)

    def cut_off(self) -> str:
        """Which whole runs the last epoch allowed ended while they were at their best (Markdown)."""
        limit, sign = self.task.settings("paper").epochs, 1 if self.task.lower_is_better else -1
        arms: dict[tuple[str, str], list[str]] = {}
        for record in self.records:
            key = record["run"]
            if key["profile"] != "paper":
                continue
            limited = record["status"] == "finished"  # a run may stop early in the last epoch, too
            cut = arms.setdefault((key["protocol"], key["variant"]), [])
            metric = [sign * epoch["metric"] for epoch in record["epochs"] if epoch["metric"] is not None]
            if limited and metric[-1] == min(metric):
                cut.append(f"seed {key['seed']} ({100 * abs(metric[-1] / metric[-2] - 1):.1f} %)")
        lines = [
            f"* `{protocol}`, {figures.LABELS[variant]}: {', '.join(cut) or 'none'}."
            for (protocol, variant), cut in arms.items()
        ]
        head = (
            f"Whole runs that the limit of {limit} epochs ended while they were at their best, and by how much the "
            f"last epoch had changed the {self.task.metric}:\n\n"
        )
        return head + "\n".join(lines) if lines else ""

    def time_to_best(self) -> pd.DataFrame:
        """AdamW's best epoch, MetaAdamW's first epoch that is as good, as text, and its last epoch."""
        table = main_report.time_to_best(self.records, self.task.lower_is_better)
        if table.empty:
            raise self.missing()
        first = table["MetaAdamW, epoch"].map("{:.0f}".format).replace("nan", "never")
        table = table.drop(columns="AdamW's best").assign(**{"MetaAdamW, epoch": first})
        return self._named(
            table.rename(
                columns={
                    "AdamW, epoch": "AdamW best",
                    "MetaAdamW, epoch": "as good",
                    "MetaAdamW, last epoch": "last",
                }
            )
        )

    def movement(self) -> Figure:
        """How far meta-learning moved Φ, α and log σ²."""
        if self._movement.empty:
            raise self.missing()
        return self._titled(figures.plot_movement(self._movement))

    def by_seed(self) -> pd.DataFrame:
        """Every pair: results of the arms, MetaAdamW's gain over AdamW in percent, and its mean α over steps and
        groups, which count by their parameters."""
        table = self.runs.pivot(index=["protocol", "seed"], columns="variant", values="outcome")
        table = table.reindex(columns=list(ARMS)).rename(columns={**figures.LABELS, "metaadamw-frozen": "untrained"})
        gains = {protocol: self._pairs(protocol, profile)["gain"] for protocol, profile in self.profiles.items()}
        shown = table.astype(float).map("{:.4g}".format)
        shown["gain (%)"] = pd.concat(gains).map("{:+.1f}".format)
        if not self._traced.empty:
            shown["mean α"] = self._factors()["α (mean)"].map("{:.2f}".format)
        shown = shown.astype(object).fillna("–").replace(["nan", "+nan"], "–")
        return self._named(shown).rename_axis(columns=None)  # seven columns leave no room for the profile

    def factors(self) -> pd.DataFrame:
        """For each run of MetaAdamW the ranges of α and β, and how far meta-learning moved them, as text."""
        factors = self._factors()
        if self._movement.empty:
            raise self.missing()
        ranges = {
            symbol: factors[f"{symbol} (min)"].map("{:.2f}".format)
            + " to "
            + factors[f"{symbol} (max)"].map("{:.2f}".format)
            for symbol in ("α", "β")
        }
        moved = self._movement.groupby(["protocol", "seed"])[["alpha_moved", "beta_moved"]].max()
        moved = moved.map("{:.0e}".format).set_axis(["α moved", "β moved"], axis=1)
        return self._named(pd.DataFrame(ranges).join(moved).fillna("–"))

    def _factors(self) -> pd.DataFrame:
        """Smallest, mean and largest factor of each run; in the mean a group counts by its parameters."""
        traced, keys = self._traced, ["protocol", "seed"]
        if traced.empty:
            raise self.missing()
        runs = traced.groupby(keys)
        columns: dict[str, pd.Series[float]] = {}
        for name, symbol in (("alpha", "α"), ("beta", "β")):
            weighted = (traced[name] * traced["parameters"]).groupby([traced[k] for k in keys]).sum()
            mean = weighted / runs["parameters"].sum()
            columns |= {
                f"{symbol} (min)": runs[name].min(),
                f"{symbol} (mean)": mean,
                f"{symbol} (max)": runs[name].max(),
            }
        return pd.DataFrame(columns).round(3)

    def _describe_factors(self) -> str:
        """The size of the factors, and how far meta-learning moved them, for each profile (Markdown)."""
        whole, says = self._factors(), []
        for profile in dict.fromkeys(self.profiles.values()):
            protocols = [protocol for protocol, p in self.profiles.items() if p == profile]
            table = whole[whole.index.get_level_values("protocol").isin(protocols)]
            if table.empty:
                continue
            equal = table["α (max)"] - table["α (min)"] < 0.1
            low, high = table["α (mean)"].min(), table["α (mean)"].max()
            says.append(
                f"In {equal.sum()} of {len(table)} runs ({main_report.TESTED[profile]}) all groups had one α, to "
                f"within 0.1, from beginning to end. Mean α lay between {low:.2f} and {high:.2f}, by the seed."
            )
            if len(self._movement):
                moved = self._movement[self._movement["protocol"].isin(protocols)][["alpha_moved", "beta_moved"]].max()
                says.append(
                    f"Training Φ changed α by {moved['alpha_moved']:.2g} at most, and β by {moved['beta_moved']:.2g}."
                )
        return " ".join(says)

    def verdict(self) -> pd.DataFrame:
        """The paper's gain, ours, its power and verdict, and the same of training Φ; a row for each protocol."""
        rows, gain = {}, _printed(self.paper["improvement_percent"], "+.2f", " %")
        for protocol in self.profiles:
            d = self._compare(protocol, "metaadamw", "adamw")
            training = self._compare(protocol, "metaadamw", "metaadamw-frozen")
            rows[protocol] = {
                "paper (1 seed)": gain if protocol == "paper" else "–",
                "ours (paired)": _gain(d),
                "power for the paper's gain": main_report.percent(main_report.power_for_paper(self.task.name, d)),
                "MetaAdamW improves on AdamW": self._judge(d, protocol),
                "trained over untrained Φ": _gain(training),
                "training Φ improves": self._judge(training, protocol),
            }
        return self._named(pd.DataFrame.from_dict(rows, orient="index").rename_axis("protocol"))

    def running_times(self) -> str:
        """Which device ``auto`` takes here, and how long a live run takes by what is recorded (Markdown).

        Whole runs as they were; on a GPU also an epoch's training at the paper's settings, from steps that were timed.
        """
        took: dict[tuple[str, str, int], list[float]] = {}
        for record in self._recorded:
            if record["run"]["variant"] in ARMS and record["status"] != "failed":
                where = record["environment"]
                key = record["run"]["profile"], where["device"], where["threads"]
                took.setdefault(key, []).append(sum(epoch["seconds"] for epoch in record["epochs"]) / 60)
        lines = [
            f"* `{profile}`, on {device} with {threads} thread{'s' if threads > 1 else ''}: {min(minutes):.1f} to "
            f"{max(minutes):.1f} minutes for the run of one arm ({len(minutes)} recorded runs)."
            for (profile, device, threads), minutes in took.items()
        ]
        settings = self.task.settings("paper")
        steps = settings.meta_every * settings.meta_per_epoch  # of an epoch, to a few
        for name, record in bench.bench_records().items():
            if record["environment"]["device_type"] != "cpu":
                measure = f"whole epoch, {self.task.title} (K_meta = {settings.meta_every})"
                timed = (row for row in record["rows"] if row["measure"] == measure and row["who"] == "ours")
                row = next(timed, None)
                if row is None:
                    continue
                adamw, ours = steps * row["baseline_seconds"], steps * row["seconds"]
                code = f"{'older ' if bench.is_older(name) else ''}code of {record['environment']['revision']}"
                lines.append(
                    f"* `paper`, on {record['environment']['device']} with the {code}: about {adamw:.2g} s for an "
                    f"epoch's training with AdamW, {ours:.2g} s with MetaAdamW. Single steps were timed "
                    f"([chapter 16](16_costs.ipynb)). A run has at most {settings.epochs} epochs."
                )
        place = torch.device(pick_device("auto"))
        here = environment(place)["device"]
        head = (
            f'The live run makes one run of each of the three arms. `device = "auto"` takes the '
            f"{'CPU' if place.type == 'cpu' else 'GPU'} of this machine, {here}"
            f"{'' if any(here in line for line in lines) else ', on which none is recorded'}. "
            "How long a run takes, by what is recorded:\n\n"
        )
        return head + "\n".join(lines)

    def _reference(self) -> dict[str, float]:
        as_published = self.profiles["paper"] == "paper" and self.paper.notna().all()
        return {arm: float(self.paper[arm]) for arm in ARMS[:2]} if as_published else {}

    def _titled(self, figure: Figure) -> Figure:
        figure.suptitle(f"{self.task.title}, profile: {self._profile()}", fontsize="medium")
        return figure

    def _named(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table with the names of the arms, and the profile in its corner, or the profiles beside the protocols."""
        table = table.rename(index=figures.LABELS)
        if len(set(self.profiles.values())) == 1:
            return table.rename_axis(columns=f"profile: {self._profile()}")
        return table.rename(index={p: f"{p} ({profile} runs)" for p, profile in self.profiles.items()})


def live(task: Task, protocol: str, profile: str, seed: int, device: str) -> list[dict[str, Any]]:
    """Make one run of each arm now, in a temporary folder; return their records."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [RunKey(task.name, arm, protocol, profile, seed) for arm in ARMS]
        return [run(key, Path(folder), device) for key in keys]


def live_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Epochs, best validation metric, test metric, number of meta-updates and movement of Φ of runs made now."""
    table = frames.runs_frame(records).set_index("variant").rename(index=figures.LABELS)
    where = "profile: {profile}, protocol: {protocol}, data: {data}".format(
        **records[0]["run"], data=records[0]["data"]
    )
    shown = table[["epochs", "best", "test", "meta_updates", "phi_moved"]].dropna(axis="columns", how="all")
    shown = shown.astype(float).map("{:.4g}".format).replace("nan", "–")
    return shown.rename(columns={"meta_updates": "updates", "phi_moved": "Φ moved"}).rename_axis(columns=where)


def _protocols(rows: pd.DataFrame) -> list[str]:
    """The protocols that have rows."""
    return [protocol for protocol in PROTOCOLS if protocol in set(rows["protocol"])]


def _gain(difference: paired.PairedDifference) -> str:
    """A gain in percent with Student's interval and the number of pairs."""
    if not difference.pairs:
        return "no pairs yet"
    lost = f", {difference.lost} lost" if difference.lost else ""
    gain = f"{difference.mean_text} % {difference.t_interval}" if difference.seeds else "–"
    return f"{gain}; {difference.pairs} pair{'s' if difference.pairs > 1 else ''}{lost}"


def _printed(number: float, form: str, unit: str = "") -> str:
    """A number of the paper for a page; a dash where it has none."""
    return "–" if math.isnan(number) else f"{number:{form}}{unit}"
