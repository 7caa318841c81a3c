"""The studies of random, constant and learned factors: what their variants share, and what each has of its own."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import assert_same, tiny
from test_experiments import interrupt_before_the_second_epoch, results_of
from torch import nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments import TASKS, studies, training
from metaadamw_lite.experiments.dose import DOSE, EVERYWHERE, TWINS
from metaadamw_lite.experiments.ladder import LADDER, meta_update_every, standardise_features
from metaadamw_lite.experiments.null import NULL, PHI_SEEDS, frozen_phi, trained_phi
from metaadamw_lite.experiments.published import RELEASED, VARIABLE
from metaadamw_lite.experiments.records import RunKey, write_record
from metaadamw_lite.experiments.replay import REPLAY
from metaadamw_lite.experiments.studies import expected_seconds, study_runs
from metaadamw_lite.experiments.training import make_optimizer, run, run_settings
from metaadamw_lite.experiments.transfer import TRANSFER
from metaadamw_lite.experiments.variants import SEEDS, VARIANTS, apply_variant
from metaadamw_lite.groups import fine_grained_groups


def smoke_run(variant, results, task="etth1", seed=0, **more):
    return run(RunKey(task, variant, "paper", "smoke", seed), results, progress=False, **more)


def made(variant, task="etth1", seed=0, model=None, *source):
    settings = apply_variant(TASKS[task].settings("smoke"), variant)
    return make_optimizer(variant, tiny() if model is None else model, settings, 10, seed, *source)


def losses_of(record):
    return [(epoch["train_loss"], epoch["val_loss"]) for epoch in record["epochs"]]


# ---------------------------------------------------------------- null


def test_the_null_test_has_phis_that_no_other_run_has(tmp_path):
    runs = study_runs("null", tmp_path)
    assert runs == study_runs("null/lite", tmp_path)
    assert len(set(runs)) == len(runs)
    null = [key for key in runs if key.variant in NULL]
    assert len(null) == 32 * 2 * 4
    assert {key.task for key in null if key.variant.startswith("trained")} == {"wikitext2"}
    assert {key.task for key in null} == {"wikitext2", "etth1", "cifar10"}
    assert {key.seed for key in null} == {0, 1}
    assert set(PHI_SEEDS).isdisjoint({*SEEDS, *(key.seed for key in study_runs("main", tmp_path))})
    with pytest.raises(ValueError, match="null/paper"):
        study_runs("null/paper", tmp_path)


def test_null_variants_share_everything_but_the_seed_of_phi():
    settings = TASKS["imdb"].settings("paper")
    for seed in (PHI_SEEDS[0], PHI_SEEDS[-1]):
        frozen, trained = (apply_variant(settings, name(seed)) for name in (frozen_phi, trained_phi))
        assert frozen == trained
        assert dataclasses.replace(frozen, metaadamw=settings.metaadamw) == settings
        assert frozen.metaadamw == {**settings.metaadamw, "seed": seed}
        assert not VARIANTS[frozen_phi(seed)].updates
        assert VARIANTS[trained_phi(seed)].updates
    first, again, other = (
        made(name, seed=run_seed).modulator.state_dict()
        for name, run_seed in ((frozen_phi(1000), 0), (trained_phi(1000), 1), (frozen_phi(1001), 0))
    )
    assert_same(first, again)
    assert not torch.equal(first["output.weight"], other["output.weight"])


def test_runs_with_another_phi_have_the_weights_and_batches_of_their_own_seed(tmp_path, monkeypatch):
    weights, batches = {}, {}

    def noted(variant, model, *rest):
        weights[variant, rest[-1]] = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        batches[variant, rest[-1]] = order = []
        monkeypatch.setattr(training, "shuffled_batches", lambda *a: order.append(shuffled_batches(*a)) or order[-1])
        return make_optimizer(variant, model, *rest)

    shuffled_batches = training.shuffled_batches
    monkeypatch.setattr(training, "make_optimizer", noted)
    for variant, seed in (("metaadamw", 0), ("metaadamw", 1), (trained_phi(1000), 0)):
        smoke_run(variant, tmp_path, seed=seed)
    assert_same(weights[trained_phi(1000), 0], weights["metaadamw", 0])
    assert_same(batches[trained_phi(1000), 0], batches["metaadamw", 0])
    assert not torch.equal(weights["metaadamw", 1], weights["metaadamw", 0])
    assert not torch.equal(batches["metaadamw", 1][0][0], batches["metaadamw", 0][0][0])


@pytest.mark.parametrize("variant", ["metaadamw-frozen", frozen_phi(1000), trained_phi(1000)])
def test_a_frozen_phi_never_moves(tmp_path, monkeypatch, variant):
    optimizers = []
    monkeypatch.setattr(training, "make_optimizer", lambda *a: optimizers.append(make_optimizer(*a)) or optimizers[-1])
    record = smoke_run(variant, tmp_path)
    start, end = (o.modulator.state_dict() for o in (made(variant, model=nn.Linear(2, 2)), optimizers[0]))
    still = all(torch.equal(start[name], end[name]) for name in start)
    assert still == (record["meta_updates"] == []) == (not variant.startswith("trained"))


def step_alike(models, optimizers, steps):
    """Steps with the same random gradients for each model."""
    for k in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            generator = torch.Generator().manual_seed(k)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            optimizer.step()


# ---------------------------------------------------------------- ladder


@pytest.mark.parametrize("rung", LADDER)
@pytest.mark.parametrize("rest", [{}, {"feature_version": "basic_plus", "attn_heads": 11}], ids=str)
def test_a_rung_starts_as_adamw(rung, rest):
    torch.manual_seed(0)
    ours, theirs = (tiny().double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = apply_variant(TASKS["etth1"].settings("smoke"), rung)
    settings = dataclasses.replace(settings, metaadamw={**settings.metaadamw, **rest})
    optimizers = [make_optimizer(*a, settings, 10, 0) for a in ((rung, ours), ("adamw", theirs))]
    step_alike((ours, theirs), optimizers, 3)
    assert optimizers[0].alpha.tolist() == [1.0] * len(optimizers[0].groups)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rung", "numbers"), [("ladder-one", 1), ("ladder-groups", None), ("ladder-mlp", 459)])
def test_a_rung_has_its_own_numbers_and_each_group_what_the_rung_is_named_after(rung, numbers):
    optimizer = made(rung)
    groups = len(optimizer.groups)
    phi = optimizer.modulator
    assert sum(p.numel() for p in phi.parameters()) == (groups if numbers is None else numbers)
    phi.output.weight.data += torch.rand(phi.output.weight.shape)
    features = torch.rand(groups, 6).to(phi.output.weight)
    alpha = phi(features).alpha
    assert (len(set(alpha.tolist())) == 1) == (rung == "ladder-one")


def test_only_in_phi_do_groups_see_each_other():
    """But for mean and spread over the groups, which the MLP's features are relative to as well."""
    found = {}
    for rung in ("ladder-mlp", "ladder-phi"):
        phi = made(rung).modulator
        torch.manual_seed(0)
        nn.init.normal_(phi.output.weight)
        f = torch.randn(5, 6).double()
        phi = phi.double()
        mixed = f[[0, 2, 1, 4, 3]]
        alpha, again = phi(f).alpha, phi(mixed).alpha
        torch.testing.assert_close(again, alpha[[0, 2, 1, 4, 3]])
        z = standardise_features(f)
        z.requires_grad_()
        sees = phi.encoder(z.unsqueeze(0)).squeeze(0) if rung == "ladder-phi" else phi.layers[1](z + phi.layers[0](z))
        (grad,) = torch.autograd.grad(sees[0].square().sum(), z)
        found[rung] = bool(grad[1:].abs().max() > 1e-9)
    assert found == {"ladder-mlp": False, "ladder-phi": True}


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30, float("nan")])
def test_features_are_compared_on_a_log_scale_and_stay_finite(scale):
    f = standardise_features(torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]]) * scale)
    assert torch.isfinite(f).all()
    assert f.abs().max() < 2
    assert f[:, 1].abs().max() < 1e-6
    assert torch.isfinite(standardise_features(torch.ones(1, 2))).all()


@pytest.mark.parametrize("rung", LADDER)
def test_after_training_only_the_rungs_own_numbers_have_moved_phi(rung, tmp_path):
    """And a meta-update leaves the model alone: until the first one the run is AdamW's."""
    settings = TASKS["etth1"].settings("smoke")
    record, adamw = (smoke_run(variant, tmp_path, settings=settings) for variant in (rung, "adamw"))
    assert record["status"] == "finished"
    assert losses_of(record)[0] == pytest.approx(losses_of(adamw)[0], rel=1e-5)
    assert losses_of(record)[1] != pytest.approx(losses_of(adamw)[1], rel=1e-5)
    last = record["meta_updates"][-1]
    assert last["alpha_moved"] > 0
    assert last["beta_moved"] == 0
    assert {tuple(point["beta"]) for point in record["trace"]} == {(1.0,) * len(record["groups"])}
    assert ("phi" in record) == (rung == "ladder-phi")


@pytest.mark.parametrize("rung", LADDER)
def test_a_rung_goes_on_from_a_checkpoint_exactly(rung, tmp_path, monkeypatch):
    key = RunKey("etth1", rung, "paper", "smoke", 3)
    expected = run(key, tmp_path / "a", progress=False)
    interrupt_before_the_second_epoch(key, tmp_path / "b", monkeypatch)
    again = run(key, tmp_path / "b", progress=False)
    assert_same(results_of(again), results_of(expected))
    assert again.get("phi") == expected.get("phi")


@pytest.mark.parametrize(("epochs", "per_epoch", "expected"), [(30, 100, (50, 2)), (30, 20, (50, 1)), (2, 3, (3, 1))])
def test_meta_updates_come_every_so_many_steps_unless_a_run_is_too_short(epochs, per_epoch, expected):
    settings = dataclasses.replace(
        TASKS["etth1"].settings("lite"), epochs=epochs, meta_every=per_epoch, meta_per_epoch=1
    )
    after = meta_update_every(50)(settings)
    assert (after.meta_every, after.meta_per_epoch) == expected


def test_the_ladder_has_ten_seeds_and_adamw_beside_each(tmp_path):
    runs = study_runs("ladder/lite", tmp_path, ["cifar10"])
    assert len(set(runs)) == len(runs) == 50
    for seed in range(10):
        assert {key.variant for key in runs if key.seed == seed} == {"adamw", *LADDER}
    assert isinstance(made("ladder-one"), MetaAdamW)


# ---------------------------------------------------------------- dose


SHAPE_OF_PHI = ("alpha_range", "attn_layers", "attn_hidden_dim", "attn_heads", "feature_version", "use_feature_gating")


@pytest.mark.parametrize("variant", TWINS)
def test_every_trained_phi_of_the_dose_has_a_twin_that_differs_by_the_training_alone(variant):
    settings = TASKS["wikitext2"].settings("paper")
    mine, theirs = (apply_variant(settings, name) for name in (variant, TWINS[variant]))
    assert VARIANTS[variant].updates
    assert theirs.lr == mine.lr
    if VARIANTS[TWINS[variant]].make is VARIANTS["adamw"].make:  # as an untrained Φ on a log scale is
        assert set(made(variant, "wikitext2").modulator(torch.rand(3, 6).double()).alpha.tolist()) == {1}
    else:
        assert not VARIANTS[TWINS[variant]].updates
        assert VARIANTS[TWINS[variant]].make is VARIANTS[variant].make
        assert {k: theirs.metaadamw.get(k) for k in SHAPE_OF_PHI} == {k: mine.metaadamw.get(k) for k in SHAPE_OF_PHI}


def test_no_trained_phi_of_the_dose_is_without_a_twin():
    assert {name for name, variant in DOSE.items() if variant.updates} <= set(TWINS)
    assert len(DOSE) <= 24


def test_the_dose_is_on_wikitext2_and_three_variants_are_everywhere(tmp_path):
    runs = study_runs("dose/lite", tmp_path)
    assert len(set(runs)) == len(runs)
    of = {task: {key.variant for key in runs if key.task == task} for task in TASKS}
    assert of["wikitext2"] >= {*TWINS, *TWINS.values(), "adamw"}
    for task in ("etth1", "multi30k", "cifar10", "imdb"):
        assert of[task] == {"adamw", "adamw-lr0.002", "metaadamw", "metaadamw-frozen", *EVERYWHERE}
    assert {key.seed for key in runs} == {0, 1, 2}


def test_a_dose_that_is_the_published_one_on_a_task_is_not_run_twice(tmp_path, monkeypatch):
    task = TASKS["wikitext2"]
    settings = dataclasses.replace(task.settings("lite"), epochs=30, meta_every=50, meta_per_epoch=2)
    monkeypatch.setitem(TASKS, "wikitext2", dataclasses.replace(task, settings=lambda _: settings))
    variants = {key.variant for key in study_runs("dose/lite", tmp_path, ["wikitext2"])}
    assert "updates-2" not in variants
    assert "updates-10" in variants
    with pytest.raises(ValueError, match="'updates-2', which is what 'metaadamw' is on this task"):
        run(RunKey("wikitext2", "updates-2", "paper", "lite", 0), tmp_path, progress=False)


# ---------------------------------------------------------------- replay


def traced(model, alphas, betas, variant="metaadamw", steps=(1, 2, 4)):
    """A record with factors, which are drawn up by hand."""
    groups = fine_grained_groups(model.named_parameters(), model)
    return {
        "run": dataclasses.asdict(RunKey("etth1", variant, "paper", "smoke", 0)),
        "status": "finished",
        "digest": "none",
        "groups": [{"name": g.name, "parameters": sum(p.numel() for p in g.params)} for g in groups],
        "trace": [
            {"step": step, "alpha": [alphas(g, step) for g in groups], "beta": [betas(g, step) for g in groups]}
            for step in steps
        ],
    }


def rates(optimizer):
    """η and λ of each parameter, beside its group's name."""
    return {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("variant", REPLAY)
def test_a_replay_of_factors_that_are_one_is_adamw(variant):
    torch.manual_seed(0)
    ours, theirs = (tiny() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    record = traced(ours, lambda *_: 1.0, lambda *_: 1.0)
    optimizers = made(variant, "etth1", 0, ours, record), made("adamw", "etth1", 0, theirs)
    step_alike((ours, theirs), optimizers, 6)
    assert_same(ours.state_dict(), theirs.state_dict())


def test_a_replay_has_the_means_of_its_groups():
    model = tiny()
    groups = fine_grained_groups(model.named_parameters(), model)
    alpha = {group.name: 0.5 + k for k, group in enumerate(groups)}
    record = traced(model, lambda g, step: alpha[g.name] * step, lambda g, step: 2.0 * step)  # the steps' mean is 7/3
    found = rates(made("replay-groups-of-metaadamw", "etth1", 0, model, record))
    for group in groups:
        for p in group.params:
            assert found[id(p)] == pytest.approx((5e-4 * alpha[group.name] * 7 / 3, 1e-2 * 14 / 3))
    sizes = {group.name: sum(p.numel() for p in group.params) for group in groups}
    mean = sum(sizes[name] * alpha[name] for name in sizes) / sum(sizes.values())
    found = rates(made("replay-one-of-metaadamw", "etth1", 0, model, record))
    assert list(found.values()) == [pytest.approx((5e-4 * mean * 7 / 3, 1e-2 * 14 / 3))] * len(found)
    found = rates(made("replay-ends-of-metaadamw", "etth1", 0, model, record))
    for group in groups:
        end = group.name.startswith(("embedding/", "other/deep/"))
        expected = (5e-4 * alpha[group.name] * 7 / 3, 1e-2 * 14 / 3) if end else (5e-4, 1e-2)
        assert all(found[id(p)] == pytest.approx(expected) for p in group.params)


def test_a_replayed_schedule_is_that_of_the_steps_also_after_a_resume():
    model = tiny()
    record = traced(model, lambda _, step: float(step), lambda *_: 1.0, "ladder-phi", steps=(2, 4, 5))
    optimizer = made("replay-schedule-of-ladder-phi", "etth1", 0, model, record)
    seen = []
    for k in range(7):
        if k == 4:
            state = optimizer.state_dict()
            optimizer = made("replay-schedule-of-ladder-phi", "etth1", 0, model, record)
            optimizer.load_state_dict(state)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr"] / 5e-4)
    assert seen == pytest.approx([2, 2, 3, 4, 5, 5, 5])


@pytest.mark.parametrize("spoil", ["groups", "trace"])
def test_a_record_that_does_not_fit_is_not_replayed(spoil):
    model = tiny()
    record = traced(model, lambda *_: 1.0, lambda *_: 1.0) | {spoil: []}
    for variant in REPLAY:
        with pytest.raises(ValueError, match="the record of etth1 metaadamw paper-smoke-seed0 has"):
            made(variant, "etth1", 0, model, record)


def test_a_replay_needs_its_source_and_says_from_which_record_it_is(tmp_path):
    with pytest.raises(ValueError, match="needs the record of etth1 metaadamw-frozen paper-smoke-seed0"):
        smoke_run("replay-groups-of-metaadamw-frozen", tmp_path)
    assert list(tmp_path.rglob("*.*")) == []
    source = smoke_run("metaadamw-frozen", tmp_path)
    record = smoke_run("replay-groups-of-metaadamw-frozen", tmp_path)
    assert record["source"] == {"run": source["run"], "digest": source["digest"]}
    assert losses_of(record)[0] == pytest.approx(losses_of(source)[0], rel=0.05)
    assert smoke_run("replay-groups-of-metaadamw-frozen", tmp_path) == record


def write_made(key, results, epochs=(), **more):
    """Write a record of a run that never was."""
    content = {"settings": dataclasses.asdict(run_settings(key)), "status": "finished", "data": "made"}
    content |= {"epochs": list(epochs), "environment": {}, "best": None, "test": None}
    write_record(content | more, key, results)


def test_replays_join_the_study_when_their_sources_are_recorded(tmp_path):
    before = study_runs("replay/lite", tmp_path, ["etth1"])
    assert {key.variant for key in before} == {"adamw", "metaadamw", "metaadamw-frozen", "ladder-phi"}
    trace = [{"step": 1, "alpha": [1.0], "beta": [1.0]}]
    write_made(RunKey("etth1", "ladder-phi", "paper", "lite", 3), tmp_path, trace=trace)
    write_made(RunKey("etth1", "metaadamw", "paper", "lite", 3), tmp_path, trace=[])
    added = [key for key in study_runs("replay/lite", tmp_path, ["etth1"]) if key not in before]
    assert {(key.variant, key.seed) for key in added} == {
        (f"replay-{what}-of-ladder-phi", 3) for what in ("groups", "one", "schedule")
    }


# ---------------------------------------------------------------- circularity and transfer


def test_with_constants_in_its_loss_only_the_decay_moves_phi(tmp_path):
    settings = TASKS["etth1"].settings("smoke")
    settings = dataclasses.replace(settings, metaadamw={**settings.metaadamw, "meta_weight_decay": 0.0})
    by_constants, by_targets, published = (
        smoke_run(v, tmp_path, settings=settings)["meta_updates"][0]
        for v in ("circularity-constants", "circularity-targets", "metaadamw")
    )
    assert by_constants["phi_moved"] == 0
    assert by_targets["phi_moved"] > 0
    assert by_targets["phi_moved"] != published["phi_moved"] > 0
    assert by_constants["log_var"] == published["log_var"] != by_targets["log_var"]


def test_with_its_loss_held_at_zero_a_phi_that_moves_goes_the_other_way(tmp_path):
    moved = {}
    for variant in ("ladder-phi", "circularity-ladder-targets"):
        record = smoke_run(variant, tmp_path)
        (first,) = {update["step"] for update in record["meta_updates"][:1]}
        after = [point["alpha"] for point in record["trace"] if point["step"] > first]
        moved[variant] = after[0]
    first, second = (np.log(moved[name]) for name in moved)
    assert (first * second < 0).all(), "a loss decrease is below zero, so its square grows with it"


def test_a_transferred_phi_is_the_one_that_its_source_ended_with_and_rests(tmp_path, monkeypatch):
    optimizers = []
    monkeypatch.setattr(training, "make_optimizer", lambda *a: optimizers.append(make_optimizer(*a)) or optimizers[-1])
    with pytest.raises(ValueError, match="needs the record of wikitext2 ladder-phi paper-smoke-seed0"):
        smoke_run("transfer-from-wikitext2", tmp_path)
    source = smoke_run("ladder-phi", tmp_path, "wikitext2")
    record = smoke_run("transfer-from-wikitext2", tmp_path)
    trained, resting = (nn.utils.parameters_to_vector(o.modulator.parameters()) for o in optimizers)
    torch.testing.assert_close(resting, trained, rtol=1e-6, atol=1e-7)
    assert record["meta_updates"] == []
    assert record["source"]["run"] == source["run"]
    assert record["trace"][0]["alpha"] != [1.0] * len(record["groups"])


def test_transfer_is_from_each_of_four_tasks_to_each(tmp_path):
    sources = study_runs("transfer/lite", tmp_path)
    assert {key.variant for key in sources} == {"adamw", "ladder-phi"}
    assert len(sources) == 2 * 4 * 3
    for key in sources:
        write_made(key, tmp_path, trace=[{"step": 1, "alpha": [1.0], "beta": [1.0]}])
    added = [key for key in study_runs("transfer/lite", tmp_path) if key not in sources]
    assert len(added) == len(set(added)) == 4 * 4 * 3
    assert {key.variant for key in added} == set(TRANSFER)


# ---------------------------------------------------------------- how long it will take


def test_a_sweep_is_estimated_from_recorded_runs_of_the_same_task_and_profile(tmp_path, monkeypatch):
    committed = tmp_path / "committed"
    monkeypatch.setattr(studies, "default_results", lambda: committed)
    tmp_path = tmp_path / "mine"
    runs = study_runs("null/lite", tmp_path, ["etth1"])
    assert expected_seconds(runs, tmp_path) is None
    for profile, task, seconds in (("lite", "etth1", 5.0), ("paper", "etth1", 500.0), ("lite", "imdb", 70.0)):
        for seed in range(2):
            epochs = [{"epoch": 1, "seconds": seconds}, {"epoch": 2, "seconds": seconds * (1 + seed)}]
            write_made(RunKey(task, "adamw", "paper", profile, seed), tmp_path, epochs=epochs)
    assert expected_seconds(runs, tmp_path) == pytest.approx(len(runs) * (10 + 15) / 2)
    assert expected_seconds([], tmp_path) == 0
    assert expected_seconds(study_runs("null/lite", tmp_path), tmp_path) is None
    for task in ("etth1", "wikitext2", "cifar10"):
        write_made(RunKey(task, "adamw", "paper", "lite", 0), committed, epochs=[{"epoch": 1, "seconds": 4.0}])
    others = study_runs("null/lite", tmp_path, ["wikitext2"])
    assert expected_seconds([*runs[:2], *others], tmp_path) == pytest.approx(2 * 12.5 + 4 * len(others))


@pytest.mark.parametrize("profile", ["lite", "paper"])
def test_one_command_makes_every_study_of_a_profile(profile, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "a clone")
    whole = study_runs(f"all/{profile}", tmp_path)
    assert len(set(whole)) == len(whole)
    names = [name for name in studies.STUDIES if profile in studies._profiles(name) and name != "all"]
    assert len(names) > 5
    assert set(whole) == {key for name in names for key in study_runs(f"{name}/{profile}", tmp_path)}
    assert {key.task for key in study_runs(f"all/{profile}", tmp_path, ["imdb"])} == {"imdb"}
    monkeypatch.delenv(VARIABLE)
    assert {key.variant for key in whole} - {key.variant for key in study_runs(f"all/{profile}", tmp_path)} <= {
        *RELEASED
    }
