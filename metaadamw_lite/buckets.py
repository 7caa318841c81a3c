"""Buckets: the tensors of a step or a meta-update, sorted for the kernels.

Tensors in a bucket share a parameter group, a modulation group, a device and a dtype, so one kernel call moves them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from metaadamw_lite.membership import Membership
from metaadamw_lite.sharding import is_sharded, local, local_gradient

FUSED_TYPES = (torch.float32, torch.float16, torch.bfloat16)

State = dict[Tensor, dict[str, Any]]
"""``optimizer.state``: moments and step count of each parameter."""


@dataclass
class Bucket:
    """Tensors of one device and dtype that share a parameter group and a modulation group.

    Attributes:
        settings: the parameter group.
        k: index of the modulation group.
        sign: −1 if ``g`` is the gradient of a loss that is maximised (the moments then collect −g), else 1.
        params: the parameters.
        theta, g, m, v: this process's parts of θ, gradients and moments; whole tensors unless θ is sharded.
        max_v: the largest v so far; empty without ``amsgrad``.
        step: step counts; empty if no step is taken.
    """

    settings: dict[str, Any]
    k: int
    sign: int = 1
    params: list[Tensor] = field(default_factory=list)
    theta: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    m: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    max_v: list[Tensor] = field(default_factory=list)
    step: list[Tensor] = field(default_factory=list)

    def select(self, indices: Sequence[int]) -> "Bucket":
        """Return a bucket of the tensors at ``indices``."""
        columns = (self.params, self.theta, self.g, self.m, self.v, self.max_v, self.step)
        return Bucket(self.settings, self.k, self.sign, *([column[i] for i in indices if column] for column in columns))


def gather(
    param_groups: Sequence[dict[str, Any]],
    members: Membership,
    state: State,
    gradients: Mapping[Tensor, Tensor] | None = None,
    to_move: bool = False,
) -> list[Bucket]:
    """Collect the parameters that have a gradient, with their moments.

    Args:
        param_groups: the parameter groups.
        members: their modulation groups, up to date.
        state: moments and step counts.
        gradients: gradients that replace those in ``.grad``.
        to_move: also create missing state and collect the step counts.

    Raises:
        RuntimeError: for a sparse gradient, before any state is created.
    """
    buckets: dict[tuple[int, int, torch.device, torch.dtype], Bucket] = {}
    for index, group in enumerate(param_groups):
        sign = -1 if group["maximize"] and gradients is None else 1
        for p in group["params"]:
            g = p.grad if gradients is None else gradients.get(p)
            if g is None:
                continue
            if g.is_sparse:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient; MetaAdamW, like AdamW, needs dense "
                    "ones (for nn.Embedding: sparse=False)"
                )
            k = members.number[p]
            bucket = buckets.get((index, k, p.device, p.dtype))
            if bucket is None:
                bucket = buckets[index, k, p.device, p.dtype] = Bucket(group, k, sign)
            bucket.params.append(p)
            bucket.theta.append(local(p) if members.sharded else p)
            bucket.g.append(local_gradient(g, p) if members.sharded else g)
    for bucket in buckets.values():
        fused, amsgrad = to_move and runs_fused(bucket.settings, bucket.params), bucket.settings["amsgrad"]
        for p in bucket.params:
            if to_move:
                mine = state[p]
                create_state(mine, p, fused, amsgrad)
                bucket.step.append(mine["step"])
            m, v, max_v = moments_of(p, state)
            bucket.m.append(m)
            bucket.v.append(v)
            if amsgrad:
                bucket.max_v.append(max_v)
    return list(buckets.values())


def create_state(state: dict[str, Any], p: Tensor, fused: bool, amsgrad: bool) -> None:
    """Create a parameter's missing moments and step count, on the device and in the dtype that torch's kernels take."""
    if "step" not in state or "exp_avg" not in state:  # a wrapper may have put entries of its own here
        wide = not fused and torch.get_default_dtype() == torch.float64
        dtype, device = torch.float64 if wide else torch.float32, p.device if fused else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=dtype, device=device)
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    if amsgrad and "max_exp_avg_sq" not in state:
        state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    if fused and p.device.type != "cpu" and state["step"].device != p.device:  # made without the fused kernel
        state["step"] = state["step"].to(p.device, torch.float32)


def moments_of(p: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return this process's parts of m, v and the largest v; before the first step, expanded zeros without memory."""
    mine = state.get(p, {})
    if "exp_avg" not in mine:
        zero = local(p).new_zeros(()).expand_as(local(p))
        return zero, zero, zero
    m, v = local(mine["exp_avg"]), local(mine["exp_avg_sq"])
    return m, v, local(mine.get("max_exp_avg_sq"))


def runs_fused(settings: dict[str, Any], params: Sequence[Tensor]) -> bool:
    """Return whether torch's fused kernel moves these parameters of one device and dtype.

    ``fused`` or ``foreach`` decides if set. Otherwise the fused kernel runs wherever torch supports it, except for
    float64 and subclasses of ``Tensor``. There torch chooses as it does for AdamW, so both trajectories agree to the
    last digit.
    """
    if settings["fused"] is not None or settings["foreach"] is not None:
        return bool(settings["fused"])
    return (
        params[0].device.type in _get_fused_kernels_supported_devices()
        and params[0].dtype in FUSED_TYPES
        and all(type(p) in (Tensor, torch.nn.Parameter) or is_sharded(p) for p in params)
    )
