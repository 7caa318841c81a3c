"""The verdicts on the paper's claims."""

import math

import pandas as pd
import pytest
from made_records import COMMITTED, claims_made, made, made_ablations, runs_of

from metaadamw_lite.experiments import TASKS, ablation_report, frames, main_report, paired
from metaadamw_lite.experiments.chapter import Evidence
from metaadamw_lite.experiments.claims import REMOVALS, _found, _found_parts
from metaadamw_lite.experiments.records import Records, paper_table, repository
from metaadamw_lite.experiments.verdict import judge


def test_what_a_run_had_reached_when_it_failed_is_not_its_result():
    runs = [r | {"status": "failed"} if k == 0 else r for k, r in enumerate(runs_of("paper", 5))]
    failed = runs[0]["run"]
    assert (failed["variant"], failed["protocol"]) == ("adamw", "paper")
    given = Records.holding(runs)
    row = main_report.table_of_tasks(given).loc["etth1"]
    assert str(judge(row["difference"])) == "not decided: 1 of 5 pairs lost"
    assert (row["last"].seeds, row["last"].lost) == (4, 1)
    claims = claims_made(given)["verdict"]
    assert claims["Lower error on ETTh1"] == "not decided: 1 of 5 pairs lost"
    assert claims[SHORT] == "not decided: 1 of 5 pairs lost"


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


def test_a_claim_that_rests_on_guessing_says_so():
    def records(accuracy):
        sizes = {"metaadamw": accuracy, "gating-off": accuracy - 0.02}
        return [made(arm, k, [x + k / 100], "imdb", "lite") for arm, x in sizes.items() for k in range(3)]

    for accuracy, guessing in ((0.53, True), (0.7, False)):
        given = Records.holding(records(accuracy))
        ours = claims_made(given)["ours"]["Feature gating is effective (IMDB)"]
        assert ours.endswith("hardly above guessing") == guessing
    assert not main_report.near_chance("etth1", main_report.main_runs(given, "etth1")), "an error has no chance level"


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
    assert main_report.percent(main_report.table_of_tasks(given).loc["etth1", "power"]) == expected
    over_tasks = claims.loc["Better than AdamW on every one of five tasks", "ours"]
    assert f"power for the paper's gain: {expected}" in over_tasks
    assert Evidence(given, TASKS["etth1"]).verdict().loc[:, "power for the paper's gain"].tolist() == [expected, "–"]


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


def test_every_claim_has_a_verdict_and_lite_runs_say_so():
    claims = claims_made(COMMITTED).reset_index()
    table = main_report.table_of_tasks(COMMITTED)
    assert set(claims["evidence"].str.extract(r"\((.*)\)")[0].dropna()) <= {
        p.name for p in (repository() / "notebooks").iterdir()
    }
    for task, row in table.iterrows():
        claim = claims[claims["evidence"].str.contains(task)]
        tested = claim["verdict"].iloc[0] != "not yet tested"
        assert tested == (row["seeds"] >= paired.ENOUGH_SEEDS)
        if tested:
            assert ("lite runs" in claim["verdict"].iloc[0]) == (row["profile"] == "lite")


def test_every_number_of_table_3_is_a_claim_with_the_printed_change():
    claims = pd.read_csv(repository() / "data" / "paper" / "claims.csv", dtype=str)
    ablations = claims[claims["kind"] == "ablation"].set_index(["task", "variant"])["number"]
    printed = paper_table(3).set_index("variant")
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
    table = ablation_report.ablation_table(given, "etth1", "lite")
    row = claims.loc["Feature gating is effective (ETTh1)"]
    assert row["ours"] == f"{table.loc[('Feature gating', 'Disable'), 'difference']} (lite runs)"
    parts = claims.loc["Every component is necessary (judged on ETTh1, our choice: grouping, objective, HUW, gating)"]
    tested = table[table["variant"].isin(REMOVALS)]
    run = tested["difference"].map(lambda d: d.seeds == 3)
    assert parts["ours"] == f"taken away one at a time: {run.sum()}"
    assert table["p_holm"].notna().sum() == table[~table["baseline"]]["difference"].map(lambda d: d.seeds == 3).sum()
    assert math.isnan(table.loc[("MetaAdamW", "MetaAdamW (baseline)"), "p_holm"]), "it is not compared with itself"


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
    row = main_report.table_of_tasks(given).loc[task]
    assert row["difference"].mean == pytest.approx(gain, abs=1)
    assert row["arm_mean"] == pytest.approx(0.9 * row["baseline_mean"], rel=0.02)
    claims = claims_made(given)
    claim = {"etth1": "Lower error on ETTh1", "cifar10": "Higher accuracy on CIFAR-10"}[task]
    assert claims.loc[claim, "verdict"] == ("holds" if gain > 0 else "does not hold: it is worse")
    learning = claims.loc["Meta-learning adapts Φ to the task, which leads to better generalization", "ours"]
    assert ("+5" in learning) == (gain > 0), "against the control"
    runs = frames.outcomes(frames.runs_frame(records))
    table = main_report.comparison_table(task, runs, dict.fromkeys(sizes, "arm"))
    assert (table["gain (%)"].iloc[0][0] == "+") == (gain > 0)


def test_a_component_is_necessary_only_if_it_is_after_the_correction():
    def verdict_with(worse_by):
        removed = [
            v for v in REMOVALS if v in set(ablation_report.ablation_table(COMMITTED, "etth1", "lite")["variant"])
        ]
        spread = [0.1, -0.2, 0.15, -0.1, 0.05]
        records = [made("metaadamw", k, [1.0], profile="lite") for k in range(5)]
        for variant in removed[:-1]:  # cannot be told from chance
            records += [made(variant, k, [1.0 + x], profile="lite") for k, x in enumerate(spread)]
        records += [made(removed[-1], k, [1.0 + worse_by + x / 5], profile="lite") for k, x in enumerate(spread)]
        given = Records.holding(records)
        table = ablation_report.ablation_table(given, "etth1", "lite").set_index("variant").loc[removed[-1]]
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
