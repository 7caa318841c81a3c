"""Reports that have a task or a row of the ablation of one's own: where the paper has no number there is a dash."""

import dataclasses
import math

import pandas as pd
import pytest
from made_records import claims_made, made, runs_of
from test_book import script

from metaadamw_lite.experiments import TASKS, ablation_report, figures, main_report, released
from metaadamw_lite.experiments.chapter import Evidence
from metaadamw_lite.experiments.records import Records
from metaadamw_lite.experiments.studies import seeds_by_power, study_runs
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variant import Variant, arguments
from metaadamw_lite.experiments.variants import ABLATIONS, SEEDS, VARIANTS, Ablation

findings = script("findings")


@pytest.fixture
def whole(monkeypatch):
    """Runs of ETTh1, with all that a chapter shows, and the same of a sixth task."""
    monkeypatch.setitem(TASKS, "own", dataclasses.replace(TASKS["etth1"], name="own", title="Mine"))
    factors = {
        "groups": [{"name": "a", "parameters": 9}],
        "trace": [{"step": 1, "alpha": [0.5], "beta": [1.0]}],
        "meta_updates": [{"log_var": [], "phi_moved": 0.0, "alpha_moved": 0.0, "beta_moved": 0.0}],
        "parameters": 9,
    }
    etth1 = [record | factors for record in runs_of("paper", 5)]
    return [*etth1, *(record | {"run": record["run"] | {"task": "own"}} for record in etth1)]


def test_tables_of_all_tasks_have_a_row_for_a_task_of_ones_own(whole):
    table = main_report.table_of_tasks(Records.holding(whole))
    assert table["seeds"].to_dict() == {"etth1": 5, "own": 5}
    assert table["power"].isna().to_dict() == {"etth1": False, "own": True}
    assert table.loc["own", "difference"] == table.loc["etth1", "difference"]
    frame = main_report.improvements_frame(table).set_index("task")
    assert frame["paper"].isna().groupby(level=0).all().to_dict() == {
        "ETTh1 forecasting (as published)": False,
        "Mine (as published)": True,
    }
    low, high = figures.plot_improvements(frame.reset_index()).axes[0].get_xlim()
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert seeds_by_power("own", pd.Series([1.0, 2, 3, 4, 5])) == dict.fromkeys(PROTOCOLS, SEEDS), (
        "for no gain is named"
    )


def test_a_page_on_a_task_of_ones_own_has_dashes_for_the_papers_numbers(whole):
    page = Evidence(Records.holding(whole), TASKS["own"])
    verdict = page.verdict()
    assert set(verdict["paper (1 seed)"]) == set(verdict["power for the paper's gain"]) == {"–"}
    assert "nan" not in page.conclusion()
    assert "(the paper's run: –)" in page.conclusion()
    assert len(page.curves().axes) == len(page.pairs().axes) == 2
    assert len(page.comparisons()) == len(page.other_tests()) == 6
    assert ablation_report.ablation_table(Records.holding(whole), "own", "paper")["paper"].isna().all()


def test_the_front_page_has_a_row_for_a_task_of_ones_own(whole, monkeypatch):
    for name in ("gains_with_alpha", "random_phis"):
        monkeypatch.setattr(findings, name, lambda *_: None)
    records = Records.holding(whole)
    text = findings.rendered(findings.facts(records, findings.comparisons(records)))
    (row,) = [line for line in text.splitlines() if line.startswith("| Mine ")]
    assert row.startswith("| Mine | as published | 5 | +")
    assert row.endswith("| – |"), "no power for a gain that the paper does not name"
    assert "nan" not in text


def test_claims_are_about_the_papers_tasks(whole):
    both, alone = (
        claims_made(Records.holding(part)) for part in (whole, [r for r in whole if r["run"]["task"] == "etth1"])
    )
    pd.testing.assert_frame_equal(both, alone)
    assert "Mine" not in set(released.behind_table3()["task"])


def test_a_row_of_the_ablation_that_the_paper_lacks_is_run_and_shown(monkeypatch, tmp_path):
    row = Ablation("Range of α", "2", arguments(alpha_range=2.0))
    monkeypatch.setitem(ABLATIONS, "range-2", row)
    monkeypatch.setitem(VARIANTS, "range-2", Variant(row.change))
    assert {key.task for key in study_runs("ablation/lite", tmp_path) if key.variant == "range-2"} == set(TASKS)
    runs = [made(v, k, [x + k], profile="lite") for v, x in (("metaadamw", 2.0), ("range-2", 1.0)) for k in range(3)]
    table = ablation_report.ablation_table(Records.holding(runs), "etth1", "lite")
    mine = table.loc[("Range of α", "2")]
    assert mine["variant"] == "range-2"
    assert not mine["baseline"]
    assert pd.isna(mine["paper"])
    assert mine["difference"].seeds == 3
    assert mine["difference"].mean > 0
    assert table.index.is_unique
    labels = [tick.get_text() for tick in figures.plot_ablations(table).axes[0].get_yticklabels()]
    assert "Range of α: 2" in labels
