"""LiLAW: the formulas against plain Python, the gradient by three scalars against differences, and what it refuses."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metaadamw_lite import LiLAW

cross_entropy = partial(F.cross_entropy, reduction="none")
double = partial(torch.tensor, dtype=torch.float64)


def focal(logits, targets, gamma=2.0):
    losses = cross_entropy(logits, targets)
    return (1 - (-losses).exp()) ** gamma * losses


def weight_by_hand(logits, label, alpha, delta, beta):
    largest = max(logits)
    exps = [math.exp(z - largest) for z in logits]
    s = [e / sum(exps) for e in exps]
    p, top = s[label], max(s)
    easy = 1 / (1 + math.exp(-(alpha * p - top)))
    moderate = math.exp(-((delta * p - top) ** 2) / 2)
    hard = 1 / (1 + math.exp(beta * p - top))
    return easy, moderate, hard


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.floats(-30, 30), min_size=2, max_size=6),
    label=st.integers(0, 5),
    scalars=st.tuples(*[st.floats(0, 20)] * 3),
)
def test_weights_are_the_formulas(logits, label, scalars):
    label %= len(logits)
    alpha, delta, beta = scalars
    lilaw = LiLAW(alpha=alpha, delta=delta, beta=beta).double()
    parts = lilaw.parts(torch.tensor([logits], dtype=torch.float64), torch.tensor([label]))
    expected = weight_by_hand(logits, label, *(x.item() for x in (lilaw.alpha, lilaw.delta, lilaw.beta)))
    assert [x.item() for x in parts] == pytest.approx(expected, abs=1e-12)
    assert 0 <= parts.total.item() <= 3


def model_and_batches(seed=0, classes=4, dropout=0.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, classes))
    batches = [(torch.randn(16, 3).double(), torch.randint(0, classes, (16,))) for _ in range(6)]
    return model.double(), batches


@pytest.mark.parametrize("loss_fn", [cross_entropy, focal])
def test_the_loss_is_the_weighted_mean_with_its_gradient_by_the_logits(loss_fn):
    lilaw = LiLAW().double()
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 0, 1])

    def by_hand(z):
        weights = [sum(weight_by_hand(row, k, 10.0, 6.0, 2.0)) for row, k in zip(z.tolist(), y, strict=True)]
        return (double(weights) * loss_fn(z, y)).mean().item()

    loss = lilaw.loss(logits, y, loss_fn)
    assert loss.item() == pytest.approx(by_hand(logits.detach()), abs=1e-12)
    loss.backward()
    h = 1e-6
    for i, j in [(0, 0), (1, 3), (5, 1), (3, 2)]:
        step = torch.zeros(6, 4).double()
        step[i, j] = h
        slope = (by_hand(logits.detach() + step) - by_hand(logits.detach() - step)) / (2 * h)
        assert logits.grad[i, j].item() == pytest.approx(slope, abs=1e-8)
    assert all(p.grad is None for p in lilaw.parameters()), "the three scalars are fixed here"


@pytest.mark.parametrize("loss_fn", [cross_entropy, focal])
def test_a_meta_step_goes_down_the_numerical_gradient(loss_fn):
    model, batches = model_and_batches()
    start = (3.0, 2.0, 1.5)
    lilaw = LiLAW(*start, lr=0.1, weight_decay=0.01).double()
    model.eval()
    x, y = batches[0]

    def value(scalars):
        there = LiLAW().double()
        there.load_state_dict(
            lilaw.state_dict() | dict(zip(("alpha", "delta", "beta"), map(double, scalars), strict=True))
        )
        with torch.no_grad():
            return (there.weights(model(x), y) * loss_fn(model(x), y)).mean().item()

    h = 1e-5
    slopes = []
    for i in range(3):
        up, down = ([x + sign * h * (i == j) for j, x in enumerate(start)] for sign in (1, -1))
        slopes.append((value(up) - value(down)) / (2 * h))
    assert lilaw.meta_step(model, batches[0], loss_fn) == pytest.approx(value(start), abs=1e-12)
    now = [x.item() for x in (lilaw.alpha, lilaw.delta, lilaw.beta)]
    assert now == pytest.approx([x - 0.1 * (g + 0.01 * x) for x, g in zip(start, slopes, strict=True)], abs=1e-9)


def test_without_decay_alpha_falls_and_beta_rises_whatever_the_data():
    for seed in range(10):
        model, batches = model_and_batches(seed)
        lilaw = LiLAW(lr=0.5, weight_decay=0.0).double()
        lilaw.meta_step(model, batches[0], cross_entropy)
        assert lilaw.alpha < 10
        assert lilaw.beta > 2


def test_a_meta_step_leaves_the_model_as_found():
    model, batches = model_and_batches(dropout=0.5)
    model[1].eval()  # a module in another mode than the model
    (x, y), val = batches[:2]
    cross_entropy(model(x), y).mean().backward()
    before = copy.deepcopy(model.state_dict())
    grads, modes = [p.grad.clone() for p in model.parameters()], [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    LiLAW().double().meta_step(model, val, cross_entropy)
    assert_same(model.state_dict(), before)
    assert_same([p.grad for p in model.parameters()], grads)
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_warm_up_is_plain_training():
    model, [(x, y), val, *_] = model_and_batches()
    lilaw = LiLAW(warmup_steps=2).double()
    for _ in range(2):
        assert lilaw.warming_up
        assert lilaw.loss(model(x), y, cross_entropy).item() == pytest.approx(cross_entropy(model(x), y).mean().item())
        lilaw.meta_step(model, val, cross_entropy)
        assert lilaw.alpha.item() == 10
    assert not lilaw.warming_up
    assert lilaw.loss(model(x), y, cross_entropy).item() != pytest.approx(cross_entropy(model(x), y).mean().item())
    lilaw.meta_step(model, val, cross_entropy)
    assert lilaw.alpha.item() != 10


def go_on(model, lilaw, optimizer, batches):
    for (x, y), val in zip(batches, reversed(batches), strict=True):
        optimizer.zero_grad()
        lilaw.loss(model(x), y, cross_entropy).backward()
        optimizer.step()
        lilaw.meta_step(model, val, cross_entropy)


def test_resume_equals_continue(tmp_path):
    model, batches = model_and_batches()
    lilaw, optimizer = LiLAW(warmup_steps=4), torch.optim.SGD(model.parameters(), 0.1)
    go_on(model, lilaw, optimizer, batches[:3])
    torch.save({"model": model.state_dict(), "lilaw": lilaw.state_dict()}, tmp_path / "saved")
    go_on(model, lilaw, optimizer, batches)

    saved = torch.load(tmp_path / "saved", weights_only=True)
    again, _ = model_and_batches(seed=5)
    again.load_state_dict(saved["model"])
    resumed = LiLAW(warmup_steps=4)
    resumed.load_state_dict(saved["lilaw"])
    go_on(again, resumed, torch.optim.SGD(again.parameters(), 0.1), batches)
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), lilaw.state_dict())


def test_low_precision_logits_have_float32_weights():
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    rounded = logits.bfloat16()
    weights = LiLAW().weights(rounded, targets)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, LiLAW().weights(rounded.float(), targets))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_any_integers(dtype):
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(LiLAW().weights(logits, targets.to(dtype)), LiLAW().weights(logits, targets))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "a target is 3; allowed are 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "a target is -1"),
        (torch.tensor([[0.0, math.nan], [0.0, 0.0]]), torch.tensor([0, 1]), "sample 0 are not finite .1 of 2"),
        (torch.tensor([[0.0, math.inf], [0.0, 0.0]]), torch.tensor([0, 1]), "not finite"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), "two logits"),
        (torch.zeros(2), torch.tensor([0, 1]), "two classes"),
        (torch.zeros(2, 3), torch.tensor([0.5, 1.5]), "no regression"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), r"targets have shape \(2, 3\)"),
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), "no several labels"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "empty"),
    ],
)
def test_bad_batches_are_refused_and_nothing_is_changed(logits, targets, message):
    lilaw = LiLAW()
    before = copy.deepcopy(lilaw.state_dict())

    class Fixed(nn.Module):
        def forward(self, x):
            return logits

    with pytest.raises(ValueError, match=message):
        lilaw.weights(logits, targets)
    with pytest.raises(ValueError, match=message):
        lilaw.loss(logits, targets, cross_entropy)
    with pytest.raises(ValueError, match=message):
        lilaw.meta_step(Fixed(), (logits, targets), cross_entropy)
    assert_same(lilaw.state_dict(), before)


def test_a_loss_that_is_not_one_number_for_each_sample():
    lilaw, logits, targets = LiLAW(), torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"shape \(\); one loss for each of 4"):
        lilaw.loss(logits, targets, F.cross_entropy)


def test_a_gradient_that_is_not_finite():
    model, batches = model_and_batches()
    lilaw = LiLAW().double()
    before = copy.deepcopy(lilaw.state_dict())
    with pytest.raises(ValueError, match="inf and its gradient is not finite"):
        lilaw.meta_step(model, batches[0], lambda z, y: cross_entropy(z, y) * math.inf)
    assert_same(lilaw.state_dict(), before)


@pytest.mark.parametrize("argument", ["alpha", "delta", "beta", "lr", "weight_decay", "warmup_steps"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        LiLAW(**{argument: value})
