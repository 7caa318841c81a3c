"""A base class for modules whose own parameters no cast makes narrower than float32.

Their steps are too small for the 8 or 11 bits of half precision: in bfloat16 a step of 0.02 from 10 is lost.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Widen a tensor of floating-point numbers of less than 32 bits to float32; return others unchanged."""
    return x.float() if x.is_floating_point() and torch.finfo(x.dtype).bits < 32 else x


class KeepsFloat32(nn.Module):
    """A module whose own parameters no cast makes narrower than float32; its submodules are cast as usual.

    ``half()``, ``bfloat16()`` and ``to(dtype)``, of this module or a parent, leave float32 parameters bitwise
    unchanged. ``load_state_dict(assign=True)`` widens narrower tensors.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # nn.Module calls this for every cast, also one of a parent.
        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return y if at_least_float32(y) is y else x.to(y.device, torch.float32)

        super()._apply(moved, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for key in (prefix + name for name in self._parameters):
            if isinstance(state_dict.get(key), Tensor):
                state_dict[key] = at_least_float32(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *others)
