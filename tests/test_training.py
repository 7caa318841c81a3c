"""What a run does with its data: which part is for what, in which order, and when it stops."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.checks import NotFiniteError
from metaadamw_lite.experiments import NOISY, TASKS, frames, training
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.training import derived_seed, run


def without_training(key, **attributes):
    """A run with some attributes only, to look at one of its parts."""
    one = training._Run.__new__(training._Run)
    one.key = key
    for name, value in attributes.items():
        setattr(one, name, value)
    return one


@pytest.mark.parametrize(
    ("losses", "status"),
    [
        ([3, 2, 2.5, 1.9, 2.5], "running"),
        ([3, 2, 2.5, 1.9, 2.5, 2.4], "stopped early"),
        ([3, 2, 1.9995, 1.9992], "stopped early"),
        ([3, 2, 2.5, 2.4], "stopped early"),
        ([math.nan], "diverged"),
        ([9, 8, 7, 6, 5, 4, 3], "finished"),
    ],
)
def test_patience_counts_epochs_in_a_row_since_the_best(losses, status):
    epochs = [{"val_loss": x, "train_loss": 0.0} for x in losses]
    settings = Settings(epochs=7, batch_size=1, meta_every=1)
    assert without_training(None, settings=settings, history={"epochs": epochs})._status() == status


def test_a_model_that_gives_no_numbers_has_no_accuracy():
    task = TASKS["imdb"]
    settings = task.settings("smoke")
    data = task.load("paper", settings, "synthetic")
    model = task.build(settings, data)
    assert 0 <= training.measure(task, model, data.val).metric <= 1
    torch.nn.init.constant_(next(reversed(list(model.parameters()))), math.nan)
    assert all(math.isnan(x) for x in training.measure(task, model, data.val))


def test_which_data_are_used_for_what_under_clean(tmp_path, monkeypatch):
    task, update, measure = TASKS["imdb"], MetaAdamW.update_attention, training.measure
    updates, measured, weights = [], [], []

    def spied_update(self, model, batch1, batch2, loss, val_batch):
        updates.append((batch1, batch2, val_batch))
        assert self._total_steps == 2 * 6, "of the whole run"
        return update(self, model, batch1, batch2, loss, val_batch)

    def spied_score(model, batch):
        assert model.training == torch.is_grad_enabled(), "measured in eval mode"
        return task.score(model, batch)

    def spied_measure(of, model, samples):
        measured.append(samples[0])
        weights.append({name: x.clone() for name, x in model.state_dict().items()})
        result = measure(of, model, samples)
        return result._replace(loss=result.loss + 1) if len(measured) == 2 else result  # so that epoch 1 is the best

    monkeypatch.setattr(MetaAdamW, "update_attention", spied_update)
    monkeypatch.setattr(training, "measure", spied_measure)
    monkeypatch.setitem(TASKS, "imdb", dataclasses.replace(task, score=spied_score))
    record = run(RunKey("imdb", "metaadamw", "clean", "smoke", 3), tmp_path, progress=False)

    data = task.load("clean", task.settings("smoke"), "synthetic")
    for seen, expected in zip(measured, (data.val, data.val, data.test), strict=True):
        assert torch.equal(seen, expected[0])
    assert record["test"]["epoch"] == 1
    assert all(torch.equal(weights[2][name], x) for name, x in weights[0].items()), "tested with the best weights"
    assert not all(torch.equal(weights[1][name], x) for name, x in weights[0].items())
    assert [u["step"] for u in record["meta_updates"]] == [3, 6, 9, 12]
    for k, (batch1, batch2, val_batch) in enumerate(updates):
        assert not torch.equal(batch1[0], batch2[0])
        assert torch.equal(val_batch[0], data.val[0][8 * (k % 2) : 8 * (k % 2) + 8]), "in turns"
    assert record["meta_updates"][-1]["alpha_moved"] > 0
    assert record["meta_updates"][-1]["beta_moved"] > 0


def test_every_epoch_has_masks_of_its_own_and_every_run_weights_of_its_own(tmp_path, monkeypatch):
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), manual_seed(seed))[1])
    run(RunKey("imdb", "adamw", "clean", "smoke", 3), tmp_path, progress=False)
    expected = [derived_seed(3, epoch, what) for epoch, what in ((0, "weights"), (1, "dropout"), (2, "dropout"))]
    assert [seed for seed in seeds if seed in expected] == expected
    assert len({derived_seed(run_seed, 0, "weights") for run_seed in range(5)}) == 5


def metaadamw(seed):
    """MetaAdamW as a run of ETTh1 would have it, and its model."""
    task = TASKS["etth1"]
    settings = task.settings("smoke")
    model = task.build(settings, task.load("paper", settings, "synthetic"))
    return training.make_optimizer("metaadamw", model, settings, 10, seed), model


def test_the_factors_that_are_traced_are_those_of_the_step():
    optimizer, model = metaadamw(seed=0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    one = without_training(None, history={"trace": []})
    one._trace(7, optimizer)
    assert one.history["trace"][0]["step"] == 7
    assert one.history["trace"][0]["alpha"] == pytest.approx(optimizer.alpha.tolist(), abs=1e-5)
    assert one.history["trace"][0]["beta"] == pytest.approx(optimizer.beta.tolist(), abs=1e-5)
    assert optimizer.alpha.tolist() != pytest.approx(optimizer.beta.tolist(), abs=1e-3)


def test_the_record_says_how_far_phi_and_its_factors_are_from_the_start():
    torch.manual_seed(0)
    optimizer, model = metaadamw(seed=0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    one = without_training(None, phi_at_start=copy.deepcopy(optimizer.modulator))
    with torch.no_grad():
        before = optimizer.modulator(optimizer.features())
        start = torch.cat([p.flatten() for p in optimizer.modulator.parameters()])
        optimizer.modulator.output.bias += torch.tensor([0.4, -0.3, 0.0, 0.0])  # of α, β, λ₁ and λ₂
        optimizer.huw.log_var.copy_(torch.tensor([0.5, -1.0, 0.25]))

    def moved(factor, shift):  # the ranges are 1: a factor is ½ + σ(raw)
        return (torch.sigmoid(torch.logit(factor - 0.5) + shift) + 0.5 - factor).abs().max().item()

    assert one._movement(optimizer) == {
        "phi_moved": pytest.approx(0.5 / start.norm().item(), rel=1e-4),
        "log_var": [0.5, -1.0, 0.25],
        "alpha_moved": pytest.approx(moved(before.alpha, 0.4), rel=1e-4),
        "beta_moved": pytest.approx(moved(before.beta, -0.3), rel=1e-4),
    }


def test_the_seconds_of_an_epoch_are_told_apart(tmp_path, clock_of):
    """On a clock that only a step, a meta-update and a measurement move: by 1, 100 and 1000 seconds."""
    takes = clock_of(training)
    takes(MetaAdamW, "step", 1, then=MetaAdamW.step)
    takes(MetaAdamW, "update_attention", 100, then=MetaAdamW.update_attention)
    takes(training, "measure", 1000, then=training.measure)
    record = run(RunKey("imdb", "metaadamw", "clean", "smoke", 0), tmp_path, progress=False)
    names = ("step_seconds", "meta_seconds", "train_seconds", "cpu_seconds", "seconds")
    assert [[epoch[name] for name in names] for epoch in record["epochs"]] == [[6, 200, 206, 206, 1206]] * 2


def test_meta_updates_begin_with_the_epoch_that_the_settings_name(tmp_path):
    """Table 1's "warmup epochs (before meta)"."""
    settings = TASKS["imdb"].settings("smoke")
    key = RunKey("imdb", "metaadamw", "clean", "smoke", 0)
    first, second = (
        run(key, tmp_path / str(k), progress=False, settings=dataclasses.replace(settings, warmup_epochs=k))
        for k in (1, 2)
    )
    assert len(first["meta_updates"]) == 2 * len(second["meta_updates"]) > 0


@pytest.mark.parametrize(("variant", "kind"), [("adamw", torch.optim.AdamW), ("metaadamw", MetaAdamW)])
def test_the_settings_of_adamw_reach_both_optimizers(variant, kind):
    given = {"lr": 0.03, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.2}
    settings = dataclasses.replace(TASKS["etth1"].settings("smoke"), **given)
    optimizer = training.make_optimizer(variant, nn.Linear(2, 2), settings, 10, 0)
    assert type(optimizer) is kind
    assert {name: optimizer.param_groups[0][name] for name in given} == given


def test_each_seed_has_a_phi_of_its_own():
    first, again, second = (metaadamw(seed)[0].modulator.output.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_each_seed_draws_wrong_labels_of_its_own(tmp_path):
    def labels(seed):
        key = RunKey("cifar10-symmetric40", "adamw", "clean", "smoke", seed)
        task = NOISY[key.task]
        return training._Run(task, key, task.settings("smoke"), tmp_path, torch.device("cpu")).data.train[1]

    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0), labels(1))


def test_each_pass_over_the_data_has_an_order_of_its_own_and_is_augmented():
    task = TASKS["cifar10"]
    settings = task.settings("smoke")
    data = task.load("paper", settings, "synthetic")
    one = without_training(RunKey("cifar10", "adamw", "paper", "smoke", 0), task=task, settings=settings, data=data)
    passes = [
        torch.cat([labels for _, labels in one._training_batches(epoch, purpose)])
        for epoch, purpose in ((1, "order"), (2, "order"), (1, "B1"), (1, "B2"))
    ]
    assert len({tuple(order.tolist()) for order in passes}) == 4
    as_they_are = {image.numpy().tobytes() for image in data.train[0]}
    images, _ = next(one._training_batches(1, "order"))
    assert sum(image.numpy().tobytes() in as_they_are for image in images) < len(images)


@pytest.mark.parametrize(
    ("error", "status"), [(NotFiniteError("the loss is nan"), "finished"), (ValueError("a mistake"), "failed")]
)
def test_only_a_meta_update_that_is_not_finite_is_passed_over_and_not_counted(tmp_path, monkeypatch, error, status):
    def refuses(*_):
        raise error

    monkeypatch.setattr(MetaAdamW, "update_attention", refuses)
    record = run(RunKey("etth1", "metaadamw", "paper", "smoke", 0), tmp_path, progress=False)
    assert record["status"] == status
    (count,) = frames.runs_frame([record])["meta_updates"]
    assert count == 0
    assert all(update["error"] == str(error) for update in record["meta_updates"])
