"""Restore everything that a meta-update touches: parameters, gradients, modes, and other state of the model.

``as_found`` does so for a block of code. The global random number generators of torch, Python and NumPy are restored by
``same_random_numbers`` after each loss. Nothing here depends on Φ or the paper.
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
"""Attributes of every ``nn.Module``: tables of parameters, buffers, children and hooks."""

_BY_VALUE = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
"""Dtypes that torch copies and compares on every device; tensors of others are handled as bytes."""


@contextmanager
def as_found(
    model: nn.Module, params: Sequence[Tensor], also: Any = ()
) -> Iterator[tuple[list[Tensor], "Surroundings"]]:
    """Restore parameters, gradients, train/eval modes and other state after the block, also after an error.

    Inside the block every ``.grad`` is None, so nothing can be added to the caller's gradients.

    Args:
        model, params, also: as for ``Surroundings``.

    Yields:
        Copies of the values of ``params`` (of this process's parts, if sharded), and the ``Surroundings``.
    """
    roots = [model, *(x for x in _as_list(also) if isinstance(x, nn.Module))]
    for root in roots:
        reshard(root)  # after a forward pass without a backward pass it still holds gathered parameters
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
    """A copy of all state, except θ, that a forward pass may change.

    It holds buffers, untrained parameters (a MoCo's key encoder), and attributes of modules: numbers, tensors, arrays,
    random number generators and modules, also inside lists, deques, tuples, sets, dicts and dataclasses. Of objects of
    other classes it restores the reference, not the content.

    Args:
        model: the model.
        params: the trained parameters, θ. Other parameters are copied, the smallest first, up to twice the number of
            elements of θ. The rest, a large frozen model below a small adapter for example, is only watched: copies
            would double its memory.
        also: other objects to restore, one or a list: modules, tensors, generators, containers of them, objects with
            ``state_dict`` and ``load_state_dict``, and others with attributes.

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
        self._values: list[SavedTensor] = []
        self._frozen: list[WatchedTensor] = []
        self._seen = {id(p) for p in params}
        self._memory_of_theta = [memory for p in params if (memory := _get_addresses(p))]
        self._is_new = True
        roots = [model, *(x for x in _as_list(also) if isinstance(x, nn.Module))]
        self._room = 2 * sum(p.numel() for p in params)
        self._keep_modules(roots)
        for x in _as_list(also):
            self._keep_object(x)
        self._keep(also)  # loss_fn may change the list itself

    def _keep_modules(self, roots: Sequence[nn.Module]) -> None:
        modules = [(name, m) for root in roots for name, m in root.named_modules() if not self._is_known(m)]
        others: list[tuple[str, Tensor]] = []
        for prefix, module in modules:
            self._tables.append((module, dict(module._buffers), set(_get_non_persistent(module) or ())))
            for buffer in module._buffers.values():
                if buffer is not None and not self._is_known(buffer) and not self._shares_theta(buffer):
                    self._values.append(SavedTensor(buffer))
            for name, p in module._parameters.items():
                if p is not None and not self._is_known(p) and not self._shares_theta(p):
                    others.append((f"{prefix}.{name}" if prefix else name, p))
        for name, p in sorted(others, key=lambda other: other[1].numel()):
            if p.numel() <= self._room:
                self._room -= p.numel()
                self._values.append(SavedTensor(p))
            else:
                self._frozen.append(WatchedTensor(name, p))
        for _, module in modules:
            self._keep_attributes(vars(module), _OF_EVERY_MODULE)

    def _keep_attributes(self, table: dict[str, Any], but: frozenset[str] = frozenset()) -> None:
        own = {name: x for name, x in table.items() if name not in but}
        self._attributes.append((table, len(table), own))
        for x in own.values():
            self._keep(x)

    def _keep_object(self, x: Any) -> None:
        """Keep the state of one object of ``also``, and of the objects in it if it is a container."""
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
        """Keep the content of a value that may change in place; return False if its class is not covered."""
        if x is None or type(x) in (bool, int, float, str):
            return False
        if isinstance(x, Tensor):
            if not self._is_known(x) and not self._shares_theta(x):
                self._values.append(SavedTensor(x))
        elif isinstance(x, nn.Module):
            self._keep_modules([x])
        elif isinstance(x, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            self._generators.append((x, _get_state(x)))
        elif isinstance(x, np.ndarray):
            if x.flags.writeable and not self._shares_theta(x):  # no copy of a read-only data set in a file
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
                self._slots += [(x, name, value) for name, value in get_attributes(x)]
                for _, value in get_attributes(x):
                    self._keep(value)
        else:
            return False
        return True

    def _is_known(self, x: Any) -> bool:
        """Return whether an object was met before, and remember it."""
        known = id(x) in self._seen
        self._seen.add(id(x))
        return known

    def _shares_theta(self, x: Tensor | np.ndarray[Any, Any]) -> bool:
        """Return whether a tensor or an array shares memory with θ; it must then follow it to θ′."""
        if isinstance(x, Tensor):
            memory = _get_addresses(x)
            return memory is not None and memory in self._memory_of_theta
        return any(x.ctypes.data in memory for memory in self._memory_of_theta)

    def refuse_changes(self) -> None:
        """Raise a RuntimeError if a parameter that is only watched has changed. It keeps the change."""
        for name in list_changed(self._frozen):
            raise RuntimeError(
                f"a forward pass changes the parameter {name}, which this optimizer does not train; a meta-update "
                "cannot restore it, because it copies untrained parameters only up to twice the size of the trained "
                "ones"
            )

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore everything, before each loss and at the end; the first call does nothing."""
        if self._is_new:
            self._is_new = False
            return
        for module, named, non_persistent in self._tables:
            table, listed = module._buffers, _get_non_persistent(module)
            if listed is not None and listed != non_persistent:
                listed.clear()
                listed.update(non_persistent)
            if list(table.keys()) != list(named):  # never for a ScriptModule, whose table has no clear()
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


class SavedTensor:
    """A tensor ``x`` of any kind, with copies of its parts (``get_parts``)."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.values = [_copy(part.detach()) for part in get_parts(x)]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """List the pairs (current part, copy); empty if the tensor has become another kind."""
        parts = get_parts(self.x)
        return list(zip(parts, self.values, strict=True)) if len(parts) == len(self.values) else []


class WatchedTensor:
    """A tensor of any kind, too large to copy, with a fingerprint of its elements.

    If the elements cannot be read, torch's count of writes to the tensor is the fingerprint.
    """

    def __init__(self, name: str, x: Tensor) -> None:
        self.name, self.x = name, x
        self.writes, self.fingerprints = self._read()

    def _read(self) -> tuple[int | None, list[Tensor]]:
        parts = [dense for part in get_parts(self.x) for dense in _get_dense_parts(part)]
        return (None, [_fingerprint(part) for part in parts]) if parts else (count_writes(self.x), [])

    def changes(self) -> list[Tensor]:
        """Compare with the start: boolean scalars on the tensor's device, at least one of them true after a change."""
        writes, fingerprints = self._read()
        if writes != self.writes or len(fingerprints) != len(self.fingerprints):
            return [torch.tensor(True)]
        return [(a != b).any() for a, b in zip(fingerprints, self.fingerprints, strict=True)]


def list_changed(watched: Sequence[WatchedTensor]) -> list[str]:
    """List the names of tensors that have changed; waits for each device once."""
    with _disable_subclass_functions():
        found = [(x.name, change) for x in watched for change in x.changes()]
        answers = _to_bools([change for _, change in found])
        return [name for (name, _), is_true in zip(found, answers, strict=True) if is_true]


def put_back(saved: Sequence[SavedTensor]) -> None:
    """Write the copies back to the tensors that have changed."""
    with _disable_subclass_functions(), torch.no_grad():
        pairs = [pair for x in saved for pair in x.pairs()]
        ready = []
        for x, value in pairs:
            if (x.shape, x.dtype) != (value.shape, value.dtype):  # through ``.data``, or by ``resize_``
                with torch.inference_mode(x.is_inference()):
                    x.data = value.clone()
            ready.append((_unexpand(x), _unexpand(value)))
        on_host = [x.device.type == "cpu" or x.layout != torch.strided for x, _ in ready]
        elsewhere = [(x.data, value) for (x, value), here in zip(ready, on_host, strict=True) if not here]
        if elsewhere:  # without a comparison, which would wait for the device
            torch._foreach_copy_([x for x, _ in elsewhere], [value for _, value in elsewhere])
        for (x, value), here in zip(ready, on_host, strict=True):
            if here and not _are_equal(x, value):
                _overwrite(x, value)


def differ(saved: Sequence[SavedTensor]) -> list[bool]:
    """Return for each tensor whether it differs from its copies; waits for each device once."""
    with _disable_subclass_functions(), torch.no_grad():
        found: list[tuple[int, Tensor]] = []
        for i, x in enumerate(saved):
            for a, b in x.pairs():
                for one, two in zip(_get_dense_parts(a.detach()), _get_dense_parts(b), strict=True):
                    if (one.shape, one.dtype) != (two.shape, two.dtype):
                        found.append((i, torch.tensor(True)))
                    else:
                        found.append((i, ((one != two) & ~((one != one) & (two != two))).any()))
        answer = [False] * len(saved)
        for (i, _), is_true in zip(found, _to_bools([change for _, change in found]), strict=True):
            answer[i] |= is_true
        return answer


def count_writes(x: Tensor) -> int | None:
    """Return torch's count of writes to a tensor; None for an inference tensor, which has no count."""
    return None if x.is_inference() else x._version


def get_parts(x: Tensor) -> list[Tensor]:
    """Split a tensor into tensors that share its memory and that torch can copy and compare.

    * an ordinary tensor: itself;
    * a subclass made of other tensors (quantised weights, jagged tensors): these; a ``DTensor``: this process's part;
    * a dtype with limited arithmetic (float8, packed integers, complex32): its bytes;
    * other tensors, and those on the meta device: an empty list.
    """
    with _disable_subclass_functions():
        x = local(x)
        if x.device.type == "meta":
            return []
        if is_traceable_wrapper_subclass(x):
            names, _ = x.__tensor_flatten__()
            return [part for name in names for part in get_parts(getattr(x, name))]
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return []
        if x.is_nested:
            return get_parts(x.values())
        if x.layout in _SPARSE or (x.layout == torch.strided and x.dtype in _BY_VALUE):
            return [x]
        return [_view_as_bytes(x)] if x.layout == torch.strided else []


def is_record(x: Any) -> bool:
    """Return whether an object is a dataclass, a ``SimpleNamespace``, a ``UserDict`` or a ``UserList``."""
    known = is_dataclass(x) and not isinstance(x, type)
    return known or isinstance(x, SimpleNamespace | UserDict | UserList)


def get_attributes(x: Any) -> list[tuple[str, Any]]:
    """List the attributes of an object by name, including the fields of a dataclass with slots."""
    slots = [f.name for f in fields(x)] if is_dataclass(x) and not hasattr(x, "__dict__") else []
    return [*getattr(x, "__dict__", {}).items(), *((name, getattr(x, name)) for name in slots if hasattr(x, name))]


@contextmanager
def same_random_numbers(devices: Sequence[torch.device]) -> Iterator[None]:
    """Restore the global random number generators of torch (CPU and ``devices``), Python and NumPy after the block."""
    accelerators = {d for d in devices if d.type not in ("cpu", "meta")}
    kind = next(iter(accelerators)).type if accelerators else "cuda"
    indices = sorted({d.index or 0 for d in accelerators if d.type == kind})
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 (users' losses may use the global generator)
    try:
        with torch.random.fork_rng(indices, device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _fingerprint(x: Tensor) -> Tensor:
    """Compute two checksums of a dense tensor's bytes, which depend on their order."""
    content = x.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)
    width = min(4096, max(1, content.numel()))
    whole = content[: content.numel() // width * width].reshape(-1, width)
    rows, columns = whole.sum(dim=1), whole.sum(dim=0)
    columns[: content.numel() % width] += content[whole.numel() :]  # the incomplete last row
    first, second = (  # torch has no integer dot product on a GPU
        (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum() for sums in (rows, columns)
    )
    return torch.stack((first, second))


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc)


def _disable_subclass_functions() -> Any:
    """Disable ``__torch_function__`` of ``Tensor`` subclasses in a context."""
    return torch._C.DisableTorchFunctionSubclass()


def _as_list(also: Any) -> Sequence[Any]:
    return also if isinstance(also, list | tuple) else (also,)


def _view_as_bytes(x: Tensor) -> Tensor:
    """View a strided tensor of any dtype as uint8, from its first to its last element."""
    storage = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    if x.numel() == 0:
        return storage[:0]
    first = x.storage_offset() * x.element_size()
    length = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return storage[first : first + length * x.element_size()]


def _get_addresses(x: Tensor) -> range | None:
    """Return the address range of a tensor's storage; None for a tensor without a storage of its own."""
    x = local(x)
    is_plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_traceable_wrapper_subclass(x)
    if not is_plain or x.layout != torch.strided or x.is_nested:
        return None
    storage = x.untyped_storage()
    first = storage.data_ptr()
    return range(first, first + storage.nbytes()) if first else None


def _to_bools(scalars: Sequence[Tensor]) -> list[bool]:
    """Copy boolean scalars from any devices to the host; waits for each device once."""
    answer = [False] * len(scalars)
    for device in {x.device for x in scalars}:
        here = [i for i, x in enumerate(scalars) if x.device == device]
        for i, is_true in zip(here, torch.stack([scalars[i] for i in here]).tolist(), strict=True):
            answer[i] = is_true
    return answer


def _get_state(generator: Any) -> Any:
    """Return the state of a random number generator of torch, NumPy or Python."""
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
    """Restore content and order of a list, deque, set, dict or bytearray, if they have changed."""
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
    """Overwrite a dense or sparse tensor with a value."""
    if x.layout == torch.sparse_coo:  # its ``.data`` cannot be written to
        x.copy_(value)
        return
    with torch.inference_mode(x.is_inference()):
        x.data.copy_(value)  # uncounted: a graph that is still needed may hold x, and torch would refuse its backward


def _get_non_persistent(module: nn.Module) -> set[str] | None:
    """Return the names of buffers that ``state_dict`` leaves out; None for a ScriptModule, which keeps no list."""
    return vars(module).get("_non_persistent_buffers_set")


def _unexpand(x: Tensor) -> Tensor:
    """View a tensor without the repetitions of expanded dimensions, which torch refuses to write to."""
    if x.layout == torch.strided:
        for dim, (step, size) in enumerate(zip(x.stride(), x.shape, strict=True)):
            if step == 0 and size > 1:
                x = x.narrow(dim, 0, 1)
    return x


def _copy(x: Tensor) -> Tensor:
    """Copy a tensor, with the same expanded dimensions."""
    return _unexpand(x).clone().expand_as(x) if x.layout == torch.strided else x.clone()


def _are_equal(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors, dense or sparse, have the same elements."""
    return all(torch.equal(a, b) for a, b in zip(_get_dense_parts(x), _get_dense_parts(y), strict=True))


def _get_dense_parts(x: Tensor) -> tuple[Tensor, ...]:
    """Return the index and value tensors of a sparse tensor; a dense tensor by itself."""
    if x.layout == torch.sparse_coo:
        return x._indices(), x._values()
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.crow_indices(), x.col_indices(), x.values()
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return x.ccol_indices(), x.row_indices(), x.values()
    return (x,)


def write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Overwrite parameters, or parts of them, with values."""
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
