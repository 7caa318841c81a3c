"""The step on a GPU: by Triton's interpreter on a CPU, or on a GPU where there is one."""

import copy
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import assert_same, cross_entropy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaadamw_lite import MetaAdamW, triton_step
from metaadamw_lite.buckets import Bucket
from metaadamw_lite.features import (
    FEATURE_VERSIONS,
    FeatureConfig,
    TensorState,
    group_features,
    inner_products,
    tensor_statistics,
)
from metaadamw_lite.groups import ModulationGroup
from metaadamw_lite.modulator import Modulator
from metaadamw_lite.triton_step import CHUNK, DeviceStep

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
needs_float64 = pytest.mark.skipif(F64 not in triton_step.matrices(), reason="this Triton has no float64 matrices")
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def bucket(thetas, k=0, seed=0, scale=1.0, settings=SETTINGS, types=(None, None, None), steps=0, params=None):
    """Tensors with random gradients and moments; ``types`` are those of g, m and v where they are not θ's."""
    generator = torch.Generator().manual_seed(seed)

    def like(theta, dtype, power):
        x = scale * torch.randn(theta.shape, generator=generator, dtype=F64) ** power
        return torch.empty_like(theta, dtype=dtype).copy_(x)

    thetas = [theta.to(DEVICE) for theta in thetas]
    g, m, v = ([like(theta, t, power) for theta in thetas] for t, power in zip(types, (1, 1, 2), strict=True))
    count = [torch.full((), float(steps), device=DEVICE) for _ in thetas]
    return Bucket(settings, k, params=params or thetas, theta=thetas, g=g, m=m, v=v, step=count)


def bucket_of(given, k, change):
    """A bucket whose lists of tensors are changed; the parameters and step counts stay."""
    columns = {name: change(getattr(given, name)) for name in ("theta", "g", "m", "v")}
    return replace(given, k=k, **columns)


def randn(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def states(buckets):
    return [TensorState(*state) for b in buckets for state in zip(b.theta, b.g, b.m, b.v, strict=True)]


def readable_sums(buckets, zeros=False):
    sums = torch.tensor([inner_products(s) for s in states(buckets)], dtype=F64)
    if zeros:
        counts = [[float((x == 0).sum()) for x in (s.g, s.m)] for s in states(buckets)]
        sums = torch.cat([sums, torch.tensor(counts, dtype=F64)], dim=1)
    return sums


def sums_of(buckets, zeros=False):
    step = DeviceStep()
    return step.inner_products(step.table(buckets, 0.0), zeros).cpu()


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("zeros", [False, True])
def test_sums_over_tensors_of_every_size(dtype, zeros):
    sizes = (0, 1, 7, 1023, CHUNK, CHUNK + 1, 2 * CHUNK + 11)
    buckets = [
        bucket([randn(n, dtype=dtype) for n in sizes]),
        bucket([randn(3, 5, dtype=dtype), torch.tensor(0.3, dtype=dtype)], k=1, seed=1),
    ]
    buckets[0].g[3][:40] = 0
    buckets[0].m[5][-3:] = 0
    torch.testing.assert_close(sums_of(buckets, zeros), readable_sums(buckets, zeros), rtol=1e-12, atol=0)


def test_sums_over_tensors_of_mixed_types():
    buckets = [
        bucket([randn(70, dtype=dtype), randn(3, 4, dtype=dtype)], k, seed=k, types=types)
        for k, (dtype, *types) in enumerate(
            [(F32, F32, F32, F32), (BF16, F32, F32, F32), (F32, BF16, F16, F64), (F64, F32, BF16, F16)]
        )
    ]
    torch.testing.assert_close(sums_of(buckets), readable_sums(buckets), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e25, 1e37])
def test_sums_of_squares_beyond_float32(scale):
    ours = bucket([randn(50), randn(CHUNK + 3)], scale=scale)
    ours = replace(ours, v=[torch.full_like(x, scale) for x in ours.v])
    sums = sums_of([ours])
    assert torch.isfinite(sums).all()
    assert (sums > 0)[:, [0, 2, 4]].all()
    torch.testing.assert_close(sums, readable_sums([ours]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dead", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_tensor(dead):
    ours = bucket([randn(50), randn(60), randn(70)])
    clean = sums_of([ours])
    ours.g[1][0] = dead
    sums = sums_of([ours])
    assert not torch.isfinite(sums[1, :2]).any()
    assert torch.equal(sums[[0, 2]], clean[[0, 2]])
    assert torch.equal(sums[1, 2:], clean[1, 2:])


def test_sums_repeat_to_the_bit_whatever_stands_beside():
    ours = bucket([randn(n) for n in (300, 2 * CHUNK + 5, 40)])
    assert torch.equal(sums_of([ours]), sums_of([ours]))
    elsewhere = bucket_of(ours, 3, lambda column: [x.clone() for x in reversed(column)])
    assert torch.equal(sums_of([elsewhere]).flip(0), sums_of([ours]))


# ---------------------------------------------------------------- features


def groups_of(buckets, number):
    """Modulation groups, of which some have no gradient."""
    members = [[p for b in buckets if b.k == k for p in b.params] for k in range(number)]
    return [ModulationGroup(f"g{k}", tuple(ps), 0.1 * k, 0.5 * (k % 2)) for k, ps in enumerate(members)]


def readable_features(config, buckets, groups, time):
    sums = readable_sums(buckets, zeros=config.version == "enhanced")
    statistics = tensor_statistics(sums[:, :5])
    if config.version == "enhanced":
        sizes = torch.tensor([max(p.numel(), 1) for b in buckets for p in b.params])
        statistics = torch.cat([statistics, sums[:, 5:] / sizes.unsqueeze(1)], dim=1)
    members = [b.k for b in buckets for _ in b.params]
    return group_features(config, groups, members, statistics, time)


def features_of(config, buckets, groups, time, dtype=F64):
    step = DeviceStep()
    table = step.table(buckets, time)
    sums = step.inner_products(table, config.version == "enhanced")
    return step.features(table, sums, config, groups, dtype).cpu()


@pytest.mark.parametrize("version", FEATURE_VERSIONS)
@pytest.mark.parametrize(("use_v", "use_time"), [(True, True), (False, False)])
def test_features_are_those_of_the_readable_version(version, use_v, use_time):
    config = FeatureConfig(version, use_v, use_time)
    # Group 1 has no gradient, group 2 one tensor, group 3 two buckets, with a gradient that is zero.
    buckets = [
        bucket([randn(20), randn(4, 5), randn(0)], 0),
        bucket([randn(30)], 2, seed=1),
        bucket([randn(7), randn(9), torch.tensor(2.0)], 3, seed=2),
        bucket([randn(8)], 3, seed=3),
    ]
    buckets[3].g[0].zero_()
    groups = groups_of(buckets, 5)
    expected = readable_features(config, buckets, groups, 0.25)
    torch.testing.assert_close(features_of(config, buckets, groups, 0.25), expected, rtol=1e-11, atol=1e-11)
    short = features_of(config, buckets, groups, 0.25, F32)
    assert short.dtype == F32
    torch.testing.assert_close(short, expected.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("version", ["enhanced", "norm_basic_plus"])
def test_features_of_many_tensors_in_many_groups(version):
    config = FeatureConfig(version)
    buckets = [bucket([randn(3, seed=i)], (7 * i) % 64, seed=i) for i in range(70)]
    groups = groups_of(buckets, 64)
    expected = readable_features(config, buckets, groups, 0.0)
    torch.testing.assert_close(features_of(config, buckets, groups, 0.0), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dead", [float("nan"), float("inf")])
@pytest.mark.parametrize("version", FEATURE_VERSIONS)
def test_features_of_gradients_that_are_not_finite(version, dead):
    config = FeatureConfig(version)
    buckets = [bucket([randn(20), randn(30)], k, seed=k) for k in range(3)]
    buckets[1].g[1][4] = dead
    groups = groups_of(buckets, 3)
    expected = readable_features(config, buckets, groups, 0.5)
    ours = features_of(config, buckets, groups, 0.5)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_sums_of_two_shards_give_the_features_of_the_whole():
    config = FeatureConfig("enhanced")
    whole = bucket([randn(10, 4), randn(6, 2)])
    whole.g[0][:3] = 0
    halves = [
        replace(bucket_of(whole, 0, lambda column, part=part: [x[part] for x in column]), params=whole.params)
        for part in (slice(None, 4), slice(4, None))
    ]
    step = DeviceStep()
    tables = [step.table([half], 0.0) for half in halves]
    sums = sum(step.inner_products(table, zeros=True) for table in tables)
    groups = groups_of([whole], 1)
    ours = step.features(tables[0], sums, config, groups).cpu()
    torch.testing.assert_close(ours, readable_features(config, [whole], groups, 0.0), rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- Φ


def phi_of(columns=6, groups=10, layers=2, heads=6, hidden=16, dtype=F32, ranges=(1.0, 1.0), seed=0, **more):
    """A Φ whose layer norms, biases and gates are away from where they start."""
    torch.manual_seed(seed)
    settings = {"layers": layers, "heads": heads, "hidden_dim": hidden}
    phi = Modulator(columns, groups, **settings, alpha_range=ranges[0], beta_range=ranges[1], **more)
    with torch.no_grad():
        for p in phi.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return phi.to(DEVICE, dtype)


def check_phi(step, phi, features, tolerance):
    with torch.no_grad():
        expected = copy.deepcopy(phi).cpu().double()(features.cpu().double())
    alpha, beta = step.modulate(phi, features.to(DEVICE, phi.output.weight.dtype))
    assert alpha.dtype == beta.dtype == phi.output.weight.dtype
    torch.testing.assert_close(alpha.cpu().double(), expected.alpha, rtol=0, atol=tolerance)
    torch.testing.assert_close(beta.cpu().double(), expected.beta, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": 12, "hidden": 64, "groups": 20},
        {"columns": 5, "heads": 1, "groups": 1},
        {"columns": 11, "heads": 11, "groups": 17, "hidden": 64},
        {"columns": 19, "heads": 19, "groups": 30, "layers": 1},
        {"columns": 16, "heads": 4, "groups": 64, "layers": 1, "hidden": 64},
        {"columns": 32, "heads": 2, "groups": 5, "hidden": 100},
        {"heads": 2, "hidden": 1, "ranges": (0.4, 2.0)},
        {"heads": 3, "ranges": (0.0, 0.3), "gating": True},
        {"columns": 10, "heads": 7, "group_embed_dim": 4},
        {"columns": 10, "heads": 2, "group_embed_dim": 2, "gating": True, "groups": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(F32, 2e-6, id="float32"), pytest.param(F64, 1e-12, id="float64", marks=needs_float64)],
)
def test_the_kernel_is_the_module(settings, dtype, tolerance):
    phi = phi_of(**settings, dtype=dtype)
    features = 3 * randn(settings.get("groups", 10), settings.get("columns", 6), dtype=F64, seed=1)
    if phi.embeddings is not None:
        assert len(phi.embeddings) == len(features)
    check_phi(DeviceStep(), phi, features, tolerance)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e30, -1e14])
def test_features_that_no_layer_norm_takes(odd):
    features, phi = randn(10, 6).to(DEVICE), phi_of()
    features[0, 0], features[3] = odd, odd
    with torch.no_grad():
        expected = phi(features)  # in its own type: numbers that large leave few digits
    alpha, beta = DeviceStep().modulate(phi, features)
    torch.testing.assert_close(alpha, expected.alpha, rtol=0, atol=5e-6)
    torch.testing.assert_close(beta, expected.beta, rtol=0, atol=5e-6)


@needs_float64
def test_changes_of_phi_are_seen():
    step, phi, features = DeviceStep(), phi_of(), randn(10, 6, dtype=F64)
    check_phi(step, phi, features, 2e-6)
    for p in phi.parameters():
        p.data.mul_(1.3)  # not counted by torch
    check_phi(step, phi, features, 2e-6)
    phi.output.weight.data = -phi.output.weight.data
    check_phi(step, phi, features, 2e-6)
    phi.load_state_dict({k: 0.5 * x for k, x in phi.state_dict().items()})
    check_phi(step, phi, features, 2e-6)
    phi.load_state_dict({k: -x for k, x in phi.state_dict().items()}, assign=True)
    check_phi(step, phi, features, 2e-6)
    phi.output = nn.Linear(6, 4, device=DEVICE)
    check_phi(step, phi, features, 2e-6)
    phi.encoder.layers[1] = copy.deepcopy(phi.encoder.layers[0])
    check_phi(step, phi, features, 2e-6)
    phi.double()
    check_phi(step, phi, features, 1e-12)
    check_phi(step, phi_of(seed=5), features, 2e-6)


def test_a_triton_without_float64_matrices_leaves_them_to_the_module(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.4.0")
    features = randn(10, 6, dtype=F64).to(DEVICE)
    assert DeviceStep().modulate(phi_of(dtype=F64), features) is None
    assert DeviceStep().modulate(phi_of(), features) is not None


class Other(Modulator):
    """Computes something else, perhaps."""


def hooked():
    phi = phi_of()
    phi.encoder.layers[1].linear1.register_forward_hook(lambda *_: None)
    return phi


def with_another_forward():
    phi = phi_of()
    phi.output.forward = lambda z: z[:, :4]
    return phi


def subclassed():
    settings = {"layers": 1, "heads": 1, "hidden_dim": 4, "alpha_range": 1.0, "beta_range": 1.0}
    return Other(6, 10, **settings).to(DEVICE)


def wider():
    phi = phi_of()
    phi.encoder.layers[1] = nn.TransformerEncoderLayer(6, 6, 20, batch_first=True, norm_first=True).to(DEVICE)
    return phi


@pytest.mark.parametrize(
    ("make", "columns", "groups"),
    [
        (hooked, 6, 10),
        (with_another_forward, 6, 10),
        (subclassed, 6, 10),
        (wider, 6, 10),
        (lambda: nn.Linear(6, 4), 6, 10),
        (lambda: phi_of().bfloat16(), 6, 10),
        (phi_of, 6, 65),
        (lambda: phi_of(columns=33, heads=1), 33, 10),
        (lambda: phi_of(columns=17, heads=1, dtype=F64), 17, 40),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_the_module(make, columns, groups):
    phi = make()
    assert DeviceStep().modulate(phi, torch.zeros(groups, columns, device=DEVICE)) is None


def test_hooks_that_come_later_are_seen():
    step, phi, features = DeviceStep(), phi_of(), torch.zeros(10, 6, device=DEVICE)
    assert step.modulate(phi, features) is not None
    handle = phi.register_forward_hook(lambda *_: None)
    assert step.modulate(phi, features) is None
    handle.remove()
    assert step.modulate(phi, features) is not None


# ---------------------------------------------------------------- the update


def reference_update(b, alpha, beta):
    """What torch's AdamW makes of a bucket in float64, with rate ηα and decay βλ."""
    moved = []
    for theta, g, m, v, step in zip(b.theta, b.g, b.m, b.v, b.step, strict=True):
        p = nn.Parameter(theta.detach().cpu().double().clone())
        p.grad = g.cpu().double()
        settings = {k: b.settings[k] for k in ("betas", "eps")}
        lr, decay = float(b.settings["lr"]) * alpha, b.settings["weight_decay"] * beta
        adamw = torch.optim.AdamW([p], lr=lr, weight_decay=decay, foreach=False, **settings)
        moments = {"exp_avg": m.cpu().double().clone(), "exp_avg_sq": v.cpu().double().clone()}
        adamw.state[p] = {"step": step.cpu().clone(), **moments}
        adamw.step()
        moved.append((p.detach(), moments["exp_avg"], moments["exp_avg_sq"], adamw.state[p]["step"]))
    return moved


# The interpreter cuts bfloat16 off where a GPU rounds it.
PRECISION = {F32: 3e-7, F64: 1e-14, BF16: 2**-8 if DEVICE.type == "cuda" else 2**-7, F16: 2**-11}


def check_update(buckets, factors, step=None):
    """A step is torch's, to the rounding of each tensor's type."""
    alpha, beta = (torch.tensor(column, dtype=F64, device=DEVICE) for column in zip(*factors, strict=True))
    expected = [reference_update(b, *factors[b.k]) for b in buckets]
    step = step or DeviceStep()
    table = step.table(buckets, 0.0)
    step.move(table, alpha, beta)
    for b, moved in zip(buckets, expected, strict=True):
        for ours, theirs in zip(zip(b.theta, b.m, b.v, b.step, strict=True), moved, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                tolerance = PRECISION[x.dtype]
                torch.testing.assert_close(
                    x.detach().cpu().double(), y.double(), rtol=tolerance, atol=tolerance, equal_nan=True
                )


@pytest.mark.parametrize("steps", [0, 1, 1000])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_an_update_is_torchs(dtype, steps):
    buckets = [
        bucket([randn(n, dtype=dtype) for n in (0, 1, 100, CHUNK + 5)], 0, steps=steps),
        bucket([randn(3, 4, dtype=dtype), torch.tensor(2.0, dtype=dtype)], 1, seed=1, steps=steps),
    ]
    check_update(buckets, [(0.7, 1.3), (1.4, 0.6)])


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.0},
        {"betas": (0.0, 0.0)},
        {"betas": (0.5, 0.9), "eps": 1e-3},
        {"lr": 0.0},
        {"eps": 0.0},
        {"lr": 1e-6, "weight_decay": 1e-3},
        {"lr": torch.tensor(0.02)},
        {"lr": torch.tensor(0.02, device=DEVICE)},
        {"lr": torch.tensor(0.02, dtype=F64, device=DEVICE)},
        {"lr": torch.tensor([0.02], dtype=F64, device=DEVICE)},
        {"lr": torch.tensor(0.02, dtype=BF16)},
    ],
    ids=str,
)
def test_every_setting_has_the_effect_that_it_has_in_torch(settings):
    buckets = [
        bucket([randn(30, dtype=F64)], 0, settings={**SETTINGS, **settings}),
        bucket([randn(40, dtype=F64)], 0, seed=1, settings={**SETTINGS, "lr": 0.5}),
    ]
    check_update(buckets, [(0.7, 1.3)])


def test_small_decays_are_not_rounded_away():
    """1 − ηβλ in float32 would keep three digits of it."""
    ours = bucket([torch.full((50,), 1e4)], settings={**SETTINGS, "lr": 1e-5, "weight_decay": 1e-2})
    for x in (*ours.g, *ours.m):
        x.zero_()
    before = ours.theta[0].clone()
    step = DeviceStep()
    table = step.table([ours], 0.0)
    one = torch.ones(1, device=DEVICE)
    for _ in range(50):
        step.move(table, one, one)
    lost = (before.double() - ours.theta[0].double()) / before.double()
    torch.testing.assert_close(lost, torch.full_like(lost, 50 * 1e-7), rtol=0.05, atol=0)


def test_gradients_that_are_huge_or_not_finite_move_as_in_torch():
    ours = bucket([randn(6)])
    ours.g[0].copy_(torch.tensor([1e18, -1e19, 1e-30, float("inf"), float("nan"), 0.0]))
    check_update([ours], [(1.0, 1.0)])


def test_tensors_of_different_types_are_moved_together():
    kinds = [(F32, F32, F32, F32), (BF16, BF16, BF16, BF16), (BF16, F32, F32, F32), (F16, F16, F32, BF16)]
    buckets = [bucket([randn(40, dtype=t)], k, seed=k, types=rest) for k, (t, *rest) in enumerate(kinds)]
    check_update(buckets, [(0.5 + 0.2 * k, 1.5 - 0.2 * k) for k in range(4)])
    buckets.append(bucket([randn(50, dtype=F64)], 0, seed=9))
    check_update(buckets, [(0.5 + 0.2 * k, 1.5 - 0.2 * k) for k in range(4)])


ORDERS = {
    "gradient transposed": (lambda: randn(6, 9), lambda x: x.t().contiguous().t()),
    "all transposed": (lambda: randn(9, 6).t(), lambda x: x),
    "parameter transposed": (lambda: randn(9, 6).t(), lambda x: x.contiguous()),
    "channels last": (lambda: randn(4, 3, 5, 5).to(memory_format=torch.channels_last), lambda x: x.contiguous()),
    "gaps": (lambda: randn(6, 20)[:, ::2], lambda x: x),
    "gradient with gaps": (lambda: randn(6, 10), lambda x: torch.stack([x, x], dim=2)[..., 0]),
    "gradient expanded": (lambda: randn(6, 10), lambda x: x[:1, :1].expand(6, 10)),
    "of one element": (lambda: randn(4, 2)[:1, :1], lambda x: x),
    "narrow": (lambda: randn(8, 4, 1, 1), lambda x: x.contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_tensors_in_any_order_of_memory(name):
    make, turn = ORDERS[name]
    ours = bucket([make(), randn(11)])
    ours.g[0] = turn(ours.g[0])
    moments_elsewhere = bucket([randn(6, 9)], seed=4)
    moments_elsewhere.m[0] = moments_elsewhere.m[0].t().contiguous().t()
    buckets = [ours, moments_elsewhere]
    torch.testing.assert_close(sums_of(buckets), readable_sums(buckets), rtol=1e-12, atol=0)
    check_update(buckets, [(0.7, 1.3)])


def test_moments_that_take_no_memory_yet_are_zero():
    theta = randn(6, 9).to(DEVICE)
    nothing = torch.zeros((), device=DEVICE).expand(6, 9)
    ours = Bucket(SETTINGS, 0, params=[theta], theta=[theta], g=[theta.clone()], m=[nothing], v=[nothing])
    torch.testing.assert_close(sums_of([ours]), readable_sums([ours]), rtol=1e-12, atol=0)


def test_one_table_follows_changes_between_steps():
    first, second = bucket([randn(30), randn(6, 6)], 0, settings={**SETTINGS}), bucket([randn(40)], 1, seed=1)
    step = DeviceStep()
    factors = [(0.7, 1.3), (1.4, 0.6)]
    check_update([first, second], factors, step)
    first = replace(first, g=[randn(30, seed=3).to(DEVICE), randn(6, 6, seed=4).to(DEVICE)])
    check_update([first, second], factors, step)  # new gradients
    check_update([second], factors, step)  # some are missing
    first.settings["lr"] = 0.05
    check_update([first, second], factors, step)
    first.theta[1].data = first.theta[1].data.t()  # at the same address
    first.m[1], first.v[1] = first.m[1].t(), first.v[1].t()
    check_update([first, second], factors, step)
    first.theta[0].data = first.theta[0].data[:12]
    for column in (first.g, first.m, first.v):
        column[0] = column[0][:12]
    check_update([first, second], factors, step)
    check_update([replace(second, k=0), replace(first, k=1)], factors, step)
    check_update([second, replace(first, settings={**SETTINGS, "lr": 0.3})], factors, step)


@pytest.mark.parametrize("place", ["step", "m"])
def test_tensors_that_the_kernels_cannot_take_are_refused(place):
    for wrong in (torch.zeros(4, dtype=torch.float8_e5m2, device=DEVICE), torch.zeros(4, device="meta")):
        ours = bucket([randn(4)])
        getattr(ours, place)[0] = wrong
        assert DeviceStep().table([ours], 0.0) is None


# ---------------------------------------------------------------- whole steps


class Counter(TorchDispatchMode):
    """Counts torch's operations that would be a kernel or a copy on a device."""

    free = ("empty", "view", "as_strided", "select", "unbind", "detach", "slice", "alias", "t.", "transpose", "expand")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(word in str(func) for word in self.free):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operations(monkeypatch):
    """Calls a function and lists what it asks of the device; kernels are counted and not run."""
    counter = Counter()

    def copied(device, host):
        counter.seen.append("copy")
        return host

    monkeypatch.setattr(triton_step, "launch", lambda kernel, *_, **__: counter.seen.append(kernel.__name__))
    monkeypatch.setattr(triton_step, "_copy_to", copied)

    def run(function):
        counter.seen.clear()
        with counter:
            function()
        return list(counter.seen)

    return run


def whole_step(step, buckets, groups, phi, config, time=0.0):
    table = step.table(buckets, time)
    sums = step.inner_products(table, zeros=config.version == "enhanced")
    features = step.features(table, sums, config, groups, phi.output.weight.dtype)
    alpha, beta = step.modulate(phi, features)
    step.move(table, alpha, beta)
    return alpha, beta


def test_device_operations_of_a_step_depend_on_neither_depth_nor_tensors(operations):
    counts = {}
    for tensors, layers in itertools.product((2, 200), (1, 64)):
        buckets = [bucket([randn(5, seed=i) for i in range(tensors)], k, seed=k) for k in range(3)]
        groups, step, phi = groups_of(buckets, 3), DeviceStep(), phi_of(columns=6, groups=3, layers=layers)
        config = FeatureConfig()
        whole_step(step, buckets, groups, phi, config)  # tables are made
        buckets = [replace(b, g=[x.clone() for x in b.g]) for b in buckets]  # as after ``zero_grad``
        counts[tensors, layers] = operations(partial(whole_step, step, buckets, groups, phi, config))
    assert len({tuple(seen) for seen in counts.values()}) == 1
    assert len(counts[200, 64]) <= 12, counts


def test_a_gradient_in_another_order_costs_one_operation(operations):
    ours = bucket([randn(6, 9), randn(7)])
    step, phi, config = DeviceStep(), phi_of(groups=1), FeatureConfig()
    groups = groups_of([ours], 1)

    def run():
        whole_step(step, [ours], groups, phi, config)

    run()
    in_order = operations(run)
    ours.g[0] = ours.g[0].t().contiguous().t()
    run()
    assert len(operations(run)) == len(in_order) + 1


class Small(nn.Module):
    """A Transformer of whose gradients none is zero but for rounding, as that of the keys' bias is."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.layer.self_attn.in_proj_bias.requires_grad_(False)
        self.head = nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)).mean(dim=1))


def run(model, optimizer, batches, start=0):
    for t, batch in enumerate(batches, start):
        optimizer.zero_grad()
        cross_entropy(model, [x.to(model.head.weight.device) for x in batch]).backward()
        if t % 3 == 1:
            model.head.bias.grad = None
        optimizer.step()


@pytest.fixture
def by_kernels(monkeypatch):
    """Steps are taken by the kernels, by the interpreter's where there is no GPU; how many were is counted."""
    taken, take = [], DeviceStep.take
    monkeypatch.setattr("metaadamw_lite.factors.is_available", lambda device: True)
    monkeypatch.setattr(DeviceStep, "take", lambda *args: taken.append(take(*args)) or taken[-1])
    return taken


SAME_RUN = {"lr": 0.01, "weight_decay": 0.1}


@needs_float64
@pytest.mark.parametrize(
    "options",
    [
        {"attn_layers": 3},
        {"feature_version": "norm_basic_plus", "attn_heads": 11, "attn_layers": 2},
        {"feature_version": "enhanced", "attn_heads": 7, "attn_layers": 1, "use_feature_gating": True},
    ],
    ids=str,
)
def test_training_is_that_of_the_cpu(options, batches, by_kernels):
    model, twin = Small(F64), Small(F64).to(DEVICE)
    cpu = MetaAdamW(model.named_parameters(), **SAME_RUN, **options, foreach=True)
    ours = MetaAdamW(twin.named_parameters(), **SAME_RUN, **options, fused=True)
    run(model, cpu, batches[:3])
    assert not by_kernels
    run(twin, ours, batches[:3])
    assert len(by_kernels) == 3
    torch.testing.assert_close(ours.alpha.cpu(), cpu.alpha, rtol=0, atol=1e-9)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=0, atol=1e-9)
        for name in ("step", "exp_avg", "exp_avg_sq") if p.requires_grad else ():
            mine, theirs = (o.state[x][name].cpu().double() for o, x in ((ours, q), (cpu, p)))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_a_meta_update_is_seen_by_the_next_step(batches, by_kernels):
    model = Small(F32).to(DEVICE)
    optimizer = MetaAdamW(model.named_parameters(), **SAME_RUN, meta_lr=0.1, attn_layers=1)
    run(model, optimizer, batches[:2])
    on_device = [[x.to(DEVICE) for x in batch] for batch in batches[2:5]]
    optimizer.update_attention(model, *on_device[:2], cross_entropy, on_device[2])
    cross_entropy(model, on_device[0]).backward()
    expected = optimizer.modulator(optimizer.features())
    optimizer.step()
    assert None not in by_kernels
    torch.testing.assert_close(optimizer.alpha.cpu(), expected.alpha.detach(), rtol=0, atol=1e-5)


@needs_float64
def test_without_ranges_it_is_torchs_adamw(batches, by_kernels):
    model, twin = Small(F64), Small(F64).to(DEVICE)
    run(model, torch.optim.AdamW(model.parameters(), **SAME_RUN), batches[:3])
    plain = {"alpha_range": 0, "beta_range": 0, "attn_layers": 1, "fused": True}
    run(twin, MetaAdamW(twin.named_parameters(), **SAME_RUN, **plain), batches[:3])
    assert len(by_kernels) == 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=0, atol=1e-12)


@needs_float64
@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"phi": "hooked"}], ids=str)
def test_steps_that_the_kernels_cannot_take_are_taken_all_the_same(options, batches, by_kernels):
    hooked = options.pop("phi", None)
    models = [Small(F64).to(DEVICE) for _ in range(2)]
    optimizers = [
        MetaAdamW(m.named_parameters(), **SAME_RUN, **options, **kernel)
        for m, kernel in zip(models, ({"fused": True}, {"foreach": True}), strict=True)
    ]
    if hooked:
        optimizers[0].modulator.register_forward_hook(lambda *_: None)
    for model, optimizer in zip(models, optimizers, strict=True):
        run(model, optimizer, batches[:3])
    assert by_kernels == [None] * 3
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_a_resumed_run_has_the_same_bits(batches, by_kernels):
    model = Small(F32).to(DEVICE)
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, attn_layers=1)
    run(model, optimizer, batches[:2])
    again, resumed = copy.deepcopy((model, optimizer))
    run(model, optimizer, batches[2:4], start=2)
    run(again, resumed, batches[2:4], start=2)
    assert None not in by_kernels
    assert_same(again.state_dict(), model.state_dict())
    assert_same(resumed.state_dict(), optimizer.state_dict())


# ---------------------------------------------------------------- compiling


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_every_kernel_compiles_and_fits(capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), str(capability)]
    ptxas = subprocess.run(
        [sys.executable, "-c", "from triton import knobs; print(knobs.nvidia.ptxas.path)"],
        env=environment,
        capture_output=True,
        text=True,
    )
    if ptxas.returncode:
        pytest.skip(f"Triton has no ptxas here: {ptxas.stderr.strip().splitlines()[-1]}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"sum_chunks", "sum_tensors", "feature_columns", "modulate", "prepare", "update"}
    assert {line["kernel"] for line in compiled} == names
    assert all(line["bytes"] for line in compiled)
    at_most = {75: 64, 80: 163, 90: 227}[capability] * 1024  # of shared memory a block may have; 99 KiB on 8.6 and 8.9
    assert all(line["shared"] <= min(at_most, 99 * 1024) for line in compiled), compiled


def test_where_triton_is_missing_the_module_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util, torch\n"
        "from metaadamw_lite import triton_step\n"
        "print(triton_step.is_available(torch.device('cpu')))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
