"""What the chapters on the relatives say follows from records: signs, pairs, and verdicts on claims."""

import math

import pandas as pd
import pytest

from metaadamw_lite.experiments import claims, lilaw_report, lope_report, paired, relatives
from metaadamw_lite.experiments.figures import COLOURS, DASHES, LABELS
from metaadamw_lite.experiments.lope_study import ARMS
from metaadamw_lite.experiments.records import Records, repository
from metaadamw_lite.experiments.verdict import count_decided


def adaptation(variant, seed, perplexity, accuracy=0.5, task="lope-noise5"):
    stages = ["pretrained", "1", "2", *(["masked"] if ARMS[variant].poisoning else [])]
    return {
        "run": {"task": task, "variant": variant, "protocol": "clean", "profile": "lite", "seed": seed},
        "status": "finished",
        "data": "made",
        "epochs": [
            {"stage": stage, "perplexity": 1000.0 if stage != stages[-1] else perplexity, "accuracy": accuracy}
            for stage in stages
        ],
    }


def on_wrong_labels(variant, seed, accuracy):
    return {
        "run": {"task": "cifar10-symmetric40", "variant": variant, "protocol": "clean", "profile": "lite"}
        | {"seed": seed, "source": "real"},
        "status": "finished",
        "data": "made",
        "wrong_labels": 40,
        "samples": {"train": 100},
        "settings": {"batch_size": 30},
        "epochs": [{"memorised": 0.2}, {"memorised": 0.4}, {"memorised": 0.5}],
        "test": {"metric": accuracy},
        "last": {"metric": accuracy / 2},
        "detection": {
            "LiLAW, easy weight": {"auroc": 0.8, "auprc": 0.7},
            "mean loss": {"auroc": 0.9 + seed / 100, "auprc": 0.7},
            "entropy": {"auroc": 0.6, "auprc": 0.5},
        },
    }


def test_kinds_on_which_nothing_is_learned_are_named():
    rows = [
        {"task": task, "noise": noise, "variant": variant, "best": best}
        for task, noise, values in (
            ("imdb-symmetric40", "IMDB, symmetric 40 %", [50.0, 53.0]),
            ("cifar10-symmetric40", "CIFAR-10, symmetric 40 %", [35.0, 37.0]),
        )
        for best in values
        for variant in ("adamw", "adamw-lilaw")
    ]
    blind = lilaw_report.hardly_above_chance(pd.DataFrame(rows))
    assert blind.to_dict("index") == {"IMDB, symmetric 40 %": {"best": 51.5, "chance": 50}}
    nothing = pd.DataFrame([row | {"best": math.nan} for row in rows])
    assert "CIFAR-10, symmetric 40 %" in lilaw_report.hardly_above_chance(nothing).index
    assert lilaw_report.hardly_above_chance(pd.DataFrame(rows[4:])).empty


def test_every_arm_has_a_label():
    assert list(lope_report.LOPE_LABELS) == list(ARMS)
    assert {"adamw", "adamw-lilaw", "metaadamw", "metaadamw-lilaw"} <= set(LABELS)
    assert set(COLOURS) == set(DASHES) == set(LABELS)


def test_only_the_final_perplexity_of_a_pair_of_seeds_counts():
    records = [adaptation("lope", k, 90.0 - k) for k in range(4)] + [adaptation("lora", k, 100.0) for k in (3, 1, 0)]
    d = lope_report.lope_against(lope_report.adaptations_frame(records), "lora")
    assert (d.seeds, d.unit) == (3, "%")
    assert d.mean == pytest.approx((10 + 11 + 13) / 3), "lower is better, and seed 2 has no pair"


def test_lope_is_set_beside_each_recorded_arm_and_not_beside_itself():
    arms = ("lope", "lora", "lope-discrete")
    runs = lope_report.adaptations_frame([adaptation(arm, k, 90.0 + k) for arm in arms for k in range(3)])
    table = lope_report.lope_table(runs)
    assert list(table.index) == [("5 %", "LoRA (peft)"), ("5 %", "LoPE, discrete noise only")]
    assert set(table["verdict"].map(str)) == {"not decided: identical results"}
    assert list(relatives.format_table(table)["difference (%)"]) == ["+0.0 [+0.0, +0.0]"] * 2


def test_an_arm_whose_pairs_are_all_lost_is_not_one_that_was_not_run():
    failed = [adaptation("lope", k, 90.0) | {"status": "failed"} for k in range(3)]
    made = [*failed, *(adaptation("lora", k, 92.0 + k) for k in range(3))]
    table = lope_report.lope_table(lope_report.adaptations_frame(made))
    assert str(table.loc[("5 %", "LoRA (peft)"), "verdict"]) == "not decided: 3 of 3 pairs lost"


def test_lope_is_judged_after_a_correction_for_all_arms_and_noises():
    made = [adaptation("lope", k, 90.0 + k) for k in range(3)]
    made += [adaptation("lora", k, 92.0 + 1.5 * k) for k in range(3)]
    alone = lope_report.lope_table(lope_report.adaptations_frame(made)).iloc[0]
    assert alone["difference"].p < 0.05
    assert str(alone["verdict"]) == "holds"
    more = [adaptation(arm, k, 90.0 - k + k * k) for arm in ("lope-discrete", "lope-continuous") for k in range(3)]
    both = lope_report.lope_table(lope_report.adaptations_frame(made + more))
    assert both.loc[("5 %", "LoRA (peft)"), "p_holm"] == pytest.approx(3 * alone["difference"].p)


def test_accuracy_of_lilaw_is_a_paired_difference_in_points():
    records = [on_wrong_labels("adamw", k, 0.4) for k in range(3)]
    records += [on_wrong_labels("adamw-lilaw", k, 0.45 + k / 100) for k in range(3)]
    runs = lilaw_report.accuracies_frame(records)
    assert lilaw_report.points(runs, "best", "adamw-lilaw", "adamw").mean == pytest.approx(6)
    assert lilaw_report.points(runs, "last", "adamw-lilaw", "adamw").mean == pytest.approx(3)


def test_what_a_failed_run_had_reached_is_not_its_end():
    whole = on_wrong_labels("adamw-lilaw", 0, 0.4) | {"lilaw": [{"alpha": 9.0, "delta": 2.0, "beta": 1.0}]}
    ends = lilaw_report.accuracies_frame([whole, whole | {"status": "failed", "test": None}])
    columns = ["meta_steps", "memorised", "alpha", "delta", "beta"]
    assert ends.loc[0, columns].tolist() == [2 * 4, 50, 9, 2, 1], "four batches an epoch, and none in the first"
    assert ends.loc[1, ["best", *columns]].isna().all()


def judged_claims(made):
    table = claims.relatives_claims_table(Records.holding(made)).set_index("claim")
    return table.assign(verdict=table["verdict"].map(str))


def test_claims_are_judged_by_their_task_and_lite_runs_say_so():
    made = [adaptation("lope", k, 90.0 + k / 10) for k in range(3)]
    made += [adaptation("lora", k, 100.0 + k) for k in range(3)]
    made += [adaptation("asymmetric-lora", k, 80.0 + k) for k in range(3)]
    made += [on_wrong_labels("adamw-lilaw", k, 0.5) for k in range(3)]
    fifty = [on_wrong_labels("adamw", k, 0.3) for k in range(3)]
    fifty += [on_wrong_labels("adamw-lilaw", k, 0.2 + k / 1000) for k in range(3)]
    made += [r | {"run": r["run"] | {"task": "cifar10-symmetric50"}, "detection": None} for r in fifty]
    table = judged_claims(made)
    verdicts = table["verdict"]
    lower = "Our check on a small GPT: adapted to noisy text it has a lower perplexity than LoRA"
    assert verdicts[lower] == "holds (lite runs)"
    assert verdicts["Our check on a small GPT: … than the same asymmetric LoRA"].startswith("does not hold")
    detection = "Finds mislabelled samples better than seven baselines"
    assert verdicts[detection].startswith("AUROC: does not hold: it is worse (lite runs) on 1 of 1 kinds<br>AUPRC: ")
    assert "AUPRC: not decided" in verdicts[detection], "the two areas are equal there"
    ours = "CIFAR-10, symmetric 40 %: -11.0 [-13.5, -8.5]; +0.0 [+0.0, +0.0]"
    assert ours in table["ours"][detection], "against the best of the other methods"
    accuracy = "Higher accuracy under 50 % uniform noise"
    assert verdicts[accuracy] == "does not hold: it is worse (lite runs)"
    assert table["ours"][accuracy].startswith("-9.9 [-10.1, -9.7] points, 3 seeds")
    assert verdicts["Higher accuracy under asymmetric noise"] == "not yet tested"
    hybrid = "Our check on a small GPT: hybrid noise teaches more than no noise"
    assert verdicts[hybrid] == "not yet tested", "an arm without records"


def test_claims_without_records_are_not_judged():
    verdicts = judged_claims([])["verdict"]
    assert verdicts.str.startswith("not ").all()
    assert (verdicts[verdicts != "not yet tested"].str.removeprefix("not tested: ").str.len() > 10).all()


def test_the_evidence_for_every_claim_is_a_chapter():
    links = claims.relatives_claims_table(Records())["evidence"].str.extract(r"\((.*)\)")[0].dropna()
    assert set(links) <= {p.name for p in (repository() / "notebooks").iterdir()}


def test_a_setting_of_lilaw_is_set_beside_adamw_with_the_same_batches():
    def both(arm, baseline, gain, seeds):
        runs = [on_wrong_labels(baseline, k, 0.4) for k in seeds]
        return runs + [on_wrong_labels(arm, k, 0.4 + gain) for k in seeds]

    made = both("adamw-lilaw", "adamw", 0.02, range(5))
    made += [on_wrong_labels("adamw-lilaw-lr0.5", k, 0.3 + (k - 1) / 500) for k in range(3)]
    made += [on_wrong_labels("adamw-batch16", k, 0.6) for k in range(3)]
    made += [on_wrong_labels("adamw-lilaw-batch16", k, 0.5 + (k - 1) / 500) for k in range(3)]
    table = lilaw_report.sensitivity_table(lilaw_report.accuracies_frame(made))
    assert {name: d.mean for name, d in table["accuracy, best epoch (points)"].items()} == {
        "as it is (rate 0.005, batches of 64)": pytest.approx(2),
        "rate 0.5": pytest.approx(-10),
        "batches of 16": pytest.approx(-10),
    }
    assert set(table["seeds"]) == {3}, "seeds that every setting has"
    assert set(table["meta-steps"]) == {"8"}, "two epochs of four batches, after the warm-up"
    found = table.filter(like="(points)").melt()["value"]
    assert len(found) == 9
    decided = [sum(count_decided(d)) for d in (found, paired.corrected(found))]
    assert decided == [4, 4], "equal differences are no test"


def test_how_far_the_weights_of_samples_moved():
    made = [on_wrong_labels("adamw-lilaw", k, 0.5) for k in range(2)]
    made[0]["lilaw"] = [{"alpha": 10.0, "delta": 6.0, "beta": 2.0}]
    made[1]["lilaw"] = [{"alpha": 9.0, "delta": 5.0, "beta": 1.0}, {"alpha": 10.0, "delta": 6.0, "beta": 0.0}]
    runs = lilaw_report.accuracies_frame([*made, on_wrong_labels("adamw", 0, 0.5)])
    there = 1 / (1 + math.exp(-1)) - 1 / (1 + math.exp(1))  # W_β = σ(m − βa), and a = m = 1 is as far as it gets
    assert list(lilaw_report.weights_moved(runs)) == pytest.approx([0.0, there], abs=1e-6)


def test_a_ranking_is_compared_with_one_other_for_all_seeds():
    made = [on_wrong_labels("adamw-lilaw", k, 0.5) for k in range(3)]
    for k, record in enumerate(made):  # the best of each seed would be another one each time
        record["detection"] = {
            "LiLAW, easy weight": {"auroc": 0.8, "auprc": 0.5},
            "mean loss": {"auroc": 0.9 if k == 0 else 0.7, "auprc": 0.5},
            "entropy": {"auroc": 0.85 if k == 1 else 0.72, "auprc": 0.5},
        }
    row = lilaw_report.detection_against(lilaw_report.detection_frame(made)).iloc[0]
    assert row["best"] == "mean loss (AdamW + LiLAW)"
    assert row["difference"].mean == pytest.approx((-10 + 10 + 10) / 3)


def test_rankings_from_trainings_without_lilaw_count_too():
    made = [on_wrong_labels(arm, k, 0.5) for arm in ("adamw", "adamw-lilaw") for k in range(3)]
    for record in made[:3]:
        record["detection"] = {"mean loss": {"auroc": 0.95, "auprc": 0.5}}
    row = lilaw_report.detection_against(lilaw_report.detection_frame(made)).iloc[0]
    assert row["best"] == "mean loss (AdamW)"
    assert row["difference"].mean == pytest.approx(-15)


def test_accuracy_is_judged_after_a_correction_for_the_kinds_of_noise():
    def kind(task, gains):
        made = [on_wrong_labels("adamw", k, 0.4) for k in range(3)]
        made += [on_wrong_labels("adamw-lilaw", k, 0.4 + gain) for k, gain in enumerate(gains)]
        return [r | {"run": r["run"] | {"task": task}} for r in made]

    one = kind("cifar10-symmetric50", (0.02, 0.024, 0.015))
    alone = lilaw_report.accuracy_table(lilaw_report.accuracies_frame(one), "best").iloc[0]
    assert str(alone["verdict"]) == "holds"
    more = [r for task in ("cifar10-symmetric20", "cifar10-human40") for r in kind(task, (0.1, -0.1, 0.02))]
    both = lilaw_report.accuracy_table(lilaw_report.accuracies_frame(one + more), "best")
    row = both.loc["CIFAR-10, symmetric 50 %"]
    assert row["p_holm"] == pytest.approx(3 * alone["p_holm"])
    assert str(row["verdict"]) == "not decided after the correction"
    assert set(both["verdict"].drop("CIFAR-10, symmetric 50 %").map(str)) == {"not decided: cannot be told from chance"}
    control = [r | {"wrong_labels": 0} for r in more]
    kept = lilaw_report.accuracy_table(lilaw_report.accuracies_frame(one + control), "best")
    assert str(kept.loc["CIFAR-10, symmetric 50 %", "verdict"]) == "holds", "right labels are not part of the question"


def test_means_are_over_the_seeds_that_both_arms_have_and_too_few_are_not_judged():
    made = [on_wrong_labels("adamw", k, 0.4 + k / 10) for k in range(3)]
    made += [on_wrong_labels("adamw-lilaw", k, 0.5) for k in range(2)]
    table = lilaw_report.accuracy_table(lilaw_report.accuracies_frame(made), "best").iloc[0]
    assert table["AdamW (%)"].startswith("45.0"), "without the third seed"
    assert str(table["verdict"]) == "not yet tested: 2 of 3 seeds"


def test_what_masking_takes_is_a_share_of_what_was_gained():
    def stages(*perplexities):
        record = adaptation("lope", 0, perplexities[-1])
        for entry, perplexity in zip(record["epochs"], perplexities, strict=True):
            entry["perplexity"] = perplexity
        runs = lope_report.adaptations_frame([record, adaptation("lora", 0, 90.0)])
        return lope_report.masking_table(runs).loc["LoPE", "5 %"]

    assert stages(200.0, 160.0, 140.0, 191.0) == "85 %"
    assert stages(200.0, 160.0, 140.0, 134.0) == "-10 %", "masking can help"
    assert stages(200.0, 220.0, 210.0, 190.0) == "nothing gained"


def test_what_noise_costs_is_measured_against_the_same_arm_without_noise():
    def ended(variant, clean, noisy):
        return [
            adaptation(variant, k, perplexity + k, task=task)
            for task, perplexity in (("lope-noise0", clean), ("lope-noise20", noisy))
            for k in range(3)
        ]

    only = adaptation("lora", 7, 1.0, task="lope-noise20")  # without a partner
    made = [*ended("lope", 200.0, 210.0), *ended("lora", 100.0, 115.0), only]
    runs = lope_report.adaptations_frame(made)
    table = lope_report.noise_cost_table(runs)
    assert table.loc["LoPE", "noise costs (%)"].startswith("+5.0 ± ")
    assert table.loc["LoRA (peft)", "noise costs (%)"].startswith("+14.9 ± ")
    assert table.loc["LoRA (peft)", "difference"].mean == pytest.approx(14.85 - 4.975, abs=0.01)
    assert str(table.loc["LoRA (peft)", "verdict"]) == "holds"
    assert str(table.loc["LoPE", "verdict"]) == "–"
    made += [adaptation("lora", 8, 1.0, task=task) for task in ("lope-noise0", "lope-noise20")]
    more = lope_report.noise_cost_table(lope_report.adaptations_frame(made)).loc["LoRA (peft)", "difference"]
    assert (more.seeds, more.lost) == (3, 0), "a seed that LoPE lacks is not lost"


def test_the_best_other_ranking_has_all_seeds():
    made = [on_wrong_labels("adamw-lilaw", k, 0.5) for k in range(3)]
    made.append(on_wrong_labels("adamw", 0, 0.5) | {"detection": {"mean loss": {"auroc": 0.99, "auprc": 0.5}}})
    row = lilaw_report.detection_against(lilaw_report.detection_frame(made)).iloc[0]
    assert row["best"] == "mean loss (AdamW + LiLAW)"
    assert row["difference"].seeds == 3


def test_the_picture_of_lope_has_the_sign_of_its_table():
    made = [adaptation("lope", k, 120.0) for k in range(3)] + [adaptation("lora", k, 100.0) for k in range(3)]
    runs = lope_report.adaptations_frame(made)
    shown = lope_report.plot_lope_against(runs).axes[0].collections[0].get_offsets()[:, 0]
    assert list(shown) == pytest.approx([lope_report.lope_against(runs, "lora").mean] * 3)
    assert shown[0] == pytest.approx(-20), "LoPE's perplexity is higher"


def test_the_use_of_the_expert_is_drawn_where_one_arm_is_recorded():
    records = [r for r in Records().of("lope-noise5") if r["run"]["variant"] == "lope"]
    assert len(lope_report.plot_expert_use(records).axes) == 1
