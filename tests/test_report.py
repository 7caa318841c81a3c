"""From records to tables and verdicts."""

import math

import numpy as np
import pandas as pd
import pytest

from metaadamw_lite.experiments import report
from metaadamw_lite.experiments.report import PairedDifference, improvement, verdict


def series(values, start=0):
    return pd.Series(values, index=range(start, start + len(values)))


def test_improvement_is_paired_by_seed_and_relative_to_the_baseline():
    d = improvement(series([0.9, 1.8, 3.6]), series([1.0, 2.0, 3.0]), lower_is_better=True)
    assert d.mean == pytest.approx((10 + 10 - 20) / 3)
    assert d.seeds == 3
    assert d.low <= d.mean <= d.high
    up = improvement(series([0.9, 1.8, 3.6]), series([1.0, 2.0, 3.0]), lower_is_better=False)
    assert up.mean == pytest.approx(-d.mean)


def test_equal_differences_are_a_decision():
    d = improvement(series([0.9, 1.8, 3.6]), series([1.0, 2.0, 4.0]), lower_is_better=True)
    assert (d.low, d.high) == pytest.approx((10, 10))
    assert verdict(d) == "holds"


def test_seeds_without_a_partner_are_left_out():
    d = improvement(series([0.9, 1.8, 100.0]), series([2.0, 1.0, 5.0], start=1), lower_is_better=True)
    assert d.seeds == 2
    assert math.isnan(d.low)
    assert verdict(d) == "not yet tested"


def test_the_t_test_is_that_of_the_pairs():
    from scipy import stats

    arm, baseline = np.array([1.0, 1.1, 0.9, 1.3]), np.array([1.2, 1.0, 1.1, 1.4])
    d = improvement(series(arm), series(baseline), lower_is_better=True)
    assert d.p == pytest.approx(stats.ttest_rel(arm / baseline, np.ones(4)).pvalue)


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (1.0, 3.0, 0.01, "holds"),
        (-3.0, -1.0, 0.01, "does not hold: it is worse"),
        (-1.0, 3.0, 0.01, "not decided: within chance"),
        (1.0, 3.0, 0.2, "not decided: within chance"),
        (math.nan, math.nan, math.nan, "not yet tested"),
    ],
)
def test_a_verdict_takes_the_interval_and_the_test(low, high, p, expected):
    assert verdict(PairedDifference(2.0, low, high, p, 5)) == expected


def test_outcome_is_the_test_metric_under_clean_only():
    runs = pd.DataFrame({"protocol": ["paper", "clean"], "best": [1.0, 2.0], "test": [None, 3.0]})
    assert report.outcomes(runs)["outcome"].tolist() == [1.0, 3.0]


def test_the_papers_tables_are_whole():
    tasks = ["etth1", "wikitext2", "multi30k", "cifar10", "imdb"]
    for number in (2, 4, 5):
        assert report.paper_table(number).index.tolist() == tasks
    table = report.paper_table(2)
    relative = 100 * (table["metaadamw"] / table["adamw"] - 1).abs()
    assert np.allclose(relative, table["improvement_percent"], atol=0.02), "Table 2 agrees with itself"


def test_committed_records_are_readable_and_real():
    from metaadamw_lite.experiments.records import read_records

    records = read_records(report.repository() / "data" / "results")
    assert len(records) >= 18
    for record in records:
        assert record["run"]["profile"] == "smoke" or record["data"] != "synthetic"
        assert record["environment"]["revision"]
        assert not record["environment"]["revision"].endswith("+"), "made from a changed checkout"
