"""The tables of the studies of random, constant and learned factors."""

import math

import numpy as np
import pytest
from made_records import made

from metaadamw_lite.experiments import phi_figures, phi_report
from metaadamw_lite.experiments.dose import TWINS
from metaadamw_lite.experiments.ladder import LADDER
from metaadamw_lite.experiments.null import PHI_SEEDS, frozen_phi, trained_phi
from metaadamw_lite.experiments.records import Records
from metaadamw_lite.experiments.transfer import TRANSFER_TASKS, transfer_from
from metaadamw_lite.experiments.verdict import CORRECTED, FAILS, HOLDS, SAME

NOISE = np.array([0.1, -0.1, 0.05, -0.05, 0.0])
"""Percent by which a result differs from seed to seed, so that there is a t-test."""


def runs_of(results, seeds=5):
    """Records of small whole runs on ETTh1: an error for each variant, with noise that depends on variant and seed."""
    return [
        made(variant, k, [error * (1 + NOISE[(k + len(variant)) % 5] / 100)], profile="lite")
        for variant, error in results.items()
        for k in range(seeds)
    ]


def kinds(table, column):
    """The kinds of a column's verdicts; None where there is none."""
    return [verdict and verdict.kind for verdict in table[f"{column}, verdict"]]


@pytest.fixture
def recorded(monkeypatch):
    """``recorded(records, best)`` are these records, with ``best`` the best AdamW of the search."""

    def put(records, best=None):
        monkeypatch.setattr(phi_report, "best_adamw", lambda records, task: best)
        return Records.holding(records)

    return put


# ---------------------------------------------------------------- null


def null_records(gains, name=frozen_phi, seeds=2):
    return [made(name(phi), k, [100.0 - gain], profile="lite") for phi, gain in gains.items() for k in range(seeds)]


def test_the_papers_gain_is_placed_among_those_of_random_phis(recorded):
    gains = {phi: 5.0 * (phi % 4 == 0) + (phi % 7) / 100 for phi in PHI_SEEDS}
    given = recorded([made("adamw", k, [100.0], profile="lite") for k in range(5)] + null_records(gains))
    table = phi_report.null_gains(given, "etth1")
    assert table.shape == (32, 2)
    assert table.loc[1004].tolist() == pytest.approx([gains[1004]] * 2)
    found = phi_report.null_distribution(given, "etth1")
    assert found["share of Φ"].value > 0.999
    assert found["share as good"].value == pytest.approx(8 / 32)
    best = found[f"best of {phi_report.logged_runs('etth1')}"]
    assert found["best of 1"].value == pytest.approx(np.mean([*gains.values()]))
    assert found["best of 1"].value < best.value <= found["95th percentile"].value
    assert found["95th percentile"].value == pytest.approx(max(gains.values()))
    assert phi_report.logged_runs("wikitext2") == 46
    given = recorded([])
    assert phi_report.null_gains(given, "etth1").empty


def test_a_gain_of_a_random_phi_is_over_adamw_with_the_same_seed(recorded):
    adamw = [made("adamw", k, [100.0 * (1 + k)], profile="lite") for k in range(2)]
    given = recorded(adamw + [made(frozen_phi(1000), k, [90.0 * (1 + k)], profile="lite") for k in range(2)])
    assert phi_report.null_gains(given, "etth1").loc[1000].tolist() == pytest.approx([10.0, 10.0])


def test_a_phi_counts_once_all_its_runs_are_there(recorded):
    half = null_records({1003: 1.0}, seeds=1)
    failed = [record | {"status": "failed"} for record in null_records({1002: 5.0})]
    given = recorded([*runs_of({"adamw": 100.0}), *null_records({1000: 1.0, 1001: 2.0}), *half, *failed])
    results = phi_report.null_results(given, "etth1")
    assert results.index.tolist() == [1000, 1001, 1002]
    assert results.loc[1002].isna().all(), "a failed run is there, without a result"


def test_the_alpha_of_a_random_phi_is_weighted_by_parameters(recorded):
    groups = [{"name": "a/shallow/weight", "parameters": 1}, {"name": "b/deep/weight", "parameters": 3}]
    factors = {1000: (1.4, 0.6), 1001: (1.0, 1.0), 1002: (0.6, 1.4)}
    records = null_records({phi: factors[phi][1] for phi in factors})
    for record in records:
        alpha = list(factors[int(record["run"]["variant"].removeprefix("frozen-phi"))])
        record |= {"groups": groups, "trace": [{"step": t, "alpha": alpha, "beta": alpha} for t in (1, 2)]}
    given = recorded([*runs_of({"adamw": 100.0}), *records])
    table = phi_report.null_alphas(given, "etth1")
    assert table.groupby("phi")["alpha"].first().to_dict() == pytest.approx({1000: 0.8, 1001: 1.0, 1002: 1.2})
    assert phi_report.rank_correlation(table, "alpha", "gain").value == pytest.approx(1)
    given = recorded(runs_of({"adamw": 100.0}))
    assert phi_report.null_alphas(given, "etth1").empty


def test_a_trained_phi_is_set_against_the_same_one_untrained(recorded):
    phis = {phi: (phi % 5) * 4.0 for phi in PHI_SEEDS}
    better = {phi: gain + 2 + phi % 3 / 10 for phi, gain in phis.items()}
    given = recorded([*null_records(phis), *null_records(better, trained_phi)])
    row = phi_report.trained_against_untrained(given, "etth1").iloc[0]
    assert row["difference"].seeds == 32
    assert 2 < row["difference"].mean < 2.5
    assert row["difference, verdict"].kind == HOLDS


# ---------------------------------------------------------------- comparisons


def test_each_rung_stands_over_adamw_and_over_the_rung_below(recorded):
    errors = {"adamw": 100.0, "adamw-lr0.002": 95.0, "ladder-one": 90.0, "ladder-groups": 80.0, "ladder-mlp": 80.0}
    given = recorded(runs_of(errors), best="adamw-lr0.002")
    table = phi_report.ladder_table(given, "etth1")
    assert table.index.tolist() == ["ladder-one", "ladder-groups", "ladder-mlp"], "as the ladder goes; Φ has no runs"
    assert [d.mean for d in table["over AdamW"]] == pytest.approx([10, 20, 20], abs=0.2)
    assert table.loc["ladder-one", "over the best AdamW"].mean == pytest.approx(100 * 5 / 95, abs=0.2)
    assert table.loc["ladder-one", "over the rung below"] is None
    assert kinds(table, "over the rung below") == [None, HOLDS, SAME]
    given = recorded(runs_of(errors))
    assert "over the best AdamW" not in phi_report.ladder_table(given, "etth1"), "its search is not complete"
    assert phi_report.format_column(table, "over the rung below")["ladder-one"] == "–"


def test_verdicts_of_a_column_are_corrected_for_its_rows(recorded):
    gain = dict.fromkeys(LADDER, 100.0) | {"adamw": 100.0}
    records = runs_of(gain)
    for record in records:  # one rung, with a p just below 0.05 by itself
        if record["run"]["variant"] == "ladder-one":
            record["best"]["metric"] = 100 - np.array([3.0, -0.5, 2.2, 4.0, 3.0])[record["run"]["seed"]]
    given = recorded(records)
    table = phi_report.ladder_table(given, "etth1")
    assert 0.01 < table.loc["ladder-one", "over AdamW"].p < 0.05
    assert table.loc["ladder-one", "over AdamW, verdict"].reason == CORRECTED


def test_a_dose_stands_over_its_twin_with_how_far_it_moved_phi(recorded):
    errors = {"adamw": 100.0, "metaadamw-frozen": 110.0, "dose-sgd1": 99.0, "ladder-phi": 90.0}
    records = runs_of(errors)
    for record in records:
        moved = {"dose-sgd1": 0.25, "ladder-phi": 2.0}.get(record["run"]["variant"])
        if moved is not None:
            size = moved + record["run"]["seed"] / 1000
            record["meta_updates"] = [{"step": t, "alpha_moved": size * t, "log_var": []} for t in (0.5, 1)]
    given = recorded(records, best="adamw")
    table = phi_report.dose_table(given, "etth1")
    assert table.index.tolist() == [v for v in TWINS if v in errors]
    assert table.loc["dose-sgd1", "over its twin"].mean == pytest.approx(10, abs=0.2)
    assert table.loc["ladder-phi", "over its twin"].mean == pytest.approx(10, abs=0.2)
    assert table["moved"].to_dict() == pytest.approx({"dose-sgd1": 0.252, "ladder-phi": 2.002})
    assert len(phi_figures.plot_dose(table).axes[0].get_lines()) >= 2
    given = recorded(runs_of({"adamw": 100.0}))
    assert phi_report.dose_table(given, "etth1").empty


def test_a_replay_stands_beside_its_source(recorded):
    names = ("metaadamw", "replay-groups-of-metaadamw", "replay-one-of-metaadamw")
    given = recorded(runs_of(dict(zip(("adamw", *names), (100.0, 90.0, 90.0, 95.0), strict=True))))
    table = phi_report.replay_table(given, "etth1")
    assert table.index.tolist() == [*names]
    assert [d.mean for d in table["over AdamW"]] == pytest.approx([10, 10, 5], abs=0.2)
    assert kinds(table, "over the source") == [None, SAME, FAILS]


def test_circularity_is_over_metaadamw(recorded):
    given = recorded(runs_of({"adamw": 50.0, "metaadamw": 100.0, "circularity-targets": 100.0}))
    table = phi_report.circularity_table(given, "etth1")
    assert table.index.tolist() == ["circularity-targets"]
    assert kinds(table, "over the loss itself") == [SAME]


def test_transfer_has_a_row_for_the_task_and_a_column_for_the_source(recorded):
    given = recorded(runs_of({"adamw": 100.0, transfer_from("imdb"): 110.0}, seeds=3))
    table = phi_report.transfer_table(given)
    assert table.index.tolist() == table.columns.tolist() == list(TRANSFER_TASKS)
    assert table.loc["etth1", "imdb"].mean == pytest.approx(-10, abs=0.2)
    assert table.loc["imdb", "etth1"] is None


def test_runs_of_searches_other_profiles_and_protocols_do_not_count(recorded):
    given = recorded(
        [
            made("adamw", 100, [1.0], profile="lite"),
            made("adamw", 0, [1.0], profile="paper"),
            made("adamw", 0, [1.0], profile="lite", protocol="clean"),
            made("adamw", 0, [2.0], profile="lite"),
        ]
    )
    assert phi_report.small_runs(given, "etth1")["outcome"].tolist() == [2.0]


# ---------------------------------------------------------------- figures


def test_only_differences_with_an_interval_are_drawn(recorded):
    records = runs_of({"adamw": 100.0, "ladder-one": 90.0, "ladder-phi": 80.0})
    given = recorded([r for r in records if r["run"]["variant"] != "ladder-phi" or r["run"]["seed"] < 2])
    table = phi_report.ladder_table(given, "etth1")
    figure = phi_figures.plot_differences(table, {"over AdamW": "gain (%)", "over the rung below": "gain (%)"})
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["ladder-one", "ladder-phi"]
    (bar,) = left.containers
    assert bar.lines[0].get_xdata().tolist() == pytest.approx([10], abs=0.2)
    assert not right.containers


def test_a_missing_pair_leaves_its_cell_empty(recorded):
    given = recorded([])
    table = phi_report.transfer_table(given)
    cells = phi_figures.plot_transfer(table, {}).axes[0].collections[0].get_array()
    assert np.isnan(np.ma.filled(cells, math.nan)).all()
