"""Modules whose own parameters stay in float32 or float64, whatever their surroundings are cast to.

The steps of such parameters are too small for 8 or 11 bits of precision: in bfloat16 a step of 0.02 from 10 is lost.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself, or in float32 where its floating-point numbers have less than 32 bits."""
    return x.float() if x.is_floating_point() and torch.finfo(x.dtype).bits < 32 else x


class KeepsFloat32(nn.Module):
    """A module whose own parameters no cast makes narrower than float32; its submodules are cast as usual.

    ``half()``, ``bfloat16()`` and ``to(dtype)``, of it or of a module that contains it, keep the bits of float32
    parameters; ``load_state_dict(assign=True)`` widens what it loads.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every cast of ``nn.Module`` comes through here, those of a parent included.
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
