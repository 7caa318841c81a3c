"""Pairs of runs with the same seed: their differences, with intervals and tests; ``verdict`` judges claims by them.

Arms with the same seed share weights, batches and dropout masks, so only their difference is evidence. Intervals and
tests come from scipy; equivalence tests, power and the analysis of variance from statsmodels.
Nothing here reads a file.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

CONFIDENCE = 0.95

EQUIVALENT = 1.0
"""Percent up to which a difference counts as none."""

POWER = 0.8
"""The planned chance that a study finds the paper's gain, if it is there."""

FEWEST_PAIRS, MOST_PAIRS = 10, 40
"""The limits of ``pairs_needed``: fewer pairs give no reliable interval, more take too long."""

ENOUGH_SEEDS = 3
"""The fewest pairs with an interval."""


def signed(x: float) -> str:
    """Format a difference with its sign and one decimal, or one significant digit if it would round to zero."""
    return f"{x:+.1g}" if 0 < abs(x) < 0.05 else f"{x:+.1f}"


@dataclass(frozen=True)
class PairedDifference:
    """An improvement over a baseline, paired by seed (positive: better).

    Attributes:
        mean: over the seeds.
        low, high: bootstrap interval (BCa) for the mean at 95 % confidence; NaN with fewer than three seeds. With a
            handful of pairs it is too narrow: its true coverage is below 90 %.
        p: of a paired t-test against no difference (of a sign test if all differences are equal); NaN with fewer than
            three seeds, as all tests and intervals.
        seeds: number of pairs with a result.
        p_wilcoxon: of Wilcoxon's signed-rank test, at least 1/16 with five pairs.
        unit: of mean, interval and standard deviation; "%" for relative differences.
        t_low, t_high: Student's interval, which goes with ``p``.
        log_ratio: of an ``improvement``: the mean logarithm of the ratios, times 100 (positive: better). Near zero it
            is a percentage; a factor of two is 69. Exchanging the arms only changes its sign. The mean of relative
            differences lacks this symmetry: with a large spread each arm can look worse than the other.
        p_log: of a t-test on these logarithms.
        p_equivalent: of two one-sided t-tests (TOST) against a mean outside of ±1 %, the larger of both; NaN in other
            units.
        std: standard deviation over the pairs; NaN with fewer than two.
        lost: number of pairs with a run without a finite result. With any, nothing is decided, since the others may be
            left because they went well.
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
    p_equivalent: float = float("nan")
    std: float = float("nan")
    lost: int = 0

    def __str__(self) -> str:
        lost = f"; lost without a finite result: {self.lost} of {self.pairs}" if self.lost else ""
        if not self.seeds:
            return "no pairs yet" + lost
        student = "" if np.isnan(self.low) else f", Student's {self.t_interval}"
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return f"{self.mean_text} {self.unit} {self.interval}{student}, {seeds}{lost}"

    def reversed(self) -> "PairedDifference":
        """Return the difference with the other sign, for the claim that the baseline is better."""
        t_low, t_high, log_ratio = -self.t_high, -self.t_low, -self.log_ratio
        low, high = -self.high, -self.low
        return replace(self, mean=-self.mean, low=low, high=high, t_low=t_low, t_high=t_high, log_ratio=log_ratio)

    @property
    def pairs(self) -> int:
        """The number of pairs, lost ones included."""
        return self.seeds + self.lost

    @property
    def mean_text(self) -> str:
        """The mean, as text."""
        return signed(self.mean)

    @property
    def log_text(self) -> str:
        """The log ratio, as text."""
        return signed(self.log_ratio)

    @property
    def interval(self) -> str:
        """The bootstrap interval, as text; "[no interval]" with too few seeds."""
        return "[no interval]" if np.isnan(self.low) else f"[{signed(self.low)}, {signed(self.high)}]"

    @property
    def half_width(self) -> float:
        """Half the width of Student's interval; a mean gain is decided only if it is larger."""
        return (self.t_high - self.t_low) / 2

    @property
    def half_width_of_one(self) -> float:
        """Half the width of Student's 95 % prediction interval for one further pair."""
        return self.half_width * math.sqrt(self.seeds + 1)

    @property
    def one_more(self) -> str:
        """Student's 95 % prediction interval for one further pair, as text; a dash with too few seeds.

        The paper's results, from one pair each, compare with this interval and not with that of a mean. It assumes
        normal differences, which a handful of pairs cannot confirm.
        """
        half = self.half_width_of_one
        return "–" if np.isnan(half) else f"[{signed(self.mean - half)}, {signed(self.mean + half)}]"

    @property
    def t_interval(self) -> str:
        """Student's interval, as text; a dash with too few seeds."""
        return "–" if np.isnan(self.low) else f"[{signed(self.t_low)}, {signed(self.t_high)}]"


def improvement(arm: "pd.Series[float]", baseline: "pd.Series[float]", lower_is_better: bool) -> PairedDifference:
    """Return the improvement of an arm over a baseline, both indexed by seed, from the seeds of both.

    Each pair's difference is relative to its baseline run, as in the paper's Table 2.
    """
    difference = paired_difference(improvements_by_seed(arm, baseline, lower_is_better), "%")
    pairs = pairs_by_seed(arm, baseline).dropna()
    if not (len(pairs) and (pairs > 0).all(axis=None)):
        return difference
    logarithms = paired_difference((pairs["arm"] / pairs["baseline"]).map(math.log), "")
    log_ratio = (-1 if lower_is_better else 1) * 100 * logarithms.mean
    return replace(difference, log_ratio=log_ratio, p_log=logarithms.p)


def paired_difference(differences: "pd.Series[float]", unit: str) -> PairedDifference:
    """Return the mean of differences, one for each seed, with its interval and tests; NaN is a lost pair."""
    values = np.sort(differences.dropna().to_numpy()) + 0.0  # + 0.0 turns −0 into 0; the bootstrap depends on the order
    low = high = t_low = t_high = p = p_equivalent = p_wilcoxon = float("nan")
    if len(values) >= ENOUGH_SEEDS and np.ptp(values) <= 1e-12 * np.abs(values).max():  # no spread but rounding
        low = high = t_low = t_high = float(values.mean())  # no t-test is defined without any: sign tests
        p = 2 * 0.5 ** len(values) if low else 1.0
        p_equivalent = 0.5 ** len(values) if abs(low) < EQUIVALENT else 1.0
    elif len(values) >= ENOUGH_SEEDS:
        test = stats.ttest_1samp(values, 0)
        p = float(test.pvalue)
        t_low, t_high = (float(x) for x in test.confidence_interval(CONFIDENCE))
        interval = stats.bootstrap(
            (values,), np.mean, confidence_level=CONFIDENCE, rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
        p_equivalent = float(DescrStatsW(values).ttost_mean(-EQUIVALENT, EQUIVALENT)[0])
    if len(values) >= ENOUGH_SEEDS and values.any():
        p_wilcoxon = float(stats.wilcoxon(values).pvalue)
    return PairedDifference(
        mean=float(values.mean()) if len(values) else float("nan"),
        low=low,
        high=high,
        p=p,
        seeds=len(values),
        p_wilcoxon=p_wilcoxon,
        unit=unit,
        t_low=t_low,
        t_high=t_high,
        p_equivalent=p_equivalent if unit == "%" else float("nan"),
        std=float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
        lost=len(differences) - len(values),
    )


def pairs_by_seed(arm: "pd.Series[float]", baseline: "pd.Series[float]") -> pd.DataFrame:
    """Pair two arms by seed: the columns "arm" and "baseline" for the seeds of both, NaN for no finite result."""
    return pd.concat([arm.rename("arm"), baseline.rename("baseline")], axis=1, join="inner").astype(float)


def improvements_by_seed(
    arm: "pd.Series[float]", baseline: "pd.Series[float]", lower_is_better: bool
) -> "pd.Series[float]":
    """Return the improvement of each pair in percent, by seed."""
    pairs = pairs_by_seed(arm, baseline)
    return percent_gain(pairs["arm"], pairs["baseline"], lower_is_better)


Results = TypeVar("Results", "pd.Series[float]", pd.DataFrame)


def percent_gain(arm: Results, baseline: Any, lower_is_better: bool) -> Results:
    """Compute the relative improvement in percent, elementwise as pandas aligns the two; positive is better."""
    gain: Results = (-1 if lower_is_better else 1) * 100 * (arm / baseline - 1)
    return gain


def p_value(p: float) -> str:
    """Format a p-value; NaN, without a test, is a dash."""
    return "–" if np.isnan(p) else "< 0.001" if p < 0.0005 else f"{p:.3f}"


def corrected(differences: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return some ``PairedDifference`` with ``p`` and ``p_equivalent`` after Holm's correction, for ``verdict.judge``.

    Tests of a difference are one family, tests of equivalence another.
    """
    families = ([getattr(d, name) for d in differences] for name in ("p", "p_equivalent"))
    p, p_equivalent = (holm(pd.Series(family, dtype=float)) for family in families)
    judged = [replace(d, p=q, p_equivalent=e) for d, q, e in zip(differences, p, p_equivalent, strict=True)]
    return pd.Series(judged, index=differences.index, dtype=object)


def holm(p_values: "pd.Series[float]") -> "pd.Series[float]":
    """Correct the p-values of a family of tests by Holm's method; NaN stay NaN and do not count."""
    # statsmodels' own collects garbage at each call, which took most of the time of a table.
    ordered = p_values.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p_values.index)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN, with too few pairs, is shown as a dash."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def over_tasks(improvements: "dict[str, pd.Series[float]]") -> dict[str, Estimate]:
    """Summarise many tasks by the improvements (percent, by seed) of each.

    Intervals come from a bootstrap stratified by task, which draws seeds anew within each (Agarwal et al., 2021). A
    task with a single pair widens no interval.

    Returns:
        "interquartile mean" of all improvements (the mean of their middle half), in percent, and "probability of
        improvement": the chance that a random pair of a random task is better than its baseline, ties counting half.
    """
    groups = [x.to_numpy() for x in improvements.values() if len(x)]
    many, alone = ([g for g in groups if (len(g) > 1) == more] for more in (True, False))  # one pair cannot be redrawn
    statistics: dict[str, Callable[[list[Any]], float]] = {
        "interquartile mean": lambda parts: float(stats.trim_mean(np.concatenate(parts), 0.25)),
        "probability of improvement": lambda parts: float(np.mean([np.mean((x > 0) + (x == 0) / 2) for x in parts])),
    }
    result = {}
    for name, statistic in statistics.items():
        value = low = high = statistic(groups)
        if many:
            low, high = _bootstrapped(many, lambda *parts, statistic=statistic: statistic([*parts, *alone]))
        result[name] = Estimate(value, low, high)
    return result


def _bootstrapped(samples: Sequence["np.ndarray[Any, Any]"], statistic: Callable[..., float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval (percentiles) of a statistic of some samples, each drawn from anew."""
    interval = stats.bootstrap(
        samples,
        statistic,
        n_resamples=2000,
        vectorized=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


# ---------------------------------------------------------------- how many pairs a question takes


def power(difference: PairedDifference, gain: float) -> float:
    """Return the chance that these pairs' t-test tells a mean of ``gain`` from zero, if their spread is the true one.

    Args:
        difference: the pairs at hand.
        gain: in the unit of ``difference``, of any sign; NaN for none.

    Returns:
        The power at p < 0.05, two-sided and without a correction; NaN with fewer than three pairs or without a gain.
    """
    if difference.seeds < ENOUGH_SEEDS or math.isnan(gain):
        return math.nan
    return float(_power(difference.std, gain, np.array([difference.seeds]))[0])


def pairs_needed(first: "pd.Series[float]", gain: float) -> int:
    """Return how many pairs tell a mean of ``gain`` from zero with a power of 80 %, by the spread of the first ones.

    Args:
        first: differences of the first pairs; NaN is a lost pair.
        gain: in the same unit.

    Returns:
        A number from 10 to 40; 40 also where fewer than two pairs have a result.
    """
    counts = np.arange(FEWEST_PAIRS, MOST_PAIRS)
    enough = _power(float(first.std()), gain, counts) >= POWER
    return int(counts[enough.argmax()]) if enough.any() else MOST_PAIRS


def _power(std: float, gain: float, pairs: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return the power of a paired t-test for each number of pairs."""
    effect = min(abs(gain) / std if std else math.inf, 6.0)  # at 6, three pairs have a power of 0.995
    solver, error = TTestPower(), 1 - CONFIDENCE
    both = solver.power(effect, pairs, error)
    right = solver.power(effect, pairs, error / 2, alternative="larger")
    # For large effects scipy returns NaN for the part with the wrong sign, which is negligible.
    return np.asarray(np.where(np.isnan(both), right, both))


# ---------------------------------------------------------------- spread and its sources


def spread_ratio(arm: "pd.Series[float]", baseline: "pd.Series[float]") -> Estimate:
    """Return the ratio of an arm's standard deviation over seeds to a baseline's.

    Args:
        arm, baseline: results by seed; only seeds with two finite results count.

    Returns:
        The ratio with Pitman's and Morgan's interval, which is exact for normal pairs and allows for the arms'
        correlation; NaN with fewer than three pairs, or without any spread in one arm.
    """
    pairs = pairs_by_seed(arm, baseline).dropna()
    n = len(pairs)
    if n < ENOUGH_SEEDS or not (pairs.std() > 0).all():
        return Estimate(math.nan, math.nan, math.nan)
    x, y = (pairs[name] / pairs[name].std() for name in ("arm", "baseline"))
    ratio = float(pairs["arm"].std() / pairs["baseline"].std())
    # The interval holds the ratios ω for which a test finds no correlation of arm / ω ± baseline.
    t = stats.t.ppf((1 + CONFIDENCE) / 2, n - 2)
    wide = 1 + 2 * max(0.0, 1 - float(x.corr(y)) ** 2) * t**2 / (n - 2)
    factor = math.sqrt(wide + math.sqrt(wide**2 - 1))
    return Estimate(ratio, ratio / factor, ratio * factor)


def share_of_phi(gains: pd.DataFrame) -> Estimate:
    """Return Φ's share of the variance of gains, from runs of every Φ with every run seed.

    The mixed model is gain = run seed (fixed) + Φ (random) + rest (random), by a two-way analysis of variance. Two run
    seeds cannot show the spread over run seeds, so the share is that of the variance among runs of one seed.

    Args:
        gains: a row for each Φ, a column for each run seed. A Φ with a lost run does not count.

    Returns:
        The intraclass correlation (Shrout and Fleiss, 1979: ICC(3, 1)) with its exact interval for normal effects.
        Zero means that Φ makes no difference; chance may bring it below zero.

    Raises:
        ValueError: with fewer than two whole rows or two columns.
    """
    whole = gains.dropna()
    rows, columns = whole.shape
    if rows < 2 or columns < 2:
        raise ValueError(f"{rows} Φ's have a result with each of {columns} run seeds; at least 2 and 2 are needed")
    cells = whole.set_axis(range(columns), axis=1).reset_index(drop=True).rename_axis("phi").reset_index()
    long = cells.melt("phi", var_name="seed", value_name="gain").astype({"gain": float})
    variance = anova_lm(ols("gain ~ C(phi) + C(seed)", long).fit())
    f = float(variance.loc["C(phi)", "F"])
    degrees = variance.loc[["C(phi)", "Residual"], "df"].to_numpy()
    apart = stats.f.ppf((1 + CONFIDENCE) / 2, *degrees), 1 / stats.f.ppf((1 + CONFIDENCE) / 2, *degrees[::-1])
    value, low, high = (float((x - 1) / (x - 1 + columns)) for x in (f, f / apart[0], f / apart[1]))
    return Estimate(value, low, high)


def share_as_good(results: pd.DataFrame, baseline: "pd.Series[float]", lower_is_better: bool, gain: float) -> Estimate:
    """Return the share of random Φ's runs that gain at least ``gain`` over the mean of a baseline's runs.

    Args:
        results: a row for each Φ, a column for each run seed. NaN, for no finite result, counts as no gain.
        baseline: the results of the baseline's runs.
        lower_is_better: direction of the metric.
        gain: the paper's, in percent.

    Returns:
        The share. Its interval spans the exact one (Clopper and Pearson; all runs of a Φ count as one) and that of a
        bootstrap over Φ's and the baseline's runs.
    """

    def share(phis: "np.ndarray[Any, Any]", runs: "np.ndarray[Any, Any]") -> float:
        gains = percent_gain(results.iloc[phis], baseline.iloc[runs].mean(), lower_is_better)
        return float((gains >= gain).to_numpy().mean())

    samples = np.arange(len(results)), np.arange(len(baseline))
    value, (low, high) = share(*samples), _bootstrapped(samples, share)
    exact = exact_share(value * len(results), len(results))
    return Estimate(value, min(low, exact.low), max(high, exact.high))


def exact_share(count: float, of: int) -> Estimate:
    """Return a share with its exact interval (Clopper and Pearson)."""
    low, high = proportion_confint(count, of, 1 - CONFIDENCE, method="beta")
    return Estimate(count / of, float(low), float(high))


def best_of(
    results: pd.DataFrame, baseline: "pd.Series[float]", lower_is_better: bool, draws: int
) -> tuple[Estimate, Estimate]:
    """Return the largest gain among k draws of a random Φ, which a search among Φ's finds by chance alone.

    Args:
        results, baseline, lower_is_better: as for ``share_as_good``; a run without a finite result is not drawn.
        draws: k, with replacement.

    Returns:
        The mean of the best of k and its 95th percentile, in percent, with intervals from a bootstrap over Φ's and the
        baseline's runs. No draw beats the best run, so both are too small if k is near the number of runs.
    """

    def best(phis: "np.ndarray[Any, Any]", runs: "np.ndarray[Any, Any]") -> tuple[float, float]:
        gains = percent_gain(results.iloc[phis], baseline.iloc[runs].mean(), lower_is_better).to_numpy().ravel()
        values = np.sort(gains[~np.isnan(gains)])
        at_most = (np.arange(len(values) + 1) / len(values)) ** draws  # the best of k lies among the first so many
        return float(values @ np.diff(at_most)), float(values[np.searchsorted(at_most[1:], 0.95)])

    results = results.dropna(how="all")
    samples = np.arange(len(results)), np.arange(len(baseline))
    values = best(*samples)
    intervals = [_bootstrapped(samples, lambda *drawn, k=k: best(*drawn)[k]) for k in range(2)]
    mean, high = (Estimate(value, *interval) for value, interval in zip(values, intervals, strict=True))
    return mean, high


# ---------------------------------------------------------------- time to a target


def median_time(times: "pd.Series[float]", reached: "pd.Series[bool]") -> Estimate:
    """Return the time by which half of some runs have reached a target; other runs are censored at their end.

    Args:
        times: time of each run until it reached the target, or ended without.
        reached: mask of the runs that reached it.

    Returns:
        Kaplan and Meier's median with its 95 % interval (log-log). It is infinite if half is never reached, and all NaN
        without any run or with a time of NaN.
    """
    if times.empty or times.isna().any():
        return Estimate(math.nan, math.nan, math.nan)
    sample = stats.CensoredData(uncensored=times[reached].to_numpy(), right=times[~reached].to_numpy())
    alive = stats.ecdf(sample).sf
    with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):
        band = alive.confidence_interval(CONFIDENCE, method="log-log")

    def first(probabilities: Any) -> float:
        known = np.where(np.isnan(probabilities), alive.probabilities, probabilities)  # unknown where all or none live
        at = alive.quantiles[known <= 0.5]
        return float(at[0]) if len(at) else math.inf

    return Estimate(first(alive.probabilities), first(band.low.probabilities), first(band.high.probabilities))
