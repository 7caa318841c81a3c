"""What the attention module sees: one row of statistics for each group (paper, section 3.3).

Every statistic is taken per tensor and then averaged over the tensors of the group, before the moments take in the
new gradient: m and v are those of the step before. A tensor without a gradient takes no part in this step, so it takes
no part in the statistics; a group without any gradient has a row of zeros in the columns made from gradients,
moments and parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaadamw_lite.checks import check_choice
from metaadamw_lite.groups import ModulationGroup

FEATURE_VERSIONS = ("basic", "basic_plus", "enhanced", "norm_basic", "norm_basic_plus")


class TensorState(NamedTuple):
    """A parameter tensor θ at one moment of training: its gradient g and its moments m and v, all of one shape."""

    theta: Tensor
    g: Tensor
    m: Tensor
    v: Tensor


@dataclass(frozen=True)
class FeatureConfig:
    """Which columns the feature matrix has.

    Args:
        version: one of ``FEATURE_VERSIONS``.
        use_v_norms: add the norm of the second moment; for ``basic_plus`` its mean and its standard deviation, which
            makes the 11 columns of the paper's Table 4. ``enhanced`` does not use it (section 3.3 lists 9 statistics).
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
        """Whether the statistical columns are standardised over the groups."""
        return self.version.startswith("norm_")


def time_feature(step: int, total_steps: int | None) -> float:
    """Training progress: t/T where the number of steps T is known, else 2σ(t/1000) − 1, which rises from 0 to 1."""
    if total_steps is not None:
        return step / total_steps
    return math.tanh(step / 2000)  # 2σ(x) − 1 = tanh(x/2)


def tensor_statistics(state: TensorState, dtype: torch.dtype) -> Tensor:
    """The five numbers ‖g‖, ‖m‖, ‖θ‖, cos(g, m), ‖v‖ of one tensor, shape (5,). The cosine with a zero vector is 0."""
    theta, g, m, v = (x.detach().to(dtype) for x in state)
    norm_g, norm_m, norm_theta, norm_v = (torch.linalg.vector_norm(x) for x in (g, m, theta, v))
    cosine = (g * m).sum() / (norm_g * norm_m).clamp_min(torch.finfo(dtype).tiny)
    return torch.stack([norm_g, norm_m, norm_theta, cosine, norm_v])


def group_features(
    config: FeatureConfig,
    groups: Sequence[ModulationGroup],
    states: Sequence[Sequence[TensorState]],
    time: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The feature matrix F (section 3.3), shape (G, D) with D = ``len(config.columns)``, without gradient.

    Args:
        config: which columns.
        groups: the G modulation groups.
        states: for each group, the states of those of its tensors that have a gradient.
        time: the value of the time column.
        dtype: in what precision the statistics are taken.
        device: where the result goes; each tensor's statistics are taken where the tensor is.
    """
    row = _enhanced_row if config.version == "enhanced" else _basic_row
    with torch.no_grad():
        statistics = torch.stack([row(config, g, s, dtype, device) for g, s in zip(groups, states, strict=True)])
        if config.standardised:
            centred = statistics - statistics.mean(dim=0)
            std = centred.square().mean(dim=0).sqrt()
            # What varies by rounding alone, as a column of one group does, becomes zero instead of noise of size one.
            constant = std <= 1e-6 * statistics.abs().amax(dim=0)
            statistics = torch.where(constant, 0.0, centred / std.masked_fill(constant, 1.0))
        if not config.include_time_step:
            return statistics
        return torch.cat([statistics, statistics.new_full((len(groups), 1), time)], dim=1)


def _basic_row(
    config: FeatureConfig,
    group: ModulationGroup,
    states: Sequence[TensorState],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if not states:
        return torch.zeros(len(config.statistics), dtype=dtype, device=device)
    per_tensor = torch.stack([tensor_statistics(s, dtype).to(device) for s in states])  # (tensors, 5)
    mean = per_tensor.mean(dim=0)
    columns = [mean[:4]]
    if config.version.endswith("basic_plus"):
        std = per_tensor.std(dim=0, correction=0)
        columns.append(std[:4])
        if config.use_v_norms:
            columns += [mean[4:], std[4:]]
    elif config.use_v_norms:
        columns.append(mean[4:])
    return torch.cat(columns)


def _enhanced_row(
    config: FeatureConfig,
    group: ModulationGroup,
    states: Sequence[TensorState],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    structure = torch.tensor(
        [math.log1p(sum(p.numel() for p in group.params)), group.bias_ratio, group.depth], dtype=dtype, device=device
    )
    if not states:
        return torch.cat([structure.new_zeros(6), structure])
    per_tensor = torch.stack([tensor_statistics(s, dtype).to(device) for s in states])
    mean, var = per_tensor.mean(dim=0), per_tensor.var(dim=0, correction=0)
    sparsity_g = torch.stack([(s.g == 0).to(dtype).mean().to(device) for s in states]).mean()
    sparsity_m = torch.stack([(s.m == 0).to(dtype).mean().to(device) for s in states]).mean()
    return torch.cat([torch.stack([mean[0], var[0], mean[1], var[1], sparsity_g, sparsity_m]), structure])
