"""MetaAdamW behaves as torch's optimizers do: the inputs that torch tests AdamW with, and the same invariants."""

import copy
import gc
import inspect
import math
import tracemalloc

import pytest
import torch
from conftest import assert_same, cross_entropy, tiny, train
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.testing._internal.common_optimizers import (
    optim_error_inputs_func_adamw,
    optim_inputs_func_adamw,
)

from metaadamw_lite import MetaAdamW

REFUSED = ("capturable", "differentiable")
KERNELS = [{}, {"foreach": True}, {"fused": True}]


def name_of(value):
    return getattr(value, "desc", None) or str(value)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("given", optim_inputs_func_adamw("cpu"), ids=name_of)
def test_the_loss_falls_for_every_setting_that_torch_tests_adamw_with(batches, given, kernel):
    settings = {**given.kwargs, **kernel}
    model = tiny(dropout=0.0)
    if any(settings.get(option) for option in REFUSED):
        with pytest.raises((TypeError, ValueError), match="|".join(REFUSED)):
            MetaAdamW(model.named_parameters(), **settings)
        return
    optimizer = MetaAdamW(model.named_parameters(), **{"lr": 0.01, **settings})
    model.eval()
    before = cross_entropy(model, batches[0]).item()
    train(model, optimizer, [batches[0]] * 20)
    after = cross_entropy(model, batches[0]).item()
    assert (before < after) if settings.get("maximize") else (after < before)


@pytest.mark.parametrize(
    "given", optim_error_inputs_func_adamw("cpu", torch.float32), ids=lambda e: e.optimizer_error_input.desc
)
def test_what_torch_refuses_is_refused(given):
    wrong = given.optimizer_error_input
    params = [nn.Parameter(torch.randn(2, 3))] if wrong.params is None else wrong.params
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            MetaAdamW(params, **wrong.kwargs)
    else:
        with pytest.raises((ValueError, TypeError)):
            make_and_step(params, **wrong.kwargs)


def make_and_step(params, **settings):
    optimizer = MetaAdamW(params, **settings)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_forgotten():
    known = {
        name
        for name, cls in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(cls, lr_scheduler.LRScheduler)
        and cls is not lr_scheduler.LRScheduler
        and not name.startswith("_")
    }
    assert known <= set(SCHEDULERS) | {"LRScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_scheduler_has_the_effect_that_it_has_on_adamw(batches, name, kernel):
    rates, models = [], [tiny(), tiny()]
    ours = MetaAdamW(models[0].named_parameters(), lr=0.05, alpha_range=0, beta_range=0, **kernel)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.05, **kernel)
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for batch in batches[:8]:
            train(model, optimizer, [batch])
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            seen.append(float(optimizer.param_groups[0]["lr"]))
        rates.append(seen)
    assert rates[0] == rates[1]
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [{}, {"fused": True}], ids=str)
def test_a_tensor_as_learning_rate(batches, kernel):
    models = [tiny(), tiny()]
    lr = torch.tensor(0.05, dtype=torch.float64)
    ours = MetaAdamW(models[0].named_parameters(), lr=lr, **kernel)
    plain = MetaAdamW(models[1].named_parameters(), lr=0.05, **kernel)
    for k, batch in enumerate(batches[:4]):
        train(models[0], ours, [batch])
        train(models[1], plain, [batch])
        lr.mul_(0.5)  # in place, as a compiled loop would
        plain.param_groups[0]["lr"] = 0.05 * 0.5 ** (k + 1)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_step_hooks_run_in_order(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    calls = []
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    train(model, optimizer, batches[:1])
    before.remove()
    train(model, optimizer, batches[:1])
    assert calls == ["before", "after", "after"]


def test_state_dict_hooks_run(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    train(model, optimizer, batches[:1])
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 7})
    assert optimizer.state_dict()["mine"] == 7
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(sorted(state)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(seen) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(batches, set_to_none):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    train(model, optimizer, batches[:1])
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert (p.grad is None) if set_to_none else not p.grad.any()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_scalars_empty_and_shared_and_frozen_parameters(kernel):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
            self.first = nn.Linear(3, 3, dtype=torch.float64)
            self.tied = nn.Linear(3, 3, dtype=torch.float64)
            self.tied.weight = self.first.weight
            self.frozen = nn.Linear(3, 3, dtype=torch.float64).requires_grad_(False)

        def forward(self, x):
            return self.scale * self.tied(self.frozen(self.first(x))) + self.empty.sum()

    models = []
    for make in (
        lambda m: MetaAdamW(m.named_parameters(), lr=0.05, alpha_range=0, beta_range=0, **kernel),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, **kernel),
    ):
        torch.manual_seed(0)
        model = Odd()
        frozen = copy.deepcopy(model.frozen.state_dict())
        optimizer = make(model)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(2, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        assert_same(model.frozen.state_dict(), frozen)
        models.append(model)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_parameters_of_several_dtypes(kernel):
    model = nn.ModuleDict(
        {
            f"of_{str(dtype)[6:]}": nn.Linear(4, 4, dtype=dtype)
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        }
    )
    before = copy.deepcopy(model.state_dict())
    optimizer = MetaAdamW(model.named_parameters(), lr=0.1, **kernel)
    for _ in range(3):
        optimizer.zero_grad()
        for layer in model.values():
            layer(torch.ones(1, 4, dtype=layer.weight.dtype)).square().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.dtype == before[name].dtype
        assert torch.isfinite(p).all()
        assert not torch.equal(p, before[name])


@pytest.mark.parametrize("sparse_after", [0, 1])
def test_sparse_gradients_are_refused_and_nothing_is_changed(sparse_after):
    dense, sparse = nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True)
    model = nn.ModuleList([dense, sparse] if sparse_after else [sparse, dense])
    optimizer = MetaAdamW(model.named_parameters())
    (dense(torch.ones(1, 2)).sum() + sparse(torch.tensor([1])).sum()).backward()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"shape \(5, 2\) has a sparse gradient"):
        optimizer.step()
    assert_same((model.state_dict(), optimizer.state_dict()), before)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_averaging_wrappers(batches, kernel):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), lr=0.05, **kernel)
    mean, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    seen = []
    for batch in batches[:4]:
        train(model, optimizer, [batch])
        mean.update_parameters(model)
        ema.update_parameters(model)
        seen.append(model.head.weight.detach().clone())
    torch.testing.assert_close(mean.module.head.weight, torch.stack(seen).mean(dim=0))
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(ema.module.head.weight.detach(), expected)


def test_a_group_added_later_is_trained_and_forms_its_own_modulation_groups(batches):
    model = tiny()
    head = list(model.head.named_parameters())
    body = [(n, p) for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = MetaAdamW(body, lr=0.05, fused=True)
    train(model, optimizer, batches[:2])
    groups = [g.name for g in optimizer.groups]
    before = model.head.weight.detach().clone()
    optimizer.add_param_group({"params": [(f"head.{n}", p) for n, p in head], "lr": 0.2, "weight_decay": 0.0})
    assert len(optimizer.groups) > len(groups)
    assert len(optimizer.alpha) == len(optimizer.groups)
    train(model, optimizer, batches[2:4])
    assert not torch.equal(model.head.weight, before)
    assert sum(len(g.params) for g in optimizer.groups) == len(list(model.parameters()))


@pytest.mark.slow
def test_twenty_thousand_steps_do_not_grow_in_memory():
    """As many objects are alive after 20,000 steps as after 1,000, and they hold as many bytes."""
    model = nn.Linear(3, 2)
    optimizer = MetaAdamW(model.named_parameters(), attn_layers=1, fused=True)

    def alive():
        gc.collect()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    def loss(model, x):
        return model(x).square().mean()

    x = torch.ones(4, 3)
    tracemalloc.start()
    for step in range(1, 20_001):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.sin(step))
        optimizer.step()
        if step % 500 == 0:
            optimizer.update_attention(model, x, -x, loss, 2 * x)
        if step == 1000:
            objects, size = alive()
    late_objects, late_size = alive()
    tracemalloc.stop()
    assert late_objects - objects < 100
    assert late_size - size < 100_000, "a number kept in each step would take over 400,000 bytes; coverage takes 20,000"
