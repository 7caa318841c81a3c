"""A fast version of ``modulator.Modulator`` for the CPU: one NumPy loop over premultiplied ("folded") weights.

Φ has few numbers for each group but up to 128 layers, so calls of modules cost more than arithmetic. The loop is 1.5 to
2 times as fast as the modules (chapter "What it costs"). The tests compare the two.
"""

import math
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metaadamw_lite.modulator import LARGEST_FEATURE, Modulator

Array = np.ndarray[Any, np.dtype[Any]]


def in_one_buffer(module: nn.Module) -> Tensor:
    """Move the parameters of a module into one buffer, in place; return the one-dimensional buffer."""
    parameters = list(module.parameters())
    with torch.inference_mode(False):
        buffer = torch.cat([p.detach().reshape(-1) for p in parameters])
        start = 0
        for p in parameters:
            p.data = buffer[start : start + p.numel()].view_as(p)
            start += p.numel()
    return buffer


class FoldedModulator:
    """Φ as one NumPy loop over its layers, on the CPU in float64, without gradients.

    Layer norms and the output layer read the token vectors z only through Cz, with C = I − 11ᵀ/D, and W_out·z. The loop
    carries these two, stacked in one matrix with a column for each group. Three things are folded beforehand:

    * C and W_out, into the matrices that add to z;
    * gain and bias of each layer norm, into the matrices that read z;
    * biases, into an extra column, which a row of ones multiplies.

    Args:
        modulator: Φ, on the CPU in float32 or float64. Its parameters are moved into one buffer, so one comparison
            finds any change of them.
    """

    def __init__(self, modulator: Modulator) -> None:
        self.modulator = modulator
        self._live: Array = in_one_buffer(modulator).numpy()
        self._seen = self._live.copy()
        modules = list(modulator.modules())
        self._parameters = list(modulator.parameters())
        self._addresses = [p.data_ptr() for p in self._parameters]
        self._tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._modules) if table]
        self._members = self._look_up_members()
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [vars(m) for m in modules]
        self._fold()

    def is_hooked(self) -> bool:
        """Return whether a module of Φ has forward hooks or a replaced ``forward``."""
        return any(self._hooks) or any("forward" in attributes for attributes in self._attributes)

    def is_current(self, modulator: nn.Module) -> bool:
        """Return whether ``modulator`` is the folded module, with the same submodules and parameter values.

        Plain attributes of its layers (activation, ε, number of heads) are not compared: ``Modulator`` never changes
        them. Use a subclass to change them.
        """
        members = self._look_up_members()
        return (
            modulator is self.modulator
            and len(members) == len(self._members)
            and all(map(is_, members, self._members))
            and [p.data_ptr() for p in self._parameters] == self._addresses
            and np.array_equal(self._live, self._seen)
        )

    def _look_up_members(self) -> list[Any]:
        return list(chain.from_iterable(table.values() for table in self._tables))

    def _fold(self) -> None:
        phi = self.modulator
        width = phi.output.in_features
        out, b_out = _to_numpy(phi.output.weight), _to_numpy(phi.output.bias)
        keep = np.concatenate([np.eye(width) - 1 / width, out])  # [C; W_out]
        self._enter = keep
        self._b_out = b_out[:, None]
        self._mean = np.full((1, width), 1 / width)
        self._gates = None if phi.gates is None else 1 / (1 + np.exp(-_to_numpy(phi.gates)))
        self._embeddings = None if phi.embeddings is None else _to_numpy(phi.embeddings)
        self._layers = []
        for layer in phi.encoder.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            attention = layer.self_attn
            heads, d = attention.num_heads, width // attention.num_heads
            assert attention.in_proj_weight is not None
            read = _fold_norm(attention.in_proj_weight, attention.in_proj_bias, layer.norm1)
            read[:width] /= math.sqrt(d)  # the scores are qᵀk/√d
            # A row of ones below each head's values computes the softmax's denominator in the same product.
            values = np.zeros((heads, d + 1, width + 1))
            values[:, :d] = read[2 * width :].reshape(heads, d, width + 1)
            values[:, d, width] = 1
            read = np.concatenate([read[: 2 * width], values.reshape(-1, width + 1)])
            write = np.zeros((len(keep), heads, d + 1))
            write[:, :, :d] = (keep @ _to_numpy(attention.out_proj.weight)).reshape(len(keep), heads, d)
            write[:, 0, d] = keep @ _to_numpy(attention.out_proj.bias)  # after the division, these rows are ones
            up = _fold_norm(layer.linear1.weight, layer.linear1.bias, layer.norm2)
            up = np.concatenate([up, np.eye(1, width + 1, width)])  # one more unit, which is always 1
            down = np.concatenate([_to_numpy(layer.linear2.weight), _to_numpy(layer.linear2.bias)[:, None]], axis=1)
            eps = (layer.norm1.eps, layer.norm2.eps)
            self._layers.append((read, write.reshape(len(keep), -1), up, keep @ down, eps))
        self._heads, self._width = heads, width

    def __call__(self, features: Array) -> tuple[Array, Array] | None:
        """Compute α and β, each (G,), from features (G, D); None if the softmax overflows: the module can handle it."""
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


def _to_numpy(x: Tensor) -> Array:
    return x.detach().double().numpy()


def _fold_norm(weight: Tensor, bias: Tensor, norm: nn.LayerNorm) -> Array:
    """Fold a layer norm into the linear map behind it: [W·diag(gain), W·shift + b] acts on [normed z; 1]."""
    w = _to_numpy(weight)
    return np.concatenate([w * _to_numpy(norm.weight), (w @ _to_numpy(norm.bias) + _to_numpy(bias))[:, None]], axis=1)
