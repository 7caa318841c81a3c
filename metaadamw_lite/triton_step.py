"""A step of ``MetaAdamW`` on a GPU in a fixed number of device operations, with the kernels of ``triton_kernels``.

========================  ==========================================================
operation                 does
========================  ==========================================================
one copy to the device    the table of addresses, sizes and settings of all tensors
``sum_chunks``            inner products over chunks of tensors
``sum_tensors``           adds them up in fixed order, so that results repeat
``feature_columns``       section 3.3: the feature matrix F
``modulate``              Eq. 5 to 8: all layers of Φ
``prepare``               counts the steps; ηα, βλ and the bias corrections
``update``                Eq. 1 to 4
========================  ==========================================================

These are seven for any depth of Φ and any number of tensors, and the host never waits. Tensors with gaps, or with a
gradient in another memory order than the parameter, each need a copy and a copy back in every step. One more copy
follows a change of the tensors with a gradient or their sizes.

The kernels have been compiled for compute capabilities 7.5, 8.0 and 9.0, and tested with Triton's interpreter on a CPU
(``tests/test_triton_step.py``). They have NOT been run on a GPU yet. On a machine with one,
``python -m pytest tests/test_triton_step.py`` runs the same tests on it, without the interpreter.
"""

import importlib.util
import math
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metaadamw_lite.buckets import Bucket
from metaadamw_lite.fast import has_no_gaps, in_one_order, memory_order
from metaadamw_lite.features import FeatureConfig, constant, structural_features
from metaadamw_lite.folded import in_one_buffer
from metaadamw_lite.groups import ModulationGroup
from metaadamw_lite.modulator import LARGEST_FEATURE, Modulator
from metaadamw_lite.sharding import sum_over_shards

CHUNK = 2**13
"""Elements that one program reads. Larger chunks leave a GPU idle for small models; smaller ones lengthen the table."""
BLOCK = 2**10
"""Elements that a program holds at a time."""
LARGEST_GROUPS, LARGEST_WIDTH, LARGEST_TOKENS = 64, 32, 2**13
"""The most groups, columns, and bytes of all token vectors with which Φ fits in one program."""
FULL = (torch.float32, torch.float64)
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATISTICS = ("|g|", "|m|", "|θ|", "cos(g, m)", "|v|", "sparsity g", "sparsity m")
_CONSTANTS = ("log count", "bias ratio", "depth")

_dtype = attrgetter("dtype")


def is_available(device: torch.device) -> bool:
    """Return whether the kernels can run on a device: an NVIDIA GPU of compute capability 7.5 or more, with Triton."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (7, 5)
        and importlib.util.find_spec("triton") is not None
    )


def matrices() -> tuple[torch.dtype, ...]:
    """Return the types of matrices that Triton multiplies: float64 only since version 3.5."""
    import triton  # its distribution has other names, too

    major, minor = (int(number) for number in triton.__version__.split(".")[:2])
    return FULL if (major, minor) >= (3, 5) else FULL[:1]


class Layout(NamedTuple):
    """The part of the table that stays while sizes, strides and dtypes of the tensors stay.

    Attributes:
        signature: sizes, strides, dtypes and devices; a change invalidates the layout.
        words: the table, (rows, n), without addresses.
        chunks: the tensor index of each chunk, on the device.
        same: the type code of all tensors, or MIXED.
        double: True if any tensor is float64.
        disordered: indices of tensors with gaps, or with g, m or v in another memory order than θ.
    """

    signature: tuple[Any, ...]
    words: np.ndarray[Any, np.dtype[np.int64]]
    chunks: Tensor
    same: int
    double: bool
    disordered: list[int]


class Table(NamedTuple):
    """The tensors of one step on the device.

    Attributes:
        layout: the part that stays from step to step.
        words: the table, followed by the records of the parameter groups and the time: int64.
        numbers: the same memory as float64.
        at_time: index of the time in it.
        copies: pairs of a disordered θ, m or v and the copy that the kernels move instead.
        sources: the tensors at the addresses, kept alive until the step has been launched.
    """

    layout: Layout
    words: Tensor
    numbers: Tensor
    at_time: int
    copies: list[tuple[Tensor, Tensor]]
    sources: list[list[Tensor]]


class DeviceStep:
    """A step of ``MetaAdamW`` for tensors on one GPU; caches the table's layout until the tensors change.

    ``take`` is the whole step. Its parts:

    >>> table = device_step.table(buckets, time)
    >>> sums = device_step.inner_products(table, zeros=False)  # with shards: sharding.sum_over_shards(sums, params)
    >>> features = device_step.features(table, sums, config, groups)
    >>> alpha, beta = device_step.modulate(modulator, features)
    >>> device_step.move(table, alpha, beta)
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._phi: Weights | None = None

    def take(
        self,
        buckets: Sequence[Bucket],
        modulator: nn.Module,
        config: FeatureConfig,
        groups: Sequence[ModulationGroup],
        time: float,
        sharded: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """Take a step (Algorithm 1) and return its α and β, each (G,), on the device.

        Args:
            buckets: the tensors to move, with their step counts.
            modulator: Φ.
            config: the choice of feature columns.
            groups: the G modulation groups.
            time: the value of the time feature.
            sharded: True if parameters are sharded over processes.

        Returns:
            None if the kernels cannot take the step; then nothing has changed. This is so with ``amsgrad`` or
            ``maximize``, and if ``table`` or ``modulate`` returns None.
        """
        if any(bucket.settings["amsgrad"] or bucket.settings["maximize"] for bucket in buckets):
            return None
        table = self.table(buckets, time)
        if table is None:
            return None
        sums = self.inner_products(table, zeros=config.version == "enhanced")
        if sharded:
            sums = sum_over_shards(sums, [p for bucket in buckets for p in bucket.params])
        dtype = next(modulator.parameters()).dtype
        factors = self.modulate(modulator, self.features(table, sums, config, groups, dtype))
        if factors is not None:
            self.move(table, *factors)
        return factors

    def table(self, buckets: Sequence[Bucket], time: float) -> Table | None:
        """Build the table of the buckets' n tensors and start its copy to the device.

        Args:
            buckets: the tensors; with step counts for a step, without for statistics alone.
            time: the value of the time feature.

        Returns:
            None if the kernels cannot be used: tensors or step counts are on several devices, a step count is not
            float32, or a dtype is none of float32, float64, bfloat16 and float16.
        """
        sources = [[x for b in buckets for x in getattr(b, name)] for name in ("theta", "g", "m", "v", "step")]
        theta = sources[0]
        device = theta[0].device
        tables = list({id(b.settings): b.settings for b in buckets}.values())
        number = {id(settings): s for s, settings in enumerate(tables)}
        signature = (
            device,
            [(b.k, number[id(b.settings)], len(b.theta)) for b in buckets],
            list(map(Tensor.numel, theta)),
            [list(map(Tensor.stride, column)) for column in sources[:4]],
            [list(map(_dtype, column)) for column in sources],
            [list(map(Tensor.get_device, column)) for column in sources],
        )
        if self._layout is None or self._layout.signature != signature:
            self._layout = _build_layout(buckets, sources, signature)
        layout = self._layout
        if layout is None:
            return None
        copies = _put_in_order(sources, layout.disordered)
        rows, n = layout.words.shape
        record = _kernels().RECORD.value
        end = rows * n + record * len(tables)
        host = torch.empty(end + 1, dtype=torch.int64, pin_memory=device.type == "cuda")
        words = host.numpy()
        words[: rows * n] = layout.words.reshape(-1)
        for row, column in enumerate(sources):  # rows THETA to STEP
            words[row * n : row * n + len(column)] = list(map(Tensor.data_ptr, column))
        for s, settings in enumerate(tables):
            _write_record(words[rows * n + s * record :][:record], settings, device)
        words[end:].view(np.float64)[0] = time
        on_device = _copy_to(device, host)
        return Table(layout, on_device, on_device.view(torch.float64), end, copies, sources)

    def inner_products(self, table: Table, zeros: bool) -> Tensor:
        """Compute ⟨g, g⟩, ⟨g, m⟩, ⟨m, m⟩, ⟨θ, θ⟩, ⟨v, v⟩ and, if ``zeros``, the number of zeros in g and in m.

        Returns:
            (n, 5) or (n, 7) for n tensors, float64. Equal tensors give equal bits.
        """
        kernels, layout = _kernels(), table.layout
        n, n_chunks, columns = layout.words.shape[1], len(layout.chunks), 7 if zeros else 5
        partial = table.numbers.new_empty(columns, n_chunks)
        sums = table.numbers.new_empty(n, columns)
        arguments = {"SAME": layout.same, "ZEROS": zeros, "CHUNK": CHUNK, "BLOCK": BLOCK}
        launch(kernels.sum_chunks, (n_chunks,), table.words, layout.chunks, partial, n, n_chunks, **arguments)
        arguments = {"CHUNK": CHUNK, "BLOCK": 512}
        launch(kernels.sum_tensors, (n, columns), table.words, partial, sums, n, n_chunks, **arguments)
        return sums

    def features(
        self,
        table: Table,
        sums: Tensor,
        config: FeatureConfig,
        groups: Sequence[ModulationGroup],
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Compute the feature matrix F (section 3.3), (G, D), as in ``features.group_features``.

        Args:
            table: the tensors.
            sums: their ``inner_products``, added up over processes; with zeros for "enhanced".
            config: the choice of columns.
            groups: the G modulation groups.
            dtype: dtype of the result, which is computed in float64.
        """
        columns = constant(tuple(map(_get_column_code, config.columns)), table.layout.chunks)
        constants = constant(structural_features(groups), sums) if config.version == "enhanced" else sums
        result = sums.new_empty(len(groups), len(config.columns), dtype=dtype)
        fit = _power_of_two(len(groups))
        launch(
            _kernels().feature_columns,
            (len(config.columns),),
            *(sums, table.words, table.numbers, columns, constants, result),
            *(len(sums), len(groups), table.at_time),
            COLUMNS=sums.shape[1],
            STANDARDISED=config.standardised,
            GROUPS=fit,
            BLOCK=max(16, 4096 // fit),
        )
        return result

    def modulate(self, modulator: nn.Module, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute α and β, each (G,), from features (G, D), on their device.

        Returns:
            None if the module itself must compute them: it is of another class, has hooks or another ``forward``, is
            neither float32 nor float64, or has more than 64 groups or 32 columns (in float64, more than 32 groups and
            16 columns).
        """
        if self._phi is None or not self._phi.is_current(modulator):
            self._phi = Weights.of(modulator)
        phi = self._phi
        if phi is None or phi.is_hooked():
            return None
        plan = phi.plan(len(features))
        if plan is None:
            return None
        buffer = phi.on(features.device)
        alpha, beta = buffer.new_empty(2, len(features)).unbind()
        launch(
            _kernels().modulate,
            (1,),
            *(features, buffer, constant(phi.constants, features.new_empty(0, dtype=torch.float64)), alpha, beta),
            *(len(features), phi.layers),
            **plan,
        )
        return alpha, beta

    def move(self, table: Table, alpha: Tensor, beta: Tensor) -> None:
        """Apply Eq. 1 to 4 to all tensors of the table, as torch's fused AdamW with rate ηα and decay βλ of each group.

        Raises the step counts by one.

        Args:
            table: built from buckets with step counts.
            alpha, beta: (G,), on the table's device.
        """
        kernels, layout = _kernels(), table.layout
        n = layout.words.shape[1]
        rates = table.numbers.new_empty(3, n)
        launch(kernels.prepare, (-(-n // 128),), table.words, table.numbers, alpha, beta, rates, n, BLOCK=128)
        launch(
            kernels.update,
            (len(layout.chunks),),
            *(table.words, table.numbers, layout.chunks, rates, n),
            SAME=layout.same,
            DOUBLE=layout.double,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
        )
        for tensor, copy in table.copies:
            tensor.copy_(copy)


class Weights:
    """The parameters of a ``Modulator`` in one buffer, in the order of the kernel, with a copy on the device.

    Φ itself is in the CPU's memory. Every step compares it with the copied values and renews the copy after a change.

    Attributes:
        buffer: all parameters, in Φ's memory.
        layers, heads, hidden, width: L, H, D_ff and the number of columns, embeddings included.
        embedding: number of embedding columns.
        gated: True if Φ has gates.
        constants: range_α, range_β and the ε of a layer's two layer norms.
    """

    def __init__(self, modulator: Modulator, parameters: Sequence[Tensor]) -> None:
        self.modulator = modulator
        layer = modulator.encoder.layers[0]
        assert isinstance(layer, nn.TransformerEncoderLayer)
        self.layers, self.heads = len(modulator.encoder.layers), layer.self_attn.num_heads
        self.hidden, self.width = layer.linear1.weight.shape
        self.embedding = 0 if modulator.embeddings is None else modulator.embeddings.shape[1]
        self.gated = modulator.gates is not None
        self.constants = (modulator.alpha_range, modulator.beta_range, layer.norm1.eps, layer.norm2.eps)
        if not _are_consecutive(parameters):
            in_one_buffer(modulator)
        self.buffer = parameters[0].detach().as_strided((sum(p.numel() for p in parameters),), (1,))
        self._seen = self.buffer
        self._copy: Tensor | None = None
        self._parameters, self._addresses = parameters, [p.data_ptr() for p in parameters]
        modules = list(modulator.modules())
        tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._modules)]
        members = [(table, name, member) for table in tables for name, member in table.items()]
        self._tables, self._names, self._members = zip(*members, strict=True)
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [vars(m) for m in modules]

    @classmethod
    def of(cls, modulator: nn.Module) -> "Weights | None":
        """Return the weights of a module; None if the kernel cannot compute it."""
        if type(modulator) is not Modulator:
            return None
        layer = modulator.encoder.layers[0]
        if not all(type(x) is nn.TransformerEncoderLayer for x in modulator.encoder.layers):
            return None
        parameters = list(modulator.parameters())
        w, f = modulator.output.in_features, layer.linear1.out_features
        one_layer = [(3 * w, w), (3 * w,), (w, w), (w,), (f, w), (f,), (w, f), (w,), (w,), (w,), (w,), (w,)]
        own = [tuple(p.shape) for p in (modulator.embeddings, modulator.gates) if p is not None]
        expected = [*own, *one_layer * len(modulator.encoder.layers), (4, w), (4,)]
        kinds = {(p.dtype, p.device) for p in parameters}
        if [tuple(p.shape) for p in parameters] != expected or len(kinds) > 1 or parameters[0].dtype not in matrices():
            return None
        return cls(modulator, parameters)

    def on(self, device: torch.device) -> Tensor:
        """Return the buffer on a device."""
        if self.buffer.device == device:
            return self.buffer
        if self._copy is None or self._copy.device != device or not torch.equal(self._seen, self.buffer):
            self._seen = self.buffer.clone()
            self._copy = self._seen.to(device)
        return self._copy

    def plan(self, groups: int) -> dict[str, Any] | None:
        """Choose the kernel's constants for a number of groups; None if Φ does not fit in one program.

        The shared memory suffices on every GPU of compute capability 7.5 or more: the tests compile the largest cases.
        """
        size = self.buffer.element_size()
        rows, columns = max(16, _power_of_two(groups)), max(16, _power_of_two(self.width))
        if rows > LARGEST_GROUPS or columns > LARGEST_WIDTH or rows * columns * size > LARGEST_TOKENS:
            return None
        together = _power_of_two(self.heads)
        while together > 1 and together * rows * max(rows, columns) * size > 2**15:
            together //= 2
        return {
            "LARGEST": LARGEST_FEATURE,
            "D": self.width - self.embedding,
            "EMBEDDING": self.embedding,
            "GATED": self.gated,
            "HEADS": self.heads,
            "HIDDEN": self.hidden,
            "GROUPS": rows,
            "WIDTHS": columns,
            "UNITS": min(max(16, _power_of_two(self.hidden)), max(16, 2**13 // (rows * size))),
            "TOGETHER": together,
            "num_warps": rows // 4,
        }

    def is_hooked(self) -> bool:
        """Return whether a module of Φ has forward hooks or a replaced ``forward``."""
        return any(self._hooks) or any("forward" in attributes for attributes in self._attributes)

    def is_current(self, modulator: nn.Module) -> bool:
        """Return whether ``modulator`` is this module, with the same submodules and parameter addresses."""
        return (
            modulator is self.modulator
            and list(map(Tensor.data_ptr, self._parameters)) == self._addresses
            and all(map(is_, map(dict.get, self._tables, self._names), self._members))
        )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel with one program for each point of the grid. All device operations but torch's go through here."""
    if 0 in grid:
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def _kernels() -> Any:
    """Import the module of the kernels, which needs Triton."""
    from metaadamw_lite import triton_kernels

    return triton_kernels


def _copy_to(device: torch.device, host: Tensor) -> Tensor:
    """Copy a host tensor to the device, without waiting if its memory is pinned."""
    return host.to(device, non_blocking=True)


def _build_layout(buckets: Sequence[Bucket], sources: list[list[Tensor]], signature: tuple[Any, ...]) -> Layout | None:
    """Build the layout of the table; None for tensors that the kernels cannot take."""
    *states, steps = sources
    theta, device = states[0], signature[0]
    if not all(x.dtype in CODES and x.device == device for column in states for x in column):
        return None
    if not all(x.dtype == torch.float32 and x.device == device for x in steps):
        return None
    n = len(theta)
    sizes = np.array(signature[2], dtype=np.int64)
    chunks = -(-sizes // CHUNK)
    codes = [sum(CODES[x.dtype] << 2 * i for i, x in enumerate(state)) for state in zip(*states, strict=True)]
    kernels = _kernels()
    words = np.zeros((kernels.ROWS.value, n), dtype=np.int64)
    words[kernels.NUMEL.value] = sizes
    words[kernels.TOTAL.value] = [max(p.numel(), 1) for b in buckets for p in b.params]
    words[kernels.GROUP.value] = [k for k, _, length in signature[1] for _ in range(length)]
    words[kernels.CODE.value] = codes
    words[kernels.FIRST.value] = np.cumsum(chunks) - chunks
    words[kernels.SETTINGS.value] = [s for _, s, length in signature[1] for _ in range(length)]
    return Layout(
        signature,
        words,
        _copy_to(device, torch.from_numpy(np.repeat(np.arange(n, dtype=np.int32), chunks))),
        codes[0] if len(set(codes)) == 1 else kernels.MIXED.value,
        any(x.dtype == torch.float64 for column in states for x in column),
        [i for i, state in enumerate(zip(*states, strict=True)) if not in_one_order(*state)],
    )


def _put_in_order(sources: list[list[Tensor]], disordered: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Replace disordered tensors in ``sources`` by copies in θ's memory order; return (tensor, copy) of θ, m and v."""
    copies = []
    for i in disordered:
        theta = sources[0][i]
        order = torch.preserve_format if has_no_gaps(memory_order(theta)) else torch.contiguous_format
        like = torch.empty_like(theta, memory_format=order)
        for row in range(4):
            x = sources[row][i]
            if not in_one_order(like, x):
                sources[row][i] = torch.empty_like(like, dtype=x.dtype, memory_format=torch.preserve_format).copy_(x)
                if row != 1:
                    copies.append((x, sources[row][i]))
    return copies


def _write_record(words: np.ndarray[Any, np.dtype[np.int64]], settings: dict[str, Any], device: torch.device) -> None:
    """Write the record of a parameter group; for a learning rate on the device, its address."""
    kernels, numbers = _kernels(), words.view(np.float64)
    lr, (beta1, beta2) = settings["lr"], map(float, settings["betas"])
    if isinstance(lr, Tensor) and lr.device == device and lr.dtype in FULL:
        words[kernels.LR_ADDRESS.value], words[kernels.LR_CODE.value] = lr.data_ptr(), CODES[lr.dtype]
    else:
        words[kernels.LR_ADDRESS.value], numbers[kernels.LR.value] = 0, float(lr)
    for at, value in ((kernels.BETA1, beta1), (kernels.BETA2, beta2), (kernels.EPS, settings["eps"])):
        numbers[at.value] = value
    numbers[kernels.WEIGHT_DECAY.value] = settings["weight_decay"]
    for at, beta in ((kernels.LOG_BETA1, beta1), (kernels.LOG_BETA2, beta2)):
        numbers[at.value] = math.log(beta) if beta else -math.inf


def _get_column_code(name: str) -> int:
    """Return the code of a feature column, from its name in ``FeatureConfig.columns``."""
    kernels = _kernels()
    first, _, rest = name.partition(" ")
    kinds = {"mean": kernels.MEAN, "std": kernels.STD, "var": kernels.VARIANCE}
    kind, index = kernels.MEAN, 0
    if name == "time":
        kind = kernels.TIME
    elif name in _CONSTANTS:
        kind, index = kernels.CONSTANT, _CONSTANTS.index(name)
    elif first in kinds:
        kind, index = kinds[first], _STATISTICS.index(rest)
    else:
        index = _STATISTICS.index(name)
    return int(kind.value * 8 + index)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _are_consecutive(parameters: Sequence[Tensor]) -> bool:
    """Return whether tensors follow each other in memory without gaps."""
    at = parameters[0].data_ptr()
    for p in parameters:
        if p.data_ptr() != at or not p.is_contiguous():
            return False
        at += p.numel() * p.element_size()
    return True
