"""Checks of arguments: each raises a ValueError that quotes the bad value and the allowed ones."""

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor


class NotFiniteError(ValueError):
    """Non-finite logits, losses or gradients: training diverges, the arguments are valid."""


def _is_finite(value: Any) -> bool:
    """Return whether a value is a finite number of Python or NumPy, or a finite zero-dimensional tensor or array."""
    number = isinstance(value, Real) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)
    return number and math.isfinite(value)


def without_numpy(value: Any) -> Any:
    """Convert NumPy numbers, also in containers, to Python's: ``torch.load(weights_only=True)`` refuses NumPy types."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if type(value) is dict:
        return {without_numpy(key): without_numpy(x) for key, x in value.items()}
    return type(value)(map(without_numpy, value)) if type(value) in (tuple, list) else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Check that the value of ``name`` is in ``allowed``."""
    if value not in list(allowed):  # a list, for values without a hash
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}")


def check_not_negative(**values: Any) -> None:
    """Check that every value is finite and at least 0."""
    for name, value in values.items():
        if not (_is_finite(value) and value >= 0):
            scalar = " (a number, or a tensor without dimensions)" if getattr(value, "ndim", 0) else ""
            raise ValueError(f"{name} is {value!r}; it must be finite and not negative{scalar}")


def check_range(**values: Any) -> None:
    """Check that every value is in [0, 2], so that a factor 1 ± value/2 is not negative."""
    for name, value in values.items():
        if not (_is_finite(value) and 0 <= value <= 2):
            raise ValueError(f"{name} is {value!r}; it must be in [0, 2], so that no factor is negative")


def check_share(**values: Any) -> None:
    """Check that every value is in [0, 1]."""
    for name, value in values.items():
        if not (_is_finite(value) and 0 <= value <= 1):
            raise ValueError(f"{name} is {value!r}; it must be in [0, 1]")


def check_count(least: int = 1, /, **values: Any) -> None:
    """Check that every value is an integer of Python or NumPy, at least ``least``."""
    for name, value in values.items():
        if not (_is_integer(value) and value >= least):
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")


def check_seed(seed: Any) -> None:
    """Check that the value is an integer in [0, 2⁶³), as torch's generators need."""
    if not (_is_integer(seed) and 0 <= int(seed) < 2**63):
        raise ValueError(f"seed is {seed!r}; it must be an integer from 0 to 2**63 - 1")


def check_betas(betas: Any) -> None:
    """Check that the value is a pair (β₁, β₂) of numbers in [0, 1)."""
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not (pair and all(_is_finite(beta) and 0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas is {betas!r}; it must be two numbers in [0, 1)")


def check_priorities(priorities: Any, count: int) -> None:
    """Check that the value is a sequence of ``count`` positive, finite numbers."""
    if not isinstance(priorities, Sequence) or isinstance(priorities, str):
        raise ValueError(f"priorities is {priorities!r}; a sequence of {count} numbers is needed")
    if len(priorities) != count:
        raise ValueError(f"priorities {tuple(priorities)} has {len(priorities)} entries; {count} are needed")
    for p in priorities:
        if not (_is_finite(p) and p > 0):
            raise ValueError(f"priority is {p!r}; priorities must be positive and finite")


UNSUPPORTED = ("capturable", "differentiable")


def check_supported(group: Mapping[str, Any]) -> None:
    """Check that no unsupported option of torch's AdamW is switched on."""
    for name in UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"{name} is {group[name]}; only False is supported")
    if not group.get("decoupled_weight_decay", True):  # turns torch's AdamW into Adam
        raise ValueError("decoupled_weight_decay is False; only True is supported")


def check_settings(group: Mapping[str, Any]) -> None:
    """Check that the settings of a parameter group are in range and supported."""
    check_not_negative(**{name: group[name] for name in ("lr", "eps", "weight_decay")})
    check_betas(group["betas"])
    for name in ("foreach", "fused"):
        check_choice(name, group[name], (None, True, False))
    for name in ("amsgrad", "maximize"):
        check_choice(name, group[name], (True, False))
    check_supported(group)
