"""The batches of a meta-update, each of which is evaluated several times and has to be the same each time.

``Batches`` hands them out as copies of their containers, which ``loss_fn`` may empty, and notices writes to the tensors
in them, which are not copied.
"""

import copy
from collections import UserDict, UserList, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from metaadamw_lite.surroundings import Saved, attributes_of, differ, is_record, put_back, writes_to


class Batches:
    """Batches by name, as ``loss_fn`` may see them.

    Args:
        named: the batches.

    Raises:
        TypeError: for an iterator, which can be read only once, also inside of a batch.
    """

    def __init__(self, **named: Any) -> None:
        self._saved: dict[str, Saved] = {}
        self._writes: dict[str, int | None] = {}
        self._arrays: list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        seen: set[int] = set()
        for name, batch in named.items():
            self._keep(name, batch, seen)

    def _keep(self, name: str, x: Any, seen: set[int]) -> None:
        if isinstance(x, Iterator):
            raise TypeError(
                f"{name} is a {type(x).__name__}, which can be read only once, and a meta-update evaluates each batch "
                "several times; pass what it yields (next(...) of it, or a list)"
            )
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, nn.Parameter):
            return  # not a batch's own: θ is written to
        if isinstance(x, Tensor):
            self._saved[name], self._writes[name] = Saved(x), writes_to(x)
        elif isinstance(x, np.ndarray):
            self._arrays.append((name, x, x.copy()))
        else:
            for key, item in _items(x):
                self._keep(f"{name}{key}", item, seen)

    @contextmanager
    def as_found(self) -> Iterator[None]:
        """Leave ``requires_grad`` and ``grad`` of the tensors as they are, which a gradient penalty changes."""
        leaves = [(x.x, x.x.requires_grad, x.x.grad) for x in self._saved.values() if x.x.is_leaf]
        try:
            yield
        finally:
            for x, requires_grad, grad in leaves:
                x.grad = grad
                if x.is_leaf and x.requires_grad != requires_grad:
                    x.requires_grad_(requires_grad)

    def refuse_counted_writes(self) -> None:
        """A RuntimeError if torch has counted a write to a tensor. No device is waited for."""
        for name, x in self._saved.items():
            if writes_to(x.x) != self._writes[name]:
                self._refuse(name)

    def refuse_writes(self) -> None:
        """A RuntimeError if a tensor or array holds other numbers than at the start (``.data`` is not counted)."""
        for name, is_other in zip(self._saved, differ(list(self._saved.values())), strict=True):
            if is_other:
                self._refuse(name)
        for name, x, before in self._arrays:
            if x.shape != before.shape or x.tobytes() != before.tobytes():
                self._refuse(name)

    def _refuse(self, name: str) -> None:
        put_back(list(self._saved.values()))
        for _, x, before in self._arrays:
            if x.shape == before.shape and x.flags.writeable:
                x[...] = before
        raise RuntimeError(
            f"loss_fn writes to {name}, so that the next loss would be that of another batch; let it write to a copy"
        )


def handed_out(x: Any) -> Any:
    """A batch whose containers are copies, also inside of each other; what they hold is not copied."""
    return _copied(x, {})


def _copied(x: Any, made: dict[int, Any]) -> Any:
    if id(x) in made:
        return made[id(x)]
    if isinstance(x, tuple):
        items = [_copied(item, made) for item in x]
        if all(a is b for a, b in zip(items, x, strict=True)):
            return x  # and so are classes that take other arguments, such as a PackedSequence
        return type(x)._make(items) if hasattr(x, "_make") else type(x)(items)
    if isinstance(x, MappingProxyType):  # which cannot be copied, and only read
        return MappingProxyType(_copied(dict(x), made))
    if not _is_container(x):
        return x
    twin = made[id(x)] = copy.copy(x)
    if isinstance(x, dict):
        for key, item in x.items():
            if (other := _copied(item, made)) is not item:
                twin[key] = other
    elif isinstance(x, list | deque):
        for i, item in enumerate(x):
            twin[i] = _copied(item, made)
    if not isinstance(x, set):
        for name, item in attributes_of(x):
            if (other := _copied(item, made)) is not item:
                object.__setattr__(twin, name, other)
    return twin


def _is_container(x: Any) -> bool:
    if isinstance(x, Tensor | nn.Module | type):
        return False
    return isinstance(x, dict | list | deque | set | Mapping | UserDict | UserList) or is_record(x)


def _items(x: Any) -> list[tuple[str, Any]]:
    """The items of a container, each with the end of its name: ``["labels"]``, ``[0]`` or ``.mask``."""
    if isinstance(x, Mapping):
        return [(f"[{key!r}]", item) for key, item in x.items()]
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return [(f".{name}", item) for name, item in zip(x._fields, x, strict=True)]
    if isinstance(x, list | tuple | deque | UserList):
        return [(f"[{i}]", item) for i, item in enumerate(x)]
    if isinstance(x, set):
        return [("", item) for item in x]
    return [(f".{name}", item) for name, item in attributes_of(x)] if _is_container(x) else []
