"""From records to tables and verdicts."""

import math

import numpy as np
import pandas as pd
import pytest

from metaadamw_lite.experiments import TASKS, figures, paired, report
from metaadamw_lite.experiments.chapter import Evidence
from metaadamw_lite.experiments.claims import REMOVALS, _found, _found_parts, claims_table
from metaadamw_lite.experiments.paired import PairedDifference, improvement
from metaadamw_lite.experiments.records import Records, RunKey, read_records
from metaadamw_lite.experiments.studies import SEARCH_SEEDS
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.variants import ABLATIONS, ARMS, SEEDS
from metaadamw_lite.experiments.verdict import FAILS, HOLDS, count_decided, judge

COMMITTED = Records()


def claims_made(records):
    """The table of claims, with verdicts as they are shown."""
    table = claims_table(records).set_index("claim")
    return table.assign(verdict=table["verdict"].map(str))


def series(values, start=0):
    return pd.Series(values, index=range(start, start + len(values)))


def test_improvement_is_paired_by_seed_and_relative_to_the_baseline():
    d = improvement(series([0.9, 1.8, 3.6]), series([1.0, 2.0, 3.0]), lower_is_better=True)
    assert d.mean == pytest.approx((10 + 10 - 20) / 3)
    assert d.seeds == 3
    assert d.low <= d.mean <= d.high
    up = improvement(series([0.9, 1.8, 3.6]), series([1.0, 2.0, 3.0]), lower_is_better=False)
    assert up.mean == pytest.approx(-d.mean)


def test_equal_differences_are_a_decision_once_there_are_enough_of_them():
    baseline = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    d = improvement(series([0.5 * x for x in baseline]), series(baseline), lower_is_better=True)
    assert (d.low, d.high) == pytest.approx((50, 50))
    assert d.p == pytest.approx(2 / 2**6), "of a sign test"
    assert str(judge(d)) == "holds"
    few = improvement(series([0.5, 1.0, 2.0]), series(baseline[:3]), lower_is_better=True)
    assert str(judge(few)) == "not decided: cannot be told from chance", "three equal small integers are no rarity"


def test_the_bootstrap_intervals_have_the_width_they_should():
    values = {"a": pd.Series([1.0, 2, 3, 4, 50]), "b": pd.Series([-1.0, 5, 9, 0, 2])}
    iqm, better = paired.over_tasks(values).values()
    assert iqm.value == pytest.approx(np.sort([1, 2, 3, 4, 50, -1, 5, 9, 0, 2])[2:8].mean())
    assert iqm.low < iqm.value - 0.5
    assert iqm.high > iqm.value + 0.5
    assert 0.3 < better.high - better.low < 0.6
    d = paired.paired_difference(pd.Series([-1.0, 0, 1, 2, 3]), "%")
    assert (d.low, d.high) == pytest.approx((-0.2, 2.2), abs=0.25), "as scipy's BCa interval of five numbers"


def test_seeds_without_a_partner_are_left_out():
    d = improvement(series([0.9, 1.8, 100.0]), series([2.0, 1.0, 5.0], start=1), lower_is_better=True)
    assert d.seeds == 2
    assert math.isnan(d.low)
    assert str(judge(d)) == "not yet tested"


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
        (-1.0, 3.0, 0.01, "not decided: cannot be told from chance"),
        (1.0, 3.0, 0.2, "not decided: cannot be told from chance"),
        (math.nan, math.nan, math.nan, "not yet tested"),
    ],
)
def test_a_verdict_takes_the_interval_and_the_test(low, high, p, expected):
    assert str(judge(PairedDifference(2.0, low, high, p, 5))) == expected


def test_outcome_is_the_test_metric_under_clean_only():
    ended = {"status": ["finished", "stopped early"], "last": [1.5, 2.5]}
    runs = pd.DataFrame({"protocol": ["paper", "clean"], "best": [1.0, 2.0], "test": [None, 3.0], **ended})
    assert report.outcomes(runs)["outcome"].tolist() == [1.0, 3.0]


def test_what_a_run_had_reached_when_it_failed_is_not_its_result():
    runs = [r | {"status": "failed"} if k == 0 else r for k, r in enumerate(runs_of("paper", 5))]
    failed = runs[0]["run"]
    assert (failed["variant"], failed["protocol"]) == ("adamw", "paper")
    given = Records.holding(runs)
    row = report.table_of_tasks(given).loc["etth1"]
    assert str(judge(row["difference"])) == "not decided: 1 of 5 pairs lost"
    assert (row["last"].seeds, row["last"].lost) == (4, 1)
    claims = claims_made(given)["verdict"]
    assert claims["Lower error on ETTh1"] == "not decided: 1 of 5 pairs lost"
    assert claims[SHORT] == "not decided: 1 of 5 pairs lost"


def test_parameters_of_a_page_that_name_no_records_are_refused():
    with pytest.raises(ValueError, match=r"profile.*'lit'"):
        report.ablation_table(COMMITTED, "etth1", "lit")
    with pytest.raises(ValueError, match=r"protocol.*'papr'"):
        report.table_of_tasks(COMMITTED, protocol="papr")


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
    table = report.alphas_and_gains(given, "etth1", "paper").set_index(["group", "seed"])
    assert sorted(table.index) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)], "seed 2 has no partner"
    assert table.loc[("a", 1), ["alpha", "share"]].tolist() == pytest.approx([(1.5 + 0.7) / 2, 30])
    assert table.loc[("b", 0), ["alpha", "share"]].tolist() == pytest.approx([1.2, 70])
    assert table.loc[("a", 0), "gain"] == pytest.approx(10)


def test_the_papers_tables_are_whole():
    tasks = ["etth1", "wikitext2", "multi30k", "cifar10", "imdb"]
    for number in (2, 4, 5):
        assert report.paper_table(number).index.tolist() == tasks
    assert report.paper_table(1).loc["lr", "value"] == "5e-4"
    ablations = report.paper_table(3)
    assert ablations.columns.tolist() == ["variant", *tasks]
    assert set(ablations["variant"].dropna()) == {"adamw", "metaadamw", *ABLATIONS}
    table = report.paper_table(2)
    relative = 100 * (table["metaadamw"] / table["adamw"] - 1).abs()
    assert np.allclose(relative, table["improvement_percent"], atol=0.02), "Table 2 agrees with itself"


def test_committed_records_are_readable_and_real():
    records = read_records(report.repository() / "data" / "results")
    assert len(records) >= 18
    for record in records:
        assert record["run"]["profile"] == "smoke" or record["data"] != "synthetic"
        assert record["environment"]["revision"]
        assert not record["environment"]["revision"].endswith("+"), "made from a changed checkout"


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


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: COMMITTED.of("ett"), "task is 'ett'; allowed are etth1"),
        (lambda: report.common_profiles(COMMITTED, "papr"), "protocol is 'papr'; allowed are paper, clean"),
        (lambda: report.main_records(COMMITTED, "etth1", "papr", "lite"), "protocol is 'papr'"),
        (lambda: report.main_records(COMMITTED, "etth1", "paper", "lit"), "profile is 'lit'; allowed are lite, paper"),
        (lambda: report.alphas_and_gains(COMMITTED, "etth1", "papr"), "protocol is 'papr'"),
        (lambda: report.more_meta_learning(COMMITTED, "etth1", "lit"), "profile is 'lit'"),
    ],
)
def test_what_is_unknown_is_refused_and_not_reported_empty(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


def test_over_tasks_weighs_tasks_alike_and_counts_ties_half():
    improvements = {"a": series([1.0, 2.0, 3.0, 4.0]), "b": series([-1.0, 0.0])}
    together = paired.over_tasks(improvements)
    assert together["probability of improvement"].value == pytest.approx((1 + 0.25) / 2)
    for estimate in together.values():
        assert estimate.low <= estimate.value <= estimate.high
    again = paired.over_tasks(improvements)
    assert str(again["interquartile mean"]) == str(together["interquartile mean"]), "the same each time"


@pytest.mark.parametrize("sign", [1, -1])
def test_time_to_best_is_the_first_epoch_that_is_as_good(sign):
    runs = {("adamw", 0): [5, 3, 2, 4], ("metaadamw", 0): [4, 2, 1, 9]}
    runs |= {("adamw", 1): [2, 1], ("metaadamw", 1): [4, 3]}
    records = [made(arm, seed, [sign * m for m in metrics]) for (arm, seed), metrics in runs.items()]
    table = report.time_to_best(records, lower_is_better=sign > 0)
    assert table.loc[("paper", 0)].tolist() == [2 * sign, 3, 2, 4]
    assert table.loc[("paper", 1), "AdamW, epoch"] == 2
    assert math.isnan(table.loc[("paper", 1), "MetaAdamW, epoch"])
    failed = [r | {"status": "failed"} if r["run"]["seed"] == 1 else r for r in records]
    assert report.time_to_best(failed, lower_is_better=sign > 0).index.tolist() == [("paper", 0)]
    assert report.time_to_best(failed[2:], lower_is_better=sign > 0).empty


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

    assert report.best_evidence(runs(paired.ENOUGH_SEEDS), "paper") == "paper"
    assert report.best_evidence(runs(paired.ENOUGH_SEEDS - 1), "paper") == "lite"
    assert report.best_evidence(runs(5).query("protocol == 'paper'"), "paper") == "paper"
    whole = runs(5)["profile"] == "paper"
    missing = runs(5)[~(whole & (runs(5)["protocol"] == "clean"))]
    assert report.best_evidence(missing, "clean") == "lite"
    missing = runs(5)[~(whole & (runs(5)["variant"] == "metaadamw-frozen"))]
    assert report.best_evidence(missing, "paper") == "paper"
    assert report.best_evidence(missing, "paper", "metaadamw-frozen") == "lite", "of the arms that are compared"
    other = runs(5)
    other.loc[whole & (other["variant"] == "adamw"), "seed"] += 3
    assert report.best_evidence(other, "paper") == "lite", "five runs each, and two pairs"
    assert report.best_evidence(runs(2).query("profile == 'paper'"), "paper") == "paper", "better than nothing"
    diverged = runs(3)
    diverged.loc[(diverged["profile"] == "paper") & (diverged["seed"] == 0), "best"] = None
    assert report.best_evidence(diverged, "paper") == "paper", "what is shown must not depend on what comes out"


def runs_of(profile, seeds, arms=ARMS):
    """Records of ETTh1 in which MetaAdamW's error is a tenth smaller and the control's as large as AdamW's."""
    errors = {"adamw": 2.0, "metaadamw": 1.8, "metaadamw-frozen": 2.0}
    return [
        made(arm, seed, [3.0, errors[arm] + seed / 1000], profile=profile, protocol=protocol)
        for arm in arms
        for seed in range(seeds)
        for protocol in ("paper", "clean")
    ]


def test_all_comparisons_of_a_row_over_tasks_can_rest_on_one_profile():
    records = runs_of("paper", 3, ARMS[:2]) + runs_of("paper", 1, ARMS[2:]) + runs_of("lite", 5)
    given = Records.holding(records)
    assert report.table_of_tasks(given)["profile"].to_dict() == {"etth1": "paper"}
    assert report.table_of_tasks(given, baseline="metaadamw-frozen")["profile"].to_dict() == {"etth1": "lite"}
    common = report.common_profiles(given)
    assert common == {"etth1": "lite"}
    assert report.table_of_tasks(given, profiles=common).loc["etth1", ["profile", "seeds"]].tolist() == ["lite", 5]
    given = Records.holding(runs_of("paper", 3))
    assert report.common_profiles(given) == {"etth1": "paper"}


def test_a_verdict_from_fewer_seeds_than_planned_says_so():
    given = Records.holding(runs_of("paper", 3))
    says = claims_made(given)["verdict"]["Lower error on ETTh1"]
    assert says == "holds (interim: 3 of 5 planned seeds)"
    verdicts = Evidence(given, TASKS["etth1"]).verdict()["MetaAdamW improves on AdamW"]
    assert str(verdicts["paper"]) == "holds (interim: 3 of 5 planned seeds)"
    given = Records.holding(runs_of("paper", 5))
    assert claims_made(given)["verdict"]["Lower error on ETTh1"] == "holds"
    lost = runs_of("paper", 5)
    lost[0] = lost[0] | {"best": None}
    given = Records.holding(lost)
    assert claims_made(given)["verdict"]["Lower error on ETTh1"] == "not decided: 1 of 5 pairs lost"


def test_whole_runs_that_are_too_few_to_judge_by_are_shown_all_the_same(monkeypatch):
    records = [r | {"settings": {"epochs": 2, "batch_size": 8}, "samples": {"train": 8}} for r in runs_of("lite", 5)]
    monkeypatch.setattr(Evidence, "factors_statement", lambda evidence: "no factors in these")
    given = Records.holding(records + runs_of("paper", 1))
    says = Evidence(given, TASKS["etth1"]).conclusion()
    assert "Runs as published under `paper`, too few to judge by: seed 0: AdamW 2, MetaAdamW 1.8 (+10.0 %)." in says
    given = Records.holding(records)
    assert "too few to judge by" not in Evidence(given, TASKS["etth1"]).conclusion()


def test_whole_runs_that_were_still_getting_better_are_named(monkeypatch):
    falling, flat = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 2.0, 1.0], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 2.0, 2.5]
    runs = [("adamw", 0, flat), ("adamw", 1, falling[:-1]), ("metaadamw", 0, flat), ("metaadamw", 1, falling)]
    records = [
        made(arm, seed, metric) | {"status": "finished" if len(metric) == 8 else "stopped early"}
        for arm, seed, metric in runs
    ]
    others = [made(arm, seed, falling, profile="lite") for arm, seed, _ in runs]
    others.append(made("metaadamw", 2, falling))  # which stopped early in the last epoch: nothing cut it off
    given = Records.holding(records * 3 + others)
    monkeypatch.setattr(report, "best_evidence", lambda runs, protocol: "paper")
    says = Evidence(given, TASKS["etth1"]).cut_off().split("\n")
    assert says[0].startswith("Whole runs that the limit of 8 epochs ended")
    assert says[2] == "* `paper`, AdamW: none."
    assert says[3].startswith("* `paper`, MetaAdamW: seed 1 (50.0 %)"), "the last epoch halved it"
    monkeypatch.setattr(report, "best_evidence", lambda runs, protocol: "lite")
    assert Evidence(given, TASKS["etth1"]).cut_off() == "", "when a shortened run ends says nothing"


def test_a_page_says_how_long_its_live_run_takes_on_each_recorded_device(monkeypatch):
    def ran(arm, seed, seconds, device, status="finished"):
        record = made(arm, seed, [3.0, 2.0])
        epochs = [epoch | {"seconds": seconds} for epoch in record["epochs"]]
        where = record["environment"] | {"device": device, "threads": 1}
        return record | {"environment": where, "epochs": epochs, "status": status}

    measure = f"whole epoch, {TASKS['etth1'].title} (K_meta = {TASKS['etth1'].settings('paper').meta_every})"
    row = {"measure": measure, "who": "ours", "baseline_seconds": 1 / 217, "seconds": 4 / 217}
    gpu = {"environment": {"device": "H200", "device_type": "cuda", "revision": "abc"}, "rows": [row]}
    runs = [ran("adamw", 0, 60, "EPYC"), ran("metaadamw", 0, 90, "EPYC"), ran("metaadamw", 1, 9, "EPYC", "failed")]
    given = Records.holding(runs)
    monkeypatch.setattr(report, "bench_records", lambda: {"cpu": {"environment": {"device_type": "cpu"}}})
    _, *lines = Evidence(given, TASKS["etth1"]).running_times().split("\n\n")[1].split("* ")
    assert len(lines) == 1
    assert "`paper`, on EPYC" in lines[0]
    assert "2.0 to 3.0 minutes" in lines[0]
    given = Records.holding([*runs, ran("adamw", 1, 6, "H100")])
    monkeypatch.setattr(report, "bench_records", lambda: {"h200-abc": gpu})
    _, *lines = Evidence(given, TASKS["etth1"]).running_times().split("\n\n")[1].split("* ")
    assert len(lines) == 3
    assert "on H100" in lines[1]
    assert "0.2 to 0.2 minutes" in lines[1]
    assert "on H200 with the older code of abc" in lines[2]
    assert "1 s for an epoch's training with AdamW, 4 s with MetaAdamW" in lines[2]


def test_a_claim_that_rests_on_guessing_says_so():
    def records(accuracy):
        sizes = {"metaadamw": accuracy, "gating-off": accuracy - 0.02}
        return [made(arm, k, [x + k / 100], "imdb", "lite") for arm, x in sizes.items() for k in range(3)]

    for accuracy, guessing in ((0.53, True), (0.7, False)):
        given = Records.holding(records(accuracy))
        ours = claims_made(given)["ours"]["Feature gating is effective (IMDB)"]
        assert ours.endswith("hardly above guessing") == guessing
    assert not report.near_chance("etth1", report.main_runs(given, "etth1")), "an error has no chance level"


def test_claims_that_one_test_decides_are_corrected_for_their_number():
    claims = {
        "gating-off": "Feature gating is effective (ETTh1)",
        "huw-none": "Uncertainty weighting improves on the plain sum (WikiText-2; priorities equal)",
        "updates-2": "Meta-updates once an epoch are better than twice (WikiText-2)",
        "objective-gradient": "The combined objective beats gradient alignment alone (WikiText-2)",
    }

    def judged(*variants):
        change = {"gating-off": (1.2, 0.14), "huw-none": (1.0, 0.003)}
        records = []
        for task in ("etth1", "wikitext2"):
            records += [made("metaadamw", k, [1.0], task, "lite") for k in range(5)]
        for variant in variants:
            task = "etth1" if variant == "gating-off" else "wikitext2"
            mean, spread = change.get(variant, (1.0, 0.3))
            for k, x in enumerate((-1, 1, 0.5, -0.5, 0.2)):
                records.append(made(variant, k, [mean + spread * x], task, "lite"))
        given = Records.holding(records)
        return claims_made(given)

    alone = judged("gating-off", "huw-none").loc[claims["gating-off"]]
    assert alone["verdict"] == "holds (lite runs)"
    table = judged(*claims)
    gating, weighting = (table.loc[claims[v]] for v in ("gating-off", "huw-none"))
    assert float(gating["p (Holm)"]) == pytest.approx(2 * float(alone["p (Holm)"]), abs=0.002), "of four tests, not two"
    assert gating["verdict"] == "not decided after the correction (lite runs)"
    assert weighting["verdict"] == "equivalent (±1 %) (lite runs)"
    assert (table.loc[[claims["updates-2"], claims["objective-gradient"]], "verdict"].str.startswith("not dec")).all()


def test_a_claim_comes_with_the_power_for_the_size_that_it_names():
    gains = [3.0, -2.0, 5.0, 1.0, 0.5]
    records = [made("adamw", k, [100.0]) for k in range(5)]
    records += [made("metaadamw", k, [100.0 - gain]) for k, gain in enumerate(gains)]
    records += [r | {"run": r["run"] | {"protocol": "clean"}} for r in records]
    given = Records.holding(records)
    expected = f"{paired.power(paired.paired_difference(pd.Series(gains), '%'), 4.26):.0%}"
    claims = claims_made(given)
    assert claims.loc["Lower error on ETTh1", "power"] == expected
    assert claims.loc[LONG, "power"] == "–", "it names no size"
    assert report.percent(report.table_of_tasks(given).loc["etth1", "power"]) == expected
    over_tasks = claims.loc["Better than AdamW on every one of five tasks", "ours"]
    assert f"power for the paper's gain: {expected}" in over_tasks
    assert Evidence(given, TASKS["etth1"]).verdict().loc[:, "power for the paper's gain"].tolist() == [expected, "–"]


def test_a_mean_alpha_counts_a_group_by_its_parameters():
    groups = [{"name": "a", "parameters": 90}, {"name": "b", "parameters": 10}]
    trace = [{"step": k, "alpha": [0.5, 1.5 - k / 10], "beta": [1.0, 0.6]} for k in (1, 2)]
    records = [r | {"groups": groups, "trace": trace} for r in runs_of("paper", 3)]
    moved = {"log_var": [], "phi_moved": 0.0, "alpha_moved": 0.0, "beta_moved": 0.0}
    records = [r | {"meta_updates": [moved]} for r in records]
    given = Records.holding(records)
    factors = Evidence(given, TASKS["etth1"]).factors()
    assert factors["α (mean)"].tolist() == pytest.approx([0.9 * 0.5 + 0.1 * 1.35] * 6)
    assert factors["β (mean)"].tolist() == pytest.approx([0.96] * 6)
    assert factors["α (max)"].tolist() == [1.4] * 6
    assert (Evidence(given, TASKS["etth1"]).by_seed()["mean α"] == "0.58").all()


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
        row = report.table_of_tasks(given, protocol=protocol).loc["etth1"]
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


def test_that_a_gain_is_missing_takes_an_interval_below_it():
    claim = (
        "Very frequent meta-updates need not bring substantial gains (WikiText-2; here: not 1 % for ten times an epoch "
        "instead of once)"
    )

    def says(*gains):
        runs = [made("metaadamw", k, [100.0], "wikitext2", "lite") for k in range(len(gains))]
        runs += [made("updates-10", k, [100.0 - gain], "wikitext2", "lite") for k, gain in enumerate(gains)]
        given = Records.holding(runs)
        return claims_made(given)["verdict"][claim]

    assert says(0.1, 0.0, -0.1).startswith("holds")
    assert says(*[0.0] * 8).startswith("holds")
    assert says(3.0, -3.0, 0.1).startswith("not decided")
    assert says(2.0, 2.1, 1.9).startswith("does not hold")
    assert says(0.1, 0.0) == "not yet tested"


def test_a_row_of_table_3_stands_beside_the_runs_that_it_is_paired_with():
    runs = [made("metaadamw", k, [1.0 + k], profile="lite") for k in range(5)]
    runs += [made("gating-off", k, [2.0 + k], profile="lite") for k in range(3)]
    given = Records.holding(runs)
    row = report.ablation_table(given, "etth1", "lite").set_index("variant").loc["gating-off"]
    assert (row["mean"], row["metaadamw"]) == (3.0, 2.0)


def test_an_ablation_claim_does_not_fall_back_on_shortened_runs_where_a_whole_one_diverged():
    def records(profile, seeds):
        return [
            made(arm, k, [x + k / 100], profile=profile)
            for arm, x in (("metaadamw", 1.0), ("gating-off", 2.0))
            for k in range(seeds)
        ]

    whole = records("paper", 3)
    whole[0] = whole[0] | {"best": None, "status": "diverged"}
    given = Records.holding(whole + records("lite", 5))
    says = claims_made(given)["verdict"]["Feature gating is effective (ETTh1)"]
    assert says == "not decided: 1 of 3 pairs lost (interim: 3 of 5 planned seeds)"


def test_every_number_of_a_claim_over_tasks_says_what_it_rests_on():
    small = [r | {"run": r["run"] | {"task": "wikitext2"}} for r in runs_of("lite", 5)]
    given = Records.holding(runs_of("paper", 5) + small)
    ours = claims_made(given)["ours"]["Better than AdamW on every one of five tasks"]
    shown = dict(line.split(":", 1) for line in ours.split("<br>"))
    assert shown[TASKS["wikitext2"].title].endswith("(lite runs)")
    assert "lite" not in shown[TASKS["etth1"].title]


def test_every_pair_is_shown_with_its_gain(monkeypatch):
    records = runs_of("paper", 3, ARMS[:2]) + runs_of("paper", 1, ARMS[2:])
    factors = pd.DataFrame(
        {"α (mean)": [1.25]}, index=pd.MultiIndex.from_tuples([("paper", 0)], names=["protocol", "seed"])
    )
    given = Records.holding(records)
    monkeypatch.setattr(Evidence, "_factors", lambda evidence: factors)
    table = Evidence(given, TASKS["etth1"]).by_seed()
    assert table.loc[("paper", 0)].tolist() == ["2", "1.8", "2", "+10.0", "1.25"]
    assert table.loc[("paper", 2)].tolist() == ["2.002", "1.802", "–", "+10.0", "–"]


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


def test_a_page_with_runs_as_published_under_one_protocol_says_what_rests_on_small_ones():
    recorded = [r for r in COMMITTED.of("imdb") if r["run"]["profile"] == "paper"]
    whole = [r for r in recorded if r["run"]["protocol"] == "paper"]
    small = [r | {"run": r["run"] | {"profile": "lite"}} for r in recorded if r["run"]["protocol"] == "clean"]
    given = Records.holding(small + whole)
    evidence = Evidence(given, TASKS["imdb"])
    assert evidence.profiles == {"paper": "paper", "clean": "lite"}
    assert set(evidence.runs.groupby("protocol")["profile"].unique().map(list).map(tuple)) == {("paper",), ("lite",)}
    assert "What is under protocol `clean` comes from small whole runs" in evidence.label()
    says = evidence.verdict()["MetaAdamW improves on AdamW"].map(str)
    assert "lite runs" in says["clean (lite runs)"]
    assert "lite runs" not in says["paper (paper runs)"]
    assert "nan" not in evidence.conclusion()
    assert evidence.curves().get_suptitle() == "IMDB sentiment, profile: paper (protocol paper), lite (protocol clean)"
    both = small + [r | {"run": r["run"] | {"profile": "lite"}} for r in whole]
    given = Records.holding(both)
    assert "Everything recorded on this page comes from small whole runs" in Evidence(given, TASKS["imdb"]).label()


@pytest.mark.parametrize("task", TASKS)
def test_the_search_stays_out_of_what_is_shown(task):
    assert {r["run"]["seed"] for r in COMMITTED.of(task)} & set(SEARCH_SEEDS), "the case is there"
    for runs in (report.main_runs(COMMITTED, task), Evidence(COMMITTED, TASKS[task]).runs):
        assert set(runs["seed"]) <= set(SEEDS)


def test_every_claim_has_a_verdict_and_lite_runs_say_so():
    claims = claims_made(COMMITTED).reset_index()
    table = report.table_of_tasks(COMMITTED)
    assert set(claims["evidence"].str.extract(r"\((.*)\)")[0].dropna()) <= {
        p.name for p in (report.repository() / "notebooks").iterdir()
    }
    for task, row in table.iterrows():
        claim = claims[claims["evidence"].str.contains(task)]
        tested = claim["verdict"].iloc[0] != "not yet tested"
        assert tested == (row["seeds"] >= paired.ENOUGH_SEEDS)
        if tested:
            assert ("lite runs" in claim["verdict"].iloc[0]) == (row["profile"] == "lite")


@pytest.mark.parametrize("task", TASKS)
def test_the_ablation_table_marks_what_is_the_baseline(task):
    runs = [made("metaadamw", seed, [1.0 + seed / 10], task, "lite") for seed in range(3)]
    given = Records.holding(runs)
    table = report.ablation_table(given, task, "lite")
    assert table["baseline"][table["paper"] == "baseline"].all(), "what the paper calls baseline is Table 4's setting"
    baseline = table[table["baseline"]]
    assert (baseline["mean"] == table.loc[("MetaAdamW", "MetaAdamW (baseline)"), "mean"]).all()
    assert all(d.mean == 0 for d in baseline["difference"])


def made_ablations():
    """AdamW, MetaAdamW and one row of Table 3 on ETTh1, three seeds each."""
    arms = {"adamw": 1.1, "metaadamw": 1.0, "gating-off": 0.8}
    return [made(arm, k, [x + k * k / 100], profile="lite") for arm, x in arms.items() for k in range(3)]


def test_ablations_are_paired_with_metaadamw():
    given = Records.holding(made_ablations())
    table = report.ablation_table(given, "etth1", "lite")
    expected = [100 * (1 - (1.1 + k * k / 100) / (1.0 + k * k / 100)) for k in range(3)]
    difference = table.loc[("MetaAdamW", "AdamW"), "difference"]
    assert difference.seeds == 3
    assert difference.mean == pytest.approx(sum(expected) / 3)


def test_the_order_of_the_pairs_does_not_matter():
    values = [-100.0, 3.0, -20.0, 8.0, 1.0]
    one, other = (paired.paired_difference(pd.Series(x), "%") for x in (values, values[::-1]))
    assert one == other


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


def test_pairs_that_are_lost_are_counted_and_leave_nothing_decided():
    outcome = pd.DataFrame(
        {
            "protocol": "paper",
            "variant": ["adamw"] * 5 + ["metaadamw"] * 5,
            "seed": [0, 1, 2, 3, 4] * 2,
            "outcome": [1.0, 2.0, 9.0, 4.0, 3.0, 0.9, 1.7, 8.2, 3.4, None],
        }
    )
    arm, baseline = report.by_seed(outcome, "paper", "metaadamw", "adamw")
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


def test_means_of_table_2_are_over_the_pairs():
    table = report.table_of_tasks(COMMITTED)
    for task, row in table.iterrows():
        runs = report.outcomes(report.runs_frame(COMMITTED.of(task)))
        mine = runs[(runs["profile"] == row["profile"]) & (runs["protocol"] == "paper")]
        mine = mine[mine["seed"].isin(row["improvements"].index) & (mine["variant"] == "adamw")]
        assert not set(mine["seed"]) & set(SEARCH_SEEDS)
        assert len(mine) == row["seeds"]
        assert row["baseline_mean"] == pytest.approx(mine["outcome"].mean())


def test_without_a_complete_search_nothing_is_compared_with_a_tuned_baseline():
    table = report.tuned_table(Records.holding(runs_of("lite", 5)))
    assert table.empty
    assert count_decided(table["difference"]) == (0, 0)
    assert {"learning_rate", "edge", "tuned", "worse", "p_holm"} <= set(table.columns)


def test_the_tuned_baseline_is_corrected_for_all_searches():
    table = report.tuned_table(COMMITTED)
    assert len(table) >= len(TASKS)
    p = table["difference"].map(lambda d: d.p).dropna()
    assert (table["p_holm"][p.index] >= p).all()
    if len(p):
        assert table["p_holm"].min() == pytest.approx(min(1, len(p) * p.min()))
    statement = report.tuned_statement(table)
    worse = table[table["difference"].map(lambda d: judge(d).kind == FAILS)]
    for task, protocol, profile in worse.index:
        named = f"{TASKS[task].title} (`{protocol}`, {profile} runs)"
        assert named in statement.split("**worse**")[1].split("\n")[0]


def test_every_number_of_table_3_is_a_claim_with_the_printed_change():
    claims = pd.read_csv(report.repository() / "data" / "paper" / "claims.csv", dtype=str)
    ablations = claims[claims["kind"] == "ablation"].set_index(["task", "variant"])["number"]
    printed = report.paper_table(3).set_index("variant")
    for task, cells in printed.drop(index=["adamw", "metaadamw"])[list(TASKS)].items():
        numbers = cells[cells.notna() & (cells != "baseline")].astype(float)
        assert set(ablations[task].index) == set(numbers.index)
        sign = -1 if TASKS[task].lower_is_better else 1
        changes = sign * 100 * (numbers / float(printed.loc["metaadamw", task]) - 1)
        claimed = ablations[task].str.removesuffix(" %").astype(float)
        assert claimed.to_dict() == pytest.approx(changes.to_dict(), abs=0.011)


def test_a_claim_of_an_unknown_kind_is_refused_and_not_called_untested():
    claim = pd.Series({"kind": "improvment", "task": math.nan, "variant": math.nan})
    with pytest.raises(ValueError, match="is 'improvment'; allowed are improvement, all"):
        _found(COMMITTED, claim, pd.DataFrame(), {})


def test_an_ablation_claim_has_the_sign_of_the_papers_table():
    given = Records.holding(made_ablations())
    claims = claims_made(given)
    table = report.ablation_table(given, "etth1", "lite")
    row = claims.loc["Feature gating is effective (ETTh1)"]
    assert row["ours"] == f"{table.loc[('Feature gating', 'Disable'), 'difference']} (lite runs)"
    parts = claims.loc["Every component is necessary (judged on ETTh1, our choice: grouping, objective, HUW, gating)"]
    tested = table[table["variant"].isin(REMOVALS)]
    run = tested["difference"].map(lambda d: d.seeds == 3)
    assert parts["ours"] == f"taken away one at a time: {run.sum()}"
    assert table["p_holm"].notna().sum() == table[~table["baseline"]]["difference"].map(lambda d: d.seeds == 3).sum()
    assert math.isnan(table.loc[("MetaAdamW", "MetaAdamW (baseline)"), "p_holm"]), "it is not compared with itself"


def made(variant, seed, metrics, task="etth1", profile="paper", protocol="paper"):
    """A record with a metric for each epoch, lower is better."""
    best = min(range(len(metrics)), key=metrics.__getitem__)
    return {
        "run": {"task": task, "variant": variant, "protocol": protocol, "profile": profile, "seed": seed},
        "status": "stopped early",
        "data": "made",
        "environment": {"revision": "made"},
        "epochs": [{"epoch": k, "metric": m} for k, m in enumerate(metrics, start=1)],
        "best": {"epoch": best + 1, "metric": metrics[best]},
        "test": None,
    }


def verdict_on(claim, ours, adamw, task="etth1"):
    """The verdict on a claim about a task where each arm has these metrics by seed and epoch."""
    arms = {"metaadamw": ours, "adamw": adamw}
    records = [made(arm, k, m, task) for arm, metrics in arms.items() for k, m in enumerate(metrics)]
    records += [r | {"run": r["run"] | {"protocol": "clean"}} for r in records]
    given = Records.holding(records)
    return claims_made(given).loc[claim]


LONG = "Shorter training on ETTh1 (earlier stop)"
SHORT = "Reaches a better optimum earlier (ETTh1; here: is as good as AdamW's best in an earlier epoch)"


def test_claims_on_the_length_of_training():
    few = [[3.0, 2.0, 1.0]] * 4 + [[3.0, 2.0, 1.0, 1.5]]
    many = [[3.0, 2.5, 2.0, 1.5, 1.2, 1.1]] * 5
    assert verdict_on(LONG, few, many)["verdict"] == "holds"
    row = verdict_on(LONG, many, few)
    assert row["verdict"] == "does not hold: it is the other way round"
    assert row["ours"].startswith("epochs: +")
    assert "0 of 10 runs went on to the last epoch allowed, 8" in row["ours"]
    longer = "Trains for more epochs on IMDB instead of stopping too early"
    assert verdict_on(longer, many, few, "imdb")["verdict"] == "holds"
    assert verdict_on(longer, few, many, "imdb")["verdict"] == "does not hold: it is the other way round"


def test_a_run_that_diverges_is_not_one_that_takes_less_time():
    short = [made("metaadamw", k, [3.0, 8.0]) | {"status": "diverged"} for k in range(5)]
    records = short + [made("adamw", k, [3.0, 2.5, 2.0, 1.5, 1.2, 1.1 + k]) for k in range(5)]
    given = Records.holding(records)
    verdicts = claims_made(given)["verdict"]
    assert verdicts[LONG] == "not decided: 5 of 5 pairs lost"


@pytest.mark.parametrize(("task", "gain"), [("etth1", 10), ("cifar10", -10)])
def test_table_2_and_its_claims_have_the_sign_of_the_papers_formula(task, gain):
    sizes = {"adamw": 1.0, "metaadamw": 0.9, "metaadamw-frozen": 2.0}
    records = [
        made(arm, k, [size * (1 + k / 10 + (k % 2) * (arm == "metaadamw") / 100)], task)
        for arm, size in sizes.items()
        for k in range(5)
    ]
    given = Records.holding(records)
    row = report.table_of_tasks(given).loc[task]
    assert row["difference"].mean == pytest.approx(gain, abs=1)
    assert row["arm_mean"] == pytest.approx(0.9 * row["baseline_mean"], rel=0.02)
    claims = claims_made(given)
    claim = {"etth1": "Lower error on ETTh1", "cifar10": "Higher accuracy on CIFAR-10"}[task]
    assert claims.loc[claim, "verdict"] == ("holds" if gain > 0 else "does not hold: it is worse")
    learning = claims.loc["Meta-learning adapts Φ to the task, which leads to better generalization", "ours"]
    assert ("+5" in learning) == (gain > 0), "against the control"
    runs = report.outcomes(report.runs_frame(records))
    table = report.comparison_table(task, runs, dict.fromkeys(sizes, "arm"))
    assert (table["improvement (%)"].iloc[0][0] == "+") == (gain > 0)


def test_table_2_is_corrected_over_its_tasks():
    table = report.table_of_tasks(COMMITTED)
    pd.testing.assert_series_equal(table["p_holm"], paired.holm(table["p"]), check_names=False)
    assert (table["p_holm"] > table["p"]).any()


def test_a_tuned_baseline_is_judged_by_seeds_that_it_was_not_chosen_by():
    table = report.tuned_table(COMMITTED)
    assert all(d.seeds <= len(SEEDS) for column in ("tuned", "difference") for d in table[column].dropna())


def test_a_tuned_baseline_and_what_is_set_beside_it_have_the_right_signs(monkeypatch):
    errors = {"adamw": 2.0, "adamw-lr0.001": 1.0, "metaadamw": 0.9}
    records = [made(arm, k, [x + k / 100]) for arm, x in errors.items() for k in (*range(5), *SEARCH_SEEDS)]
    given = Records.holding(records)
    done = RunKey("etth1", "adamw", "paper", "paper", SEARCH_SEEDS[0])
    monkeypatch.setattr(report, "best_variant", lambda search, _: "adamw-lr0.001" if done in search else None)
    row = report.tuned_table(given).iloc[0]
    assert row["difference"].mean == pytest.approx(10, abs=0.5)
    assert row["tuned"].mean == pytest.approx(50, abs=1)
    assert row["worse"] == 0
    assert row["difference"].seeds == 5


def test_what_is_called_the_last_epoch_is_the_last():
    records = [
        made(arm, k, [3.0, 1.0 + k / 10, last + k / 10], protocol=protocol)
        for arm, last in (("adamw", 2.0), ("metaadamw", 4.0), ("metaadamw-frozen", 2.0))
        for protocol in ("paper", "clean")
        for k in range(3)
    ]
    given = Records.holding(records)
    assert report.table_of_tasks(given).loc["etth1", "last"].mean == pytest.approx(-97, abs=3)
    says = Evidence(given, TASKS["etth1"]).last_epoch()
    assert "Last epoch, MetaAdamW against AdamW: -9" in says, "twice the error"
    frame = report.runs_frame([made("adamw", 0, [3.0, 1.0, 2.0])])
    assert frame[["best", "last"]].iloc[0].tolist() == [1.0, 2.0]


def test_a_component_is_necessary_only_if_it_is_after_the_correction():
    def verdict_with(worse_by):
        removed = [v for v in REMOVALS if v in set(report.ablation_table(COMMITTED, "etth1", "lite")["variant"])]
        spread = [0.1, -0.2, 0.15, -0.1, 0.05]
        records = [made("metaadamw", k, [1.0], profile="lite") for k in range(5)]
        for variant in removed[:-1]:  # cannot be told from chance
            records += [made(variant, k, [1.0 + x], profile="lite") for k, x in enumerate(spread)]
        records += [made(removed[-1], k, [1.0 + worse_by + x / 5], profile="lite") for k, x in enumerate(spread)]
        given = Records.holding(records)
        table = report.ablation_table(given, "etth1", "lite").set_index("variant").loc[removed[-1]]
        return table["difference"].p, _found_parts(given, "etth1").says

    p, says = verdict_with(0.04)
    assert 0.01 < p < 0.05, "one of six, uncorrected"
    assert says == "after Holm's correction: not decided: cannot be told from chance for 6 (lite runs)"
    p, says = verdict_with(0.4)
    assert "holds for 1" in says


def test_claims_on_who_is_first():
    soon = [[3.0, 1.0, 2.0, 2.0]] * 3 + [[1.0, 1.0, 2.0, 2.0]] * 2
    late = [[3.0, 2.5, 2.0, 1.0]] * 5
    assert verdict_on(SHORT, soon, late)["verdict"] == "holds"
    assert verdict_on(SHORT, late, soon)["verdict"] == "does not hold: it is later or never"
    same = verdict_on(SHORT, late, late)
    assert same["verdict"] == "not decided: identical results", "a tie is no defeat"
    assert "(3 of 5 pairs)" in verdict_on(SHORT, soon[:3] + late[3:], late)["ours"]
    latest = [*late[:3], [3.0, 1.0, 2.0, 2.0], [3.0, 1.0, 2.0, 2.0]]
    never = verdict_on(SHORT, [[3.0, 2.9, 2.8, 2.7]] * 5, latest)
    assert never["verdict"] == "does not hold: it is later or never"


def test_an_ablation_holds_where_the_change_is_worse():
    def row(variant_error):
        records = [made("metaadamw", k, [1.0 + k / 10], profile="lite") for k in range(5)]
        records += [made("adamw", k, [1.0 + k / 10], profile="lite") for k in range(5)]
        records += [
            made("gating-off", k, [(1.0 + k / 10) * (variant_error + k / 100)], profile="lite") for k in range(5)
        ]
        given = Records.holding(records)
        return claims_made(given).loc["Feature gating is effective (ETTh1)"]

    assert row(1.3)["verdict"] == "holds (lite runs)"
    assert row(1.3)["ours"].startswith("-"), "as the paper prints it"
    assert row(0.7)["verdict"] == "does not hold: it is better (lite runs)"


def test_what_training_phi_brings_is_taken_against_the_same_phi_untrained():
    gains = {"metaadamw": 1.00, "updates-10": 0.90, "features-enhanced": 0.5, "metaadamw-frozen": 1.00}
    moves = {"metaadamw": [0.01, 0.02], "updates-10": [0.1, 0.4, 0.3], "features-enhanced": [0.9]}
    records = [
        made(variant, seed, [gain * (1 + seed / 10)], profile="lite")
        | {"meta_updates": [{"log_var": [], "alpha_moved": m * (1 + seed)} for m in moves.get(variant, [])]}
        for variant, gain in gains.items()
        for seed in range(4)
    ]
    refused = next(r for r in records if (r["run"]["variant"], r["run"]["seed"]) == ("updates-10", 2))
    refused["meta_updates"][1]["error"] = "the loss is nan"
    given = Records.holding(records)
    runs = report.movement_table(given, "etth1", "lite").set_index(["variant", "seed"])
    assert runs.loc[("updates-10", 3), "alpha_moved"] == pytest.approx(1.6)
    assert runs.loc[("updates-10", 3), "meta_updates"] == 3
    assert runs.loc[("updates-10", 2), "meta_updates"] == 2, "one was refused"
    assert len(runs) == 12, "the control does no meta-updates"
    table = report.more_meta_learning(given, "etth1", "lite")
    assert table.index.tolist() == ["MetaAdamW", "Meta-update frequency: Approx. 10 times per epoch"]
    assert table["difference"].map(lambda d: d.mean).tolist() == pytest.approx([0, 10])
    assert table["alpha_moved"].tolist() == pytest.approx([0.05, 1.0])
    statement = report.more_meta_learning_statement(table)
    assert "10 times per epoch**: 3 meta-updates a run, α by up to 1.6) is +10.0 %" in statement
    assert report.more_meta_learning(given, "etth1", "paper").empty


def test_the_statement_on_the_tuned_baseline_counts_what_was_tested():
    def difference(values):
        return paired.paired_difference(pd.Series(values, dtype=float), "%")

    where = [("etth1", "paper"), ("imdb", "paper"), ("cifar10", "paper"), ("imdb", "clean")]
    index = pd.MultiIndex.from_tuples([(*w, "lite") for w in where], names=["task", "protocol", "profile"])
    differences = [difference(x) for x in ([-5, -5.1, -4.9, -5.2], [3, 2.5, 2, 1.5], [1, -1, 2, -2], [])]
    table = pd.DataFrame({"difference": differences}, index=index)
    table["tuned"] = [None, difference([5, 5.1, 4.9]), None, None]
    table["p_holm"] = paired.holm(table["difference"].map(lambda d: d.p))
    better, worse, count, gained, missing = report.tuned_statement(table).split("\n")
    assert "ETTh1" in worse
    assert "IMDB" not in worse
    assert "IMDB" in better
    assert "2 of 3 comparisons" in count
    assert f"{(table['p_holm'] < 0.05).sum()} of them are left" in count
    assert "IMDB" in gained
    assert "`clean`" in missing


def dots(ax):
    """Where the dots of a picture are along its horizontal axis."""
    return sorted(x for collection in ax.collections for x in collection.get_offsets()[:, 0])


def test_pictures_show_the_numbers_of_their_tables():
    pairs = pd.DataFrame({"task": "made", "improvement": [1.0, -2.0, 30.0], "paper": 4.0})
    assert set(dots(figures.plot_improvements(pairs).axes[0])) == {-2.0, 1.0, 4.0, 30.0}

    given = Records.holding(made_ablations())
    table = report.ablation_table(given, "etth1", "lite")
    tested = table[~table["baseline"] & table["difference"].map(lambda d: d.seeds >= 3)]
    assert len(tested) == 2
    means = figures.plot_ablations(table).axes[0].lines[0].get_xdata()
    assert list(means) == [d.mean for d in tested["difference"]]

    epochs = report.epochs_frame(made("adamw", k, [3.0 + k, 2.0 - k / 10]) for k in range(3))
    band = figures.plot_curves(epochs, ["paper"], TASKS["etth1"]).axes[0].collections[0].get_paths()[0].vertices
    assert {(1.0, 3.0), (1.0, 5.0), (2.0, 1.8), (2.0, 2.0)} <= {(x, round(y, 9)) for x, y in band}, "lowest to highest"
