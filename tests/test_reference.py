"""``reference`` against torch, and the optimizer against ``reference``: Eq. 1 to 13, Algorithms 1 and 2."""

import ast
import copy
import io
import math
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import cross_entropy, feature_settings, groups_of, phi_of, tiny, train
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import adamw_settings, give, modules, parameter_groups, phi_settings, shapes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaadamw_lite import MetaAdamW, Modulator, reference

HEADS = {"basic": 6, "basic_plus": 11, "enhanced": 7, "norm_basic": 6, "norm_basic_plus": 11}
PHI_OF_EVERY_KIND = [
    *({"feature_version": version, "attn_heads": heads} for version, heads in HEADS.items()),
    {"use_v_norms": False, "attn_heads": 5},
    {"include_time_step": False, "attn_heads": 1},
    {"feature_version": "basic_plus", "use_v_norms": False, "attn_heads": 3},
    {"use_feature_gating": True},
    {"feature_version": "enhanced", "attn_heads": 6, "group_embed_dim": 2, "use_feature_gating": True},
    {"alpha_range": 0.4, "beta_range": 2.0, "attn_layers": 2, "attn_hidden_dim": 3, "attn_heads": 2},
    {"group_strategy": "original", "feature_version": "norm_basic"},
    {"seed": 7, "total_steps": 9},
]


def cases(count: int) -> Callable:
    """A property that is tried on so many generated cases, the same ones each time."""

    def decorate(test):
        test.cases = count
        return settings(max_examples=count, deadline=None, derandomize=True)(test)

    return decorate


# ---------------------------------------------------------------- the file


def test_the_file_has_at_most_150_lines_of_code():
    source = Path(reference.__file__).read_text(encoding="utf-8")
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    assert len(lines) <= 150


# ---------------------------------------------------------------- Eq. 1 to 4


@cases(200)
@given(
    shape=shapes,
    adamw=adamw_settings,
    factors=st.tuples(st.sampled_from([0.5, 1.0, 1.5]), st.sampled_from([0.0, 1.0, 2.0])),
    steps=st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e3, 1e12]), min_size=1, max_size=6),
    as_tensors=st.booleans(),
)
def test_equation_4_is_torchs_adamw_with_its_rate_and_decay_times_the_factors(shape, adamw, factors, steps, as_tensors):
    generator = torch.Generator().manual_seed(len(steps))
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))
    alpha, beta = factors
    theirs = torch.optim.AdamW(
        [p], **{**adamw, "lr": adamw["lr"] * alpha, "weight_decay": adamw["weight_decay"] * beta}
    )
    theta, m, v = p.detach().clone(), torch.zeros_like(p).detach(), torch.zeros_like(p).detach()
    if as_tensors:
        alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in factors)
    for t, scale in enumerate(steps, start=1):
        p.grad = scale * torch.randn(shape, dtype=torch.float64, generator=generator)
        given_ = theta, p.grad, m, v
        kept = [x.clone() for x in given_]
        theta, m, v = reference.adamw_step(*given_, t, alpha, beta, **adamw)
        theirs.step()
        assert all(torch.equal(x, y) for x, y in zip(given_, kept, strict=True)), "the arguments stay"
        for ours, torchs in ((theta, p), (m, theirs.state[p]["exp_avg"]), (v, theirs.state[p]["exp_avg_sq"])):
            torch.testing.assert_close(ours, torchs.detach(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- Eq. 5 to 9


@pytest.mark.parametrize("heads", [1, 2, 5, 10])
@pytest.mark.parametrize(
    "parts", [{}, {"gating": True}, {"group_embed_dim": 4}, {"gating": True, "group_embed_dim": 4}]
)
def test_equations_5_to_9_are_the_module(heads, parts):
    torch.manual_seed(0)
    width = 10 - parts.get("group_embed_dim", 0)
    ranges = {"alpha_range": 0.6, "beta_range": 2.0}
    module = Modulator(width, 7, layers=3, heads=heads, hidden_dim=4, **ranges, **parts).double()
    with torch.no_grad():
        for p in module.parameters():  # norms, biases and gates away from where they start
            p.add_(0.3 * torch.randn_like(p))
    f = 10 * torch.randn(7, width, dtype=torch.float64)
    f[0, 0], f[1, 1], f[2, 2] = math.nan, math.inf, -1e30
    ours = reference.modulation(f, reference.Phi(dict(module.named_parameters()), heads, *ranges.values()))
    for mine, theirs in zip(ours, module(f), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- Algorithm 1


def follow(optimizer, tolerance):
    """A step of the optimizer is Algorithm 1: factors, parameters, moments and counts."""
    groups, alpha, beta = reference.metaadamw_step(
        copy.deepcopy(groups_of(optimizer)), phi_of(optimizer), **feature_settings(optimizer)
    )
    any_gradient = any(p.grad is not None for group in optimizer.groups for p in group.params)
    optimizer.step()
    if any_gradient:
        torch.testing.assert_close(optimizer.alpha.double(), alpha, rtol=0, atol=tolerance)
        torch.testing.assert_close(optimizer.beta.double(), beta, rtol=0, atol=tolerance)
    for ours, theirs in zip(groups_of(optimizer), groups, strict=True):
        for p, q in zip(ours.params, theirs.params, strict=True):
            assert p.t == q.t
            for x, y in ((p.theta, q.theta), (p.m, q.m), (p.v, q.v)):
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("phi", PHI_OF_EVERY_KIND, ids=str)
def test_a_step_is_algorithm_1(batches, phi, kernel):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), lr=0.03, weight_decay=0.3, **phi, **kernel)
    for k, batch in enumerate(batches[:5]):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        if k in (1, 2):  # a tensor alone, then a whole group, takes no part
            model.layers[0].linear1.weight.grad = None
        if k == 2:
            model.token_embedding.weight.grad = None
        follow(optimizer, 1e-12)


@cases(200)
@given(
    module=modules(),
    phi=phi_settings(),
    adamw=adamw_settings,
    kernel=st.sampled_from([{}, {"foreach": True}, {"fused": True}]),
    groups=st.integers(1, 3),
    steps=st.lists(
        st.tuples(
            st.integers(0, 99),
            st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
            st.integers(0, 3),
            st.sampled_from([None, None, math.nan]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_a_step_is_algorithm_1_for_any_parameters_settings_and_gradients(module, phi, adamw, kernel, groups, steps):
    optimizer = MetaAdamW(parameter_groups(module, groups), **adamw, **phi, **kernel)
    precise = all(p.dtype == torch.float64 for p in module.parameters())
    for seed, scale, missing, special in steps:
        give(module, seed, scale, missing, special)
        follow(optimizer, 1e-9 if precise else 1e-5)


# ---------------------------------------------------------------- Algorithm 2


def loss_of(model, optimizer, loss_fn=cross_entropy):
    """L_task(θ, batch) for θ in the order of the groups; every call has the random numbers of the first."""
    name_of = {p: name for name, p in model.named_parameters()}
    names = [name_of[p] for group in optimizer.groups for p in group.params]
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    start = torch.get_rng_state()

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return loss_fn(self.model, batch)

    def loss(theta, batch):
        state = {**dict(zip(names, theta, strict=True)), **{name: x.clone() for name, x in buffers.items()}}
        with torch.random.fork_rng():
            torch.set_rng_state(start)
            return torch.func.functional_call(Loss(), {f"model.{name}": x for name, x in state.items()}, (batch,))

    return loss


def trained(batches, phi, **changes):
    model = tiny()
    given_ = {"lr": 0.02, "weight_decay": 0.3, "meta_lr": 0.5, "meta_weight_decay": 0.1, "total_steps": 50}
    optimizer = MetaAdamW(model.named_parameters(), **{**given_, **phi, **changes})
    train(model, optimizer, batches[:3])
    with torch.no_grad():
        for parameter in optimizer.huw.parameters() if optimizer.huw else ():
            parameter.copy_(torch.tensor([0.2, -0.4, 0.6]))
    return model, optimizer


def check_meta_update(model, optimizer, batches, priorities, objective, double_backward, loss_fn=cross_entropy):
    """``update_attention`` is Algorithm 2: the same losses, the same Φ and the same log σ² after it."""
    s = optimizer.huw.log_var.detach().clone() if optimizer.huw else torch.zeros(3, dtype=torch.float64)
    decay = optimizer._meta_optimizer.param_groups[0]
    phi = phi_of(optimizer)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        after, s_after, expected = reference.meta_update(
            groups_of(optimizer),
            phi,
            s,
            loss_of(model, optimizer, loss_fn),
            *batches[3:6],
            objective=objective,
            priorities=priorities,
            meta_lr=decay["lr"],
            meta_weight_decay=decay["weight_decay"],
            gate_sparsity=optimizer._feature_gating_sparsity,
            **feature_settings(optimizer),
        )
        losses = optimizer.update_attention(
            model, batches[3], batches[4], loss_fn, batches[5], double_backward=double_backward
        )
    terms = [
        expected[name].item() if name in expected else math.nan for name in ("L_meta", "L_grad", "L_loss", "L_gap")
    ]
    assert losses == pytest.approx(terms, rel=1e-10, abs=1e-14, nan_ok=True)
    names = list(phi.weights)
    moved = torch.cat([(after.weights[n] - phi.weights[n]).flatten() for n in names])
    ours = torch.cat([(phi_of(optimizer).weights[n] - phi.weights[n]).flatten() for n in names])
    assert moved.norm() > 1e-6, "there must be something to agree on"
    assert (ours - moved).norm() <= (1e-9 if double_backward else 1e-5) * moved.norm()
    if optimizer.huw:
        assert not torch.equal(s_after, s)
        torch.testing.assert_close(optimizer.huw.log_var.detach(), s_after, rtol=1e-10, atol=1e-14)
    else:
        assert torch.equal(s_after, s)


@pytest.mark.parametrize("double_backward", [False, True])
@pytest.mark.parametrize("objective", ["combined", "gradient", "loss_decrease", "gen_gap"])
@pytest.mark.parametrize("phi", PHI_OF_EVERY_KIND, ids=str)
def test_a_meta_update_is_algorithm_2(batches, phi, objective, double_backward):
    priorities = (1.0, 2.0, 5.0)
    model, optimizer = trained(batches, phi, meta_objective=objective, huw_priorities=priorities)
    check_meta_update(model, optimizer, batches, priorities, objective, double_backward)


@pytest.mark.parametrize("double_backward", [False, True])
@pytest.mark.parametrize("priorities", [None, (1.0, 1.0, 1.0), (5.0, 2.0, 0.5)])
@pytest.mark.parametrize("weight_decay", [0.0, 3.0])
def test_it_is_algorithm_2_with_and_without_weighting_and_decay(batches, priorities, weight_decay, double_backward):
    model, optimizer = trained(batches, {}, weight_decay=weight_decay, huw_priorities=priorities)
    check_meta_update(model, optimizer, batches, priorities, "combined", double_backward)


def without_embedding(model, batch):
    """The embedding has no gradient; a batch of 12 samples uses the head's bias, others do not."""
    h = torch.nn.functional.one_hot(batch[0], 8).to(model.head.weight)
    for layer in model.layers:
        h = layer(h)
    h = model.batch_norm(h.mean(dim=1))
    return F.cross_entropy(model.head(h) if len(h) == 12 else h @ model.head.weight.T, batch[1])


@pytest.mark.parametrize("double_backward", [False, True])
@pytest.mark.parametrize("without_bias", [1, 2])
@pytest.mark.parametrize("version", HEADS)
def test_it_is_algorithm_2_where_parameters_have_no_gradient(batches, version, without_bias, double_backward):
    """Some have none at all, others none on B₁, or none on B₂ and B_val; and one was not moved in the steps before."""
    phi = {"feature_version": version, "attn_heads": HEADS[version]}
    model, optimizer = trained(batches, phi)
    batches = [(x % 8, y) for x, y in batches]
    del optimizer.state[model.layers[1].linear2.weight]
    short = {3} if without_bias == 1 else {4, 5}
    batches = [(x[:9], y[:9]) if k in short else (x, y) for k, (x, y) in enumerate(batches)]
    check_meta_update(model, optimizer, batches, (1.0, 1.0, 1.0), "combined", double_backward, without_embedding)


@pytest.mark.parametrize("double_backward", [False, True])
def test_it_is_algorithm_2_where_parameter_groups_differ(batches, double_backward):
    model = tiny()
    named = list(model.named_parameters())
    parts = [
        {"params": named[::3], "lr": 0.05, "betas": (0.5, 0.9)},
        {"params": named[1::3], "weight_decay": 1.0},
        {"params": named[2::3], "eps": 1e-3},
    ]
    optimizer = MetaAdamW(parts, lr=0.01, meta_lr=0.5)
    train(model, optimizer, batches[:3])
    check_meta_update(model, optimizer, batches, (1.0, 1.0, 1.0), "combined", double_backward)


@pytest.mark.parametrize("double_backward", [False, True])
def test_it_is_algorithm_2_where_a_groups_gradient_is_rounding(double_backward):
    """A bias in front of a batch norm has no gradient, but what is computed is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8)).double()
    samples = [(torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 8, (32,))) for _ in range(6)]
    optimizer = MetaAdamW(model.named_parameters(), meta_lr=1.0)
    train(model, optimizer, samples[:3])
    check_meta_update(model, optimizer, samples, (1.0, 1.0, 1.0), "combined", double_backward)


def test_a_meta_update_changes_none_of_its_arguments(batches):
    model, optimizer = trained(batches, {"use_feature_gating": True})
    groups, phi, s = groups_of(optimizer), phi_of(optimizer), torch.zeros(3, dtype=torch.float64)
    before = copy.deepcopy((groups, phi, s))
    with sdpa_kernel(SDPBackend.MATH):
        reference.meta_update(groups, phi, s, loss_of(model, optimizer), *batches[3:6], **feature_settings(optimizer))
    for ours, theirs in zip(groups, before[0], strict=True):
        for p, q in zip(ours.params, theirs.params, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(p[:4], q[:4], strict=True))
    assert all(torch.equal(w, before[1].weights[name]) for name, w in phi.weights.items())
    assert not s.any()
    assert not s.requires_grad
