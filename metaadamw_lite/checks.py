"""Checks of arguments. Each raises a ValueError that quotes the bad value and says what is allowed."""

import math
from collections.abc import Collection, Sequence
from numbers import Integral

from torch import Tensor


def check_choice(what: str, value: object, allowed: Collection[object]) -> None:
    """The value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; allowed are {', '.join(map(str, allowed))}")


def check_not_negative(**values: float | Tensor) -> None:
    """Every value is finite and at least 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be finite and not negative")


def check_range(**values: float) -> None:
    """Every value is in [0, 2], so that a factor 1 ± value/2 is not negative."""
    for name, value in values.items():
        if not 0 <= value <= 2:
            raise ValueError(f"{name} is {value}; it must be in [0, 2], so that no factor is negative")


def check_count(**values: object) -> None:
    """Every value is an integer (NumPy's included) of at least 1."""
    for name, value in values.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")


def check_seed(seed: object) -> None:
    """The value is a seed that torch's generators take."""
    if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be an integer from 0 to 2**63 - 1")


def check_betas(betas: object) -> None:
    """The value is a pair (β₁, β₂) of numbers in [0, 1)."""
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}; it must be two numbers in [0, 1)")


def check_priorities(priorities: object, count: int) -> None:
    """The value is a sequence of ``count`` positive, finite numbers."""
    if not isinstance(priorities, Sequence):
        raise ValueError(f"priorities is {priorities!r}; a sequence of {count} numbers is needed")
    if len(priorities) != count:
        raise ValueError(f"priorities {tuple(priorities)} has {len(priorities)} entries; {count} are needed")
    for p in priorities:
        if not (math.isfinite(p) and p > 0):
            raise ValueError(f"priority is {p}; priorities must be positive and finite")
