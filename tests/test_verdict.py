"""Verdicts on claims, from paired differences."""

import math

import pandas as pd
import pytest
from made_records import series

from metaadamw_lite.experiments import frames, paired
from metaadamw_lite.experiments.paired import PairedDifference, improvement
from metaadamw_lite.experiments.verdict import HOLDS, NEVER, SAME, Verdict, count_decided, judge


def test_equal_differences_are_a_decision_once_there_are_enough_of_them():
    baseline = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    d = improvement(series([0.5 * x for x in baseline]), series(baseline), lower_is_better=True)
    assert (d.low, d.high) == pytest.approx((50, 50))
    assert d.p == pytest.approx(2 / 2**6), "of a sign test"
    assert str(judge(d)) == "holds"
    few = improvement(series([0.5, 1.0, 2.0]), series(baseline[:3]), lower_is_better=True)
    assert str(judge(few)) == "not decided: cannot be told from chance", "three equal small integers are no rarity"


def test_seeds_without_a_partner_are_left_out():
    d = improvement(series([0.9, 1.8, 100.0]), series([2.0, 1.0, 5.0], start=1), lower_is_better=True)
    assert d.seeds == 2
    assert math.isnan(d.low)
    assert str(judge(d)) == "not yet tested"


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (1.0, 3.0, 0.01, "holds"),
        (-3.0, -1.0, 0.01, "does not hold: it is worse"),
        (-1.0, 3.0, 0.01, "not decided: cannot be told from chance"),
        (1.0, 3.0, 0.2, "not decided: cannot be told from chance"),
        (math.nan, math.nan, math.nan, "not yet tested"),
    ],
)
def test_a_verdict_takes_the_interval_and_the_test(low, high, p, expected):
    assert str(judge(PairedDifference(2.0, low, high, p, 5))) == expected


def test_a_lost_pair_is_not_decided_after_a_correction_either():
    clear = paired.paired_difference(series([1.0, 1.1, 1.2, 0.9]), "%")
    lost = paired.paired_difference(series([1.0, 1.1, 1.2, 0.9, math.nan]), "%")
    chance = paired.paired_difference(series([1.0, -1.1, 1.2, -0.9]), "%")
    corrected = paired.corrected(pd.Series([clear, lost, chance], dtype=object))
    assert corrected[0].p == pytest.approx(3 * clear.p)
    assert count_decided(corrected) == (1, 0)
    several = pd.Series([paired.paired_difference(series([1.0, 1.3, 1.7, 0.7]), "%")] * 9, dtype=object)
    assert count_decided(several) == (9, 0)
    assert count_decided(paired.corrected(several)) == (0, 0)


def test_differences_that_are_equal_but_for_rounding_have_no_spread():
    d = paired.paired_difference(series([50, 50.00000000000001, 50]), "%")
    assert (d.low, d.high, d.p) == (pytest.approx(50), pytest.approx(50), 0.25)
    assert str(judge(d)) == "not decided: cannot be told from chance", "three equal signs are no evidence"


def test_pairs_that_are_lost_are_counted_and_leave_nothing_decided():
    outcome = pd.DataFrame(
        {
            "protocol": "paper",
            "variant": ["adamw"] * 5 + ["metaadamw"] * 5,
            "seed": [0, 1, 2, 3, 4] * 2,
            "outcome": [1.0, 2.0, 9.0, 4.0, 3.0, 0.9, 1.7, 8.2, 3.4, None],
        }
    )
    arm, baseline = frames.by_seed(outcome, "paper", "metaadamw", "adamw")
    d = improvement(arm, baseline, lower_is_better=True)
    assert (d.seeds, d.lost) == (4, 1)
    assert d.low > 0, "the four that are left went well"
    assert str(judge(d)) == "not decided: 1 of 5 pairs lost"
    assert "4 seeds; lost without a finite result: 1 of 5" in str(d)


def test_a_difference_can_be_seen_from_the_other_side():
    d = improvement(series([0.9, 1.9, 3.6]), series([1.0, 2.0, 4.0]), lower_is_better=True)
    back = d.reversed()
    assert (back.mean, back.low, back.high, back.p) == (-d.mean, -d.high, -d.low, d.p)
    assert (back.t_low, back.t_high, back.log_ratio) == (-d.t_high, -d.t_low, -d.log_ratio)
    assert back.reversed() == d
    assert judge(d).kind == HOLDS
    assert str(judge(back, opposite="it is better")) == "does not hold: it is better"


def test_the_notes_of_a_verdict_say_what_it_rests_on_unless_it_rests_on_nothing():
    assert str(Verdict(HOLDS, profile="lite", pairs=3, planned=5)) == "holds (lite runs; interim: 3 of 5 planned seeds)"
    assert str(Verdict(HOLDS, profile="lite", pairs=5, planned=5)) == "holds (lite runs)"
    assert str(Verdict(NEVER, "2 of 3 seeds", "lite", 2, 3)) == "not yet tested: 2 of 3 seeds"


def test_a_verdict_has_a_short_form_without_its_reason():
    d = paired.paired_difference(series([0.30, 0.31, 0.32, 0.29, 0.30]), "%")
    assert judge(d).text == "equivalent (±1 %), though not zero"
    assert judge(d).label == "equivalent (±1 %)"
    assert judge(d).kind == SAME
    assert not judge(d).decided
