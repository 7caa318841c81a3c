"""Features of the groups (section 3.3) and the factors α and β that Φ computes from them (Eq. 5 to 8).

``feature_matrix`` computes Φ's input, for steps and meta-updates. ``Factors`` runs Φ in the fastest available way:
folded on the CPU, with Triton's kernels on a GPU (they take the whole step), else as a module.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaadamw_lite.buckets import Bucket, runs_fused
from metaadamw_lite.fast import measure
from metaadamw_lite.features import FeatureConfig, constant, group_features, tensor_statistics, zero_counts
from metaadamw_lite.folded import FoldedModulator, in_one_buffer
from metaadamw_lite.membership import Membership
from metaadamw_lite.modulator import Modulator
from metaadamw_lite.sharding import sum_over_shards
from metaadamw_lite.triton_step import DeviceStep, is_available


def feature_matrix(buckets: Sequence[Bucket], members: Membership, config: FeatureConfig, time: float) -> Tensor:
    """Compute F (section 3.3), shape (G, D), in float64 on the CPU.

    Args:
        buckets: the tensors that have a gradient.
        members: the modulation groups.
        config: the choice of columns.
        time: the value of the time column.
    """
    params = [p for bucket in buckets for p in bucket.params]
    numbers = [bucket.k for bucket in buckets for _ in bucket.params]
    sums = measure(buckets)
    enhanced = config.version == "enhanced"
    if enhanced:
        zeros = zero_counts([x for b in buckets for x in b.g], [x for b in buckets for x in b.m], sums)
        sums = torch.cat([sums, zeros], dim=1)
    if members.sharded:
        sums = sum_over_shards(sums, params)
    measured = tensor_statistics(sums[:, :5])
    if enhanced:
        sizes = constant(tuple(max(p.numel(), 1) for p in params), sums)  # 1 for an empty tensor: no division by 0
        measured = torch.cat([measured, sums[:, 5:] / sizes.unsqueeze(1)], dim=1)
    return group_features(config, members.groups, numbers, measured, time)


class Factors:
    """The fastest available evaluation of Φ for a step.

    Args:
        modulator: Φ. Its parameters are moved into one buffer here, before the first step: memory layout decides how a
            matrix product rounds, and a resumed run must round as the first one did.
    """

    def __init__(self, modulator: nn.Module) -> None:
        self._folded: FoldedModulator | None = None
        self._device_step: DeviceStep | None = None
        if isinstance(modulator, Modulator):
            in_one_buffer(modulator)

    def step_on_device(
        self, phi: nn.Module, buckets: Sequence[Bucket], members: Membership, config: FeatureConfig, time: float
    ) -> tuple[Tensor, Tensor] | None:
        """Take the whole step with the kernels of ``triton_step``, without waiting for the GPU.

        Returns:
            α and β, each (G,), on the GPU. None if the kernels cannot take this step; then nothing has changed.
        """
        if not (is_available(buckets[0].theta[0].device) and all(runs_fused(b.settings, b.params) for b in buckets)):
            return None
        if self._device_step is None:
            self._device_step = DeviceStep()
        return self._device_step.take(buckets, phi, config, members.groups, time, members.sharded)

    def of(self, phi: nn.Module, f: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Compute α and β, each (G,), from a feature matrix ``f``, (G, D); dtype and device are those of ``like``."""
        if type(phi) is Modulator and like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64):
            if self._folded is None or not self._folded.is_current(phi):
                self._folded = FoldedModulator(phi)
            folded = None if self._folded.is_hooked() else self._folded(f.numpy())
            if folded is not None:
                alpha, beta = (torch.from_numpy(x).to(like.dtype) for x in folded)
                return alpha, beta
        modulation = phi(f.to(like))
        return modulation.alpha.detach(), modulation.beta.detach()
