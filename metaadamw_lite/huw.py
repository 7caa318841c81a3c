"""Priority-injected homoscedastic uncertainty weighting (paper, section 2.4 and Eq. 13)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaadamw_lite.checks import check_choice, check_priorities

KINDS = ("regression", "classification")


class PriorityHUW(nn.Module):
    """Weighted sum of losses with learned variances σ² = exp(s) and a priority p on each regulariser.

    A "regression" loss L contributes ½·e^{−s}·L + ½·p·s (Eq. 13), a "classification" loss e^{−s}·L + p·s. For fixed
    L > 0 both have their minimum at σ² = L/p, so the loss ends with a weight proportional to p. For L ≤ 0 there is no
    minimum; s falls without bound (chapter 4).

    Args:
        kinds: "regression" or "classification" for each loss.
        priorities: p for each loss, positive.
        init_log_var: the start of every s.

    Attributes:
        log_var: the learned s, shape (number of losses,).

    Raises:
        ValueError: for an unknown kind, no kinds, a priority that is not positive and finite, unequal lengths, or a
            start that is not finite.
    """

    def __init__(self, kinds: Sequence[str], priorities: Sequence[float], init_log_var: float = 0.0) -> None:
        super().__init__()
        kinds = tuple(kinds)
        if not kinds:
            raise ValueError("kinds is empty; at least one loss is needed")
        for kind in kinds:
            check_choice("kind", kind, KINDS)
        check_priorities(priorities, len(kinds))
        if not math.isfinite(init_log_var):
            raise ValueError(f"init_log_var is {init_log_var}; it must be finite")
        self.kinds = kinds
        self.priorities = tuple(float(p) for p in priorities)
        self.log_var = nn.Parameter(torch.full((len(kinds),), float(init_log_var)))

    def forward(self, losses: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the weighted sum of scalar losses, a scalar.

        Raises:
            ValueError: if the number of losses differs from that of kinds.
        """
        if len(losses) != len(self.kinds):
            raise ValueError(f"got {len(losses)} losses; this PriorityHUW is for {len(self.kinds)}")
        terms = [
            (0.5 if kind == "regression" else 1.0) * (torch.exp(-s) * loss + p * s)
            for kind, p, s, loss in zip(self.kinds, self.priorities, self.log_var, losses, strict=True)
        ]
        return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        """Return kinds and priorities, for printing."""
        return f"kinds={self.kinds}, priorities={self.priorities}"
