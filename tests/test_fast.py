"""``fast`` against the readable version: a step computes what ``reference`` does."""

import copy
import io
import math

import pytest
import torch
from conftest import assert_same, feature_settings, groups_of, phi_of, tiny, train
from torch import nn

from metaadamw_lite import MetaAdamW, fast, reference
from metaadamw_lite.buckets import gather
from metaadamw_lite.fast import BLOCK
from metaadamw_lite.features import TensorState, zero_counts
from metaadamw_lite.folded import FoldedModulator
from metaadamw_lite.modulator import Modulation


class Sizes(nn.Module):
    """Tensors of every size that is treated in a way of its own: scalars up to more than two blocks."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Module() for _ in range(3))
        sizes = (1, 7, 2**16, 2**16 + 1, BLOCK, BLOCK + 1, 2 * BLOCK + 11)
        for k, n in enumerate(sizes):
            self.layers[k % 3].register_parameter(f"weight_{k}", nn.Parameter(torch.randn(n, dtype=dtype)))
        self.layers[0].bias = nn.Parameter(torch.randn(300, 400, dtype=dtype))
        self.layers[2].bias = nn.Parameter(torch.tensor(0.3, dtype=dtype))
        self.layers[1].bias = nn.Parameter(torch.randn(300, 300, dtype=dtype))
        self.square = self.layers[1].bias
        self.largest, self.second = self.layers[0].weight_6, self.layers[2].weight_5


class Half(nn.Module):
    """Stands in for Φ and halves every learning rate and decay."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(1, 1)  # its type and device are those of Φ

    def forward(self, features):
        half = torch.full((len(features),), 0.5)
        return Modulation(half, half, half, half)


def give_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, dtype=p.dtype, generator=generator)


def readable_features(optimizer):
    """The feature matrix by ``reference``, in float64."""
    return reference.features(groups_of(optimizer), **feature_settings(optimizer))


def readable_factors(optimizer):
    """α and β by ``reference``, in float64."""
    alpha, beta, _, _ = reference.modulation(readable_features(optimizer), phi_of(optimizer))
    return alpha, beta


def check_step(optimizer, tolerance):
    """A step uses the factors that the readable version gives."""
    alpha, beta = readable_factors(optimizer)
    optimizer.step()
    torch.testing.assert_close(optimizer.alpha.double(), alpha, rtol=0, atol=tolerance)
    torch.testing.assert_close(optimizer.beta.double(), beta, rtol=0, atol=tolerance)


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fused", [True, False])
def test_factors_of_a_step_are_those_of_the_readable_version(dtype, fused):
    model = Sizes(dtype)
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, fused=fused)
    for step in range(4):
        give_gradients(model, step)
        check_step(optimizer, TOLERANCE[dtype])


@pytest.mark.parametrize("version", ["basic", "basic_plus", "enhanced", "norm_basic", "norm_basic_plus"])
def test_statistics_are_those_of_the_readable_version(version):
    model = Sizes()
    heads = {"basic": 6, "norm_basic": 6, "enhanced": 7}.get(version, 11)
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, fused=True, feature_version=version, attn_heads=heads)
    rounding = 1e-5 if version.startswith("norm") else 1e-6  # dividing by the spread over groups enlarges it
    for step in range(3):
        give_gradients(model, step)
        expected = readable_features(optimizer)
        torch.testing.assert_close(optimizer.features().double(), expected, rtol=2e-6, atol=rounding)
        optimizer.step()


def test_the_fused_step_in_blocks_is_the_unfused_one():
    models = [Sizes(torch.float64) for _ in range(2)]
    optimizers = [MetaAdamW(m.named_parameters(), lr=0.01, fused=f) for m, f in zip(models, (True, False), strict=True)]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            give_gradients(model, step)
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            mine, other = (o.state[x][name] for o, x in zip(optimizers, (p, q), strict=True))
            torch.testing.assert_close(mine.double(), other.double(), rtol=0, atol=1e-12)


def write_theta(model, optimizer):
    with torch.no_grad():
        model.largest.mul_(3)


def replace_theta(model, optimizer):
    model.largest.data = 3 * model.largest.data


def write_theta_unseen(model, optimizer):
    for p in model.parameters():
        p.data.clamp_(-0.01, 0.01)  # as a WGAN does; torch does not count it


def turn_theta(model, optimizer):
    model.square.data = model.square.data.t()
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[model.square][name] = optimizer.state[model.square][name].t()


def shorten_theta(model, optimizer):
    half = model.largest.numel() // 2
    model.largest.data, model.largest.grad = model.largest.data[:half], model.largest.grad[:half]
    state = optimizer.state[model.largest]
    state.update({name: state[name][:half] for name in ("exp_avg", "exp_avg_sq")})


def write_moments(model, optimizer):
    optimizer.state[model.largest]["exp_avg"].mul_(2)
    optimizer.state[model.second]["exp_avg_sq"].mul_(2)


def replace_moments(model, optimizer):
    state = optimizer.state[model.largest]
    state["exp_avg"] = 2 * state["exp_avg"]


def load_state(model, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())
    write_moments(model, optimizer)


def update_phi(model, optimizer):
    optimizer.update_attention(
        model, 1.0, 2.0, lambda m, batch: batch * sum(p.square().mean() for p in m.parameters()), 3.0
    )


def write_phi(model, optimizer):
    for p in optimizer.modulator.parameters():
        p.data.mul_(1.3)  # torch does not count a write through .data


def replace_phi(model, optimizer):
    optimizer.modulator.output.weight.data = -optimizer.modulator.output.weight.data


def load_phi(model, optimizer):
    optimizer.modulator.load_state_dict({k: 0.5 * x for k, x in optimizer.modulator.state_dict().items()})


def double_phi(model, optimizer):
    optimizer.modulator.double()


def assign_phi(model, optimizer):
    state = {k: -x for k, x in optimizer.modulator.state_dict().items()}
    optimizer.modulator.load_state_dict(state, assign=True)


def replace_a_part_of_phi(model, optimizer):
    optimizer.modulator.output = nn.Linear(6, 4)


@pytest.mark.parametrize(
    "change",
    [
        write_theta,
        write_theta_unseen,
        replace_theta,
        turn_theta,
        shorten_theta,
        write_moments,
        replace_moments,
        load_state,
        update_phi,
        write_phi,
        replace_phi,
        load_phi,
        assign_phi,
        replace_a_part_of_phi,
        double_phi,
    ],
    ids=lambda f: f.__name__,
)
def test_changes_between_steps_are_seen(change):
    model = Sizes()
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, fused=True)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    give_gradients(model, 2)
    before = readable_features(optimizer), *readable_factors(optimizer)
    change(model, optimizer)
    after = readable_features(optimizer), *readable_factors(optimizer)
    assert change is double_phi or any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    check_step(optimizer, 1e-6)
    give_gradients(model, 3)
    check_step(optimizer, 1e-6)


def test_copies_go_on_alike():
    model = Sizes()
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, fused=True)
    give_gradients(model, 0)
    optimizer.step()
    twin_model, twin = copy.deepcopy((model, optimizer))
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    read_model, read = torch.load(file, weights_only=False)
    for m, o in ((model, optimizer), (twin_model, twin), (read_model, read)):
        give_gradients(m, 1)
        check_step(o, 1e-6)
    for p, q, r in zip(model.parameters(), twin_model.parameters(), read_model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_resumed_run_has_the_same_bits(dtype):
    """What was carried in memory is read again after loading, and must come out the same."""
    model = Sizes(dtype)
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, fused=True)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    resumed = Sizes(dtype)
    resumed.load_state_dict(model.state_dict())
    again = MetaAdamW(resumed.named_parameters(), lr=0.01, fused=True, seed=5)
    again.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        for m, o in ((model, optimizer), (resumed, again)):
            give_gradients(m, step)
            o.step()
        assert_same(again.state_dict(), optimizer.state_dict())
        assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("same_order", [True, False])
def test_tensors_in_any_order_of_memory(same_order):
    # torch's fused kernel on the CPU gives wrong results for gradients in another order: ours must not
    model = nn.Conv2d(40, 60, 9).to(memory_format=torch.channels_last)
    model.transposed = nn.Parameter(torch.randn(300, 900).t())
    model.gaps = nn.Parameter(torch.randn(300, 900)[:, ::2])
    model.narrow = nn.Parameter(torch.randn(64, 32, 1, 1).contiguous(memory_format=torch.channels_last))
    model.short = nn.Parameter(0.1 * torch.randn(50).bfloat16())
    model.none = nn.Parameter(torch.randn(0, 3))
    before = model.short.detach().clone()
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, fused=True)
    plain = copy.deepcopy(model).double()
    reference = MetaAdamW(plain.named_parameters(), lr=0.01)
    for step in range(3):
        give_gradients(model, step)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if same_order:
                p.grad = torch.empty_like(p, memory_format=torch.preserve_format).copy_(p.grad)
            q.grad = p.grad.double()
        check_step(optimizer, 1e-6)
        reference.step()
    assert (model.short - before).abs().mean() > 0.008, "what is compared has moved"
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        tolerance = 0.004 if p.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(p.double(), q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_cosines_of_tiny_and_huge_gradients(scale):
    model = nn.Linear(8, 8, bias=False)
    optimizer = MetaAdamW(model.named_parameters(), fused=True)
    give_gradients(model, 0, scale)
    optimizer.step()
    give_gradients(model, 0, scale)
    assert optimizer.features()[0, 3].item() == pytest.approx(1, abs=1e-6)
    check_step(optimizer, 1e-6)


@pytest.mark.parametrize("scale", [1e-11, 1e-6])
def test_standardised_second_moments_of_tiny_gradients(scale):
    model = Sizes()
    optimizer = MetaAdamW(model.named_parameters(), fused=True, feature_version="norm_basic")
    for step in range(2):
        give_gradients(model, step, scale)
        check_step(optimizer, 1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("first", "last"), [(math.inf, -math.inf), (math.nan, 1.0), (1e20, -1e20), (3e38, 3e38), (math.inf, math.inf)]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_huge_and_infinite_gradients_in_several_blocks_step_as_adamw_does(fused, first, last, dtype):
    ours, theirs = (nn.Parameter(torch.zeros(2 * BLOCK, dtype=dtype)) for _ in range(2))
    optimizer = MetaAdamW([ours], fused=fused, alpha_range=0, beta_range=0)
    adamw = torch.optim.AdamW([theirs], fused=fused)
    for first_now, last_now in ((1.0, 1.0), (first, last), (1.0, 1.0)):
        for p, o in ((ours, optimizer), (theirs, adamw)):
            p.grad = torch.ones_like(p)
            p.grad[0], p.grad[-1] = first_now, last_now
            o.step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dead", [float("nan"), float("inf")])
def test_a_group_with_nan_or_inf_leaves_the_others_alone(dead):
    model = tiny(torch.float32)
    optimizer = MetaAdamW(model.named_parameters(), fused=True)
    give_gradients(model, 0)
    clean = optimizer.features()
    group = optimizer.groups[0]
    group.params[0].grad[0] = dead
    features = optimizer.features()
    assert not torch.isfinite(features[0]).all()
    assert torch.equal(features[1:], clean[1:])
    optimizer.step()
    assert ((optimizer.alpha >= 0.5) & (optimizer.alpha <= 1.5)).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_layers": 128, "attn_hidden_dim": 64},
        {"attn_heads": 1},
        {"attn_heads": 2, "attn_layers": 3},
        {"use_feature_gating": True},
        {"feature_version": "enhanced", "attn_heads": 7},
        {"feature_version": "enhanced", "attn_heads": 2, "group_embed_dim": 2, "use_feature_gating": True},
        {"alpha_range": 0.4, "beta_range": 2.0},
    ],
    ids=str,
)
def test_the_loop_is_the_module(options):
    optimizer = MetaAdamW(tiny().named_parameters(), **options)
    phi = optimizer.modulator
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # layer norms and gates away from where they start
        for p in phi.parameters():
            p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    features = 10 * torch.randn(optimizer.features().shape, dtype=torch.float64, generator=generator)
    features[0, 0], features[1, 1] = float("nan"), 1e30
    with torch.no_grad():
        expected = phi(features)
    alpha, beta = FoldedModulator(phi)(features.numpy())
    torch.testing.assert_close(torch.from_numpy(alpha), expected.alpha, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.from_numpy(beta), expected.beta, rtol=0, atol=1e-12)


def test_where_the_loop_overflows_the_module_decides(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    with torch.no_grad():
        optimizer.modulator.encoder.layers[0].self_attn.in_proj_weight.mul_(1e4)
    train(model, optimizer, batches[:2])
    assert FoldedModulator(optimizer.modulator)(optimizer.features().numpy()) is None
    check_step(optimizer, 1e-12)


def test_hooks_on_the_module_are_called():
    model = Sizes()
    optimizer = MetaAdamW(model.named_parameters(), fused=True)
    give_gradients(model, 0)
    optimizer.step()
    seen = []
    optimizer.modulator.register_forward_hook(lambda module, inputs, output: seen.append(output))
    optimizer.step()
    assert len(seen) == 1
    assert torch.equal(seen[0].alpha, optimizer.alpha)


def test_another_forward_in_the_place_of_phis():
    model = Sizes()
    optimizer = MetaAdamW(model.named_parameters(), fused=True)
    give_gradients(model, 0)
    optimizer.step()
    asked = optimizer.modulator.forward
    calls = []
    optimizer.modulator.forward = lambda features: calls.append(features) or asked(features)
    optimizer.step()
    assert len(calls) == 1
    del optimizer.modulator.forward
    optimizer.modulator.output.forward = lambda z: calls.append(z) or torch.zeros(len(z), 4, dtype=z.dtype)
    optimizer.step()
    assert len(calls) == 2, "of a part of Φ, too"
    assert (optimizer.alpha == 1).all()


def test_phi_in_low_precision_is_asked_as_a_module():
    model = Sizes()
    optimizer = MetaAdamW(model.named_parameters(), fused=True)
    optimizer.modulator.bfloat16()
    give_gradients(model, 0)
    optimizer.step()
    assert optimizer.alpha.dtype == torch.bfloat16


def test_a_step_in_inference_mode():
    model = Sizes()
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, fused=True)
    with torch.inference_mode():
        for step in range(2):
            give_gradients(model, step)
            check_step(optimizer, 1e-6)
    assert not any(p.is_inference() for p in optimizer.modulator.parameters())


def test_tensors_on_two_devices_are_each_moved_by_a_kernel_that_can(monkeypatch):
    """A tensor elsewhere must not keep a disordered one on the CPU from the plain loop."""
    fused = []
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: fused.append(args[0]))
    monkeypatch.setattr(fast, "measure_on_device", lambda states: torch.zeros(len(states), 5))
    elsewhere = nn.Parameter(torch.empty(3, device="meta"))
    turned = nn.Parameter(torch.randn(30, 20).t())
    optimizer = MetaAdamW([turned, elsewhere], fused=True)
    optimizer.modulator = Half()
    turned.grad, elsewhere.grad = torch.randn(20, 30), torch.empty(3, device="meta")
    before = turned.detach().clone()
    optimizer.step()
    assert [x is elsewhere for call in fused for x in call] == [True]
    assert not torch.equal(turned, before)


def test_another_module_in_the_place_of_phi_is_asked():
    model = Sizes()
    optimizer = MetaAdamW(model.named_parameters(), fused=True)
    optimizer.modulator = Half()
    give_gradients(model, 0)
    optimizer.step()
    assert (optimizer.alpha == 0.5).all()


def test_zeros_are_counted_on_every_device():
    here, there = torch.tensor([0.0, 1.0, 0.0]), torch.empty(2, device="meta")
    assert zero_counts([here, there], [here, there], torch.empty(0, device="meta")).shape == (2, 2)
    assert zero_counts([here], [here + 1], torch.empty(0)).tolist() == [[2, 0]]


def test_statistics_on_a_gpu_are_the_same():
    model = Sizes(torch.float64)
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, fused=True)
    for step in range(3):
        give_gradients(model, step)
        buckets = gather(optimizer.param_groups, optimizer._members, optimizer.state)
        states = [TensorState(*state) for b in buckets for state in zip(b.theta, b.g, b.m, b.v, strict=True)]
        there, here = (x.clone() for x in (fast.measure_on_device(states), fast.measure(buckets)))
        for sums in (there, here):  # of ⟨g, m⟩ the cosine counts
            sums[:, 1] /= (sums[:, 0] * sums[:, 2]).sqrt().clamp_min(1e-300)
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)
        optimizer.step()
