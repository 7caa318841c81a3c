"""Does it matter which loss Φ descends? MetaAdamW with the terms of Eq. 13 replaced.

If Φ learns to optimise, it must lose what it gains when its loss has nothing to do with optimising any more.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Maker, Variant, metaadamw
from metaadamw_lite.huw import PriorityHUW


class ReplacedTerms(PriorityHUW):
    """The uncertainty weights of Eq. 13 on another function of each loss term."""

    def __init__(self, like: PriorityHUW, term: Callable[[Tensor], Tensor]) -> None:
        super().__init__(like.kinds, like.priorities)
        self._term = term

    def forward(self, losses: Sequence[Tensor] | Tensor) -> Tensor:
        """The weighted sum of the replaced terms, a scalar."""
        return super().forward([self._term(loss) for loss in losses])


def squared_distance_to_zero(loss: Tensor) -> Tensor:
    """(L − c)² with the fixed target c = 0: a loss decrease is then to be avoided."""
    return loss.square()


def with_terms(term: Callable[[Tensor], Tensor]) -> Maker:
    """MetaAdamW whose loss terms are ``term`` of the published ones."""

    def make(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> MetaAdamW:
        optimizer = metaadamw(model, settings, total_steps, seed)
        assert optimizer.huw is not None  # Table 4 has priorities on every task
        optimizer.huw = ReplacedTerms(optimizer.huw, term).to(optimizer.huw.log_var)
        return optimizer

    return make


CIRCULARITY = {
    "circularity-targets": Variant(make=with_terms(squared_distance_to_zero)),
    "circularity-constants": Variant(make=with_terms(Tensor.detach)),
}
"""With constants only weight decay and a penalty of gates could move Φ; the uncertainty weights see the same values."""
