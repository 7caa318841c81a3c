"""The main study as tables."""

import math

import numpy as np
import pandas as pd
import pytest
from made_records import COMMITTED, made, runs_of, series

from metaadamw_lite.experiments import TASKS, ablation_report, frames, main_report, paired
from metaadamw_lite.experiments.chapter import Evidence
from metaadamw_lite.experiments.records import Records, paper_table, read_records, repository
from metaadamw_lite.experiments.studies import SEARCH_SEEDS
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variants import ABLATIONS, ARMS
from metaadamw_lite.experiments.verdict import judge


def test_outcome_is_the_test_metric_under_clean_only():
    ended = {"status": ["finished", "stopped early"], "last": [1.5, 2.5]}
    runs = pd.DataFrame({"protocol": ["paper", "clean"], "best": [1.0, 2.0], "test": [None, 3.0], **ended})
    assert frames.outcomes(runs)["outcome"].tolist() == [1.0, 3.0]


def test_parameters_of_a_page_that_name_no_records_are_refused():
    with pytest.raises(ValueError, match=r"profile.*'lit'"):
        ablation_report.ablation_table(COMMITTED, "etth1", "lit")
    with pytest.raises(ValueError, match=r"protocol.*'papr'"):
        main_report.table_of_tasks(COMMITTED, protocol="papr")


def test_the_alpha_of_a_group_stands_beside_what_its_pair_gained():
    def traced(record, first, second):
        groups = [{"name": "a", "parameters": 30}, {"name": "b", "parameters": 70}]
        trace = [{"step": k, "alpha": [x, first + second], "beta": [1.0, 1.0]} for k, x in enumerate((first, second))]
        return record | {"groups": groups, "trace": trace, "parameters": 100}

    records = [
        traced(r, 0.5 + r["run"]["seed"], 0.7) if r["run"]["variant"] == "metaadamw" else r | {"parameters": 100}
        for r in runs_of("lite", 3)
        if r["run"]["variant"] != "adamw" or r["run"]["seed"] < 2
    ]
    given = Records.holding(records)
    table = main_report.alphas_and_gains(given, "etth1", "paper").set_index(["group", "seed"])
    assert sorted(table.index) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)], "seed 2 has no partner"
    assert table.loc[("a", 1), ["alpha", "share"]].tolist() == pytest.approx([(1.5 + 0.7) / 2, 30])
    assert table.loc[("b", 0), ["alpha", "share"]].tolist() == pytest.approx([1.2, 70])
    assert table.loc[("a", 0), "gain"] == pytest.approx(10)


def test_the_papers_tables_are_whole():
    tasks = ["etth1", "wikitext2", "multi30k", "cifar10", "imdb"]
    for number in (2, 4, 5):
        assert paper_table(number).index.tolist() == tasks
    assert paper_table(1).loc["lr", "value"] == "5e-4"
    ablations = paper_table(3)
    assert ablations.columns.tolist() == ["variant", *tasks]
    assert set(ablations["variant"].dropna()) == {"adamw", "metaadamw", *ABLATIONS}
    table = paper_table(2)
    relative = 100 * (table["metaadamw"] / table["adamw"] - 1).abs()
    assert np.allclose(relative, table["improvement_percent"], atol=0.02), "Table 2 agrees with itself"


def test_committed_records_are_readable_and_real():
    records = read_records(repository() / "data" / "results")
    assert len(records) >= 18
    for record in records:
        assert record["run"]["profile"] == "smoke" or record["data"] != "synthetic"
        assert record["environment"]["revision"]
        assert not record["environment"]["revision"].endswith("+"), "made from a changed checkout"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: COMMITTED.of("ett"), "task is 'ett'; allowed are etth1"),
        (lambda: main_report.common_profiles(COMMITTED, "papr"), "protocol is 'papr'; allowed are paper, clean"),
        (lambda: main_report.main_records(COMMITTED, "etth1", "papr", "lite"), "protocol is 'papr'"),
        (
            lambda: main_report.main_records(COMMITTED, "etth1", "paper", "lit"),
            "profile is 'lit'; allowed are lite, paper",
        ),
        (lambda: main_report.alphas_and_gains(COMMITTED, "etth1", "papr"), "protocol is 'papr'"),
        (lambda: ablation_report.more_meta_learning(COMMITTED, "etth1", "lit"), "profile is 'lit'"),
    ],
)
def test_what_is_unknown_is_refused_and_not_reported_empty(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


@pytest.mark.parametrize("sign", [1, -1])
def test_time_to_best_is_the_first_epoch_that_is_as_good(sign):
    runs = {("adamw", 0): [5, 3, 2, 4], ("metaadamw", 0): [4, 2, 1, 9]}
    runs |= {("adamw", 1): [2, 1], ("metaadamw", 1): [4, 3]}
    records = [made(arm, seed, [sign * m for m in metrics]) for (arm, seed), metrics in runs.items()]
    table = main_report.time_to_best(records, lower_is_better=sign > 0)
    assert table.loc[("paper", 0)].tolist() == [2 * sign, 3, 2, 4]
    assert table.loc[("paper", 1), "AdamW, epoch"] == 2
    assert math.isnan(table.loc[("paper", 1), "MetaAdamW, epoch"])
    failed = [r | {"status": "failed"} if r["run"]["seed"] == 1 else r for r in records]
    assert main_report.time_to_best(failed, lower_is_better=sign > 0).index.tolist() == [("paper", 0)]
    assert main_report.time_to_best(failed[2:], lower_is_better=sign > 0).empty


def test_evidence_is_of_the_papers_settings_once_there_are_enough_seeds():
    def runs(seeds):
        return pd.DataFrame(
            [
                {"profile": f, "protocol": p, "variant": v, "seed": s, "status": "finished"}
                | {"best": 1.0, "last": 1.0, "test": 1.0}
                for f in ("paper", "lite")
                for p in ("paper", "clean")
                for v in ARMS
                for s in (range(seeds) if f == "paper" else range(5))
            ]
        )

    assert main_report.best_evidence(runs(paired.ENOUGH_SEEDS), "paper") == "paper"
    assert main_report.best_evidence(runs(paired.ENOUGH_SEEDS - 1), "paper") == "lite"
    assert main_report.best_evidence(runs(5).query("protocol == 'paper'"), "paper") == "paper"
    whole = runs(5)["profile"] == "paper"
    missing = runs(5)[~(whole & (runs(5)["protocol"] == "clean"))]
    assert main_report.best_evidence(missing, "clean") == "lite"
    missing = runs(5)[~(whole & (runs(5)["variant"] == "metaadamw-frozen"))]
    assert main_report.best_evidence(missing, "paper") == "paper"
    assert main_report.best_evidence(missing, "paper", "metaadamw-frozen") == "lite", "of the arms that are compared"
    other = runs(5)
    other.loc[whole & (other["variant"] == "adamw"), "seed"] += 3
    assert main_report.best_evidence(other, "paper") == "lite", "five runs each, and two pairs"
    assert main_report.best_evidence(runs(2).query("profile == 'paper'"), "paper") == "paper", "better than nothing"
    diverged = runs(3)
    diverged.loc[(diverged["profile"] == "paper") & (diverged["seed"] == 0), "best"] = None
    assert main_report.best_evidence(diverged, "paper") == "paper", "what is shown must not depend on what comes out"


def test_all_comparisons_of_a_row_over_tasks_can_rest_on_one_profile():
    records = runs_of("paper", 3, ARMS[:2]) + runs_of("paper", 1, ARMS[2:]) + runs_of("lite", 5)
    given = Records.holding(records)
    assert main_report.table_of_tasks(given)["profile"].to_dict() == {"etth1": "paper"}
    assert main_report.table_of_tasks(given, baseline="metaadamw-frozen")["profile"].to_dict() == {"etth1": "lite"}
    common = main_report.common_profiles(given)
    assert common == {"etth1": "lite"}
    assert main_report.table_of_tasks(given, profiles=common).loc["etth1", ["profile", "seeds"]].tolist() == ["lite", 5]
    given = Records.holding(runs_of("paper", 3))
    assert main_report.common_profiles(given) == {"etth1": "paper"}


def test_shortened_runs_are_interim_until_there_are_as_many_as_the_power_asks_for():
    def records(seeds, spread):
        gains = [5, -4, 3, -6, 2] * 8
        made_runs = [
            made(arm, k, [100.0 - (arm == "metaadamw") * spread * gains[k]], profile="lite", protocol=protocol)
            for protocol in PROTOCOLS
            for arm in ARMS
            for k in range(seeds)
        ]
        return [r | {"test": {"metric": r["best"]["metric"]}} for r in made_runs]

    def says(seeds, spread, protocol="paper"):
        given = Records.holding(records(seeds, spread))
        row = main_report.table_of_tasks(given, protocol=protocol).loc["etth1"]
        assert Evidence(given, TASKS["etth1"]).verdict().loc[protocol, "MetaAdamW improves on AdamW"] == judge(
            row["difference"], profile="lite", planned=row["planned"]
        )
        return row["seeds"], row["planned"]

    assert says(5, 1.0) == (5, paired.pairs_needed(series([5, -4, 3, -6, 2]), 4.26))
    assert says(20, 1.0)[0] == 20, "all seeds of the study count"
    assert says(20, 1.0)[1] == says(5, 1.0)[1], "what is planned does not depend on what comes later"
    assert says(5, 1.0, "clean")[1] == math.ceil(says(5, 1.0)[1] / 2)
    assert says(5, 0.01) == (5, 10)
    assert says(3, 1.0) == (3, 5), "the first five come first"


@pytest.mark.parametrize("task", TASKS)
def test_the_search_stays_out_of_what_is_shown(task):
    assert {r["run"]["seed"] for r in COMMITTED.of(task)} & set(SEARCH_SEEDS), "the case is there"
    for runs in (main_report.main_runs(COMMITTED, task), Evidence(COMMITTED, TASKS[task]).runs):
        assert set(runs["seed"]) <= set(range(paired.MOST_PAIRS))


def test_means_of_table_2_are_over_the_pairs():
    table = main_report.table_of_tasks(COMMITTED)
    for task, row in table.iterrows():
        runs = frames.outcomes(frames.runs_frame(COMMITTED.of(task)))
        mine = runs[(runs["profile"] == row["profile"]) & (runs["protocol"] == "paper")]
        mine = mine[mine["seed"].isin(row["improvements"].index) & (mine["variant"] == "adamw")]
        assert not set(mine["seed"]) & set(SEARCH_SEEDS)
        assert len(mine) == row["seeds"]
        assert row["baseline_mean"] == pytest.approx(mine["outcome"].mean())


def test_table_2_is_corrected_over_its_tasks():
    table = main_report.table_of_tasks(COMMITTED)
    pd.testing.assert_series_equal(table["p_holm"], paired.holm(table["p"]), check_names=False)
    assert (table["p_holm"] > table["p"]).any()


def test_what_is_called_the_last_epoch_is_the_last():
    records = [
        made(arm, k, [3.0, 1.0 + k / 10, last + k / 10], protocol=protocol)
        for arm, last in (("adamw", 2.0), ("metaadamw", 4.0), ("metaadamw-frozen", 2.0))
        for protocol in ("paper", "clean")
        for k in range(3)
    ]
    given = Records.holding(records)
    assert main_report.table_of_tasks(given).loc["etth1", "last"].mean == pytest.approx(-97, abs=3)
    says = Evidence(given, TASKS["etth1"]).last_epoch()
    assert "Last epoch, MetaAdamW against AdamW: -9" in says, "twice the error"
    frame = frames.runs_frame([made("adamw", 0, [3.0, 1.0, 2.0])])
    assert frame[["best", "last"]].iloc[0].tolist() == [1.0, 2.0]
