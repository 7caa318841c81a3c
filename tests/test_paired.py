"""Statistics of pairs on made data whose answers are known."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from metaadamw_lite.experiments import paired
from metaadamw_lite.experiments.paired import improvement, paired_difference
from metaadamw_lite.experiments.verdict import judge


def series(values):
    return pd.Series(values, dtype=float)


# ---------------------------------------------------------------- equivalence


def test_the_equivalence_test_is_the_larger_of_two_one_sided_t_tests():
    values = [0.3, -0.2, 0.5, 0.1]
    above = stats.ttest_1samp(values, -1, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 1, alternative="less").pvalue
    assert paired_difference(series(values), "%").p_equivalent == pytest.approx(max(above, below))
    assert paired_difference(-series(values), "%").p_equivalent == pytest.approx(max(above, below))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, -0.1, 0.2, 0.0, -0.2], "equivalent (±1 %)"),
        ([0.30, 0.31, 0.32, 0.29, 0.30], "equivalent (±1 %), though not zero"),
        ([1e-5, 1.1e-5, 0.9e-5], "equivalent (±1 %), though not zero"),
        ([0.9, -0.8, 1.2, 0.7, -1.3], "not decided: cannot be told from chance"),
        ([1.5, 1.6, 1.4, 1.55, 1.5], "holds"),
        ([-1.5, -1.6, -1.4, -1.55, -1.5], "does not hold: it is worse"),
        ([0.1, -0.1, 0.2, 0.0, math.nan], "not decided: 1 of 5 pairs lost"),
        ([0.1, -0.1], "not yet tested"),
    ],
)
def test_a_difference_within_a_percent_is_called_equivalent(values, expected):
    difference = paired_difference(series(values), "%")
    assert str(judge(difference)) == expected
    if "hold" not in expected:
        assert str(judge(difference.reversed(), opposite="it is better")) == expected, (
            "whichever side is claimed to be better"
        )


def test_equal_differences_are_equivalent_once_there_are_five():
    assert str(judge(paired_difference(series([0.0] * 5), "%"))) == "equivalent (±1 %)"
    assert str(judge(paired_difference(series([0.0] * 4), "%"))) == "not decided: identical results"
    assert str(judge(paired_difference(series([1.0] * 6), "%"))) == "holds", "a percent is no longer within one"


def test_equivalence_is_a_matter_of_percentages():
    assert math.isnan(paired_difference(series([0.1, -0.1, 0.2]), "epochs").p_equivalent)
    d = improvement(series([0.701, 0.702, 0.699, 0.700]), series([0.7, 0.701, 0.7, 0.701]), lower_is_better=False)
    assert str(judge(d)) == "equivalent (±1 %)"


def test_equivalence_keeps_its_level():
    draws = np.random.default_rng(0).normal(1.0, 0.5, (2000, 5))  # just outside
    called = [paired_difference(series(d), "%").p_equivalent < 0.05 for d in draws[:400]]
    assert 0.02 < np.mean(called) < 0.08


def test_equivalence_is_corrected_as_differences_are():
    same = paired_difference(series([0.5, -0.6, 0.7, 0.1]), "%")
    assert 0.01 < same.p_equivalent < 0.05
    several = paired.corrected(pd.Series([same] * 6, dtype=object))
    assert several[0].p_equivalent == pytest.approx(6 * same.p_equivalent)
    assert str(judge(several[0])) == "not decided: cannot be told from chance"
    points = paired_difference(series([5.0, 6, 7, 5]), "points")
    mixed = paired.corrected(pd.Series([points, same], index=[3, 7], dtype=object))
    assert mixed[7].p_equivalent == same.p_equivalent, "the only test of equivalence"
    assert mixed[3].p == pytest.approx(2 * points.p)


# ---------------------------------------------------------------- power


def test_the_power_is_that_of_the_t_test():
    values = series([1.0, 3.0, -1.0, 4.0, 0.5, 2.0])
    d = paired_difference(values, "%")
    assert d.std == pytest.approx(values.std())
    expected = TTestPower().power(2.0 / values.std(), 6, 0.05)
    assert paired.power(d, 2.0) == pytest.approx(expected)
    assert paired.power(d, -2.0) == pytest.approx(expected)
    draws = stats.ttest_1samp(np.random.default_rng(0).normal(2.0, values.std(), (4000, 6)), 0, axis=1).pvalue
    assert np.mean(draws < 0.05) == pytest.approx(expected, abs=0.03)
    assert math.isnan(paired.power(paired_difference(series([1.0, 2.0]), "%"), 2.0))
    assert paired.power(paired_difference(series([1.0, 1.0, 1.0]), "%"), 2.0) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("effect", [0.01, 0.5, 3.0, 4.0, 8.0, 1e6])
@pytest.mark.parametrize("pairs", [3, 5, 10, 40])
def test_the_power_is_a_number_for_every_effect(effect, pairs):
    values = np.tile([-1.0, 1.0, 0.0], 14)[:pairs]
    values = series(values / values.std(ddof=1))
    assert 0.04 < paired.power(paired_difference(values, "%"), effect) <= 1


@pytest.mark.parametrize("std_over_gain", [0.5, 1.3, 1.6, 2.0])
def test_as_many_pairs_are_asked_for_as_the_power_takes(std_over_gain):
    first = series([-1.0, 1.0, 0.0, 0.5, -0.5])
    gain = first.std() / std_over_gain
    needed = paired.pairs_needed(first, gain)
    exact = math.ceil(TTestPower().solve_power(1 / std_over_gain, alpha=0.05, power=0.8))
    assert needed == max(10, exact)
    assert paired.pairs_needed(first, -gain) == needed


def test_between_ten_and_forty_pairs_are_asked_for():
    assert paired.pairs_needed(series([4.0, 4.0, 4.1, 4.0, 3.9]), 4.0) == 10
    assert paired.pairs_needed(series([4.0] * 5), 4.0) == 10
    assert paired.pairs_needed(series([40.0, -30.0, 10.0, -60.0, 5.0]), 1.0) == 40
    assert paired.pairs_needed(series([math.nan] * 5), 4.0) == 40
    assert paired.pairs_needed(series([1.0, math.nan, 0.0, -1.0, math.nan]), 0.5) == paired.pairs_needed(
        series([1.0, 0.0, -1.0]), 0.5
    )


# ---------------------------------------------------------------- spread


def test_the_ratio_of_spreads_has_the_interval_of_pitman_and_morgan():
    rng = np.random.default_rng(1)
    baseline = series(rng.normal(size=12))
    arm = 3 * (0.6 * baseline + 0.8 * series(rng.normal(size=12))) + 100
    ratio = paired.spread_ratio(arm, baseline)
    assert ratio.value == pytest.approx(arm.std() / baseline.std())
    for end in (ratio.low, ratio.high):
        p = stats.pearsonr(arm / end + baseline, arm / end - baseline).pvalue
        assert p == pytest.approx(0.05), "the test is on the edge at both ends"
    back = paired.spread_ratio(baseline, arm)
    assert (back.low, back.high) == pytest.approx((1 / ratio.high, 1 / ratio.low))


def test_the_interval_of_a_ratio_of_spreads_covers_the_true_one():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(1000):
        common = rng.normal(size=5)
        x, y = 2 * (common + rng.normal(size=5)), common + rng.normal(size=5)
        ratio = paired.spread_ratio(series(x), series(y))
        inside += ratio.low <= 2 <= ratio.high
    assert inside / 1000 == pytest.approx(0.95, abs=0.02)


def test_a_ratio_of_spreads_takes_pairs_that_differ():
    arm = series([1.0, 2.0, 4.0, math.nan])
    assert paired.spread_ratio(arm, series([1.0, 2.0, 4.0, 100.0])).value == pytest.approx(1), "of pairs only"
    for other in ([1.0, 2.0], [3.0, 3.0, 3.0, 3.0]):
        assert math.isnan(paired.spread_ratio(arm, series(other)).high)


def crossed(phi, rest, seeds=2, phis=32, seed=0):
    """Gains with these standard deviations, where run seed k adds 10 k."""
    rng = np.random.default_rng(seed)
    gains = rng.normal(0, phi, (phis, 1)) + 10 * np.arange(seeds) + rng.normal(0, rest, (phis, seeds))
    return pd.DataFrame(gains, index=range(1000, 1000 + phis))


def test_the_share_of_phi_is_the_intraclass_correlation_of_the_mixed_model():
    from statsmodels.formula.api import mixedlm

    gains = crossed(phi=2.0, rest=1.0)
    share = paired.share_of_phi(gains)
    long = gains.rename_axis("phi").reset_index().melt("phi", var_name="seed", value_name="gain")
    long["gain"] = long["gain"].astype(float)
    fit = mixedlm("gain ~ C(seed)", long, groups="phi").fit(reml=True)
    of_phi = float(fit.cov_re.iloc[0, 0])
    assert share.value == pytest.approx(of_phi / (of_phi + fit.scale), abs=1e-3)
    assert 0.5 < share.low < share.value < share.high < 0.95


@pytest.mark.parametrize(("phi", "rest", "share"), [(2.0, 1.0, 0.8), (1.0, 1.0, 0.5), (0.0, 1.0, 0.0)])
def test_the_interval_of_phis_share_covers_the_true_one(phi, rest, share):
    found = [paired.share_of_phi(crossed(phi, rest, seed=k)) for k in range(200)]
    assert np.mean([e.value for e in found]) == pytest.approx(share, abs=0.03)
    assert np.mean([e.low <= share <= e.high for e in found]) > 0.9


def test_a_phi_that_lost_a_run_does_not_count():
    gains = crossed(2.0, 1.0)
    more = pd.concat([gains, pd.DataFrame([[np.nan, 900.0]], index=[2000])])
    assert paired.share_of_phi(more) == paired.share_of_phi(gains)
    with pytest.raises(ValueError, match=r"1 Φ's .* 2 run seeds"):
        paired.share_of_phi(gains.head(1))
    with pytest.raises(ValueError, match=r"32 Φ's .* 1 run seeds"):
        paired.share_of_phi(gains[[0]])


ALONE = series([100.0, 100.0])
"""A baseline without noise, over which a higher result of 100 + x gains x percent."""


def test_the_papers_gain_has_a_place_among_those_of_random_phis():
    results = 100 + pd.DataFrame({0: np.arange(32.0), 1: np.arange(32.0)})
    share = paired.share_as_good(results, ALONE, False, 24.0)
    assert share.value == pytest.approx(0.25)
    exact = stats.binomtest(8, 32).proportion_ci(method="exact")
    assert share.low <= exact.low < exact.high <= share.high + 1e-9, "two runs of one Φ are not two draws"
    none = paired.share_as_good(results, ALONE, False, 99.0)
    assert (none.value, none.low) == (0, 0)
    assert 0.05 < none.high < 0.15
    lost = results.copy()
    lost.iloc[-1] = np.nan
    assert paired.share_as_good(lost, ALONE, False, 24.0).value == pytest.approx(7 / 32), "a lost run is no gain"
    errors = 200 - results
    assert paired.share_as_good(errors, ALONE, True, 24.0) == share, "smaller errors are gains"


def test_noise_of_the_baseline_widens_the_interval_of_the_share():
    results = 100 + pd.DataFrame({0: np.arange(32.0)})
    noisy = series(list(100 + 40 * np.array([-1, 1, -1, 1, -1, 1])))
    sharp, wide = (paired.share_as_good(results, base, False, 24.0) for base in (ALONE, noisy))
    assert wide.value == sharp.value
    assert wide.high - wide.low > 1.5 * (sharp.high - sharp.low)


def test_the_best_of_more_draws_is_better():
    results = 100 + pd.DataFrame(np.random.default_rng(0).normal(size=(400, 2)))
    found = {k: paired.best_of(results, ALONE, False, k) for k in (1, 2, 10)}
    best = {k: mean for k, (mean, _) in found.items()}
    assert best[1].value == pytest.approx(results.to_numpy().mean() - 100)
    assert best[2].value == pytest.approx(1 / math.sqrt(math.pi), abs=0.1), "of two normal draws"
    assert best[10].value == pytest.approx(1.539, abs=0.15)
    assert all(e.low < e.value < e.high for e in best.values())
    assert found[1][1].value == pytest.approx(stats.norm.ppf(0.95), abs=0.15)
    assert found[10][1].value == pytest.approx(stats.norm.ppf(0.95 ** (1 / 10)), abs=0.3)
    few = paired.best_of(pd.DataFrame([[101.0], [103.0], [np.nan]]), ALONE, False, 2)[0]
    assert few.value == pytest.approx(2.5)
    assert paired.best_of(results, ALONE, False, 10) == found[10], "the same each time"
