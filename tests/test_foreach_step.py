"""The step on a GPU without Triton: the same numbers as the readable version, and few operations."""

import pytest
import torch
from conftest import largest_gap
from test_triton_step import (
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    Counter,
    bucket,
    hooked,
    phi_of,
    randn,
    readable_sums,
    subclassed,
    with_another_forward,
)
from torch import nn

from metaadamw_lite import meta
from metaadamw_lite.foreach_step import HostFactors, inner_products_on_host


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_sums_are_those_of_the_readable_version(dtype, zeros):
    sizes = (0, 1, 7, 1000, 2**17)
    buckets = [
        bucket([randn(n, dtype=dtype) for n in sizes]),
        bucket([randn(30, 5, dtype=dtype).t(), torch.tensor(0.3, dtype=dtype)], k=1, seed=1),
        bucket([randn(50, dtype=dtype)], seed=2, types=(dtype, F32, F64)),
    ]
    buckets[0].g[3][:40] = 0
    buckets[0].m[4][-3:] = 0
    buckets[1].g[0] = buckets[1].g[0].contiguous()
    sums, expected = inner_products_on_host(buckets, zeros), readable_sums(buckets, zeros)
    assert sums.device.type == "cpu"
    digits = 1e-12 if dtype == F64 else 1e-6
    norms = (expected[:, 0] * expected[:, 2]).sqrt()
    assert (sums[:, 1] - expected[:, 1]).abs().le(digits * norms).all()
    torch.testing.assert_close(sums[:, [0, 2, 3, 4]], expected[:, [0, 2, 3, 4]], rtol=1e-12, atol=0)
    assert torch.equal(sums[:, 5:], expected[:, 5:])


def test_squares_beyond_float32():
    ours = bucket([randn(50)], scale=1e18)
    ours.m[0].mul_(1e-18)
    ours = ours._replace(v=[torch.full_like(x, 1e36) for x in ours.v])
    torch.testing.assert_close(inner_products_on_host([ours], False), readable_sums([ours]), rtol=1e-6, atol=0)


def test_operations_do_not_grow_with_the_number_of_tensors():
    seen = []
    for n in (2, 50):
        buckets = [bucket([randn(5, seed=i) for i in range(n)])]
        with Counter() as counter:
            inner_products_on_host(buckets, zeros=True)
        seen.append(counter.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("settings", [{}, {"columns": 10, "heads": 7, "group_embed_dim": 4, "gating": True}], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_factors_on_the_host_follow_phi(settings, dtype):
    factors, phi = HostFactors(), phi_of(**settings, dtype=dtype)
    features = randn(10, settings.get("columns", 6), dtype=F64)

    def check():
        with torch.no_grad():
            expected = phi(features.to(DEVICE, phi.output.weight.dtype))
        ours = factors(phi, features)
        assert ours[0].dtype == phi.output.weight.dtype
        assert largest_gap(ours, (expected.alpha.cpu(), expected.beta.cpu())) < 2e-6

    check()
    for p in phi.parameters():
        p.data.mul_(1.3)
    check()
    phi.output = nn.Linear(phi.output.in_features, 4, dtype=dtype, device=DEVICE)
    check()
    phi.double()
    check()


@pytest.mark.parametrize("make", [hooked, with_another_forward, subclassed, lambda: phi_of().bfloat16()])
def test_what_cannot_be_folded_is_left_to_the_module(make):
    assert HostFactors()(make(), randn(10, 6)) is None


@pytest.mark.parametrize("dtype", [F32, F64])
def test_sums_of_a_meta_update_on_a_gpu_are_those_of_the_cpu(dtype):
    xs, ys = ([randn(n, dtype=dtype, seed=seed + n).to(DEVICE) for n in (0, 1, 5000)] for seed in (1, 2))
    like = torch.empty(0, dtype=F64, device=DEVICE)
    expected = torch.stack([(x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True)])
    ours = meta._sums(torch._foreach_mul(xs, ys), like)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 if dtype == F64 else 1e-4)
    torch.testing.assert_close(meta.inner_products(xs, ys, like=like)[:, 0], expected, rtol=0, atol=1e-3)
