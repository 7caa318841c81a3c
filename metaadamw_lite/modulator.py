"""The attention module Φ, from group statistics to learning-rate and decay factors (paper, section 3.4, Eq. 5 to 9)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaadamw_lite.checks import check_count, check_range

# Larger features are cut: in the layer norms their squares overflow in float32. They mean that training has diverged.
LARGEST_FEATURE = 1e15


class Modulation(NamedTuple):
    """The output of Φ for G groups; every field has shape (G,).

    Attributes:
        alpha: learning-rate factor α_g in 1 ± alpha_range/2 (Eq. 7).
        beta: weight-decay factor β_g in 1 ± beta_range/2 (Eq. 8).
        lambda1: weight of the gradient norm in Eq. 10, in (0, 1) (Eq. 9).
        lambda2: weight of the gradient alignment in Eq. 10, in (0, 1) (Eq. 9).
    """

    alpha: Tensor
    beta: Tensor
    lambda1: Tensor
    lambda2: Tensor


class Modulator(nn.Module):
    """Φ: a pre-norm Transformer encoder over the groups, then a linear map to four numbers for each group.

    Matrices start Xavier-uniform and the output bias at zero, as in the released code; section 3.4 does not define the
    start. So the factors are random around 1 from the first step on; chapter 3 shows their spread.

    Args:
        num_features: D, columns of the feature matrix.
        num_groups: G, used by the group embeddings only.
        layers, heads, hidden_dim: L, H and D_ff of section 3.4.
        alpha_range, beta_range: range_α and range_β of Eq. 7 and 8.
        group_embed_dim: width of a learned embedding for each group, appended to its features; 0 for none.
        gating: multiply every input column by a learned gate σ(·), which starts at σ(1) ≈ 0.73.
        generator: source of the random start; None for torch's global generator.

    Raises:
        ValueError: if the heads do not divide the input width D + group_embed_dim, for fewer than one layer, head or
            hidden unit, and for a range outside [0, 2].
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        *,
        layers: int,
        heads: int,
        hidden_dim: int,
        alpha_range: float,
        beta_range: float,
        group_embed_dim: int = 0,
        gating: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count(layers=layers, heads=heads, hidden_dim=hidden_dim)
        check_range(alpha_range=alpha_range, beta_range=beta_range)
        width = num_features + group_embed_dim
        if width % heads:
            raise ValueError(
                f"attn_heads is {heads} but must divide the feature size {width} "
                f"(allowed: {', '.join(str(h) for h in range(1, width + 1) if width % h == 0)})"
            )
        self.alpha_range = alpha_range
        self.beta_range = beta_range
        with DrawFrom(generator):
            layer = nn.TransformerEncoderLayer(width, heads, hidden_dim, dropout=0.0, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.output = nn.Linear(width, 4)
            for p in self.parameters():
                if p.ndim > 1:
                    nn.init.xavier_uniform_(p)
            nn.init.zeros_(self.output.bias)
            embeddings = 0.1 * torch.empty(num_groups, group_embed_dim).normal_() if group_embed_dim else None
        self.embeddings = None if embeddings is None else nn.Parameter(embeddings)
        self.gates = nn.Parameter(torch.ones(width)) if gating else None

    def forward(self, features: Tensor) -> Modulation:
        """Map features (G, D) to the factors of the G groups.

        The factors stay in their ranges for any features: NaN counts as zero, and magnitudes above 1e15 are cut.
        """
        with torch.autocast(features.device.type, enabled=False):  # half precision is too coarse for features
            return self._modulate(features)

    def _modulate(self, features: Tensor) -> Modulation:
        f = torch.nan_to_num(features, nan=0.0).clamp(-LARGEST_FEATURE, LARGEST_FEATURE)
        if self.embeddings is not None:
            f = torch.cat([f, self.embeddings], dim=1)
        if self.gates is not None:
            f = f * torch.sigmoid(self.gates)
        z = self.encoder(f.unsqueeze(0)).squeeze(0)  # Eq. 5: groups are the tokens of one sequence
        alpha_raw, beta_raw, lambda1_raw, lambda2_raw = self.output(z).unbind(dim=1)  # Eq. 6
        return Modulation(
            alpha=1 + self.alpha_range * (torch.sigmoid(alpha_raw) - 0.5),  # Eq. 7
            beta=1 + self.beta_range * (torch.sigmoid(beta_raw) - 0.5),  # Eq. 8
            lambda1=torch.sigmoid(lambda1_raw),  # Eq. 9
            lambda2=torch.sigmoid(lambda2_raw),
        )

    def gate_penalty(self) -> Tensor | None:
        """Return the L1 norm of the gates, Σ σ(gate), or None without gates."""
        return None if self.gates is None else torch.sigmoid(self.gates).sum()


class DrawFrom(TorchFunctionMode):
    """Draw uniform and normal numbers from a given generator inside the block, in this thread only.

    The constructors of torch's layers take no generator, and seeding the global one would race with other threads.

    Args:
        generator: the generator; None for torch's global one.
    """

    _DRAW = (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, with the generator if it draws random numbers."""
        draws = {"generator": self._generator} if func in self._DRAW else {}
        return func(*args, **{**(kwargs or {}), **draws})
