"""The studies of random, constant and learned factors: what their variants share, and what each has of its own."""

import dataclasses

import pytest
import torch
from conftest import assert_same, tiny
from test_experiments import interrupt_before_the_second_epoch, results_of
from torch import nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments import TASKS, training
from metaadamw_lite.experiments.ladder import LADDER, compared, every
from metaadamw_lite.experiments.null import NULL, PHI_SEEDS, frozen_phi, trained_phi
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.studies import study_runs
from metaadamw_lite.experiments.training import make_optimizer, run
from metaadamw_lite.experiments.variants import SEEDS, VARIANTS, changed


def smoke_run(variant, results, task="etth1", seed=0, **more):
    return run(RunKey(task, variant, "paper", "smoke", seed), results, progress=False, **more)


def made(variant, task="etth1", seed=0, model=None, *source):
    settings = changed(TASKS[task].settings("smoke"), variant)
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
        frozen, trained = (changed(settings, name(seed)) for name in (frozen_phi, trained_phi))
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


# ---------------------------------------------------------------- ladder


@pytest.mark.parametrize("rung", LADDER)
@pytest.mark.parametrize("rest", [{}, {"feature_version": "basic_plus", "attn_heads": 11}], ids=str)
def test_a_rung_starts_as_adamw(rung, rest):
    torch.manual_seed(0)
    ours, theirs = (tiny().double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = changed(TASKS["etth1"].settings("smoke"), rung)
    settings = dataclasses.replace(settings, metaadamw={**settings.metaadamw, **rest})
    optimizers = [make_optimizer(*a, settings, 10, 0) for a in ((rung, ours), ("adamw", theirs))]
    for k in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            generator = torch.Generator().manual_seed(k)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            optimizer.step()
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
        z = compared(f)
        z.requires_grad_()
        sees = phi.encoder(z.unsqueeze(0)).squeeze(0) if rung == "ladder-phi" else phi.layers[1](z + phi.layers[0](z))
        (grad,) = torch.autograd.grad(sees[0].square().sum(), z)
        found[rung] = bool(grad[1:].abs().max() > 1e-9)
    assert found == {"ladder-mlp": False, "ladder-phi": True}


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30, float("nan")])
def test_features_are_compared_on_a_log_scale_and_stay_finite(scale):
    f = compared(torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]]) * scale)
    assert torch.isfinite(f).all()
    assert f.abs().max() < 2
    assert f[:, 1].abs().max() < 1e-6
    assert torch.isfinite(compared(torch.ones(1, 2))).all()


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
    after = every(50)(settings)
    assert (after.meta_every, after.meta_per_epoch) == expected


def test_the_ladder_has_ten_seeds_and_adamw_beside_each(tmp_path):
    runs = study_runs("ladder/lite", tmp_path, ["cifar10"])
    assert len(set(runs)) == len(runs) == 50
    for seed in range(10):
        assert {key.variant for key in runs if key.seed == seed} == {"adamw", *LADDER}
    assert isinstance(made("ladder-one"), MetaAdamW)
