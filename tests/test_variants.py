"""The named variants of an experiment, and which runs make up a study."""

import csv
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tiny

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.budget import LEARNED, SEARCHES, searched_as
from metaadamw_lite.experiments.ladder import LADDER
from metaadamw_lite.experiments.null import NULL
from metaadamw_lite.experiments.paired import pairs_needed
from metaadamw_lite.experiments.peers import PEERS
from metaadamw_lite.experiments.published import RELEASED
from metaadamw_lite.experiments.records import RunKey, write_record
from metaadamw_lite.experiments.studies import (
    SEARCH_SEEDS,
    STUDIES_OF_PHI,
    best_variant,
    missing,
    status,
    status_lines,
    study_runs,
)
from metaadamw_lite.experiments.task import PROFILES
from metaadamw_lite.experiments.training import make_optimizer, run, run_settings
from metaadamw_lite.experiments.variant import Variant
from metaadamw_lite.experiments.variants import (
    ABLATIONS,
    ARMS,
    LEARNING_RATES,
    OTHER_ATTENTION,
    SEEDS,
    UNEQUAL_PRIORITIES,
    VARIANTS,
    WEIGHTED,
    apply_variant,
    at_learning_rate,
    changes_settings,
    learning_rate,
    learning_rates,
)

PAPER = Path(__file__).parent.parent / "data" / "paper"
ARGUMENTS = {
    "Grouping strategy": {"group_strategy"},
    "Feature version": {"feature_version", "attn_heads"},
    "Meta-learning objective": {"meta_objective"},
    "HUW priorities": {"huw_priorities"},
    "Feature gating": {"use_feature_gating"},
    "Meta-update frequency": set(),
    "Attention module": {"attn_layers", "attn_hidden_dim"},
}
STEPS_PER_EPOCH = {"etth1": 217, "wikitext2": 123, "multi30k": 454, "cifar10": 391, "imdb": 391}
"""With the paper's settings."""


def table(number):
    with (PAPER / f"table{number}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def changing(task, profile="paper"):
    return [v for v in ABLATIONS if changes_settings(TASKS[task].settings(profile), v)]


PAIRS = [(task, variant) for task in TASKS for variant in changing(task)]

# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("row", table(4), ids=lambda row: row["task"])
def test_the_settings_are_those_of_table_4(row):
    settings = TASKS[row["task"]].settings("paper")
    assert settings.meta_every == int(row["k_meta"])
    assert settings.metaadamw == {
        "attn_layers": int(row["attn_layers"]),
        "attn_hidden_dim": int(row["attn_hidden_dim"]),
        "attn_heads": int(row["attn_heads"]),
        "feature_version": row["feature_version"],
        "use_feature_gating": row["feature_gating"] == "True",
        "huw_priorities": tuple(float(row[f"huw_priority_{x}"]) for x in ("gradient", "loss_decrease", "gen_gap")),
    }
    assert (settings.lr, settings.weight_decay, settings.betas) == (5e-4, 1e-2, (0.9, 0.999))


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize(("task", "variant"), PAIRS)
@pytest.mark.parametrize("profile", PROFILES)
def test_an_ablation_changes_exactly_one_factor(task, variant, profile):
    before = TASKS[task].settings(profile)
    kept = asdict(before)
    after = apply_variant(before, variant)
    published = apply_variant(before, "metaadamw")
    other = {f.name for f in fields(before) if getattr(published, f.name) != getattr(after, f.name)}
    keys = {
        k
        for k in before.metaadamw.keys() | after.metaadamw.keys()
        if before.metaadamw.get(k, "default") != after.metaadamw.get(k, "default")
    }
    allowed = ARGUMENTS[ABLATIONS[variant].factor]
    if allowed:
        assert other == {"metaadamw"}
        assert keys
        assert keys <= allowed
    else:
        assert "meta_per_epoch" in other
        assert other <= {"meta_every", "meta_per_epoch"}
    assert asdict(before) == kept, "the task's own settings stay as they are"


def test_every_ablation_has_the_value_it_is_named_after():
    expected = {
        "grouping-original": {"group_strategy": "original"},
        "features-basic": {"feature_version": "basic", "attn_heads": 6},
        "features-basic_plus": {"feature_version": "basic_plus", "attn_heads": 11},
        "features-enhanced": {"feature_version": "enhanced"},
        "objective-gradient": {"meta_objective": "gradient"},
        "objective-loss_decrease": {"meta_objective": "loss_decrease"},
        "objective-gen_gap": {"meta_objective": "gen_gap"},
        "huw-none": {"huw_priorities": None},
        "huw-equal": {"huw_priorities": (1.0, 1.0, 1.0)},
        "huw-unequal": {"huw_priorities": UNEQUAL_PRIORITIES},
        "gating-on": {"use_feature_gating": True},
        "gating-off": {"use_feature_gating": False},
        "attention-8x16": {"attn_layers": 8, "attn_hidden_dim": 16},
        "attention-other": OTHER_ATTENTION,
    }
    for task, variant in PAIRS:
        after = apply_variant(TASKS[task].settings("paper"), variant)
        assert expected.get(variant, {}).items() <= after.metaadamw.items(), (task, variant)
    assert {v for _, v in PAIRS} == set(ABLATIONS), "every variant is a change for some task"
    assert set(ABLATIONS) - set(expected) == {"updates-1", "updates-2", "updates-10"}
    assert len(set(UNEQUAL_PRIORITIES)) > 1
    assert OTHER_ATTENTION != {"attn_layers": 8, "attn_hidden_dim": 16}


def test_a_group_strategy_or_an_objective_that_table_3_calls_baseline_is_the_default():
    optimizer = make_optimizer("metaadamw", tiny(), replace(TASKS["wikitext2"].settings("paper")), 10, 0)
    original = make_optimizer(
        "grouping-original", tiny(), apply_variant(TASKS["wikitext2"].settings("paper"), "grouping-original"), 10, 0
    )
    assert len(optimizer.groups) > len(original.groups) == 1
    explicit = MetaAdamW(tiny().named_parameters(), group_strategy="fine_grained")
    assert [g.name for g in optimizer.groups] == [g.name for g in explicit.groups]


@pytest.mark.parametrize("version", ["basic", "basic_plus", "enhanced"])
def test_heads_follow_the_width_of_the_features(version):
    """As in Table 4: 6 heads for 6 features, 11 for 11; the embedding of the groups counts for ``enhanced``."""
    variant = f"features-{version}"
    task = next(t for t in TASKS if variant in changing(t))
    settings = apply_variant(TASKS[task].settings("paper"), variant)
    settings = replace(settings, metaadamw={**settings.metaadamw, "attn_layers": 1})
    optimizer = make_optimizer(variant, tiny(), settings, 10, 0)
    widths = {m.embed_dim for m in optimizer.modulator.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    assert widths == {settings.metaadamw["attn_heads"]}


@pytest.mark.parametrize("task", TASKS)
def test_variants_that_change_nothing_are_refused_and_not_in_the_study(task, tmp_path):
    settings = TASKS[task].settings("paper")
    same = [v for v in ABLATIONS if v not in changing(task)]
    assert same
    in_study = {key.variant for key in study_runs("ablation", tmp_path, [task])}
    for variant in same:
        with pytest.raises(ValueError, match=f"'{variant}'.*'metaadamw'"):
            apply_variant(settings, variant)
        with pytest.raises(ValueError, match=f"'{variant}'"):
            run(RunKey(task, variant, "paper", "smoke", 0), tmp_path, progress=False)
        assert variant not in in_study
    assert list(tmp_path.iterdir()) == []


def test_unknown_variants_are_quoted():
    with pytest.raises(ValueError, match="sgd"):
        apply_variant(TASKS["etth1"].settings("paper"), "sgd")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_the_same_variants(task, profile):
    assert changing(task, profile) == changing(task)


@pytest.mark.parametrize("task", TASKS)
def test_the_study_covers_table_3(task, tmp_path):
    """Every row but those that are the task's own baseline, also where the paper has a dash."""
    rows = [row for row in table(3) if row[task] != "baseline"]
    assert all(row["variant"] for row in rows)
    expected = {row["variant"] for row in rows}
    ours = {key.variant for key in study_runs("ablation/paper", tmp_path, [task])}
    assert ours == expected
    for row in table(3):
        if row["variant"] in ABLATIONS:
            ablation = ABLATIONS[row["variant"]]
            assert (ablation.factor, ablation.value) == (row["factor"], row["value"])


@pytest.mark.parametrize(
    ("task", "variant", "every"),
    [
        ("etth1", "metaadamw", 217),
        ("etth1", "updates-2", 108),
        ("etth1", "updates-10", 21),
        ("wikitext2", "updates-2", 61),
        ("wikitext2", "updates-10", 12),
        ("multi30k", "updates-2", 227),
        ("multi30k", "updates-10", 45),
        ("cifar10", "updates-1", 390),
        ("cifar10", "updates-10", 39),
        ("imdb", "updates-1", 390),
        ("imdb", "updates-2", 195),
    ],
)
def test_meta_update_frequencies(task, variant, every):
    settings = apply_variant(TASKS[task].settings("paper"), variant)
    assert settings.meta_every == pytest.approx(every, rel=0.03)
    updates = STEPS_PER_EPOCH[task] // settings.meta_every
    assert updates == settings.meta_per_epoch == int(variant.partition("-")[2] or 1)


@pytest.mark.parametrize("task", TASKS)
def test_the_arms_have_the_settings_of_their_task(task):
    settings = TASKS[task].settings("paper")
    assert all(apply_variant(settings, arm) == settings for arm in ARMS)
    assert settings.meta_every * settings.meta_per_epoch == pytest.approx(STEPS_PER_EPOCH[task], rel=0.03)


@pytest.mark.parametrize("lr", LEARNING_RATES)
def test_learning_rate_variants(lr):
    settings = TASKS["imdb"].settings("paper")
    variant = at_learning_rate(lr)
    after = apply_variant(settings, variant)
    assert after == replace(settings, lr=lr)
    assert learning_rate(variant) == lr
    optimizer = make_optimizer(variant, tiny(), after, 10, 0)
    assert type(optimizer) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(lr, 1e-2)]


def test_names_of_the_variants():
    assert at_learning_rate(5e-4) == "adamw"
    assert {"adamw-lr0.000125", "adamw-lr0.00025", "adamw-lr0.001", "adamw-lr0.008"} < set(VARIANTS)
    assert len(set(VARIANTS)) == len(VARIANTS)
    rates = {at_learning_rate(lr) for profile in PROFILES for lr in learning_rates(profile)}
    assert {*ARMS, *ABLATIONS, *rates, *WEIGHTED, *NULL, *LADDER} <= set(VARIANTS)
    for profile in PROFILES:
        assert 5e-4 in learning_rates(profile)
        assert list(learning_rates(profile)) == sorted(learning_rates(profile))


def test_a_variant_needs_nothing_but_its_entry_in_the_registry(tmp_path, monkeypatch):
    """Whatever its name is: neither which optimizer it has nor whether Φ is trained is read from there."""
    sgd = Variant(lambda s: replace(s, lr=1e-3), lambda model, s, *_: torch.optim.SGD(model.parameters(), lr=s.lr))
    monkeypatch.setitem(VARIANTS, "adamw-in-name-only", sgd)
    made = run(RunKey("etth1", "adamw-in-name-only", "paper", "smoke", 0), tmp_path, progress=False)
    assert (made["status"], made["settings"]["lr"], "trace" in made) == ("finished", 1e-3, False)
    monkeypatch.setitem(VARIANTS, "adamw-at-rest", Variant(lambda s: replace(s, lr=1e-3), updates=False))
    resting = run(RunKey("etth1", "adamw-at-rest", "paper", "smoke", 0), tmp_path, progress=False)
    assert (resting["meta_updates"], len(resting["trace"]) > 0) == ([], True)


def test_a_variant_that_is_an_arm_by_another_name_is_refused(monkeypatch):
    settings = TASKS["etth1"].settings("paper")
    for arm in ARMS:
        monkeypatch.setitem(VARIANTS, "alias", VARIANTS[arm])
        with pytest.raises(ValueError, match=f"'alias', which is what '{arm}' is on this task"):
            apply_variant(settings, "alias")
    monkeypatch.setitem(VARIANTS, "alias", Variant(make=lambda *_: None))
    assert apply_variant(settings, "alias") == settings


# ---------------------------------------------------------------- studies


def counts(study, results, tasks=tuple(TASKS)):
    runs = study_runs(study, results, tasks)
    assert len(set(runs)) == len(runs), "no run twice"
    return len(runs)


def test_the_main_study_goes_seed_by_seed(tmp_path):
    runs = study_runs("main/paper", tmp_path)
    assert counts("main/paper", tmp_path) == 150
    assert [key.seed for key in runs] == [seed for seed in range(5) for _ in range(30)]
    first = [(key.task, key.protocol, key.variant) for key in runs[:30]]
    assert first == [(task, protocol, arm) for task in TASKS for protocol in ("paper", "clean") for arm in ARMS]
    assert {key.source for key in runs} == {"real"}


def first_pairs(task, gains, results, seconds=1.0):
    """Write the records of the first seeds of the main study under ``paper``, with these gains in percent."""
    for seed, gain in zip(SEEDS, gains, strict=True):
        better = 1 - gain / 100 if TASKS[task].lower_is_better else 1 + gain / 100
        for arm, metric in (("adamw", 2.0), ("metaadamw", None if math.isnan(gain) else 2 * better)):
            record(metric, RunKey(task, arm, "paper", "lite", seed), results, [{"seconds": seconds}])


def seeds_of(task, results, protocol="paper"):
    runs = study_runs("main/lite", results)
    assert len(set(runs)) == len(runs), "no run twice"
    mine = [key for key in runs if (key.task, key.protocol) == (task, protocol)]
    adamw, ours, control = ([key.seed for key in mine if key.variant == arm] for arm in ARMS)
    assert adamw == ours == control
    return adamw


@pytest.mark.parametrize("task", ["etth1", "imdb"])
def test_the_main_study_goes_on_until_the_papers_gain_would_be_found(task, tmp_path):
    gains = [9.0, -8.0, 4.0, -3.0, 6.0] if task == "etth1" else [25.0, -20.0, 10.0, -9.0, 18.0]
    first_pairs(task, gains, tmp_path)
    needed = pairs_needed(pd.Series(gains), {"etth1": 4.26, "imdb": 11.08}[task])
    assert 10 < needed < 40
    assert seeds_of(task, tmp_path) == list(range(needed))
    assert seeds_of(task, tmp_path, "clean") == list(range(math.ceil(needed / 2)))
    assert seeds_of("cifar10", tmp_path) == list(SEEDS), "each task by its own pairs"
    assert {key.seed for key in study_runs("main/paper", tmp_path)} == set(SEEDS), "whole runs have five seeds"


def test_the_main_study_asks_for_no_more_before_the_first_pairs_are_whole(tmp_path):
    first_pairs("etth1", [1.0, 2.0, 1.5, 1.0, 2.0], tmp_path)
    assert seeds_of("etth1", tmp_path) == list(range(10))
    RunKey("etth1", "adamw", "paper", "lite", 3).path(tmp_path).unlink()
    assert seeds_of("etth1", tmp_path) == list(SEEDS)


def test_a_pair_that_is_lost_tells_nothing_of_the_spread(tmp_path):
    first_pairs("etth1", [9.0, -8.0, math.nan, -3.0, 6.0], tmp_path)
    assert len(seeds_of("etth1", tmp_path)) == pairs_needed(pd.Series([9.0, -8.0, -3.0, 6.0]), 4.26)


def test_further_seeds_come_after_all_first_ones_the_cheapest_task_first(tmp_path):
    first_pairs("etth1", [1.0, 2.0, 1.5, 1.0, 2.0], tmp_path, seconds=30.0)
    first_pairs("imdb", [1.0, 2.0, 1.5, 1.0, 2.0], tmp_path, seconds=3.0)
    runs = study_runs("main/lite", tmp_path)
    assert [key.seed for key in runs[:150]] == [seed for seed in SEEDS for _ in range(30)]
    further = list(dict.fromkeys(key.task for key in runs[150:]))
    assert further == ["imdb", "etth1"]
    assert [key.seed for key in runs[150:] if key.task == "imdb"] == [seed for seed in range(5, 10) for _ in range(3)]


def test_a_study_without_a_profile_has_both(tmp_path):
    for name in ("main", "baseline", "ablation"):
        both = study_runs(name, tmp_path)
        assert both == study_runs(f"{name}/paper", tmp_path) + study_runs(f"{name}/lite", tmp_path)


def test_the_ablation_has_its_baselines_beside_it(tmp_path):
    runs = study_runs("ablation/lite", tmp_path, ["cifar10", "imdb"])
    assert {(key.protocol, key.profile) for key in runs} == {("paper", "lite")}
    assert [key.seed for key in runs] == sorted(key.seed for key in runs)
    for task in ("cifar10", "imdb"):
        seed_0 = [key.variant for key in runs if key.task == task and key.seed == 0]
        assert seed_0 == ["adamw", "metaadamw", *changing(task, "lite")]
        assert len(seed_0) == 14
    assert counts("ablation/lite", tmp_path, ["cifar10", "imdb"]) == 2 * 14 * 5


def test_the_smoke_study_has_every_variant_of_every_task(tmp_path):
    counts("smoke", tmp_path)
    runs = study_runs("smoke", tmp_path)
    assert {(key.profile, key.seed, key.source) for key in runs} == {("smoke", 0, "synthetic")}
    for task in TASKS:
        rates = {at_learning_rate(lr) for lr in LEARNING_RATES}
        expected = {*ARMS, *changing(task), *rates}
        studies = {"wikitext2": STUDIES_OF_PHI, "etth1": ("published",)}.get(task, ())
        expected |= {key.variant for s in studies for key in study_runs(s, tmp_path) if key.task == task}
        if task == "etth1":
            expected |= {
                *PEERS,
                LEARNED,
                *(searched_as(*s, LEARNING_RATES[-1]) for s in SEARCHES if s[1] != "constant"),
            }
        else:
            expected -= {name for name in NULL if name.endswith("-phi1000")}.symmetric_difference(NULL)
        expected -= {*RELEASED}  # whose code is elsewhere
        assert {key.variant for key in runs if key.task == task} == expected
        clean = {key.variant for key in runs if (key.task, key.protocol) == (task, "clean")}
        assert clean == set(ARMS)


def test_only_the_tasks_that_were_asked_for(tmp_path):
    for study in ("main", "baseline", "ablation", "smoke"):
        assert {key.task for key in study_runs(study, tmp_path, ["imdb"])} == {"imdb"}


@pytest.mark.parametrize("study", ["everything", "main/full", "smoke/paper", "main/smoke", "/paper", "main/"])
def test_unknown_studies_and_profiles_are_quoted(study, tmp_path):
    with pytest.raises(ValueError, match=f"study is '{study}'"):
        study_runs(study, tmp_path)


def test_unknown_tasks_are_quoted(tmp_path):
    with pytest.raises(ValueError, match="task is 'mnist'"):
        study_runs("main", tmp_path, ["etth1", "mnist"])


# ---------------------------------------------------------------- the search for a learning rate


def record(metric, key, results, epochs=()):
    best = None if metric is None else {"epoch": 1, "val_loss": 1.0, "metric": metric}
    settings = asdict(run_settings(key))
    content = {"settings": settings, "status": "finished", "data": "made", "epochs": list(epochs), "environment": {}}
    content |= {"best": best, "test": None}
    return write_record(content, key, results)


def searched(task, protocol, metrics, results, profile="lite"):
    """Write the records of a whole search; ``metrics`` has, for each rate, those of the two seeds."""
    for lr, values in zip(learning_rates(profile), metrics, strict=True):
        for seed, metric in zip(SEARCH_SEEDS, values, strict=True):
            record(metric, RunKey(task, at_learning_rate(lr), protocol, profile, seed), results)


def reruns(task, results, protocol="clean"):
    runs = study_runs("baseline/lite", results, [task])
    assert len(set(runs)) == len(runs)
    return [(key.variant, key.seed) for key in runs if key.protocol == protocol and key.seed in SEEDS]


def test_search_seeds_are_used_for_nothing_that_is_reported(tmp_path):
    assert set(SEEDS).isdisjoint(SEARCH_SEEDS)
    assert list(SEEDS) == list(range(5))
    for study in ("main", "ablation"):
        assert {key.seed for key in study_runs(study, tmp_path)} == set(SEEDS)


def test_before_the_search_is_done_there_is_only_the_search(tmp_path):
    runs = study_runs("baseline/lite", tmp_path)
    assert counts("baseline/lite", tmp_path) == 5 * 2 * 7 * 2
    assert {key.seed for key in runs} == set(SEARCH_SEEDS)
    assert {key.variant for key in runs} == {at_learning_rate(lr) for lr in learning_rates("lite")}
    assert [key.protocol for key in runs] == ["clean"] * 70 + ["paper"] * 70
    searched("etth1", "clean", [(1, 1)] * 7, tmp_path)
    last = RunKey("etth1", at_learning_rate(8e-3), "clean", "lite", SEARCH_SEEDS[-1])
    last.path(tmp_path).unlink()
    assert reruns("etth1", tmp_path) == []
    assert best_variant([last], tmp_path) is None


def test_after_the_search_the_best_rate_is_run_again_with_fresh_seeds(tmp_path):
    searched("etth1", "clean", [(5, 5), (4, 4), (3, 3), (2.9, 2.8), (1, 9), (3, 3), (8, 8)], tmp_path)
    assert reruns("etth1", tmp_path) == [("adamw-lr0.004", seed) for seed in range(5)]
    assert reruns("etth1", tmp_path, "paper") == [], "each protocol has a search of its own"
    assert reruns("wikitext2", tmp_path) == [], "and each task"
    assert all(key.profile == "lite" for key in study_runs("baseline/lite", tmp_path))
    assert {key.seed for key in study_runs("baseline/paper", tmp_path)} == set(SEARCH_SEEDS), "and each profile"


def test_an_accuracy_is_better_if_it_is_higher(tmp_path):
    metrics = [(0.5, 0.5), (0.6, 0.6), (0.7, 0.7), (0.8, 0.8), (0.85, 0.95), (0.99, 0.5), (0.1, 0.1)]
    for task in TASKS:
        searched(task, "clean", metrics, tmp_path)
        best = "adamw-lr0.032" if TASKS[task].lower_is_better else "adamw-lr0.008"
        assert reruns(task, tmp_path) == [(best, seed) for seed in range(5)]
    assert [t for t in TASKS if not TASKS[t].lower_is_better] == ["cifar10", "imdb"]


def test_a_rate_with_a_run_that_diverged_is_not_chosen(tmp_path):
    searched("etth1", "clean", [(5, 5), (4, 4), (3, 3), (2, 2), (0.1, None), (None, 0.1), (None, None)], tmp_path)
    assert reruns("etth1", tmp_path) == [("adamw-lr0.004", seed) for seed in range(5)]
    searched("imdb", "clean", [(None, None)] * 7, tmp_path)
    assert reruns("imdb", tmp_path) == []


def test_a_rate_with_an_infinite_perplexity_is_not_chosen(tmp_path):
    """The loss is finite, its exponential is not, and a record holds null for it."""
    metrics = [(300, 300), (200, 200), (100, 100), (150, 150), (160, 160), (50, float("inf")), (float("inf"), 50)]
    searched("wikitext2", "clean", metrics, tmp_path)
    assert reruns("wikitext2", tmp_path) == [("adamw-lr0.002", seed) for seed in range(5)]


def test_if_the_paper_s_rate_is_the_best_the_runs_are_those_of_the_main_study(tmp_path):
    searched("etth1", "paper", [(1, 1), (4, 4), (5, 5), (2, 2), (3, 3), (6, 6), (7, 7)], tmp_path)
    runs = [key for key in study_runs("baseline/lite", tmp_path, ["etth1"]) if key.seed in SEEDS]
    assert [key.variant for key in runs] == ["adamw"] * 5
    assert set(runs) < set(study_runs("main/lite", tmp_path))


# ---------------------------------------------------------------- what is recorded


def test_status_counts_the_records_of_every_study(tmp_path):
    empty = status(tmp_path)
    assert list(empty.columns) == list(TASKS)
    assert list(empty.index) == [f"{s}/{p}" for s in ("main", "baseline", "ablation") for p in ("paper", "lite")]
    assert set(empty.loc["main/paper"]) == {"0/30"}
    assert set(empty.loc["baseline/lite"]) == {"0/28"}
    assert set(empty.loc["ablation/paper"]) == {"0/70"}

    record(0.9, RunKey("imdb", "metaadamw", "paper", "paper", 3), tmp_path)
    record(0.9, RunKey("imdb", "huw-none", "paper", "paper", 3), tmp_path)
    record(0.9, RunKey("imdb", "adamw", "clean", "lite", 0), tmp_path)
    record(0.9, RunKey("imdb", "adamw", "paper", "lite", 0, "synthetic"), tmp_path)
    after = status(tmp_path)
    assert list(after["imdb"]) == ["1/30", "1/30", "0/28", "0/28", "2/70", "0/70"]
    assert after.drop(columns="imdb").equals(empty.drop(columns="imdb"))


def test_status_counts_the_second_half_of_the_baseline_once_the_search_is_done(tmp_path):
    searched("etth1", "clean", [(1, 1)] + [(2, 2)] * 6, tmp_path)
    assert status(tmp_path).loc["baseline/lite", "etth1"] == "14/33"
    record(1.0, RunKey("etth1", "adamw", "clean", "lite", 4), tmp_path)
    assert status(tmp_path).loc["baseline/lite", "etth1"] == "15/33"


def test_status_lines_name_the_missing_seeds(tmp_path):
    for seed in range(5):
        record(1.0, RunKey("etth1", "adamw", "paper", "lite", seed), tmp_path)
    for seed in (1, 3):
        record(1.0, RunKey("etth1", "metaadamw", "clean", "lite", seed), tmp_path)
    lines = [line.split(maxsplit=5) for line in status_lines("main/lite", tmp_path).splitlines()[:-1]]
    assert len(lines) == 30
    assert ["etth1", "paper", "lite", "adamw", "5/5", "complete"] in lines
    assert ["etth1", "clean", "lite", "metaadamw", "2/5", "missing seeds 0, 2, 4"] in lines
    assert sum(line[4] == "0/5" for line in lines) == 28
    assert len(status_lines("main", tmp_path).splitlines()) == 60 + 1, "the last tells what is missing in all"


def test_what_is_missing_keeps_its_order(tmp_path):
    runs = study_runs("main/lite", tmp_path, ["etth1"])
    for key in runs[::2]:
        record(1.0, key, tmp_path)
    assert missing(runs, tmp_path) == runs[1::2]
