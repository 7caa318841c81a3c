"""The feature matrix F, the input of Φ: one row of statistics for each group (paper, section 3.3).

A statistic is computed for each tensor and averaged over the group. The moments m and v are those before the step.
Tensors without a gradient do not count. A group without any gradient has zeros in the columns made from gradients,
moments and parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaadamw_lite.checks import check_choice
from metaadamw_lite.groups import ModulationGroup

FEATURE_VERSIONS = ("basic", "basic_plus", "enhanced", "norm_basic", "norm_basic_plus")


Products = tuple[float, float, float, float, float]
"""⟨g, g⟩, ⟨g, m⟩, ⟨m, m⟩, ⟨θ, θ⟩ and ⟨v, v⟩."""


class TensorState(NamedTuple):
    """A parameter tensor θ with its gradient g and its moments m and v, all of one shape."""

    theta: Tensor
    g: Tensor
    m: Tensor
    v: Tensor


@dataclass(frozen=True)
class FeatureConfig:
    """The choice of columns of the feature matrix (section 3.3).

    Args:
        version: one of ``FEATURE_VERSIONS``.
        use_v_norms: add the mean norm of the second moment, and for ``basic_plus`` also its standard deviation (the 11
            columns of the paper's Table 4). ``enhanced`` ignores it: section 3.3 lists 9 statistics.
        include_time_step: add the training progress as the last column.

    Raises:
        ValueError: for an unknown version, or a switch that is neither True nor False.
    """

    version: str = "basic"
    use_v_norms: bool = True
    include_time_step: bool = True

    def __post_init__(self) -> None:
        check_choice("feature_version", self.version, FEATURE_VERSIONS)
        check_choice("use_v_norms", self.use_v_norms, (True, False))
        check_choice("include_time_step", self.include_time_step, (True, False))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistical columns, in order."""
        if self.version == "enhanced":
            return (
                "mean |g|",
                "var |g|",
                "mean |m|",
                "var |m|",
                "sparsity g",
                "sparsity m",
                "log count",
                "bias ratio",
                "depth",
            )
        basic = ("|g|", "|m|", "|θ|", "cos(g, m)")
        v = ("|v|",) if self.use_v_norms else ()
        if self.version in ("basic", "norm_basic"):
            return (*basic, *v)
        return (*basic, *(f"std {name}" for name in basic), *v, *(f"std {name}" for name in v))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all D columns, in order."""
        return (*self.statistics, "time") if self.include_time_step else self.statistics

    @property
    def standardised(self) -> bool:
        """True if the statistical columns are standardised over the groups."""
        return self.version.startswith("norm_")


def time_feature(step: int, total_steps: int | None) -> float:
    """Compute the training progress: t/T if the number of steps T is known, else 2σ(t/1000) − 1, from 0 towards 1.

    Args:
        step: t, the number of steps before this one, from 0.
        total_steps: T, or None.
    """
    if total_steps is not None:
        return step / total_steps
    return math.tanh(step / 2000)  # 2σ(x) − 1 = tanh(x/2)


def inner_products(state: TensorState) -> Products:
    """Compute ⟨g, g⟩, ⟨g, m⟩, ⟨m, m⟩, ⟨θ, θ⟩ and ⟨v, v⟩ of one tensor in float64.

    ``fast.measure`` is the fast version. It calls this one for tensors that need float64.
    """
    theta, g, m, v = (x.detach().double() for x in state)
    gg, gm, mm, tt, vv = (float((x * y).sum()) for x, y in ((g, g), (g, m), (m, m), (theta, theta), (v, v)))
    return gg, gm, mm, tt, vv


def tensor_statistics(products: Tensor) -> Tensor:
    """Compute ‖g‖, ‖m‖, ‖θ‖, cos(g, m), ‖v‖ of n tensors, (n, 5), from their ``inner_products``, (n, 5).

    The cosine with a zero vector is 0.
    """
    gg, gm, mm, tt, vv = products.unbind(dim=1)
    norm_g, norm_m = gg.sqrt(), mm.sqrt()
    cosine = (gm / (norm_g * norm_m).clamp_min(torch.finfo(products.dtype).tiny)).clamp(-1, 1)
    return torch.stack([norm_g, norm_m, tt.sqrt(), cosine, vv.sqrt()], dim=1)


def zero_counts(g: Sequence[Tensor], m: Sequence[Tensor], like: Tensor) -> Tensor:
    """Count the zeros in each of n gradients and first moments, (n, 2), for the sparsity columns of "enhanced".

    The result has the dtype and device of ``like``.
    """
    if not g:
        return like.new_zeros(0, 2)
    return torch.stack([torch.stack([(x == 0).sum().to(like) for x in tensors]) for tensors in (g, m)], dim=1)


def group_features(
    config: FeatureConfig, groups: Sequence[ModulationGroup], members: Sequence[int], statistics: Tensor, time: float
) -> Tensor:
    """Compute the feature matrix F (section 3.3), shape (G, D) with D = ``len(config.columns)``, without gradient.

    Args:
        config: the choice of columns.
        groups: the G modulation groups.
        members: the group index of each of the n tensors that have a gradient.
        statistics: their ``tensor_statistics``, (n, 5); for "enhanced" (n, 7), with the shares of zeros in g and in m.
        time: the value of the time column.
    """
    index, count = _index_and_count(tuple(members), len(groups), statistics.dtype, statistics.device)
    zeros = statistics.new_zeros(len(groups), statistics.shape[1])
    mean = zeros.index_add(0, index, statistics) / count
    columns = [mean[:, :4]]
    if config.version == "enhanced" or config.version.endswith("basic_plus"):
        variance = zeros.index_add(0, index, (statistics - mean[index]).square()) / count
    if config.version == "enhanced":
        norms = [mean[:, 0], variance[:, 0], mean[:, 1], variance[:, 1]]
        columns = [torch.stack(norms, dim=1), mean[:, 5:], constant(structural_features(groups), statistics)]
    elif config.version.endswith("basic_plus"):
        std = variance.sqrt()
        columns += [std[:, :4], mean[:, 4:], std[:, 4:]] if config.use_v_norms else [std[:, :4]]
    elif config.use_v_norms:
        columns.append(mean[:, 4:])
    if config.standardised:
        columns = [standardise(torch.cat(columns, dim=1), sorted(set(members)))]
    if config.include_time_step:
        columns.append(statistics.new_full((len(groups), 1), time))
    return torch.cat(columns, dim=1)


def structural_features(groups: Sequence[ModulationGroup]) -> tuple[tuple[float, float, float], ...]:
    """Compute log count, bias ratio and depth of each group: the constant columns of "enhanced"."""
    return tuple((math.log1p(sum(p.numel() for p in g.params)), g.bias_ratio, g.depth) for g in groups)


def constant(values: tuple[Any, ...], like: Tensor) -> Tensor:
    """Return a cached tensor of ``values`` with the dtype and device of ``like``.

    A new copy in every step would wait for the GPU.
    """
    return _constant(values, like.dtype, like.device)


@lru_cache(maxsize=64)
def _constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


@lru_cache(maxsize=16)
def _index_and_count(
    members: tuple[int, ...], groups: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the group index of each tensor, (n,), and the number of tensors in each group, at least 1, (G, 1)."""
    index = torch.tensor(members, dtype=torch.long, device="cpu")
    count = torch.bincount(index, minlength=groups).clamp_min(1)
    return index.to(device), count.to(device, dtype).unsqueeze(1)


def standardise(columns: Tensor, rows: Sequence[int]) -> Tensor:
    """Scale each column to mean 0 and standard deviation 1 over ``rows``; other rows and constant columns become zero.

    Args:
        columns: (G, D).
        rows: the indices of the groups that have a gradient.
    """
    if not rows:
        return torch.zeros_like(columns)
    if len(rows) < len(columns):
        some = _constant(tuple(rows), torch.long, columns.device)
        return torch.zeros_like(columns).index_copy(0, some, standardise(columns[some], range(len(rows))))
    centred = columns - columns.mean(dim=0)
    std = centred.square().mean(dim=0).sqrt()
    # A column that varies only by rounding, as with a single group, becomes zero instead of noise of size one.
    same = std <= 1e-6 * columns.abs().amax(dim=0)
    return torch.where(same, 0.0, centred / std.masked_fill(same, 1.0))
