"""What a meta-update must leave as it found it: parameters, gradients, buffers, modes and random number generators.

``as_found`` puts back all but the generators, which ``same_random_numbers`` does for each loss. Nothing here knows of Φ
or of the paper.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from metaadamw_lite.sharding import local, reshard


@contextmanager
def as_found(model: nn.Module, params: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], "Surroundings"]]:
    """Leave parameters, gradients, buffers and train/eval modes as they are, whatever the block does or raises.

    Inside the block every ``.grad`` is None, so that nothing can be added to the gradients of the caller.

    Yields:
        Copies of the values of ``params`` (where they are sharded, of this process's parts), and everything else that a
        forward pass may change.
    """
    reshard(model)  # after a forward pass without a backward pass it holds whole parameters, which are not its own
    parts = [local(p) for p in params]
    theta = [part.detach().clone() for part in parts]
    grads = {p: p.grad for p in (*model.parameters(), *params)}
    modes = [(module, module.training) for module in model.modules()]
    surroundings = Surroundings(model, params)
    try:
        for p in grads:
            p.grad = None
        yield theta, surroundings
    finally:
        for p, grad in grads.items():
            p.grad = grad
        for module, training in modes:
            module.training = training
        reshard(model)
        with torch.no_grad():
            write(parts, theta)
        surroundings.put_back()
        torch.clear_autocast_cache()


class Surroundings:
    """What a forward pass may change beside θ: buffers, and parameters that are not trained (a MoCo's key encoder).

    Args:
        model: whose.
        params: what is trained, θ. Other parameters are copied where they are at most twice as large as these in all;
            a large frozen model below a small adapter would double its memory, so of that only fingerprints are kept.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor]) -> None:
        self._tables = [
            (module, dict(module._buffers), set(_non_persistent(module) or ())) for module in model.modules()
        ]
        buffers = {buffer for _, named, _ in self._tables for buffer in named.values() if buffer is not None}
        trained = set(params)
        others = {name: p for name, p in model.named_parameters() if p not in trained and p.device.type != "meta"}
        few = sum(p.numel() for p in others.values()) <= 2 * sum(p.numel() for p in params)
        kept = [x for x in (*buffers, *(others.values() if few else ())) if x.device.type != "meta"]
        self._values = [(x, _copy(local(x).detach())) for x in kept]
        self._frozen = {} if few else {name: (p, _fingerprint(p)) for name, p in others.items()}
        self._is_new = True

    def refuse_changes(self) -> None:
        """A RuntimeError if a parameter has changed that was too large to be copied. It stays as it is."""
        for name, (p, before) in self._frozen.items():
            if _fingerprint(p) != before:
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
        pairs = [(local(x), value) for x, value in self._values]
        for x, value in pairs:
            if (x.shape, x.dtype) != (value.shape, value.dtype):  # through ``.data``, or by ``resize_``
                with torch.inference_mode(x.is_inference()):
                    x.data = value.clone()
        pairs = [(_without_repetitions(x), _without_repetitions(value)) for x, value in pairs]
        on_host = [x.device.type == "cpu" or x.layout != torch.strided for x, _ in pairs]
        elsewhere = [(x.data, value) for (x, value), here in zip(pairs, on_host, strict=True) if not here]
        if elsewhere:  # without a look, for which the host would have to wait
            torch._foreach_copy_([x for x, _ in elsewhere], [value for _, value in elsewhere])
        for (x, value), here in zip(pairs, on_host, strict=True):
            if here and not _alike(x, value):
                _overwrite(x, value)


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


def _fingerprint(x: Tensor) -> tuple[int, int]:
    """Two numbers that change with a tensor's content, of whatever type, and with its order."""
    content = local(x).detach().reshape(-1).view(torch.uint8)
    width = min(4096, max(1, content.numel()))
    whole = content[: content.numel() // width * width].reshape(-1, width)
    rows, columns = whole.sum(dim=1), whole.sum(dim=0)
    columns[: content.numel() % width] += content[whole.numel() :]  # the rest, which fills no row
    first, second = (  # a product of vectors of integers is not to be had on a GPU
        (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum() for sums in (rows, columns)
    )
    return int(first), int(second)


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
