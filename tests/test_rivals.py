"""The published code, equal budgets and peers: what is run, and what the tables say of it."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from made_records import made
from test_variants import record

from metaadamw_lite.experiments import TASKS, paired, rivals_report, training
from metaadamw_lite.experiments.__main__ import main
from metaadamw_lite.experiments.budget import LEARNED, SEARCHES, searched_as
from metaadamw_lite.experiments.departures import DEPARTURES
from metaadamw_lite.experiments.peers import PEERS
from metaadamw_lite.experiments.published import RELEASED, VARIABLE, released_class, their_arguments
from metaadamw_lite.experiments.records import Records, RunKey, default_results, paper_table, read_record
from metaadamw_lite.experiments.studies import SEARCH_SEEDS, best_variant, search_runs, study_runs
from metaadamw_lite.experiments.training import run
from metaadamw_lite.experiments.variants import ARMS, LEARNING_RATES, SEEDS, VARIANTS, apply_variant


def smoke(variant, folder, task="etth1"):
    return run(RunKey(task, variant, "paper", "smoke", 0), folder, "cpu", progress=False)


# ---------------------------------------------------------------- what is run


def test_departures_are_run_where_they_are_any_and_the_released_optimizer_everywhere(tmp_path):
    runs = study_runs("published/lite", tmp_path)
    assert len(set(runs)) == len(runs)
    assert {(key.protocol, key.profile) for key in runs} == {("paper", "lite")}
    of_task = {task: {key.variant for key in runs if key.task == task} for task in TASKS}
    assert all({*ARMS, *RELEASED} <= variants for variants in of_task.values())
    alone = {task: sorted(v.removeprefix("departure-") for v in of_task[task] if v.startswith("dep")) for task in TASKS}
    assert alone["wikitext2"] == ["all", "u1", "u13", "u2", "u4", "u9"]
    assert alone["etth1"] == ["all", "u1", "u13", "u2", "u3", "u4", "u9"]
    assert alone["imdb"] == ["u5"]
    assert {key.seed for key in runs} == set(SEEDS)
    assert {f"departure-{name}" for name in (*DEPARTURES, "all")} <= set(VARIANTS)


def test_every_arm_is_searched_alike_and_its_best_rate_run_again_with_fresh_seeds(tmp_path):
    runs = study_runs("budget/lite", tmp_path, ["etth1"])
    searches = [key for key in runs if key.seed in SEARCH_SEEDS]
    assert len(searches) == len(set(searches)) == 7 * 7 * 2
    assert {key.variant for key in runs if key.seed in SEEDS} == {*PEERS, LEARNED}, "before a search is done"
    best = {("metaadamw", "cosine"): 2e-3, ("metaadamw-frozen", "constant"): 5e-4}
    for (arm, schedule), rate in best.items():
        for key in search_runs("etth1", "paper", "lite", arm, schedule):
            record(1.0 if key.variant == searched_as(arm, schedule, rate) else 2.0, key, tmp_path)
    again = [key for key in study_runs("budget/lite", tmp_path, ["etth1"]) if key.seed in SEEDS]
    assert {key.variant for key in again} == {*PEERS, LEARNED, "metaadamw-cosine-lr0.002", "metaadamw-frozen"}
    assert sum(key.variant == "metaadamw-cosine-lr0.002" for key in again) == len(SEEDS)


@pytest.mark.parametrize(("arm", "schedule"), SEARCHES)
@pytest.mark.parametrize("lr", LEARNING_RATES)
def test_a_searched_arm_changes_rate_and_schedule_only(arm, schedule, lr):
    settings = TASKS["etth1"].settings("lite")
    variant = VARIANTS[searched_as(arm, schedule, lr)]
    mine = variant.change(settings)
    length = (settings.epochs, settings.patience) if schedule == "constant" else (settings.scheduled_epochs, None)
    assert (mine.lr, mine.schedule, mine.epochs, mine.patience) == (lr, schedule, *length)
    changed = {k for k, v in vars(mine).items() if v != getattr(settings, k)}
    assert changed <= {"lr", "schedule", "epochs", "patience"}
    assert (variant.make, variant.updates) == (VARIANTS[arm].make, VARIANTS[arm].updates)


# ---------------------------------------------------------------- how it is trained


@pytest.mark.parametrize("task", TASKS)
def test_a_run_with_a_schedule_is_half_as_long_again_as_adamws_at_its_best_rate(task):
    search = search_runs(task, "paper", "lite")
    best = best_variant(search, default_results())
    lengths = [len(read_record(key.path(default_results()))["epochs"]) for key in search if key.variant == best]
    settings = apply_variant(TASKS[task].settings("lite"), "adamw-cosine")
    assert settings.epochs == pytest.approx(1.5 * np.mean(lengths), abs=0.5)
    assert settings.scheduled_epochs is None, "as in records that are older than schedules"


def test_a_warm_up_rises_to_the_rate_and_then_falls_to_zero():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, rates = training.schedule_of(optimizer, "warmup-linear", 100), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert (rates[0], rates[29]) == pytest.approx((2 / 30, 2.0))
    assert np.allclose(np.diff(rates[:30]), 2 / 30)
    assert np.allclose(np.diff(rates[30:]), -2 / 70)
    assert optimizer.param_groups[0]["lr"] == 0
    with pytest.raises(ValueError, match="schedule is 'linear'"):
        training.schedule_of(optimizer, "linear", 100)


def test_a_run_of_fixed_length_does_not_stop_early(tmp_path):
    settings = dataclasses.replace(TASKS["etth1"].settings("smoke"), epochs=4, patience=1, min_delta=10.0)
    ends = {}
    for variant in ("adamw", "adamw-warmup-linear"):
        key = RunKey("etth1", variant, "paper", "smoke", 0)
        done = run(key, tmp_path, "cpu", progress=False, settings=settings)
        ends[variant] = done["status"], len(done["epochs"])
    assert ends == {"adamw": ("stopped early", 2), "adamw-warmup-linear": ("finished", 4)}


def test_a_record_that_lacks_a_setting_was_made_with_its_default(tmp_path):
    key = RunKey("etth1", "adamw", "paper", "smoke", 0)
    old = smoke("adamw", tmp_path)
    del old["settings"]["schedule"]
    assert training.check_settings_match(training.run_settings(key), old, tmp_path) is old
    other = dataclasses.replace(training.run_settings(key), schedule="cosine")
    with pytest.raises(ValueError, match="schedule 'constant' instead of 'cosine'"):
        training.check_settings_match(other, old, tmp_path)


def test_a_cosine_schedule_ends_at_zero(tmp_path, monkeypatch):
    seen = []

    def noted(*arguments):
        seen.append(training.VARIANTS[arguments[0]].make(*arguments[1:]))
        return seen[-1]

    monkeypatch.setattr(training, "make_optimizer", noted)
    done = smoke("adamw-cosine-lr0.001", tmp_path)
    assert done["status"] == "finished"
    assert seen[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert done["settings"]["schedule"] == "cosine"


def stopped_and_resumed(variant, folder, monkeypatch):
    """A run that is interrupted after its first epoch, and made again from its checkpoint."""
    saved = training._Run._save

    def stop(self):
        saved(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training._Run, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            smoke(variant, folder)
    return smoke(variant, folder)


@pytest.mark.parametrize("variant", ["metaadamw-cosine", "adamw-warmup-linear", "departure-all", *PEERS])
def test_a_rival_goes_on_from_its_checkpoint_to_the_same_result(variant, tmp_path, monkeypatch):
    whole, resumed = smoke(variant, tmp_path / "a"), stopped_and_resumed(variant, tmp_path / "b", monkeypatch)
    for one, other in zip(whole["epochs"], resumed["epochs"], strict=True):
        assert [one[k] for k in ("train_loss", "val_loss")] == [other[k] for k in ("train_loss", "val_loss")]


def test_schedule_free_is_evaluated_at_its_average(tmp_path, monkeypatch):
    modes, models = [], []
    measure = training.measure

    def looking(task, model, samples):
        models.append([p.detach().clone() for p in model.parameters()])
        return measure(task, model, samples)

    def noted(*arguments):
        optimizer = training.VARIANTS[arguments[0]].make(*arguments[1:])
        step = optimizer.step
        optimizer.step = lambda: (modes.append(optimizer.param_groups[0]["train_mode"]), step())
        noted.optimizer = optimizer
        return optimizer

    monkeypatch.setattr(training, "measure", looking)
    monkeypatch.setattr(training, "make_optimizer", noted)
    smoke("schedulefree", tmp_path)
    assert all(modes)
    noted.optimizer.train()
    trained = noted.optimizer.param_groups[0]["params"]
    assert not all(torch.equal(p, q) for p, q in zip(trained, models[-1], strict=True))
    noted.optimizer.eval()
    for p, q in zip(noted.optimizer.param_groups[0]["params"], models[-1], strict=True):
        torch.testing.assert_close(p.detach(), q)


# ---------------------------------------------------------------- the released optimizer


def test_the_released_optimizer_needs_a_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    command = ["run", "etth1", "--optimizer", "released", "--profile", "smoke", "--results", str(tmp_path)]
    assert main(command) == 2
    assert VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, "elsewhere")
    (tmp_path / "empty").mkdir()
    assert main([*command, "--reference", str(tmp_path / "empty")]) == 2
    assert "no experiments/meta_adamw.py" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.json"))


def test_the_smoke_study_leaves_the_released_optimizer_out_without_a_clone(tmp_path, monkeypatch):
    for there in (False, True):
        monkeypatch.setenv(VARIABLE, str(tmp_path) if there else "")
        variants = {key.variant for key in study_runs("smoke", tmp_path)}
        assert variants.issuperset(RELEASED) == there


def test_the_released_optimizer_gets_the_settings_of_table_4():
    table = paper_table(4)
    for name, task in TASKS.items():
        theirs, row = their_arguments(task.settings("paper").metaadamw), table.loc[name]
        for ours in ("attn_layers", "attn_hidden_dim", "attn_heads", "feature_version", "feature_dim"):
            assert theirs[ours] == row[ours]
        assert theirs["use_feature_gating"] == row["feature_gating"]
        names = ("gradient", "loss_decrease", "gen_gap")
        assert theirs["huw_priorities"] == [row[f"huw_priority_{x}"] for x in names]


CLONE = __import__("os").environ.get(VARIABLE)


@pytest.mark.skipif(not CLONE, reason=f"{VARIABLE} names no clone of the released code")
def test_the_released_optimizer_is_paired_with_the_other_arms(tmp_path, monkeypatch):
    first = {}
    whole = {variant: smoke(variant, tmp_path / "a") for variant in ("released", "released-frozen")}
    for variant, done in whole.items():
        assert done["status"] == "finished"
        first[variant] = done["trace"][0]["alpha"]
        assert all(0.5 <= a <= 1.5 for point in done["trace"] for a in point["alpha"])
    assert first["released"] == first["released-frozen"], "one Φ"
    assert whole["released"]["meta_updates"][-1]["phi_moved"] > 0
    assert whole["released-frozen"]["meta_updates"] == []
    resumed = stopped_and_resumed("released", tmp_path / "b", monkeypatch)
    assert [e["val_loss"] for e in whole["released"]["epochs"]] == [e["val_loss"] for e in resumed["epochs"]]
    assert released_class(training.Path(CLONE)).__name__ == "MetaAdamW"


# ---------------------------------------------------------------- what the tables say


def timed(variant, seed, metrics, seconds=1.0, task="etth1"):
    done = made(variant, seed, metrics, task, "lite")
    epochs = [e | {"cpu_seconds": seconds} for e in done["epochs"]]
    return done | {"epochs": epochs, "samples": {"train": 25}, "settings": {"batch_size": 10}}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_time_to_a_target_ends_with_the_run_where_it_is_not_reached(sign):
    metrics = {"a": [3.0, 2.0, 1.0], "b": [3.0, 2.5], "c": [1.5, 9.0, 9.0]}
    records = [timed(name, 0, [sign * m for m in metric], 0.5) for name, metric in metrics.items()]
    records.append(timed("d", 0, [math.inf, 1.0]) | {"epochs": [{"metric": None, "cpu_seconds": 2.0}]})
    table = rivals_report.time_to_target(records, sign * 2.0, lower_is_better=sign > 0).set_index("variant")
    assert table["reached"].to_dict() == {"a": True, "b": False, "c": True, "d": False}
    assert table["steps"].to_dict() == {"a": 6, "b": 6, "c": 3, "d": 3}
    assert table["seconds"].to_dict() == {"a": 1.0, "b": 1.0, "c": 0.5, "d": 2.0}
    old = made("a", 0, [sign * 1.0], "etth1", "lite") | {"samples": {"train": 25}, "settings": {"batch_size": 10}}
    assert math.isnan(rivals_report.time_to_target([old], sign * 2.0, sign > 0)["seconds"].item())


def test_runs_that_do_not_reach_a_target_count_in_the_median():
    def median(times, reached):
        return paired.median_time(pd.Series(times, dtype=float), pd.Series(reached, dtype=bool))

    assert median([1, 2, 3, 4, 5], [True] * 5).value == 3
    assert median([1, 2, 3, 4, 5], [True, False, True, False, True]).value == 5, "not 3, the median of those that do"
    assert median([1, 2, 3], [True, False, False]).value == math.inf
    assert median([2, 2, 2], [True] * 3) == paired.Estimate(2, 2, 2)
    assert math.isnan(median([], []).value)
    assert math.isnan(median([1, np.nan], [True, True]).value)
    rng = np.random.default_rng(0)
    times, ends = rng.exponential(1.0, 4000), rng.exponential(2.0, 4000)
    estimate = median(np.minimum(times, ends), times <= ends)
    assert estimate.low < math.log(2) < estimate.high
    assert estimate.value == pytest.approx(math.log(2), abs=0.05)


def test_departures_are_set_against_metaadamw():
    spread = np.array([-0.02, 0.01, 0.0, 0.02, -0.01])
    results = {"adamw": 2.0, "metaadamw": 1.0, "departure-u1": 0.8, "departure-u2": 1.0, "released": 1.5}
    records = [
        made(variant, k, [x + (spread[(k + len(variant)) % 5] / 20 if "dep" in variant else 0)], "etth1", "lite")
        for variant, x in results.items()
        for k in range(5)
    ]
    given = Records.holding(records)
    table = rivals_report.published_table(given, "etth1")
    assert table.index.tolist() == ["departure-u1", "departure-u2", "released"]
    assert table.loc["departure-u1", "difference"].mean == pytest.approx(20, abs=0.5)
    assert table.loc["departure-u1", "adamw"].mean == pytest.approx(60, abs=0.5)
    assert table["verdict"].map(str).tolist()[:2] == ["holds", "equivalent (±1 %)"]
    given = Records.holding([])
    assert rivals_report.published_table(given, "etth1").empty


def test_arms_are_compared_at_the_best_rate_that_each_search_found(monkeypatch):
    best = {("adamw", "constant"): 1e-3, ("metaadamw", "constant"): 3.2e-2}
    monkeypatch.setattr(
        rivals_report,
        "best_variant",
        lambda search, _: next(
            (searched_as(*k, lr) for k, lr in best.items() if searched_as(*k, lr) in {key.variant for key in search}),
            None,
        ),
    )
    errors = {"adamw-lr0.001": 1.0, "metaadamw-lr0.032": 0.8, "prodigy": 2.0, "metaadamw": 0.1}
    records = [
        timed(variant, k, [3.0, x + k / 1000], seconds=2.0)
        for variant, x in errors.items()
        for k in (*SEEDS, *SEARCH_SEEDS)
    ]
    given = Records.holding(records)
    table = rivals_report.budget_table(given, "etth1")
    assert table.index.tolist() == ["adamw, constant", "metaadamw, constant", "prodigy"]
    ours = table.loc["metaadamw, constant"]
    assert ours["difference"].seeds == 5, "without the seeds of the search"
    assert ours["difference"].mean == pytest.approx(20, abs=0.5)
    assert ours["edge"]
    assert not table.loc["adamw, constant", "edge"]
    assert table["reached"].to_dict() == {
        "adamw, constant": "3 of 5",
        "metaadamw, constant": "5 of 5",
        "prodigy": "0 of 5",
    }
    assert ours["steps"].value == 6
    assert ours["seconds"].value == 4.0
    assert table.loc["prodigy", "steps"].value == math.inf
    assert table.loc["adamw, constant", "verdict"] == "–"
    monkeypatch.setattr(rivals_report, "best_variant", lambda *_: None)
    with pytest.raises(ValueError, match=r"etth1 is not complete"):
        rivals_report.budget_table(given, "etth1")
