"""Priority-injected homoscedastic uncertainty weighting (paper, section 2.4 and Eq. 13)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaadamw_lite.checks import check_choice, check_priorities

KINDS = ("regression", "classification")


class PriorityHUW(nn.Module):
    """Balance several losses by learned variances σ² = exp(s), with a priority p on each regulariser.

    A "regression" loss L enters as ½·e^{−s}·L + ½·p·s (Eq. 13), a "classification" loss as e^{−s}·L + p·s. For a
    fixed L > 0 both are smallest at σ² = L/p: the priority multiplies the weight that the loss ends up with. For
    L ≤ 0 there is no smallest value; s falls without bound (chapter 4).

    Args:
        kinds: "regression" or "classification" for each loss.
        priorities: p for each loss, positive.
        init_log_var: where every s starts.

    Raises:
        ValueError: for an unknown kind or none, a priority that is not positive and finite, unequal lengths, or a start
            that is not finite.

    The learned s are the parameter ``log_var``, shape (number of losses,).
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
        """The weighted sum of scalar losses, a scalar.

        Raises:
            ValueError: if there are more or fewer losses than kinds.
        """
        if len(losses) != len(self.kinds):
            raise ValueError(f"got {len(losses)} losses, but PriorityHUW was made for {len(self.kinds)}")
        terms = [
            (0.5 if kind == "regression" else 1.0) * (torch.exp(-s) * loss + p * s)
            for kind, p, s, loss in zip(self.kinds, self.priorities, self.log_var, losses, strict=True)
        ]
        return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        """Kinds and priorities, for printing."""
        return f"kinds={self.kinds}, priorities={self.priorities}"
