"""The batches of a meta-update, which evaluates each of them several times.

``loss_fn`` gets copies of their containers, which it may empty. Tensors and arrays are not copied; ``Batches`` refuses
a ``loss_fn`` that writes to them.
"""

import copy
from collections import UserDict, UserList, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn

from metaadamw_lite.surroundings import SavedTensor, count_writes, differ, get_attributes, is_record, put_back


class Batches:
    """Batches whose tensors and arrays must keep their values.

    Args:
        named: the batches by name.

    Raises:
        TypeError: for an iterator, also inside a batch: it can be read only once.
    """

    def __init__(self, **named: Any) -> None:
        self._saved: dict[str, SavedTensor] = {}
        self._writes: dict[str, int | None] = {}
        self._arrays: list[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        seen: set[int] = set()
        for name, batch in named.items():
            self._keep(name, batch, seen)

    def _keep(self, name: str, x: Any, seen: set[int]) -> None:
        if isinstance(x, Iterator):
            raise TypeError(
                f"{name} is a {type(x).__name__}, which can be read only once; a meta-update evaluates each batch "
                "several times. Pass a batch: next(...) of the iterator, or a list"
            )
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, nn.Parameter):
            return  # may be θ, which a meta-update overwrites
        if isinstance(x, Tensor):
            self._saved[name], self._writes[name] = SavedTensor(x), count_writes(x)
        elif isinstance(x, np.ndarray):
            self._arrays.append((name, x, x.copy()))
        else:
            for key, item in _items(x):
                self._keep(f"{name}{key}", item, seen)

    @contextmanager
    def as_found(self) -> Iterator[None]:
        """Restore ``requires_grad`` and ``grad`` of the tensors after the block; a gradient penalty changes them."""
        leaves = [(x.x, x.x.requires_grad, x.x.grad) for x in self._saved.values() if x.x.is_leaf]
        try:
            yield
        finally:
            for x, requires_grad, grad in leaves:
                x.grad = grad
                if x.is_leaf and x.requires_grad != requires_grad:
                    x.requires_grad_(requires_grad)

    def refuse_counted_writes(self) -> None:
        """Raise a RuntimeError if torch has counted a write to a tensor, without waiting for a device."""
        for name, x in self._saved.items():
            if count_writes(x.x) != self._writes[name]:
                self._refuse(name)

    def refuse_writes(self) -> None:
        """Raise a RuntimeError if a tensor or array has changed; torch does not count writes through ``.data``."""
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
            f"loss_fn writes to {name}, so the next loss would be of another batch; let loss_fn write to a copy"
        )


def copy_containers(x: Any) -> Any:
    """Copy a batch's containers, nested ones included; tensors, arrays and other items are shared."""
    return _copy(x, {})


def _copy(x: Any, copies: dict[int, Any]) -> Any:
    if id(x) in copies:
        return copies[id(x)]
    if isinstance(x, tuple):
        items = [_copy(item, copies) for item in x]
        if all(a is b for a, b in zip(items, x, strict=True)):
            return x  # a PackedSequence, for example, whose constructor takes other arguments
        return type(x)._make(items) if hasattr(x, "_make") else type(x)(items)
    if isinstance(x, MappingProxyType):  # copy.copy refuses it
        return MappingProxyType(_copy(dict(x), copies))
    if not _is_container(x):
        return x
    twin = copies[id(x)] = copy.copy(x)
    if isinstance(x, dict):
        for key, item in x.items():
            if (other := _copy(item, copies)) is not item:
                twin[key] = other
    elif isinstance(x, list | deque):
        for i, item in enumerate(x):
            twin[i] = _copy(item, copies)
    if not isinstance(x, set):
        for name, item in get_attributes(x):
            if (other := _copy(item, copies)) is not item:
                object.__setattr__(twin, name, other)
    return twin


def _is_container(x: Any) -> bool:
    if isinstance(x, Tensor | nn.Module | type):
        return False
    return isinstance(x, dict | list | deque | set | Mapping | UserDict | UserList) or is_record(x)


def _items(x: Any) -> list[tuple[str, Any]]:
    """List the items of a container, each with its suffix in error messages: ``["labels"]``, ``[0]`` or ``.mask``."""
    if isinstance(x, Mapping):
        return [(f"[{key!r}]", item) for key, item in x.items()]
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return [(f".{name}", item) for name, item in zip(x._fields, x, strict=True)]
    if isinstance(x, list | tuple | deque | UserList):
        return [(f"[{i}]", item) for i, item in enumerate(x)]
    if isinstance(x, set):
        return [("", item) for item in x]
    return [(f".{name}", item) for name, item in get_attributes(x)] if _is_container(x) else []
