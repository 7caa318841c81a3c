"""Properties that hold for any shapes, types, groupings, settings, gradients and orders of calls (hypothesis).

Each property is tried on ``CASES[...]`` generated cases, over two thousand together, the same ones each time.
"""

import copy
import io
import math

import numpy as np
import pytest
import torch
from conftest import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from metaadamw_lite import MetaAdamW

CASES = {"identity": 800, "bounds": 700, "as found": 250, "resume": 300}
WIDTHS = {"basic": 6, "basic_plus": 11, "enhanced": 10, "norm_basic": 6, "norm_basic_plus": 11}


def property_with(name):
    def decorate(test):
        test.cases = CASES[name]
        return settings(
            max_examples=CASES[name], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )(test)

    return decorate


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple)
magnitudes = st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30])
kernels = st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
adamw_settings = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.9), (0.99, 0.5)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
    }
)


@st.composite
def phi_settings(draw):
    version = draw(st.sampled_from(list(WIDTHS)))
    embedding = draw(st.integers(1, 3)) if version == "enhanced" else 4
    width = WIDTHS[version] + (embedding if version == "enhanced" else 0)
    return {
        "feature_version": version,
        "group_embed_dim": embedding,
        "attn_layers": draw(st.integers(1, 3)),
        "attn_hidden_dim": draw(st.integers(1, 8)),
        "attn_heads": draw(st.sampled_from([h for h in range(1, width + 1) if width % h == 0])),
        "use_feature_gating": draw(st.booleans()),
        "group_strategy": draw(st.sampled_from(["fine_grained", "original"])),
        "seed": draw(st.integers(0, 100)),
    }


@st.composite
def modules(draw, dtype=None):
    """A module of parameters with names and shapes of every kind, in one to three parameter groups."""
    module = nn.Module()
    dtype = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    names = st.sampled_from(["layers_0", "layers_1", "embed", "norm", "self_attn", "mlp", "head"])
    for k, name in enumerate(draw(st.lists(names, min_size=1, max_size=5))):
        sub = nn.Module()
        sub.weight = nn.Parameter(torch.randn(draw(shapes), generator=generator).to(dtype))
        if draw(st.booleans()):
            sub.bias = nn.Parameter(torch.randn(3, generator=generator).to(dtype))
        module.add_module(f"{name}_{k}", sub)
    return module


def parameter_groups(module, count, named=True):
    members = list(module.named_parameters()) if named else list(module.parameters())
    parts = [members[k::count] for k in range(count)]
    return [{"params": part, **({"weight_decay": 0.1 * k} if k else {})} for k, part in enumerate(parts) if part]


def give(module, seed, scale, missing=0, special=None):
    """Random gradients of a size; every ``missing``-th parameter has none; one element may be NaN or Inf."""
    generator = torch.Generator().manual_seed(seed)
    for k, p in enumerate(module.parameters()):
        p.grad = scale * torch.randn(p.shape, generator=generator).to(p)
        if special is not None and p.numel() and k == 0:
            p.grad.view(-1)[0] = special
        if missing and k % missing == missing - 1:
            p.grad = None


@pytest.mark.slow
@property_with("identity")
@given(
    module=modules(),
    kernel=kernels,
    adamw=adamw_settings,
    groups=st.integers(1, 3),
    named=st.booleans(),
    steps=st.lists(st.tuples(st.integers(0, 99), magnitudes, st.integers(0, 3)), min_size=1, max_size=4),
)
def test_without_ranges_it_is_adamw(module, kernel, adamw, groups, named, steps):
    twin = copy.deepcopy(module)
    ours = MetaAdamW(
        parameter_groups(module, groups, named), alpha_range=0, beta_range=0, attn_layers=1, **adamw, **kernel
    )
    theirs = torch.optim.AdamW(parameter_groups(twin, groups, named), **adamw, **kernel)
    for seed, scale, missing in steps:
        for m, optimizer in ((module, ours), (twin, theirs)):
            give(m, seed, scale, missing)
            optimizer.step()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        tolerance = 1e-12 if p.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.slow
@property_with("bounds")
@given(
    module=modules(),
    kernel=kernels,
    phi=phi_settings(),
    ranges=st.tuples(st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.sampled_from([0.0, 0.3, 1.0, 2.0])),
    steps=st.lists(
        st.tuples(
            st.integers(0, 99), magnitudes, st.integers(0, 3), st.sampled_from([None, math.nan, math.inf, -math.inf])
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_the_factors_stay_in_their_ranges_whatever_the_gradients_are(module, kernel, phi, ranges, steps):
    optimizer = MetaAdamW(module.named_parameters(), alpha_range=ranges[0], beta_range=ranges[1], **phi, **kernel)
    for seed, scale, missing, special in steps:
        give(module, seed, scale, missing, special)
        optimizer.step()
        for factor, width in zip((optimizer.alpha, optimizer.beta), ranges, strict=True):
            assert factor.shape == (len(optimizer.groups),)
            assert torch.isfinite(factor).all()
            assert ((factor - 1).abs() <= width / 2 + 1e-6).all()


class Small(nn.Module):
    """Dropout, a buffer that changes, and an output for a regression."""

    def __init__(self, dtype, width, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(2))
            self.norm = nn.BatchNorm1d(width, dtype=dtype)
            self.head = nn.Linear(width, 1, dtype=dtype)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(nn.functional.dropout(layer(x), 0.3, self.training))
        return self.head(self.norm(x))


def squared_error(model, batch):
    x, y = batch
    np.random.rand()  # noqa: NPY002 (the global generators of the caller are part of what must be left alone)
    return (model(x) - y).square().mean()


def batch_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    p = model.head.weight
    return torch.randn(4, p.shape[1], generator=generator).to(p), torch.randn(4, 1, generator=generator).to(p)


small_models = st.builds(Small, st.sampled_from([torch.float32, torch.float64]), st.integers(1, 4), st.integers(0, 100))
meta_settings = st.fixed_dictionaries(
    {
        "meta_objective": st.sampled_from(["combined", "gradient", "loss_decrease", "gen_gap"]),
        "huw_priorities": st.sampled_from([None, (1.0, 1.0, 1.0), (5.0, 2.0, 1.0)]),
        "meta_optimizer": st.sampled_from(["sgd", "adam"]),
        "meta_lr": st.sampled_from([0.0, 1e-4, 0.1]),
    }
)


def training_step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    squared_error(model, batch_of(model, seed)).backward()
    optimizer.step()


def meta_step(model, optimizer, seed):
    torch.manual_seed(seed)
    one, two, val = (batch_of(model, seed + k) for k in range(3))
    return optimizer.update_attention(model, one, two, squared_error, val)


@property_with("as found")
@given(
    model=small_models,
    phi=phi_settings(),
    meta=meta_settings,
    kernel=kernels,
    steps=st.integers(0, 2),
    training=st.booleans(),
    double_backward=st.booleans(),
)
def test_a_meta_update_leaves_everything_as_found(model, phi, meta, kernel, steps, training, double_backward):
    optimizer = MetaAdamW(model.named_parameters(), **phi, **meta, **kernel)
    for seed in range(steps):
        training_step(model, optimizer, seed)
    model.train(training)
    batches = [batch_of(model, k) for k in range(3)]

    def everything():
        moments = {k: v for k, v in optimizer.state_dict().items() if k != "meta"}
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        numpy_state = np.random.get_state()[2]  # noqa: NPY002
        return copy.deepcopy((model.state_dict(), moments, grads, modes, torch.get_rng_state(), numpy_state))

    before = everything()
    optimizer.update_attention(
        model, batches[0], batches[1], squared_error, batches[2], double_backward=double_backward
    )
    assert_same(everything(), before)


@pytest.mark.slow
@property_with("resume")
@given(
    model=small_models,
    phi=phi_settings(),
    meta=meta_settings,
    kernel=kernels,
    calls=st.lists(st.sampled_from(["step", "step", "meta"]), min_size=1, max_size=5),
    saved_after=st.integers(0, 4),
)
def test_resuming_anywhere_is_going_on(model, phi, meta, kernel, calls, saved_after):
    phi = {**phi, **meta, **kernel}
    optimizer = MetaAdamW(model.named_parameters(), **phi)
    state = None
    for k, call in enumerate(calls):
        if k == min(saved_after, len(calls) - 1):
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            state = file.getvalue()
            first = k
        (training_step if call == "step" else meta_step)(model, optimizer, k)
    saved = torch.load(io.BytesIO(state), weights_only=True)
    resumed = Small(model.head.weight.dtype, model.head.weight.shape[1], seed=1234)
    resumed.load_state_dict(saved["model"])
    again = MetaAdamW(resumed.named_parameters(), **{**phi, "seed": 77})
    again.load_state_dict(saved["optimizer"])
    for k, call in list(enumerate(calls))[first:]:
        (training_step if call == "step" else meta_step)(resumed, again, k)
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(again.state_dict(), optimizer.state_dict())
