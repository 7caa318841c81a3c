"""The numbers of ``features`` and ``modulator`` with less work: what ``MetaAdamW.step`` runs.

A step has three parts, and each has its fast form here (chapter "What it costs" has the times):

* Statistics. ``Memory`` asks a BLAS library for inner products of blocks that fit the cache. What an update leaves in
  the moments of a large tensor is measured during that update, block by block, and not read again.
* Φ. It has a handful of numbers for each group but up to 128 layers, so calling modules costs more than arithmetic.
  ``PlainModulator`` is one NumPy loop with everything that can be multiplied beforehand.
* The update. It is torch's fused kernel, called block by block for large tensors.

On the CPU all of it gives what the readable version gives, up to rounding; the tests compare them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from metaadamw_lite.features import TensorState, inner_products
from metaadamw_lite.modulator import LARGEST_FEATURE, Modulator

BLOCK = 2**18
"""Numbers in a block: 1 MiB of float32. Smaller ones cost more calls, larger ones digits: a norm from a float32 sum of
that many squares is good to about 1e-6, one from a sum of 10⁸ to 1e-2."""

READ_AT_ONCE = 2**16
"""Smaller tensors are left to one core, which is done with them before a second one has started."""
FULL = (torch.float32, torch.float64)
LARGE, SMALL = 1e36, 1e-30
"""Squares taken in float32 beyond these may have overflowed, or lost the digits that a cosine needs."""
ONE = torch.tensor(1.0, device="cpu")
"""Wrapped once, as torch does for the same reason: adding a Python number to many tensors wraps it anew for each."""

Array = np.ndarray[Any, np.dtype[Any]]


Products = tuple[float, float, float, float, float]
"""⟨g, g⟩, ⟨g, m⟩, ⟨m, m⟩, ⟨θ, θ⟩ and ⟨v, v⟩."""
Squares = tuple[float, float]
"""⟨m, m⟩ and ⟨v, v⟩."""


class Bucket(NamedTuple):
    """Tensors that share a parameter group and a modulation group: a list for each thing that a step needs of them.

    Attributes:
        settings: the parameter group.
        k: number of the modulation group.
        params: the parameters.
        theta, g, m, v: this process's parts of parameters, gradients and moments: all of them, unless the parameters
            are sharded.
        step: step counts; none where nothing is to move.
    """

    settings: dict[str, Any]
    k: int
    params: list[Tensor]
    theta: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    step: list[Tensor]

    def keep(self, indices: Sequence[int]) -> "Bucket":
        """The bucket with some of its tensors."""
        columns = (self.params, self.theta, self.g, self.m, self.v, self.step)
        return Bucket(self.settings, self.k, *([column[i] for i in indices] for column in columns))


class Kept:
    """What is kept of a parameter from step to step: its memory, to be read, and what the last update left in m and v.

    θ itself is read in every step: others write to it, and not always so that torch notices (``p.data.clamp_()``).

    Args:
        theta, m, v: the parameter and its moments: float32 or float64, in the CPU's memory, without gaps, in one order.
    """

    __slots__ = ("blocks", "contiguous", "is_large", "layout", "order", "squares", "versions")

    def __init__(self, theta: Tensor, m: Tensor, v: Tensor) -> None:
        self.layout = layout(theta, m, v)
        self.order, self.contiguous = memory_order(theta), theta.is_contiguous()
        self.is_large = theta.numel() > READ_AT_ONCE
        flat = [in_memory_order(x) for x in (theta, m, v)]
        self.blocks: list[Any] = [torch.split(x, BLOCK) if self.is_large else x.numpy() for x in flat]
        self.squares: Squares | None = None
        self.versions = (0, 0)

    def fits(self, g: Tensor) -> bool:
        """Whether a gradient lies in the same order as the parameter."""
        return (self.contiguous and g.is_contiguous()) or memory_order(g) == self.order

    def carry(self, squares: Squares, m: Tensor, v: Tensor) -> None:
        """Remember squared norms until torch counts a write to the moments.

        A write through ``.data`` is not counted. For θ people do that; the moments are the optimizer's own.
        """
        if not (m.is_inference() or v.is_inference()):  # for these it does not count
            self.squares, self.versions = squares, (m._version, v._version)

    def carried(self, m: Tensor, v: Tensor) -> Squares | None:
        """The squared norms that the last update left in the moments, if they still hold."""
        return self.squares if self.squares and self.versions == (m._version, v._version) else None


def layout(theta: Tensor, m: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Where a parameter and its moments lie: addresses, size and strides."""
    addresses = theta.data_ptr(), m.data_ptr(), v.data_ptr()
    return *addresses, theta.numel(), theta.stride(), m.stride(), v.stride()


def memory_order(x: Tensor) -> list[tuple[int, int]]:
    """Stride and size of every dimension that has more than one element: tensors that agree in it have one order."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def has_no_gaps(order: list[tuple[int, int]]) -> bool:
    """Whether a tensor with this order fills its memory, each element in a place of its own (any permutation does)."""
    place = 1
    for stride, size in sorted(order):
        if stride != place:
            return False
        place *= size
    return True


def in_one_order(*tensors: Tensor) -> bool:
    """Whether tensors of one shape have no gaps and lie in the same order."""
    order = memory_order(tensors[0])
    return has_no_gaps(order) and all(memory_order(x) == order for x in tensors[1:])


def in_memory_order(x: Tensor) -> Tensor:
    """A tensor without gaps as a vector, without a copy: (number of elements,)."""
    return x.detach().as_strided((x.numel(),), (1,))


class Memory:
    """``features.inner_products`` of many tensors and torch's fused kernel, with as little reading as possible."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        self._disordered: set[int] = set()

    def inner_products(self, buckets: Sequence[Bucket]) -> Tensor:
        """The inner products of the buckets' n tensors, in order: (n, 5).

        In float64 on the CPU; where a tensor is on a GPU, there, without waiting for it.
        """
        states = [state for b in buckets for state in zip(b.theta, b.g, b.m, b.v, strict=True)]
        self._disordered.clear()
        if any(theta.device.type != "cpu" for theta, *_ in states):
            on_host = [state for state in states if state[0].device.type == "cpu"]
            self._disordered.update(id(state[0]) for state in on_host if not in_one_order(*state))
            return _inner_products_on_device(states)
        with np.errstate(over="ignore", invalid="ignore"):
            rows = [self._products(*state) for state in states]
        products = np.array(rows, dtype=np.float64).reshape(len(rows), 5)
        doubtful = (products > LARGE).any(axis=1) | (products[:, [0, 2, 4]] < SMALL).any(axis=1)
        for i in np.flatnonzero(doubtful):
            state = TensorState(*states[i])
            if products[i].max() > LARGE or (state.g.any() and state.m.any()) or state.v.any():
                products[i] = inner_products(state)
        return torch.from_numpy(products)

    def _products(self, theta: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Products:
        kept = self._of(theta, m, v)
        if kept is None or g.dtype != theta.dtype or not kept.fits(g):
            if not in_one_order(theta, g, m, v):
                self._disordered.add(id(theta))
            return inner_products(TensorState(theta, g, m, v))
        if kept.is_large:
            return _in_blocks(torch.split(in_memory_order(g), BLOCK), kept, kept.carried(m, v))
        x = in_memory_order(g).numpy()
        t, y, w = kept.blocks
        return x.dot(x), x.dot(y), y.dot(y), t.dot(t), w.dot(w)

    def _of(self, theta: Tensor, m: Tensor, v: Tensor) -> Kept | None:
        """What is kept of a parameter, made anew if its memory is elsewhere; None if it cannot be read as a vector."""
        kept = self._kept.get(id(theta))
        if kept is None or kept.layout != layout(theta, m, v):
            alike = m.dtype == v.dtype == theta.dtype and in_one_order(theta, m, v)
            if not (alike and theta.dtype in FULL and theta.numel()):
                self._kept.pop(id(theta), None)
                return None
            kept = self._kept[id(theta)] = Kept(theta, m, v)
        return kept

    def fused_adamw(self, buckets: Sequence[Bucket], factors: Sequence[tuple[float, float]]) -> None:
        """One step of torch's fused kernel for tensors on the CPU, on large ones block by block.

        What it leaves in a block is measured while it is in the cache. Tensors that ``inner_products`` has just found
        to lie in different orders, or with gaps, are left to torch's plain loop: its fused CPU kernel takes elements as
        they come in memory and gives wrong results then, without a warning (seen in torch 2.15).

        Args:
            buckets: what to move.
            factors: α and β of each modulation group.
        """
        pairs = [pair for bucket in buckets for pair in zip(bucket.theta, bucket.step, strict=True)]
        steps = [step for theta, step in pairs if id(theta) not in self._disordered]
        if steps:
            torch._foreach_add_(steps, ONE)
        for bucket in buckets:
            alpha, beta = factors[bucket.k]
            lr, weight_decay = float(bucket.settings["lr"]) * alpha, beta * bucket.settings["weight_decay"]
            if self._disordered:
                disordered = [id(theta) in self._disordered for theta in bucket.theta]
                torch_adamw(bucket.keep([i for i, d in enumerate(disordered) if d]), lr, weight_decay, False, False)
                bucket = bucket.keep([i for i, d in enumerate(disordered) if not d])
            if any(x.numel() > READ_AT_ONCE for x in bucket.theta):
                in_blocks = [self._move_in_blocks(bucket, i, lr, weight_decay) for i in range(len(bucket.theta))]
                bucket = bucket.keep([i for i, done in enumerate(in_blocks) if not done])
            if bucket.theta:
                fused_adamw(bucket, lr, weight_decay)

    def _move_in_blocks(self, bucket: Bucket, i: int, lr: float, weight_decay: float) -> bool:
        """Move the i-th tensor of a bucket, if it is large and lies in order; whether that was so."""
        theta, g, m, v, step = bucket.theta[i], bucket.g[i], bucket.m[i], bucket.v[i], bucket.step[i]
        kept = self._kept.get(id(theta))  # ``inner_products`` has just checked it
        if kept is None or not kept.is_large or g.dtype != theta.dtype:
            return False
        squares: list[Squares] = []
        for t, x, y, w in zip(kept.blocks[0], torch.split(in_memory_order(g), BLOCK), *kept.blocks[1:], strict=True):
            fused_adamw(bucket._replace(theta=[t], g=[x], m=[y], v=[w], step=[step]), lr, weight_decay)
            squares.append((torch.dot(y, y).item(), torch.dot(w, w).item()))
        if bucket.params[i] is theta:  # writes to a sharded moment are not counted by its parts
            mm, vv = zip(*squares, strict=True)
            kept.carry((sum(mm), sum(vv)), m, v)
        return True


def torch_adamw(
    bucket: Bucket, lr: float | Tensor, weight_decay: float, foreach: bool | None, fused: bool | None
) -> None:
    """A call of torch's functional AdamW, which counts the step itself."""
    adamw(
        bucket.theta,
        bucket.g,
        bucket.m,
        bucket.v,
        [],
        bucket.step,
        foreach=foreach,
        fused=fused,
        amsgrad=False,
        beta1=bucket.settings["betas"][0],
        beta2=bucket.settings["betas"][1],
        lr=lr,
        weight_decay=weight_decay,
        eps=bucket.settings["eps"],
        maximize=False,
    )


def fused_adamw(bucket: Bucket, lr: float | Tensor, weight_decay: float) -> None:
    """A call of torch's fused kernel, which takes step counts that include this step."""
    (beta1, beta2), eps = bucket.settings["betas"], bucket.settings["eps"]
    torch._fused_adamw_(
        bucket.theta,
        bucket.g,
        bucket.m,
        bucket.v,
        [],
        bucket.step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )


def _in_blocks(g: Sequence[Tensor], kept: Kept, carried: Squares | None) -> Products:
    products = [(torch.dot(x, x).item(), torch.dot(x, y).item()) for x, y in zip(g, kept.blocks[1], strict=True)]
    gg, gm = (sum(column) for column in zip(*products, strict=True))
    theta, m, v = kept.blocks
    if carried is None:  # summed as they are during an update, so that a resumed run has the same bits
        mm, vv = (sum([torch.dot(x, x).item() for x in blocks]) for blocks in (m, v))
        carried = mm, vv
    mm, vv = carried
    return gg, gm, mm, sum([torch.dot(x, x).item() for x in theta]), vv


def _inner_products_on_device(states: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """The inner products, (n, 5), without waiting for the device; squared norms in float64 where it has that.

    ⟨g, m⟩ is taken in the precision of the parameters, so the cosine is not to be relied on where ‖g‖ or ‖m‖ is below
    1e-19 or above 1e19.
    """
    device = states[0][0].device
    thetas, gs, ms, vs = ([x.detach() for x in column] for column in zip(*states, strict=True))
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def column(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([x.to(device, dtype) for x in values])

    gg, mm, tt, vv = (column(torch._foreach_norm(tensors, dtype=dtype)).square() for tensors in (gs, ms, thetas, vs))
    wide = [torch.promote_types(x.dtype, torch.float32) for x in gs]
    gm = column([torch.dot(x.to(d).flatten(), y.to(d).flatten()) for x, y, d in zip(gs, ms, wide, strict=True)])
    return torch.stack([gg, gm, mm, tt, vv], dim=1)


def in_one_buffer(module: nn.Module) -> Tensor:
    """Move the parameters of a module into one buffer, in place, and return it."""
    parameters = list(module.parameters())
    with torch.inference_mode(False):
        buffer = torch.cat([p.detach().reshape(-1) for p in parameters])
        start = 0
        for p in parameters:
            p.data = buffer[start : start + p.numel()].view_as(p)
            start += p.numel()
    return buffer


class PlainModulator:
    """Φ as one loop over its layers, on the CPU in float64, without gradients.

    Everything that Φ does with its token vectors z is linear, apart from softmax, ReLU and the division by the
    standard deviation: they are centred (before that division) and mapped to the output. So the loop carries Cz, with
    C = I − 11ᵀ/D, and W_out·z, stacked in one matrix with a column for each group; C and W_out are multiplied into the
    matrices that add to z, the gain and bias of the layer norms into those that read z, and a row of ones carries the
    biases.

    Args:
        modulator: Φ, on the CPU in float32 or float64. Its parameters are moved into one buffer, so that a change of
            any of them, however it is made, is noticed by one comparison.
    """

    def __init__(self, modulator: Modulator) -> None:
        self.modulator = modulator
        self._live: Array = in_one_buffer(modulator).numpy()
        self._seen = self._live.copy()
        modules = list(modulator.modules())
        self._addresses = [(p, p.data_ptr()) for p in modulator.parameters()]
        tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._modules)]
        self._members = [(table, name, member) for table in tables for name, member in table.items()]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [vars(m) for m in modules]
        self._fold()

    def is_hooked(self) -> bool:
        """Whether somebody wants to see a module at work, or has put another ``forward`` in its place."""
        return any(self._hooks) or any("forward" in attributes for attributes in self._attributes)

    def is_current(self, modulator: nn.Module) -> bool:
        """Whether Φ is still this module with these parts and weights.

        Plain attributes of its layers (an activation, an ε, the number of heads) are not looked at: ``Modulator`` never
        changes them, and whoever does has to use a subclass of it.
        """
        return (
            modulator is self.modulator
            and all(members.get(name) is member for members, name, member in self._members)
            and all(p.data_ptr() == address for p, address in self._addresses)
            and np.array_equal(self._live, self._seen)
        )

    def _fold(self) -> None:
        phi = self.modulator
        width = phi.output.in_features
        out, b_out = _array(phi.output.weight), _array(phi.output.bias)
        keep = np.concatenate([np.eye(width) - 1 / width, out])  # [C; W_out]
        self._enter = keep
        self._b_out = b_out[:, None]
        self._mean = np.full((1, width), 1 / width)
        self._gates = None if phi.gates is None else 1 / (1 + np.exp(-_array(phi.gates)))
        self._embeddings = None if phi.embeddings is None else _array(phi.embeddings)
        self._layers = []
        for layer in phi.encoder.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            attention = layer.self_attn
            heads, d = attention.num_heads, width // attention.num_heads
            assert attention.in_proj_weight is not None
            read = _with_norm(attention.in_proj_weight, attention.in_proj_bias, layer.norm1)
            read[:width] /= math.sqrt(d)  # the scores are qᵀk/√d
            # A row of ones below the values of each head makes the softmax's denominator in the same product.
            values = np.zeros((heads, d + 1, width + 1))
            values[:, :d] = read[2 * width :].reshape(heads, d, width + 1)
            values[:, d, width] = 1
            read = np.concatenate([read[: 2 * width], values.reshape(-1, width + 1)])
            write = np.zeros((len(keep), heads, d + 1))
            write[:, :, :d] = (keep @ _array(attention.out_proj.weight)).reshape(len(keep), heads, d)
            write[:, 0, d] = keep @ _array(attention.out_proj.bias)  # after the division, these rows are ones
            up = _with_norm(layer.linear1.weight, layer.linear1.bias, layer.norm2)
            up = np.concatenate([up, np.eye(1, width + 1, width)])  # one more unit, which is always 1
            down = np.concatenate([_array(layer.linear2.weight), _array(layer.linear2.bias)[:, None]], axis=1)
            eps = (layer.norm1.eps, layer.norm2.eps)
            self._layers.append((read, write.reshape(len(keep), -1), up, keep @ down, eps))
        self._heads, self._width = heads, width

    def __call__(self, features: Array) -> tuple[Array, Array] | None:
        """α and β, each (G,), for features (G, D); None where the softmax overflows, which the module can handle."""
        f = np.clip(np.nan_to_num(features, nan=0.0), -LARGEST_FEATURE, LARGEST_FEATURE)
        if self._embeddings is not None:
            f = np.concatenate([f, self._embeddings], axis=1)
        if self._gates is not None:
            f = f * self._gates
        width, heads, groups = self._width, self._heads, len(f)
        z = self._enter @ f.T  # [Cz; W_out·z]
        normed = np.ones((width + 1, groups))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for read, write, up, down, (eps1, eps2) in self._layers:
                centred = z[:width]
                np.divide(centred, np.sqrt(self._mean @ (centred * centred) + eps1), out=normed[:width])
                qkv = read @ normed
                q = qkv[:width].reshape(heads, -1, groups)
                k = qkv[width : 2 * width].reshape(heads, -1, groups)
                v = qkv[2 * width :].reshape(heads, -1, groups)
                sums = v @ np.exp(k.transpose(0, 2, 1) @ q)
                z = z + write @ (sums / sums[:, -1:]).reshape(-1, groups)
                centred = z[:width]
                np.divide(centred, np.sqrt(self._mean @ (centred * centred) + eps2), out=normed[:width])
                z += down @ np.maximum(up @ normed, 0)
            alpha_raw, beta_raw = z[width : width + 2] + self._b_out[:2]
            if not np.isfinite(alpha_raw + beta_raw).all():
                return None
            phi = self.modulator
            alpha = 1 + phi.alpha_range * (1 / (1 + np.exp(-alpha_raw)) - 0.5)  # Eq. 7
            return alpha, 1 + phi.beta_range * (1 / (1 + np.exp(-beta_raw)) - 0.5)  # Eq. 8


def _array(x: Tensor) -> Array:
    return x.detach().double().numpy()


def _with_norm(weight: Tensor, bias: Tensor, norm: nn.LayerNorm) -> Array:
    """[W·diag(gain), W·shift + b]: a linear map of layer norm's output as one of the normed vector with a 1 below."""
    w = _array(weight)
    return np.concatenate([w * _array(norm.weight), (w @ _array(norm.bias) + _array(bias))[:, None]], axis=1)
