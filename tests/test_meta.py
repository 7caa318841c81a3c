"""Section 3.5 and Algorithm 2: the meta-losses, their gradient by Φ, and that nothing else is touched."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from conftest import assert_same, cross_entropy, tiny, train
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaadamw_lite import MetaAdamW
from metaadamw_lite.meta import MetaLosses, gradient_alignment
from metaadamw_lite.modulator import Modulation

OBJECTIVES = ("combined", "gradient", "loss_decrease", "gen_gap")
HEADS = {"basic": 6, "basic_plus": 11, "enhanced": 7, "norm_basic": 6, "norm_basic_plus": 11}


def trained(batches, dtype=torch.float64, **settings):
    """A model and its optimizer after three steps; plain descent on Φ with step 1 shows the gradient."""
    model = tiny(dtype)
    settings = {
        "lr": 0.02,
        "weight_decay": 0.3,
        "meta_lr": 1.0,
        "meta_weight_decay": 0.0,
        "total_steps": 50,
        **settings,
    }
    optimizer = MetaAdamW(model.named_parameters(), **settings)
    train(model, optimizer, batches[:3])
    return model, optimizer


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.p = module.dropout = 0.0


def phi_vector(optimizer):
    parts = [p.detach().flatten() for p in optimizer.modulator.parameters()]
    if optimizer.huw is not None:
        parts.append(optimizer.huw.log_var.detach())
    return torch.cat(parts).clone()


def meta_gradient(model, optimizer, batches, **how):
    """The gradient that one meta-update follows (its negative step of length 1) and its losses."""
    before = phi_vector(optimizer)
    losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5], **how)
    return before - phi_vector(optimizer), losses


# ---------------------------------------------------------------- the losses


def test_equation_10_against_plain_python():
    lambda1, lambda2 = torch.tensor([0.2, 0.9]), torch.tensor([0.7, 0.4])
    modulation = Modulation(torch.ones(2), torch.ones(2), lambda1, lambda2)
    g = [torch.tensor([1.0, 2.0]), torch.tensor([[0.5]]), torch.tensor([-1.0, 1.0])]
    g_prime = [torch.tensor([3.0, -1.0]), torch.tensor([[2.0]]), torch.tensor([0.5, 2.0])]
    first = 0.2 * (9 + 1 + 4) - 0.7 * (3 - 2 + 1) / math.sqrt((1 + 4 + 0.25) * (9 + 1 + 4))
    second = 0.9 * (0.25 + 4) - 0.4 * (-0.5 + 2) / math.sqrt(2 * 4.25)
    assert gradient_alignment(modulation, [0, 0, 1], g, g_prime).item() == pytest.approx((first + second) / 2)


def test_a_zero_gradient_has_cosine_0_and_a_finite_slope():
    modulation = Modulation(*(torch.ones(1) for _ in range(4)))
    zero = torch.zeros(3, requires_grad=True)
    value = gradient_alignment(modulation, [0], [torch.ones(3)], [zero])
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_is_only_rounding_counts_as_zero(dtype):
    """A bias in front of a batch norm has no gradient, and what comes out instead points anywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8)).to(dtype)
    samples = [(torch.randn(32, 6, dtype=dtype), torch.randint(0, 8, (32,))) for _ in range(6)]
    optimizer = MetaAdamW(model.named_parameters(), meta_lr=1.0, meta_weight_decay=0.0, meta_objective="gradient")

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    for sample in samples[:3]:
        optimizer.zero_grad()
        loss(model, sample).backward()
        optimizer.step()
    assert 0 < model[0].bias.grad.norm() < 1e-6 * model[0].weight.grad.norm(), "the case is there"
    gradients = []
    for double_backward in (False, True):
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
        before = phi_vector(twin_optimizer)
        twin_optimizer.update_attention(twin, *samples[3:5], loss, double_backward=double_backward)
        gradients.append(phi_vector(twin_optimizer) - before)
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < (0.1 if dtype == torch.float32 else 1e-6)


def test_a_small_gradient_that_is_no_rounding_counts():
    modulation = Modulation(*(torch.ones(2) for _ in range(4)))
    small = 1e-4 * torch.ones(2)
    value = gradient_alignment(modulation, [0, 1], [torch.ones(2), small], [torch.zeros(2), small])
    assert value.item() == pytest.approx(-1 / 2, abs=1e-6), "the mean of 0 and −1"


def test_the_reported_losses_are_equations_10_to_13(batches):
    """Computed the long way: a copy of the model takes the hypothetical step with the optimizer's own step()."""
    model, optimizer = trained(batches, huw_priorities=(1.0, 2.0, 5.0))
    without_dropout(model)
    with torch.no_grad():
        optimizer.huw.log_var.copy_(torch.tensor([0.2, -0.4, 0.6]))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))

    twin_optimizer.zero_grad()
    loss1 = cross_entropy(twin, batches[3])
    loss1.backward()
    g = {p: p.grad.clone() for p in twin.parameters()}
    val_at_theta = cross_entropy(twin, batches[5]).item()
    modulation = twin_optimizer.modulator(twin_optimizer.features())
    twin_optimizer.step()
    twin_optimizer.zero_grad()
    cross_entropy(twin, batches[4]).backward()
    order = [(p, k) for k, group in enumerate(twin_optimizer.groups) for p in group.params]
    expected_gradient = gradient_alignment(
        modulation, [k for _, k in order], [g[p] for p, _ in order], [p.grad for p, _ in order]
    ).item()
    expected_decrease = cross_entropy(twin, batches[5]).item() - val_at_theta
    expected_gap = abs(loss1.item() - val_at_theta)

    expected_total = sum(
        0.5 * math.exp(-s) * loss + 0.5 * p * s
        for s, p, loss in zip(
            (0.2, -0.4, 0.6), (1, 2, 5), (expected_gradient, expected_decrease, expected_gap), strict=True
        )
    )
    losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    expected = MetaLosses(expected_total, expected_gradient, expected_decrease, expected_gap)
    assert losses == pytest.approx(expected, rel=1e-6)


def test_gates_add_their_penalty_to_equation_13_and_descend_it(batches):
    log_var, priorities, moved = (0.2, -0.4, 0.6), (1.0, 2.0, 5.0), {}
    for sparsity in (0.0, 0.3):
        model, optimizer = trained(
            batches, use_feature_gating=True, feature_gating_sparsity=sparsity, huw_priorities=priorities
        )
        gates = torch.linspace(-1, 2, len(optimizer.modulator.gates), dtype=torch.float64)
        with torch.no_grad():
            optimizer.modulator.gates.copy_(gates)
            optimizer.huw.log_var.copy_(torch.tensor(log_var))
        losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
        equation_13 = sum(
            0.5 * math.exp(-s) * loss + 0.5 * p * s for s, p, loss in zip(log_var, priorities, losses[1:], strict=True)
        )
        assert losses.total == pytest.approx(equation_13 + sparsity * gates.sigmoid().sum().item(), rel=1e-6)
        moved[sparsity] = optimizer.modulator.gates.detach() - gates
    slope = 0.3 * gates.sigmoid() * (1 - gates.sigmoid())
    torch.testing.assert_close(moved[0.3] - moved[0.0], -slope)


@pytest.mark.parametrize(
    ("objective", "present"),
    [("gradient", {1}), ("loss_decrease", {2}), ("gen_gap", {3}), ("combined", {1, 2, 3})],
)
def test_terms_that_the_objective_leaves_out_are_nan(batches, objective, present):
    model, optimizer = trained(batches, meta_objective=objective, huw_priorities=None)
    losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    assert {i for i in (1, 2, 3) if not math.isnan(losses[i])} == present
    assert losses.total == pytest.approx(sum(losses[i] for i in present), rel=1e-12)
    assert optimizer.huw is None


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "gen_gap"])  # which moves no Φ
@pytest.mark.parametrize("version", HEADS)
@pytest.mark.parametrize("gating", [False, True])
def test_first_order_equals_double_backward(batches, objective, version, gating):
    results = []
    for double_backward in (False, True):
        model, optimizer = trained(
            batches,
            meta_objective=objective,
            feature_version=version,
            attn_heads=HEADS[version],
            use_feature_gating=gating,
        )
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            results.append(meta_gradient(model, optimizer, batches, double_backward=double_backward))
    (first, losses1), (exact, losses2) = results
    assert losses1 == pytest.approx(losses2, rel=1e-10, nan_ok=True)
    assert exact.norm() > 1e-6, "there must be something to agree on"
    assert (first - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("part", ["alpha", "beta"])
def test_the_gradient_through_each_factor_agrees(batches, part):
    """α's and β's parts are checked apart, for the λ part alone could hide an error in a small one."""
    row = ("alpha", "beta").index(part)
    rows = []
    for double_backward in (False, True):
        model, optimizer = trained(batches, weight_decay=3.0)
        before = optimizer.modulator.output.bias.detach().clone()
        with sdpa_kernel(SDPBackend.MATH):
            optimizer.update_attention(
                model, batches[3], batches[4], cross_entropy, batches[5], double_backward=double_backward
            )
        rows.append((before - optimizer.modulator.output.bias.detach())[row])
    assert abs(rows[1]) > 1e-6
    assert rows[0].item() == pytest.approx(rows[1].item(), rel=1e-5)


def test_first_order_equals_a_numerical_derivative(batches):
    model, optimizer = trained(batches, use_feature_gating=True)
    snapshot = copy.deepcopy((optimizer.modulator.state_dict(), optimizer.huw.state_dict()))

    def total(direction, step):
        optimizer.modulator.load_state_dict(snapshot[0])
        optimizer.huw.load_state_dict(snapshot[1])
        parameters = [*optimizer.modulator.parameters(), *optimizer.huw.parameters()]
        with torch.no_grad():
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters) + step * direction, parameters)
        return optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5]).total

    gradient, _ = meta_gradient(model, optimizer, batches)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(len(gradient), generator=generator, dtype=torch.float64)
        numerical = (total(direction, 1e-5) - total(direction, -1e-5)) / 2e-5
        assert (gradient @ direction).item() == pytest.approx(numerical, rel=1e-4, abs=1e-8)


def test_only_first_derivatives_are_asked_of_the_model(batches):
    """Without dropout torch takes a fused attention kernel, which has no second derivative."""
    model = tiny(dropout=0.0)
    optimizer = MetaAdamW(model.named_parameters())
    before = phi_vector(optimizer)
    optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    assert not torch.equal(phi_vector(optimizer), before)
    with pytest.raises(RuntimeError, match=r"attention.*not implemented"):
        optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5], double_backward=True)


def test_beta_is_trained(batches):
    model, optimizer = trained(batches, meta_objective="loss_decrease")
    before = optimizer.modulator.output.weight.detach().clone()
    optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    assert (optimizer.modulator.output.weight - before)[1].abs().max() > 0


def test_the_generalisation_gap_cannot_move_phi(batches):
    model, optimizer = trained(batches, meta_objective="gen_gap")
    before = phi_vector(optimizer)
    losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    assert losses.gen_gap > 0
    assert torch.equal(phi_vector(optimizer), before)


def test_gates_are_trained(batches):
    """By the meta-losses: the penalty, which alone would move them, too, is switched off."""
    model, optimizer = trained(batches, use_feature_gating=True, feature_gating_sparsity=0.0)
    optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    assert (optimizer.modulator.gates != 1).all()


def test_meta_weight_decay_shrinks_phi_but_not_the_variances(batches):
    moved = {}
    for decay in (0.0, 0.5):
        model, optimizer = trained(batches, meta_lr=0.1, meta_weight_decay=decay)
        with torch.no_grad():
            optimizer.huw.log_var.copy_(torch.tensor([0.7, -0.4, 0.5]))
        before = phi_vector(optimizer)
        optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
        moved[decay] = phi_vector(optimizer) - before
    shrunk = moved[0.5] - moved[0.0]
    torch.testing.assert_close(shrunk[:-3], -0.1 * 0.5 * before[:-3])
    assert torch.equal(shrunk[-3:], torch.zeros(3, dtype=torch.float64)), "log σ² stands last"


def test_many_meta_updates_lower_the_meta_loss(batches):
    for meta_optimizer, lr in (("sgd", 1e-2), ("adam", 1e-2)):
        model, optimizer = trained(
            batches, meta_objective="gradient", meta_optimizer=meta_optimizer, meta_lr=lr, weight_decay=0.01
        )
        totals = [optimizer.update_attention(model, batches[3], batches[4], cross_entropy).total for _ in range(30)]
        assert totals[-1] < totals[0] - 1e-3


def test_recurrent_models_need_no_second_derivative():
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, num_layers=2, dropout=0.1).double()
    optimizer = MetaAdamW(model.named_parameters(), meta_lr=1.0)
    data = [torch.randn(6, 2, 3, dtype=torch.float64) for _ in range(3)]

    def loss_fn(model, x):
        return model(x)[0].square().mean()

    before = phi_vector(optimizer)
    optimizer.update_attention(model, data[0], data[1], loss_fn, data[2])
    assert not torch.equal(phi_vector(optimizer), before)


# ---------------------------------------------------------------- leaving everything as found


def everything(model, optimizer):
    return copy.deepcopy(
        {
            "parameters and buffers": model.state_dict(),
            "gradients": [p.grad for p in model.parameters()],
            "modes": [m.training for m in model.modules()],
            "moments": [optimizer.state[p] for p in model.parameters()],
            "counter": optimizer.state_dict()["meta"]["t"],
            "factors": (optimizer.alpha, optimizer.beta),
            "torch rng": torch.get_rng_state(),
            "python rng": random.getstate()[1],
            "numpy rng": np.random.get_state()[1].tolist(),  # noqa: NPY002
        }
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("double_backward", [False, True])
def test_everything_is_left_as_found(batches, objective, double_backward):
    model, optimizer = trained(batches, meta_objective=objective)
    model.layers[0].eval()
    before = everything(model, optimizer)

    def loss_fn(model, batch):
        model.train()
        random.random()
        np.random.rand()  # noqa: NPY002
        return cross_entropy(model, batch)

    with sdpa_kernel(SDPBackend.MATH):
        optimizer.update_attention(model, batches[3], batches[4], loss_fn, batches[5], double_backward=double_backward)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize(
    ("double_backward", "fails_at"),
    [(False, k) for k in range(1, 6)] + [(True, k) for k in range(1, 5)],  # which has no perturbed gradient to take
)
def test_everything_is_left_as_found_when_the_loss_raises(batches, double_backward, fails_at):
    model, optimizer = trained(batches)
    before, phi = everything(model, optimizer), phi_vector(optimizer)
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        loss = cross_entropy(model, batch)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return loss

    with sdpa_kernel(SDPBackend.MATH), pytest.raises(KeyboardInterrupt):
        optimizer.update_attention(model, batches[3], batches[4], loss_fn, batches[5], double_backward=double_backward)
    assert_same(everything(model, optimizer), before)
    assert torch.equal(phi_vector(optimizer), phi)


def test_gradients_are_left_as_found_even_if_the_loss_adds_to_them(batches):
    model, optimizer = trained(batches)
    before = everything(model, optimizer)

    def loss_fn(model, batch):
        loss = cross_entropy(model, batch)
        loss.backward(retain_graph=True)
        return loss

    optimizer.update_attention(model, batches[3], batches[4], loss_fn, batches[5])
    assert_same(everything(model, optimizer), before)


def test_a_buffer_that_is_made_by_the_forward_pass_is_left_out_again(batches):
    model = tiny()
    model.register_buffer("cache", None)

    def caching(model, batch):
        loss = cross_entropy(model, batch)
        model.cache = loss.detach()[None]
        model.register_buffer("later", loss.detach()[None])
        return loss

    optimizer = MetaAdamW(model.named_parameters())
    optimizer.update_attention(model, *batches[:2], caching, batches[2])
    assert model.cache is None
    assert "later" not in dict(model.named_buffers())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_part_that_torchscript_made_is_left_as_found(batches):
    model = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.BatchNorm1d(3)))
    before = copy.deepcopy(model.state_dict())
    samples = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    MetaAdamW(list(model.named_parameters())).update_attention(model, *samples[:2], loss, samples[2])
    assert_same(model.state_dict(), before)


class Centred(nn.Module):
    """A model whose forward pass moves a buffer (a DINO's centre), and frozen weights (a MoCo's key encoder)."""

    def __init__(self, write=torch.Tensor.copy_):
        super().__init__()
        self.query, self.key = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(3))
        self.write = write

    def forward(self, x):
        with torch.no_grad():
            for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                self.write(key, 0.9 * key + 0.1 * query)
            self.write(self.centre, 0.9 * self.centre + 0.1 * self.key(x).mean(0))
        return self.query(x) - self.centre + self.key(x)


def centred_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def new_data(x, y):
    x.data = y.clone()


@pytest.mark.parametrize(
    "write", [torch.Tensor.copy_, lambda x, y: x.data.copy_(y), new_data], ids=["counted", "by .data", "new .data"]
)
@pytest.mark.parametrize("whole", [True, False], ids=["frozen ones in the optimizer", "trained ones only"])
def test_what_a_forward_pass_moves_is_the_same_for_every_loss_and_put_back(write, whole):
    torch.manual_seed(0)
    model = Centred(write).double()
    samples = [(torch.randn(8, 4).double(), torch.randint(0, 3, (8,))) for _ in range(3)]
    params = list((model if whole else model.query).named_parameters())
    before = copy.deepcopy(model.state_dict())
    losses = MetaAdamW(params, lr=0.0).update_attention(model, *samples[:2], centred_loss, samples[2])
    assert losses.loss_decrease == 0, "θ′ is θ where the learning rate is zero"
    assert_same(model.state_dict(), before)

    def failing(model, batch):
        centred_loss(model, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MetaAdamW(params).update_attention(model, *samples[:2], failing, samples[2])
    assert_same(model.state_dict(), before)


class Rebuilt(nn.Module):
    """A model whose forward pass does something to a buffer, and whose output shows what is in it."""

    def __init__(self, change):
        super().__init__()
        self.output = nn.Linear(4, 3)
        self.register_buffer("q", torch.full((2, 3), 0.1))
        self.register_buffer("hidden", torch.full((3,), 0.2), persistent=False)
        self.base = torch.full((1, 3), 0.3)
        self.register_buffer("wide", self.base.expand(2, 3))
        self.change = change

    def forward(self, x):
        shown = self.q.sum() + self.hidden.sum() + self.wide.sum()
        self.change(self)
        return self.output(x) * shown


def resized(model):
    model.q.resize_(7, 3).fill_(5.0)


def larger(model):
    model.q.data = torch.full((5, 2, 3), 5.0)


def narrower(model):
    model.q.data = model.q.data.to(torch.bfloat16)


def without_hidden(model):
    del model.hidden
    model.hidden = torch.full((3,), 5.0)


def registered_anew(model):
    model.register_buffer("q", torch.full((2, 3), 5.0), persistent=False)


def below_the_expanded(model):
    model.base.fill_(5.0)


@pytest.mark.parametrize("fails", [False, True], ids=["", "the loss raises"])
@pytest.mark.parametrize(
    "change", [resized, larger, narrower, without_hidden, registered_anew, below_the_expanded], ids=lambda f: f.__name__
)
def test_a_buffer_is_put_back_whatever_the_forward_pass_makes_of_it(change, fails):
    torch.manual_seed(0)
    model = Rebuilt(change)
    samples = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]
    optimizer = MetaAdamW(model.output.named_parameters(), lr=0.0)
    saved, values = copy.deepcopy(model.state_dict()), {n: x.clone() for n, x in model.named_buffers()}

    def loss(model, batch):
        value = centred_loss(model, batch)
        if fails:
            raise KeyboardInterrupt
        return value

    if fails:
        with pytest.raises(KeyboardInterrupt):
            optimizer.update_attention(model, *samples[:2], loss, samples[2])
    else:
        losses = optimizer.update_attention(model, *samples[:2], loss, samples[2])
        assert losses.loss_decrease == 0, "θ′ is θ where the learning rate is zero"
    assert_same(dict(model.named_buffers()), values)
    assert {n: x.dtype for n, x in model.named_buffers()} == {n: x.dtype for n, x in values.items()}
    assert_same(model.state_dict(), saved)


@pytest.mark.parametrize("meta_optimizer", ["sgd", "adam"])
def test_parameters_that_take_the_place_of_phis_are_trained(batches, meta_optimizer):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), meta_lr=0.1, meta_optimizer=meta_optimizer)
    update = (model, batches[0], batches[1], cross_entropy, batches[2])
    optimizer.update_attention(*update)
    for module in (optimizer.modulator, optimizer.huw):
        module.load_state_dict({n: x.clone() for n, x in module.state_dict().items()}, assign=True)
    before = copy.deepcopy((optimizer.modulator.state_dict(), optimizer.huw.state_dict()))
    optimizer.update_attention(*update)
    assert not torch.equal(optimizer.modulator.output.weight, before[0]["output.weight"])
    assert not torch.equal(optimizer.huw.log_var, before[1]["log_var"])
    held = {p for group in optimizer._meta_optimizer.param_groups for p in group["params"]}
    assert set(optimizer._meta_optimizer.state) <= held, "no moments of parameters that are gone"


def test_a_meta_update_in_inference_mode_is_refused_by_name(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.update_attention(model, batches[0], batches[1], cross_entropy, batches[2])


@pytest.mark.parametrize("size", [(3, 4), (70, 40), (5000, 3)])
def test_a_large_frozen_queue_that_is_only_moved_is_noticed(size):
    """As in MoCo: the same numbers at other places."""
    torch.manual_seed(0)
    model = nn.ParameterDict({"head": nn.Parameter(torch.ones(4)), "queue": nn.Parameter(torch.randn(size))})
    model["queue"].requires_grad_(False)

    def loss(model, batch):
        with torch.no_grad():
            model["queue"].copy_(model["queue"].roll(1, 0))
        return (model["head"] * batch).sum()

    optimizer = MetaAdamW([("head", model["head"])])
    with pytest.raises(RuntimeError, match="changes the parameter queue"):
        optimizer.update_attention(model, torch.ones(4), torch.ones(4), loss, torch.ones(4))


@pytest.mark.parametrize("write", [torch.Tensor.copy_, lambda x, y: x.data.copy_(y), new_data])
def test_a_large_frozen_model_that_the_forward_pass_changes_is_refused_by_name(write):
    """It is not copied: below a small adapter that would double the memory."""
    torch.manual_seed(0)
    model = Centred(write)
    samples = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]
    optimizer = MetaAdamW([("query.bias", model.query.bias)])
    phi = phi_vector(optimizer)
    model.query.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"changes the parameter key\.weight"):
        optimizer.update_attention(model, *samples[:2], centred_loss, samples[2])
    assert torch.equal(phi_vector(optimizer), phi)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_hides_its_parameters_is_refused(reentrant):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    samples = [(torch.randn(8, 4, requires_grad=True), torch.randint(0, 3, (8,))) for _ in range(3)]

    def loss(model, batch):
        return nn.functional.cross_entropy(model[1](checkpoint(model[0], batch[0], use_reentrant=reentrant)), batch[1])

    optimizer = MetaAdamW(model.named_parameters())
    phi = phi_vector(optimizer)
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            optimizer.update_attention(model, *samples[:2], loss, samples[2])
        assert torch.equal(phi_vector(optimizer), phi)
    else:
        optimizer.update_attention(model, *samples[:2], loss, samples[2])
        assert not torch.equal(phi_vector(optimizer), phi)


def sparse(layout):
    return torch.eye(4).to_sparse_coo() if layout == "coo" else getattr(torch.eye(4), f"to_sparse_{layout}")()


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "inference"])
def test_buffers_of_every_kind_are_no_obstacle(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    if kind == "inference":
        with torch.inference_mode():
            model.register_buffer("extra", torch.ones(4))
    else:
        model.register_buffer("extra", sparse(kind))
    samples = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]

    def read():
        return model.extra.clone() if kind == "inference" else (model.extra @ torch.eye(4)).clone()

    def loss(model, batch):
        extra = read().sum(0) if kind != "inference" else read()
        with torch.inference_mode(kind == "inference"), torch.no_grad():
            values = model.extra if kind == "inference" else model.extra._values() if kind == "coo" else None
            (model.extra.values() if values is None else values).mul_(0.5)
        return nn.functional.cross_entropy(model(batch[0] * extra), batch[1])

    before, extra = copy.deepcopy(model[1].state_dict()), read()
    losses = MetaAdamW(model.named_parameters(), lr=0.0).update_attention(model, *samples[:2], loss, samples[2])
    assert losses.loss_decrease == 0, "each loss sees the same buffer"
    assert_same(model[1].state_dict(), before)
    assert torch.equal(read(), extra)


def test_a_buffer_that_the_forward_pass_deletes_is_there_again(batches):
    model, optimizer = trained(batches)
    model.register_buffer("cache", torch.ones(2))

    def loss_fn(model, batch):
        assert model.cache.sum() == 2
        del model.cache
        return cross_entropy(model, batch)

    optimizer.update_attention(model, batches[3], batches[4], loss_fn, batches[5])
    assert torch.equal(model.cache, torch.ones(2))


def test_a_buffer_that_shares_memory_is_no_obstacle(batches):
    model, optimizer = trained(batches)
    model.register_buffer("mask", torch.ones(1, 4).expand(8, 4))
    before = everything(model, optimizer)

    def loss_fn(model, batch):
        model.eval()
        return cross_entropy(model, batch)

    optimizer.update_attention(model, batches[3], batches[4], loss_fn, batches[5])
    assert_same(everything(model, optimizer), before)


def test_autocast_does_not_hide_the_hypothetical_step(batches):
    model, optimizer = trained(batches, torch.float32)
    without_dropout(model)  # masks differ between precisions
    optimizer.param_groups[0]["lr"] = 1.0
    plain = copy.deepcopy((model, optimizer))
    with torch.autocast("cpu", torch.bfloat16):
        losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
        after = cross_entropy(model, batches[6])
        optimizer.step()
    assert optimizer.alpha.dtype == torch.float32
    exact = plain[1].update_attention(plain[0], batches[3], batches[4], cross_entropy, batches[5])
    assert abs(exact.loss_decrease) > 0.1
    assert losses.loss_decrease == pytest.approx(exact.loss_decrease, rel=0.1)
    assert after.item() == pytest.approx(cross_entropy(plain[0], batches[6]).item(), rel=0.2)


def test_at_a_rate_of_zero_nothing_decreases_in_eval_mode_with_padding():
    """Under no_grad torch's encoder takes another path in eval mode; both losses must take the same."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    optimizer = MetaAdamW(model.named_parameters(), lr=0.0, meta_objective="loss_decrease")
    padding = torch.tensor([[False] * 4 + [True] * 2] * 3)

    def loss_fn(model, x):
        return model(x, src_key_padding_mask=padding).square().mean()

    x = torch.randn(3, 6, 8)
    assert optimizer.update_attention(model, x, x, loss_fn, x).loss_decrease == 0


def test_dropout_masks_are_the_same_at_theta_and_theta_prime(batches):
    """With a learning rate of zero, θ′ = θ: the loss decrease must then be exactly zero, dropout or not."""
    model, optimizer = trained(batches)
    optimizer.param_groups[0]["lr"] = 0.0
    losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    assert losses.loss_decrease == 0


def test_a_frozen_parameter_is_no_obstacle(batches):
    model, optimizer = trained(batches)
    model.head.weight.requires_grad_(False)
    weight, bias, phi = model.head.weight.clone(), model.head.bias.clone(), phi_vector(optimizer)
    seen = []

    def loss_fn(model, batch):
        seen.append((model.head.weight.clone(), model.head.bias.detach().clone()))
        return cross_entropy(model, batch)

    optimizer.update_attention(model, batches[3], batches[4], loss_fn, batches[5])
    assert all(torch.equal(x, weight) for x, _ in seen), "θ′ has it where it was"
    assert not all(torch.equal(x, bias) for _, x in seen)
    assert not torch.equal(phi_vector(optimizer), phi)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("objective", ["combined", "loss_decrease", "gen_gap"])
def test_a_missing_validation_batch(batches, objective):
    model, optimizer = trained(batches, meta_objective=objective)
    before, phi = everything(model, optimizer), phi_vector(optimizer)
    with pytest.raises(ValueError, match=f"val_batch is None.*{objective}"):
        optimizer.update_attention(model, batches[3], batches[4], cross_entropy)
    assert_same(everything(model, optimizer), before)
    assert torch.equal(phi_vector(optimizer), phi)


@pytest.mark.parametrize("which", ["batch1", "batch2", "val_batch"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite(batches, which, value):
    model, optimizer = trained(batches)
    before, state = everything(model, optimizer), copy.deepcopy(optimizer.state_dict()["meta"])
    bad = {"batch1": batches[3], "batch2": batches[4], "val_batch": batches[5]}[which]

    def loss_fn(model, batch):
        return cross_entropy(model, batch) * (value if batch is bad else 1.0)

    with pytest.raises(ValueError, match=f"loss on {which} is {value}"):
        optimizer.update_attention(model, batches[3], batches[4], loss_fn, batches[5])
    assert_same(everything(model, optimizer), before)
    assert_same(optimizer.state_dict()["meta"], state)


def test_a_gradient_that_is_not_finite_leaves_phi(batches):
    model, optimizer = trained(batches)
    phi = phi_vector(optimizer)

    def loss_fn(model, batch):  # a finite loss with an infinite slope
        return cross_entropy(model, batch) + (model.head.bias - model.head.bias.detach()).abs().sum().sqrt()

    with pytest.raises(ValueError, match="finite"):
        optimizer.update_attention(model, batches[3], batches[4], loss_fn, batches[5])
    assert torch.equal(phi_vector(optimizer), phi)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_of_phi_that_is_not_finite_is_refused(batches, bad):
    model, optimizer = trained(batches)
    before, state = everything(model, optimizer), copy.deepcopy(optimizer.state_dict()["meta"])
    hook = optimizer.modulator.output.bias.register_hook(lambda grad: grad * bad)
    with pytest.raises(ValueError, match="its gradient is not finite"):
        optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    assert_same(everything(model, optimizer), before)
    assert_same(optimizer.state_dict()["meta"], state)
    hook.remove()
    assert math.isfinite(optimizer.update_attention(model, *batches[3:5], cross_entropy, batches[5]).total)


def test_a_meta_loss_that_is_not_finite_is_refused(batches):
    model, optimizer = trained(batches)
    with torch.no_grad():
        optimizer.huw.log_var.fill_(-2000.0)  # e²⁰⁰⁰
    state = copy.deepcopy(optimizer.state_dict()["meta"])
    with pytest.raises(ValueError, match=r"the meta-loss is (nan|-?inf)"):
        optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    assert_same(optimizer.state_dict()["meta"], state)


def test_a_model_that_is_not_the_optimizers(batches):
    _, optimizer = trained(batches)
    with pytest.raises(ValueError, match="contains no parameter of this optimizer"):
        optimizer.update_attention(tiny(), batches[3], batches[4], cross_entropy, batches[5])
    with pytest.raises(ValueError, match="contains no parameter of this optimizer"):
        optimizer.update_attention(tiny(), batches[3], batches[4], lambda m, b: torch.tensor(1.0), batches[5])


def test_a_loss_that_is_no_scalar(batches):
    model, optimizer = trained(batches)
    with pytest.raises(ValueError, match=r"\(12, 3\) on batch1"):
        optimizer.update_attention(model, batches[3], batches[4], lambda m, b: m(b[0]), batches[5])
    with pytest.raises(ValueError, match="float on batch1"):
        optimizer.update_attention(model, batches[3], batches[4], lambda m, b: 1.0, batches[5])
