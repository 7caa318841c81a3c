"""Statistics and factors of a step on a GPU where Triton is missing: one copy to the host, Φ folded there, one back.

Sums over tensors are taken by ``torch._foreach_*``, some ten calls whatever the number of tensors (each starts a few
kernels). The host waits for the statistics once in a step. It then knows α and β as numbers, so that torch's own fused
AdamW can be called with them. Not run on a GPU yet; the tests run it on the CPU.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaadamw_lite.fast import Bucket, PlainModulator
from metaadamw_lite.triton_step import Weights


def inner_products_on_host(buckets: Sequence[Bucket], zeros: bool) -> Tensor:
    """⟨g, g⟩, ⟨g, m⟩, ⟨m, m⟩, ⟨θ, θ⟩, ⟨v, v⟩ of each of n tensors, and the number of zeros in g and in m if ``zeros``.

    Needs memory for one number for each of g and, in half precision, as many for m. Squares are added up in float64;
    the products of g and m are taken in float32 (float64 for float64), so the cosine is not to be relied on where ‖g‖
    or ‖m‖ is below 1e-19 or above 1e19.

    Returns:
        (n, 5) or (n, 7), float64, on the CPU.
    """
    theta, g, m, v = ([x.detach() for b in buckets for x in getattr(b, name)] for name in ("theta", "g", "m", "v"))
    wide = [
        torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32) for x, y in zip(g, m, strict=True)
    ]
    device = theta[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    squares = [torch._foreach_norm(column, dtype=dtype) for column in (g, m, theta, v)]
    products = _widened(g, wide)
    torch._foreach_mul_(products, m if all(y.dtype == d for y, d in zip(m, wide, strict=True)) else _widened(m, wide))
    total = torch._foreach_norm(products, 1, dtype=dtype)
    torch._foreach_clamp_max_(products, 0)  # the sum is Σ|gm| − 2Σ|min(gm, 0)|: norms are what torch has for many
    negative = torch._foreach_norm(products, 1, dtype=dtype)
    columns = [*squares, total, negative]
    if zeros:
        columns += [torch._foreach_norm(column, 0, dtype=dtype) for column in (g, m)]
    table = torch.stack([x.to(device) for column in columns for x in column]).cpu().double().reshape(len(columns), -1)
    gg, mm, tt, vv = table[:4].square()
    rows = [gg, table[4] - 2 * table[5], mm, tt, vv]
    if zeros:
        sizes = torch.tensor([x.numel() for x in g], dtype=torch.float64, device="cpu")
        rows += [sizes - table[6], sizes - table[7]]  # the norm of order 0 counts what is not zero
    return torch.stack(rows, dim=1)


def _widened(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Copies in other types."""
    copies = [torch.empty_like(x, dtype=d) for x, d in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


class HostFactors:
    """α and β by the folded Φ on the host, on whatever device Φ is."""

    def __init__(self) -> None:
        self._phi: Weights | None = None

    def __call__(self, modulator: nn.Module, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """α and β, each (G,), in Φ's type on the CPU, for features (G, D) on the CPU.

        Φ's weights are copied to the host in every step, in one piece: only there can be seen whether they changed.

        Returns:
            None where the module has to be asked: it is of another class, has hooks or another ``forward``, is in
            another type than float32 and float64, or its softmax overflows.
        """
        if self._phi is None or not self._phi.is_current(modulator):
            self._phi = Weights.of(modulator)
            if self._phi is None:
                return None
            self._twin = copy.deepcopy(self._phi.modulator).cpu()
            self._folded = PlainModulator(self._twin)
        phi = self._phi
        if phi.is_hooked():
            return None
        flat = next(self._twin.parameters()).detach().as_strided(phi.buffer.shape, (1,))
        flat.copy_(phi.buffer)
        if not self._folded.is_current(self._twin):
            self._folded = PlainModulator(self._twin)
        factors = self._folded(features.double().numpy())
        if factors is None:
            return None
        alpha, beta = (torch.from_numpy(x).to(phi.buffer.dtype) for x in factors)
        return alpha, beta
