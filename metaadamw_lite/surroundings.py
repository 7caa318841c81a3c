"""Leave as found whatever a meta-update touches: parameters, gradients, modes, and the state beside them.

``as_found`` puts back all but torch's, Python's and NumPy's own random number generators, which ``same_random_numbers``
does for each loss. Nothing here knows of Φ or of the paper.
"""

import copy
import random
from collections import UserDict, UserList, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from inspect import isroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from metaadamw_lite.sharding import local, reshard

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
"""Tables of parameters, buffers, children and hooks, which are not state of a module's own."""

_BY_VALUE = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
"""Types that torch copies and compares on every device; others are taken as bytes."""


@contextmanager
def as_found(
    model: nn.Module, params: Sequence[Tensor], also: Any = ()
) -> Iterator[tuple[list[Tensor], "Surroundings"]]:
    """Leave parameters, gradients, train/eval modes and other state as they are, whatever the block does or raises.

    Inside the block every ``.grad`` is None, so that nothing can be added to the gradients of the caller.

    Args:
        model, params, also: as for ``Surroundings``.

    Yields:
        Copies of the values of ``params`` (where they are sharded, of this process's parts), and everything else that a
        forward pass may change.
    """
    roots = [model, *(x for x in _listed(also) if isinstance(x, nn.Module))]
    for root in roots:
        reshard(root)  # after a forward pass without a backward pass it holds whole parameters, which are not its own
    parts = [local(p) for p in params]
    theta = [part.detach().clone() for part in parts]
    everywhere = {id(p): p for p in (*(p for root in roots for p in root.parameters()), *params)}
    grads = [(p, p.grad, p.requires_grad) for p in everywhere.values()]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    surroundings = Surroundings(model, params, also)
    try:
        for p, _, _ in grads:
            p.grad = None
        yield theta, surroundings
    finally:
        for p, grad, requires_grad in grads:
            p.grad = grad
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        for root in roots:
            reshard(root)
        with torch.no_grad():
            write(parts, theta)
        surroundings.put_back()
        torch.clear_autocast_cache()


class Surroundings:
    """Everything that a forward pass may change beside θ.

    These are buffers, parameters that are not trained (a MoCo's key encoder), and what modules hold in attributes of
    their own: numbers, tensors, arrays, random number generators and modules, also inside of lists, deques, tuples,
    sets, dicts and dataclasses. Objects of other classes are put back as objects; their content is not looked at.

    Args:
        model: whose.
        params: what is trained, θ. Other parameters are copied, the smallest first, up to twice as many numbers as
            these have; a large frozen model below a small adapter would double its memory, so the rest is only watched.
        also: what else to put back, one object or a list: modules, tensors, generators, containers of them, objects
            with ``state_dict`` and ``load_state_dict``, and others with attributes.

    Raises:
        TypeError: for an object in ``also`` whose state cannot be read.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor], also: Any = ()) -> None:
        self._tables: list[tuple[nn.Module, dict[str, Tensor | None], set[str]]] = []
        self._attributes: list[tuple[dict[str, Any], int, dict[str, Any]]] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._objects: list[tuple[Any, Any]] = []
        self._values: list[Saved] = []
        self._frozen: list[Watched] = []
        self._seen = {id(p) for p in params}
        self._memory_of_theta = [memory for p in params if (memory := _memory(p))]
        self._is_new = True
        roots = [model, *(x for x in _listed(also) if isinstance(x, nn.Module))]
        self._room = 2 * sum(p.numel() for p in params)
        self._keep_modules(roots)
        for x in _listed(also):
            self._keep_object(x)
        self._keep(also)  # a list may be what loss_fn changes

    def _keep_modules(self, roots: Sequence[nn.Module]) -> None:
        modules = [(name, m) for root in roots for name, m in root.named_modules() if not self._is_known(m)]
        others: list[tuple[str, Tensor]] = []
        for prefix, module in modules:
            self._tables.append((module, dict(module._buffers), set(_non_persistent(module) or ())))
            for buffer in module._buffers.values():
                if buffer is not None and not self._is_known(buffer) and not self._is_theta(buffer):
                    self._values.append(Saved(buffer))
            for name, p in module._parameters.items():
                if p is not None and not self._is_known(p) and not self._is_theta(p):
                    others.append((f"{prefix}.{name}" if prefix else name, p))
        for name, p in sorted(others, key=lambda other: other[1].numel()):
            if p.numel() <= self._room:
                self._room -= p.numel()
                self._values.append(Saved(p))
            else:
                self._frozen.append(Watched(name, p))
        for _, module in modules:
            self._keep_attributes(vars(module), _OF_EVERY_MODULE)

    def _keep_attributes(self, table: dict[str, Any], but: frozenset[str] = frozenset()) -> None:
        own = {name: x for name, x in table.items() if name not in but}
        self._attributes.append((table, len(table), own))
        for x in own.values():
            self._keep(x)

    def _keep_object(self, x: Any) -> None:
        """Keep the state of one object of ``also``, and of those in it where it is a container."""
        if self._keep(x):
            for item in x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple | deque | set) else ():
                if hasattr(item, "__dict__") and not self._is_known(item):
                    self._keep_object(item)
            return
        is_instance = not isinstance(x, type)
        if is_instance and hasattr(x, "state_dict") and hasattr(x, "load_state_dict"):
            self._objects.append((x, copy.deepcopy(x.state_dict())))
        elif is_instance and hasattr(x, "__dict__") and not isroutine(x):
            self._keep_attributes(vars(x))
        else:
            raise TypeError(
                f"also contains {type(x).__name__!r}; it takes modules, tensors, generators, containers of these, and "
                "objects with state_dict and load_state_dict"
            )

    def _keep(self, x: Any) -> bool:
        """Keep what is in a value that may change in place; False for a value whose content is not looked at."""
        if x is None or type(x) in (bool, int, float, str):
            return False
        if isinstance(x, Tensor):
            if not self._is_known(x) and not self._is_theta(x):
                self._values.append(Saved(x))
        elif isinstance(x, nn.Module):
            self._keep_modules([x])
        elif isinstance(x, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            self._generators.append((x, _state_of(x)))
        elif isinstance(x, np.ndarray):
            if x.flags.writeable and not self._is_theta(x):  # a data set mapped from a file is not to be copied
                self._arrays.append((x, x.copy()))
        elif isinstance(x, list | deque | dict | set):
            if not self._is_known(x):
                self._containers.append((x, dict(x) if isinstance(x, dict) else set(x) if isinstance(x, set) else [*x]))
                for item in x.values() if isinstance(x, dict) else x:
                    self._keep(item)
        elif isinstance(x, tuple):
            for item in x:
                self._keep(item)
        elif isinstance(x, bytearray):
            self._containers.append((x, [*x]))
        elif is_record(x):
            if self._is_known(x):
                return True
            if hasattr(x, "__dict__"):
                self._keep_attributes(vars(x))
            else:
                self._slots += [(x, name, value) for name, value in attributes_of(x)]
                for _, value in attributes_of(x):
                    self._keep(value)
        else:
            return False
        return True

    def _is_known(self, x: Any) -> bool:
        known = id(x) in self._seen
        self._seen.add(id(x))
        return known

    def _is_theta(self, x: Tensor | np.ndarray[Any, Any]) -> bool:
        """Whether a tensor or an array shares memory with θ, and so has to follow it to θ′."""
        if isinstance(x, Tensor):
            memory = _memory(x)
            return memory is not None and memory in self._memory_of_theta
        return any(x.ctypes.data in memory for memory in self._memory_of_theta)

    def refuse_changes(self) -> None:
        """A RuntimeError if a parameter has changed that was too large to be copied. It stays as it is."""
        for name in changed(self._frozen):
            raise RuntimeError(
                f"a forward pass changes the parameter {name}, which this optimizer does not train; a meta-update "
                "cannot put it back, since the parameters that are not trained are much larger than those that are"
            )

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything as it was at the start, before each loss but the first and at the end."""
        if self._is_new:
            self._is_new = False
            return
        for module, named, non_persistent in self._tables:
            table, listed = module._buffers, _non_persistent(module)
            if listed is not None and listed != non_persistent:
                listed.clear()
                listed.update(non_persistent)
            if list(table.keys()) != list(named):  # not so in a ScriptModule, whose table cannot do this
                table.clear()
                table.update(named)
            for name, buffer in named.items():
                if table[name] is not buffer:
                    table[name] = buffer
        for attributes, length, own in self._attributes:
            for name, x in own.items():
                if name not in attributes or attributes[name] is not x:
                    attributes[name] = x
            if len(attributes) != length:
                for name in set(attributes) - set(own) - _OF_EVERY_MODULE:
                    del attributes[name]
        for x, name, value in self._slots:
            object.__setattr__(x, name, value)
        for container, content in self._containers:
            _refill(container, content)
        for array, before in self._arrays:
            if array.shape == before.shape and array.flags.writeable:
                array[...] = before
        for generator, state in self._generators:
            _set_state(generator, state)
        for x, saved in self._objects:
            x.load_state_dict(copy.deepcopy(saved))
        put_back(self._values)


class Saved:
    """A tensor of any kind, with copies of its numbers: of its parts, if it is made of others."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.values = [_copy(part.detach()) for part in parts_of(x)]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The parts as they are now, beside the copies; none where the tensor has become another kind."""
        parts = parts_of(self.x)
        return list(zip(parts, self.values, strict=True)) if len(parts) == len(self.values) else []


class Watched:
    """A tensor of any kind that is too large to be copied, with a fingerprint of its numbers.

    Of one whose numbers cannot be reached there is torch's count of the writes to it.
    """

    def __init__(self, name: str, x: Tensor) -> None:
        self.name, self.x = name, x
        self.writes, self.fingerprints = self._look()

    def _look(self) -> tuple[int | None, list[Tensor]]:
        parts = [dense for part in parts_of(self.x) for dense in _dense_parts(part)]
        return (None, [_fingerprint(part) for part in parts]) if parts else (writes_to(self.x), [])

    def changes(self) -> list[Tensor]:
        """Truth values, on the device of the tensor, of which one is true if it has changed."""
        writes, fingerprints = self._look()
        if writes != self.writes or len(fingerprints) != len(self.fingerprints):
            return [torch.tensor(True)]
        return [(a != b).any() for a, b in zip(fingerprints, self.fingerprints, strict=True)]


def changed(watched: Sequence[Watched]) -> list[str]:
    """The names of tensors that have changed; a device is waited for once."""
    with _plainly():
        found = [(x.name, change) for x in watched for change in x.changes()]
        return [
            name for (name, _), is_true in zip(found, _read([change for _, change in found]), strict=True) if is_true
        ]


def put_back(saved: Sequence[Saved]) -> None:
    """Write the copies to the tensors that they were taken of, where they differ."""
    with _plainly(), torch.no_grad():
        pairs = [pair for x in saved for pair in x.pairs()]
        ready = []
        for x, value in pairs:
            if (x.shape, x.dtype) != (value.shape, value.dtype):  # through ``.data``, or by ``resize_``
                with torch.inference_mode(x.is_inference()):
                    x.data = value.clone()
            ready.append((_without_repetitions(x), _without_repetitions(value)))
        on_host = [x.device.type == "cpu" or x.layout != torch.strided for x, _ in ready]
        elsewhere = [(x.data, value) for (x, value), here in zip(ready, on_host, strict=True) if not here]
        if elsewhere:  # without a look, for which the host would have to wait
            torch._foreach_copy_([x for x, _ in elsewhere], [value for _, value in elsewhere])
        for (x, value), here in zip(ready, on_host, strict=True):
            if here and not _alike(x, value):
                _overwrite(x, value)


def differ(saved: Sequence[Saved]) -> list[bool]:
    """Whether each tensor holds other numbers than its copies do; a device is waited for once."""
    with _plainly(), torch.no_grad():
        found: list[tuple[int, Tensor]] = []
        for i, x in enumerate(saved):
            for a, b in x.pairs():
                for one, two in zip(_dense_parts(a.detach()), _dense_parts(b), strict=True):
                    if (one.shape, one.dtype) != (two.shape, two.dtype):
                        found.append((i, torch.tensor(True)))
                    else:
                        found.append((i, ((one != two) & ~((one != one) & (two != two))).any()))
        answer = [False] * len(saved)
        for (i, _), is_true in zip(found, _read([change for _, change in found]), strict=True):
            answer[i] |= is_true
        return answer


def writes_to(x: Tensor) -> int | None:
    """How often torch has seen a tensor written to; None for one made in inference mode, which is not counted."""
    return None if x.is_inference() else x._version


def parts_of(x: Tensor) -> list[Tensor]:
    """Tensors that torch can copy and compare and that share the memory of ``x``: itself, where it is of that kind.

    A subclass made of other tensors (quantised weights, jagged tensors, this process's part of a ``DTensor``) is these
    others; a type with an arithmetic of its own (float8, packed integers, complex32) is its bytes. Nothing for what
    opens in neither way, and on the meta device.
    """
    with _plainly():
        x = local(x)
        if x.device.type == "meta":
            return []
        if is_traceable_wrapper_subclass(x):
            names, _ = x.__tensor_flatten__()
            return [part for name in names for part in parts_of(getattr(x, name))]
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return []
        if x.is_nested:
            return parts_of(x.values())
        if x.layout in _SPARSE or (x.layout == torch.strided and x.dtype in _BY_VALUE):
            return [x]
        return [_bytes(x)] if x.layout == torch.strided else []


def is_record(x: Any) -> bool:
    """Whether an object only holds others, under names: a dataclass, a namespace, a dict or list of ``collections``."""
    known = is_dataclass(x) and not isinstance(x, type)
    return known or isinstance(x, SimpleNamespace | UserDict | UserList)


def attributes_of(x: Any) -> list[tuple[str, Any]]:
    """The attributes of an object, also of a dataclass that keeps its fields in slots."""
    slots = [f.name for f in fields(x)] if is_dataclass(x) and not hasattr(x, "__dict__") else []
    return [*getattr(x, "__dict__", {}).items(), *((name, getattr(x, name)) for name in slots if hasattr(x, name))]


@contextmanager
def same_random_numbers(devices: Sequence[torch.device]) -> Iterator[None]:
    """Run a block and put back every random number generator it may have used (torch's, Python's and NumPy's)."""
    accelerators = {d for d in devices if d.type not in ("cpu", "meta")}
    kind = next(iter(accelerators)).type if accelerators else "cuda"
    indices = sorted({d.index or 0 for d in accelerators if d.type == kind})
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 (the losses of others use the global generator)
    try:
        with torch.random.fork_rng(indices, device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _fingerprint(x: Tensor) -> Tensor:
    """Two numbers that change with a dense tensor's content, of whatever type, and with its order."""
    content = x.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)
    width = min(4096, max(1, content.numel()))
    whole = content[: content.numel() // width * width].reshape(-1, width)
    rows, columns = whole.sum(dim=1), whole.sum(dim=0)
    columns[: content.numel() % width] += content[whole.numel() :]  # the rest, which fills no row
    first, second = (  # a product of vectors of integers is not to be had on a GPU
        (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum() for sums in (rows, columns)
    )
    return torch.stack((first, second))


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc)


def _plainly() -> Any:
    """A context in which subclasses of ``Tensor`` are what they are made of, without functions of their own."""
    return torch._C.DisableTorchFunctionSubclass()


def _listed(also: Any) -> Sequence[Any]:
    return also if isinstance(also, list | tuple) else (also,)


def _bytes(x: Tensor) -> Tensor:
    """The bytes from the first to the last number of a tensor of any type."""
    storage = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    if x.numel() == 0:
        return storage[:0]
    first = x.storage_offset() * x.element_size()
    length = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return storage[first : first + length * x.element_size()]


def _memory(x: Tensor) -> range | None:
    """The addresses of a tensor's memory; None for one that has none of its own."""
    x = local(x)
    is_plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_traceable_wrapper_subclass(x)
    if not is_plain or x.layout != torch.strided or x.is_nested:
        return None
    storage = x.untyped_storage()
    first = storage.data_ptr()
    return range(first, first + storage.nbytes()) if first else None


def _read(truths: Sequence[Tensor]) -> list[bool]:
    """Truth values of any devices, each of which is waited for once."""
    answer = [False] * len(truths)
    for device in {x.device for x in truths}:
        here = [i for i, x in enumerate(truths) if x.device == device]
        for i, is_true in zip(here, torch.stack([truths[i] for i in here]).tolist(), strict=True):
            answer[i] = is_true
    return answer


def _state_of(generator: Any) -> Any:
    """The state of one of torch's, NumPy's or Python's random number generators."""
    if isinstance(generator, np.random.Generator):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _refill(container: Any, content: Any) -> None:
    """Give a list, deque, set or dict this content and this order, if it has another."""
    if isinstance(container, dict):
        pairs = zip(container.items(), content.items(), strict=False)
        if len(container) != len(content) or not all(k is n and x is y for (k, x), (n, y) in pairs):
            container.clear()
            container.update(content)
    elif isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
    elif len(container) != len(content) or not all(x is y for x, y in zip(container, content, strict=True)):
        container.clear()
        container.extend(content)


def _overwrite(x: Tensor, value: Tensor) -> None:
    """Write a value to a dense or sparse tensor."""
    if x.layout == torch.sparse_coo:  # has no ``.data`` that could be written to
        x.copy_(value)
        return
    with torch.inference_mode(x.is_inference()):
        x.data.copy_(value)  # a graph that is not yet used up may hold x, and torch would refuse that


def _non_persistent(module: nn.Module) -> set[str] | None:
    """The names of a module's buffers that ``state_dict`` leaves out; None for a ScriptModule, which keeps no list."""
    return vars(module).get("_non_persistent_buffers_set")


def _without_repetitions(x: Tensor) -> Tensor:
    """A view of a tensor that has each element of an expanded dimension once; torch writes to no other."""
    if x.layout == torch.strided:
        for dim, (step, size) in enumerate(zip(x.stride(), x.shape, strict=True)):
            if step == 0 and size > 1:
                x = x.narrow(dim, 0, 1)
    return x


def _copy(x: Tensor) -> Tensor:
    """A copy of a tensor's values, expanded where it is."""
    return _without_repetitions(x).clone().expand_as(x) if x.layout == torch.strided else x.clone()


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors, dense or sparse, hold the same numbers."""
    return all(torch.equal(a, b) for a, b in zip(_dense_parts(x), _dense_parts(y), strict=True))


def _dense_parts(x: Tensor) -> tuple[Tensor, ...]:
    if x.layout == torch.sparse_coo:
        return x._indices(), x._values()
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.crow_indices(), x.col_indices(), x.values()
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return x.ccol_indices(), x.row_indices(), x.values()
    return (x,)


def write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give parameters (or parts of them) these values."""
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
