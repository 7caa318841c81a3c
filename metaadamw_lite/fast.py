"""The step of ``MetaAdamW`` without Triton: statistics of all tensors, and their update by torch (Eq. 1 to 4).

* ``measure`` computes the inner products of every tensor: on a CPU with BLAS, in blocks that fit the cache.
* ``move`` updates the tensors of a bucket: torch's AdamW with learning rate ηα and weight decay βλ.

Neither caches anything, so writes to parameters, moments and settings between two steps take effect. On the CPU both
agree with ``reference`` up to rounding; the tests compare them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from metaadamw_lite.buckets import Bucket, runs_fused
from metaadamw_lite.features import Products, TensorState, inner_products

BLOCK = 2**18
"""Elements in a block: 1 MiB of float32. Smaller blocks need more calls, larger ones lose digits: the float32 norm of a
block is exact to about 1e-6, that of 10⁸ elements to 1e-2."""

Array = np.ndarray[Any, np.dtype[Any]]

LARGE, SMALL = 1e36, 1e-30
"""Bounds on squared norms in float32: larger ones may have overflowed, smaller ones lack the digits for a cosine."""
ONE = torch.tensor(1.0, device="cpu")
"""The increment of step counts. torch would convert a Python number once for each tensor."""


# ---------------------------------------------------------------- statistics


def measure(buckets: Sequence[Bucket]) -> Tensor:
    """Compute ⟨g, g⟩, ⟨g, m⟩, ⟨m, m⟩, ⟨θ, θ⟩ and ⟨v, v⟩ of the buckets' n tensors: (n, 5), float64, on the CPU."""
    states = [TensorState(*state) for b in buckets for state in zip(b.theta, b.g, b.m, b.v, strict=True)]
    if any(state.theta.device.type != "cpu" for state in states):
        sums = measure_on_device(states).to("cpu", torch.float64)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = [_products(state) for state in states]
        sums = torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(len(rows), 5)
    signs = [float(bucket.sign) for bucket in buckets for _ in bucket.params]
    if -1 in signs:
        sums[:, 1] *= torch.tensor(signs, dtype=torch.float64, device="cpu")
    return sums


def _products(state: TensorState) -> Products:
    """Compute ``features.inner_products`` in blocks in the tensor's own precision, or in float64 if that is too coarse.

    Written for speed: converting a small tensor to NumPy takes longer than multiplying it.
    """
    theta, g, m, v = state
    dtype = theta.dtype
    if dtype not in (torch.float32, torch.float64) or not dtype == g.dtype == m.dtype == v.dtype:
        return inner_products(state)
    if not in_one_order(theta, g, m, v):
        theta, g, m, v = (x.reshape(-1) for x in state)
    t, x = theta.detach().numpy().ravel("K"), g.detach().numpy().ravel("K")
    y, w = m.numpy().ravel("K"), v.numpy().ravel("K")
    if len(t) <= BLOCK:
        products = _multiply(t, x, y, w)
    else:
        parts = [slice(start, start + BLOCK) for start in range(0, len(t), BLOCK)]
        rows = [_multiply(t[part], x[part], y[part], w[part]) for part in parts]
        gg, gm, mm, tt, vv = (sum(column, 0.0) for column in zip(*rows, strict=True))
        products = gg, gm, mm, tt, vv
    gg, _, mm, _, vv = products
    return products if max(products) <= LARGE and min(gg, mm, vv) >= SMALL else inner_products(state)


def _multiply(t: Array, x: Array, y: Array, w: Array) -> Products:
    return float(x.dot(x)), float(x.dot(y)), float(y.dot(y)), float(t.dot(t)), float(w.dot(w))


def measure_on_device(states: Sequence[TensorState]) -> Tensor:
    """Compute the inner products, (n, 5), of all tensors at once; squares in float64 if the device has it.

    Products in ⟨g, m⟩ are float32 or wider, so the cosine is unreliable if ‖g‖ or ‖m‖ is below 1e-19 or above 1e19. The
    sum is Σ|gm| − 2Σ|min(gm, 0)|, because norms are the only sums that torch takes of many tensors at once.
    """
    theta, g, m, v = ([x.detach() for x in column] for column in zip(*states, strict=True))
    device = next((x.device for x in theta if x.device.type != "cpu"), theta[0].device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    products = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in g]
    products = list(torch._foreach_mul(products, [y.to(x.dtype) for x, y in zip(products, m, strict=True)]))
    columns = [*(torch._foreach_norm(tensors, dtype=dtype) for tensors in (g, m, theta, v))]
    columns.append(torch._foreach_norm(products, 1, dtype=dtype))
    torch._foreach_clamp_max_(products, 0)
    columns.append(torch._foreach_norm(products, 1, dtype=dtype))
    table = torch.stack([x.to(device) for column in columns for x in column]).reshape(6, -1)
    gg, mm, tt, vv = table[:4].square()
    return torch.stack([gg, table[4] - 2 * table[5], mm, tt, vv], dim=1)


# ---------------------------------------------------------------- the update


def move(bucket: Bucket, alpha: float, beta: float) -> None:
    """Update m, v and θ of a bucket (Eq. 1 to 4): AdamW with learning rate ηα and weight decay βλ."""
    settings = bucket.settings
    lr, weight_decay = settings["lr"] * alpha, beta * settings["weight_decay"]
    if not runs_fused(settings, bucket.params):
        call_adamw(bucket, lr, weight_decay, settings["foreach"], False)
        return
    lr = float(lr)
    if bucket.theta[0].device.type == "cpu":
        # torch's fused CPU kernel pairs elements by their position in memory. Tensors that differ in memory order get
        # wrong results without a warning (seen in torch 2.15).
        states = zip(bucket.theta, bucket.g, bucket.m, bucket.v, strict=True)
        disordered = [i for i, state in enumerate(states) if not in_one_order(*state)]
        if disordered:
            call_adamw(bucket.select(disordered), lr, weight_decay, False, False)
            bucket = bucket.select(sorted({*range(len(bucket.theta))} - {*disordered}))
    if bucket.theta:
        call_fused_adamw(bucket, lr, weight_decay)


def call_adamw(
    bucket: Bucket, lr: float | Tensor, weight_decay: float, foreach: bool | None, fused: bool | None
) -> None:
    """Call torch's functional AdamW, which counts the step itself."""
    adamw(
        bucket.theta,
        bucket.g,
        bucket.m,
        bucket.v,
        bucket.max_v,
        bucket.step,
        foreach=foreach,
        fused=fused,
        amsgrad=bool(bucket.settings["amsgrad"]),
        beta1=bucket.settings["betas"][0],
        beta2=bucket.settings["betas"][1],
        lr=lr,
        weight_decay=weight_decay,
        eps=bucket.settings["eps"],
        maximize=bool(bucket.settings["maximize"]),
    )


def call_fused_adamw(bucket: Bucket, lr: float, weight_decay: float) -> None:
    """Count a step and call torch's fused kernel; the functional AdamW would first sort the tensors by device."""
    torch._foreach_add_(bucket.step, ONE if bucket.step[0].device.type == "cpu" else 1)
    (beta1, beta2), eps = bucket.settings["betas"], bucket.settings["eps"]
    torch._fused_adamw_(
        bucket.theta,
        bucket.g,
        bucket.m,
        bucket.v,
        bucket.max_v,
        bucket.step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=bool(bucket.settings["amsgrad"]),
        maximize=bool(bucket.settings["maximize"]),
        grad_scale=None,
        found_inf=None,
    )


# ---------------------------------------------------------------- memory order


def in_one_order(first: Tensor, *others: Tensor) -> bool:
    """Return whether tensors of one shape have the same memory order, without gaps."""
    if all(map(Tensor.is_contiguous, (first, *others))):
        return True
    order = memory_order(first)
    return has_no_gaps(order) and all(memory_order(x) == order for x in others)


def memory_order(x: Tensor) -> list[tuple[int, int]]:
    """Return stride and size of every dimension with more than one element; equal lists mean equal memory order."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def has_no_gaps(order: list[tuple[int, int]]) -> bool:
    """Return whether a tensor with this memory order is dense: no gaps and no overlaps, dimensions in any order."""
    place = 1
    for stride, size in sorted(order):
        if stride != place:
            return False
        place *= size
    return True
