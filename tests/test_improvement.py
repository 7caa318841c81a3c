"""Paired differences: means, intervals, tests and how they are written."""

import math
from dataclasses import astuple

import numpy as np
import pandas as pd
import pytest
from made_records import series
from statsmodels.stats.multitest import multipletests

from metaadamw_lite.experiments import paired
from metaadamw_lite.experiments.paired import improvement


def test_improvement_is_paired_by_seed_and_relative_to_the_baseline():
    d = improvement(series([0.9, 1.8, 3.6]), series([1.0, 2.0, 3.0]), lower_is_better=True)
    assert d.mean == pytest.approx((10 + 10 - 20) / 3)
    assert d.seeds == 3
    assert d.low <= d.mean <= d.high
    up = improvement(series([0.9, 1.8, 3.6]), series([1.0, 2.0, 3.0]), lower_is_better=False)
    assert up.mean == pytest.approx(-d.mean)


def test_the_bootstrap_intervals_have_the_width_they_should():
    values = {"a": pd.Series([1.0, 2, 3, 4, 50]), "b": pd.Series([-1.0, 5, 9, 0, 2])}
    iqm, better = paired.over_tasks(values).values()
    assert iqm.value == pytest.approx(np.sort([1, 2, 3, 4, 50, -1, 5, 9, 0, 2])[2:8].mean())
    assert iqm.low < iqm.value - 0.5
    assert iqm.high > iqm.value + 0.5
    assert 0.3 < better.high - better.low < 0.6
    d = paired.paired_difference(pd.Series([-1.0, 0, 1, 2, 3]), "%")
    assert (d.low, d.high) == pytest.approx((-0.2, 2.2), abs=0.25), "as scipy's BCa interval of five numbers"


def test_the_t_test_is_that_of_the_pairs():
    from scipy import stats

    arm, baseline = np.array([1.0, 1.1, 0.9, 1.3]), np.array([1.2, 1.0, 1.1, 1.4])
    d = improvement(series(arm), series(baseline), lower_is_better=True)
    assert d.p == pytest.approx(stats.ttest_rel(arm / baseline, np.ones(4)).pvalue)


def test_the_wilcoxon_test_is_that_of_the_pairs():
    from scipy import stats

    arm, baseline = series([1.0, 1.1, 0.9, 1.3, 0.7]), series([1.2, 1.0, 1.15, 1.4, 1.1])
    d = improvement(arm, baseline, lower_is_better=True)
    assert d.p_wilcoxon == pytest.approx(stats.wilcoxon(1 - arm / baseline).pvalue)
    assert math.isnan(improvement(arm, arm, lower_is_better=True).p_wilcoxon)


def test_where_one_more_pair_would_fall():
    d = paired.paired_difference(series([1.0, 2.0, 3.0]), "%")  # 2 ± 4.303 · √(1 + 1/3)
    assert d.one_more == "[-3.0, +7.0]"
    assert paired.paired_difference(series([1.0, 2.0]), "%").one_more == "–"
    pairs = np.random.default_rng(0).normal(5.0, 2.0, (2000, 6))
    inside = 0
    for *seen, further in pairs:
        low, high = paired.paired_difference(series(seen), "%").one_more.strip("[]").split(", ")
        inside += float(low) <= further <= float(high)
    assert inside / len(pairs) == pytest.approx(0.95, abs=0.015)


def test_a_small_p_is_not_printed_as_none():
    assert [paired.p_value(p) for p in (0.04, 0.00051, 1e-7, math.nan)] == ["0.040", "0.001", "< 0.001", "–"]


def test_holm_multiplies_the_smallest_by_the_number_of_tests():
    corrected = paired.holm(pd.Series({"a": 0.01, "b": 0.04, "c": math.nan, "d": 0.03}))
    assert corrected.dropna().to_dict() == pytest.approx({"a": 0.03, "b": 0.06, "d": 0.06})
    assert math.isnan(corrected["c"])


@pytest.mark.parametrize(
    "p", [[], [0.2], [0.03, 0.03, 0.01], [0.9, 0.5, math.nan, 0.0, 1.0, 0.02], [math.nan]], ids=str
)
def test_holm_is_that_of_statsmodels(p):
    corrected = paired.holm(pd.Series(p, dtype=float))
    known = [value for value in p if not math.isnan(value)]
    theirs = multipletests(known, method="holm")[1] if known else []
    assert corrected.dropna().tolist() == pytest.approx(list(theirs))
    assert corrected.isna().tolist() == [math.isnan(value) for value in p]


def test_over_tasks_weighs_tasks_alike_and_counts_ties_half():
    improvements = {"a": series([1.0, 2.0, 3.0, 4.0]), "b": series([-1.0, 0.0])}
    together = paired.over_tasks(improvements)
    assert together["probability of improvement"].value == pytest.approx((1 + 0.25) / 2)
    for estimate in together.values():
        assert estimate.low <= estimate.value <= estimate.high
    again = paired.over_tasks(improvements)
    assert str(again["interquartile mean"]) == str(together["interquartile mean"]), "the same each time"


def test_a_task_with_one_pair_counts_and_widens_no_interval():
    together = paired.over_tasks({"a": series([1.0, 2.0, 3.0]), "b": series([-1.0])})
    assert together["probability of improvement"] == paired.Estimate(0.5, 0.5, 0.5)
    alone = paired.over_tasks({"b": series([-1.0])})
    assert alone["interquartile mean"] == paired.Estimate(-1, -1, -1)


def test_a_small_difference_does_not_look_like_none():
    assert [paired.signed(x) for x in (-12.34, 0.05, 0.0, -0.0007, 0.04)] == [
        "-12.3",
        "+0.1",
        "+0.0",
        "-0.0007",
        "+0.04",
    ]
    d = improvement(series([1.00001, 1.00002, 1.00002]), series([1.0, 1.0, 1.0]), lower_is_better=True)
    assert str(d).startswith("-0.002 % [")


def test_a_difference_shows_both_of_its_intervals():
    d = paired.paired_difference(series([1.0, 2.0, 4.0]), "%")
    assert str(d) == f"+2.3 % {d.interval}, Student's {d.t_interval}, 3 seeds"
    assert str(paired.paired_difference(series([1.0, 2.0]), "%")) == "+1.5 % [no interval], 2 seeds"


def test_the_order_of_the_pairs_does_not_matter():
    values = [-100.0, 3.0, -20.0, 8.0, 1.0]
    one, other = (paired.paired_difference(pd.Series(x), "%") for x in (values, values[::-1]))
    assert astuple(one) == astuple(other)  # a tuple takes NaN for itself


def test_students_interval_goes_with_its_p():
    d = paired.paired_difference(pd.Series([1.0, 2.0, 3.0, 2.5, 1.5]), "%")
    assert d.t_low < d.mean < d.t_high
    assert (d.t_low > 0) == (d.p < 0.05)
    wide = paired.paired_difference(pd.Series([-1.0, 2.0, 3.0, -2.5, 1.5]), "%")
    assert wide.t_low < 0 < wide.t_high
    assert wide.p > 0.05


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_log_ratios_take_no_side(lower_is_better):
    arm, baseline = series([1.0, 4.0, 2.0, 2.0]), series([2.0, 2.0, 4.0, 1.0])  # twice and half as good, in turns
    there, back = improvement(arm, baseline, lower_is_better), improvement(baseline, arm, lower_is_better)
    assert there.log_ratio == pytest.approx(0)
    assert back.log_ratio == pytest.approx(0)
    assert there.mean == pytest.approx(back.mean)
    assert abs(there.mean) == pytest.approx(25), "by the paper's formula both arms look worse, or both better"
    assert there.p_log == pytest.approx(back.p_log)


def test_log_ratios_are_tested_by_themselves():
    from scipy import stats

    arm, baseline = series([2.0, 4.0, 1.5]), series([1.0, 1.0, 1.0])
    d = improvement(arm, baseline, lower_is_better=True)
    assert d.log_ratio == pytest.approx(-100 * np.log(12) / 3)
    assert improvement(arm, baseline, lower_is_better=False).log_ratio == pytest.approx(-d.log_ratio)
    assert d.p_log == pytest.approx(stats.ttest_1samp(np.log(arm), 0).pvalue)
    assert d.p_log != pytest.approx(d.p)


def test_two_pairs_are_not_tested():
    d = improvement(series([0.9, 1.8]), series([1.0, 2.0]), lower_is_better=True)
    assert d.mean == pytest.approx(10)
    assert math.isnan(d.p)
    assert math.isnan(d.p_wilcoxon)
