"""Does it matter which loss Φ descends? MetaAdamW with the terms of Eq. 13 replaced.

If Φ learns to optimise, a loss that has nothing to do with optimising must cost its gain.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments.ladder import log_phi, small_phi, with_phi
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Maker, Variant, metaadamw
from metaadamw_lite.huw import PriorityHUW


class ReplacedTerms(PriorityHUW):
    """The uncertainty weights of Eq. 13 on another function of each loss term."""

    def __init__(self, like: PriorityHUW, term: Callable[[Tensor], Tensor]) -> None:
        super().__init__(like.kinds, like.priorities)
        self._term = term

    def forward(self, losses: Sequence[Tensor] | Tensor) -> Tensor:
        """Return the weighted sum of the replaced terms, a scalar."""
        return super().forward([self._term(loss) for loss in losses])


def squared_distance_to_zero(loss: Tensor) -> Tensor:
    """Return (L − c)² with the fixed target c = 0, which punishes a loss decrease."""
    return loss.square()


def with_terms(term: Callable[[Tensor], Tensor]) -> Maker:
    """Return the maker of MetaAdamW with ``term`` applied to each published loss term."""

    def make(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> MetaAdamW:
        optimizer = metaadamw(model, settings, total_steps, seed)
        assert optimizer.huw is not None  # Table 4 has priorities on every task
        optimizer.huw = ReplacedTerms(optimizer.huw, term).to(optimizer.huw.log_var)
        return optimizer

    return make


class ReplacedLoss(nn.Module):
    """Stand in for the uncertainty weights by a function of a single loss, without weights."""

    log_var: Tensor

    def __init__(self, term: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("log_var", torch.zeros(0))
        self._term = term

    def forward(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the replaced loss, a scalar."""
        (loss,) = losses
        return self._term(loss)


def _ladder_to_target(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> torch.optim.Optimizer:
    """Make ``ladder-phi`` with (L − 0)² in place of its loss."""
    optimizer = with_phi(log_phi)(model, settings, total_steps, seed)
    assert isinstance(optimizer, MetaAdamW)
    optimizer.huw = ReplacedLoss(squared_distance_to_zero)  # type: ignore[assignment]
    return optimizer


CIRCULARITY = {
    "circularity-targets": Variant(make=with_terms(squared_distance_to_zero)),
    "circularity-constants": Variant(make=with_terms(Tensor.detach)),
    "circularity-ladder-targets": Variant(small_phi, _ladder_to_target),
}
"""With constants only weight decay and a penalty of gates could move Φ; the uncertainty weights see the same values.
The last replaces the loss of ``ladder-phi``, whose Φ moves: a loss decrease held at zero means standing still."""

UNREPLACED = {name: "ladder-phi" if "ladder" in name else "metaadamw" for name in CIRCULARITY}
"""The variant with the published loss, by variant with a replaced one."""
