"""MetaAdamW beside AdamW with a searched learning rate."""

import pytest
from made_records import COMMITTED, made, runs_of

from metaadamw_lite.experiments import TASKS, tuning_report
from metaadamw_lite.experiments.records import Records, RunKey
from metaadamw_lite.experiments.studies import SEARCH_SEEDS
from metaadamw_lite.experiments.variants import SEEDS
from metaadamw_lite.experiments.verdict import count_decided


def test_without_a_complete_search_nothing_is_compared_with_a_tuned_baseline():
    table = tuning_report.tuned_table(Records.holding(runs_of("lite", 5)))
    assert table.empty
    assert count_decided(table["difference"]) == (0, 0)
    assert {"learning_rate", "edge", "tuned", "worse", "p_holm"} <= set(table.columns)


def test_the_tuned_baseline_is_corrected_for_all_searches():
    table = tuning_report.tuned_table(COMMITTED)
    assert len(table) >= len(TASKS)
    p = table["difference"].map(lambda d: d.p).dropna()
    assert (table["p_holm"][p.index] >= p).all()
    if len(p):
        assert table["p_holm"].min() == pytest.approx(min(1, len(p) * p.min()))


def test_a_tuned_baseline_is_judged_by_seeds_that_it_was_not_chosen_by():
    table = tuning_report.tuned_table(COMMITTED)
    assert all(d.seeds <= len(SEEDS) for column in ("tuned", "difference") for d in table[column].dropna())


def test_a_tuned_baseline_and_what_is_set_beside_it_have_the_right_signs(monkeypatch):
    errors = {"adamw": 2.0, "adamw-lr0.001": 1.0, "metaadamw": 0.9}
    records = [made(arm, k, [x + k / 100]) for arm, x in errors.items() for k in (*range(5), *SEARCH_SEEDS)]
    given = Records.holding(records)
    done = RunKey("etth1", "adamw", "paper", "paper", SEARCH_SEEDS[0])
    monkeypatch.setattr(tuning_report, "best_variant", lambda search, _: "adamw-lr0.001" if done in search else None)
    row = tuning_report.tuned_table(given).iloc[0]
    assert row["difference"].mean == pytest.approx(10, abs=0.5)
    assert row["tuned"].mean == pytest.approx(50, abs=1)
    assert row["worse"] == 0
    assert row["difference"].seeds == 5
