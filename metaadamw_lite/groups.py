"""Modulation groups: the parameters that share one α and one β (paper, section 3.2).

A group collects the parameters of one layer type (embedding, attention, feed-forward, norm, other), one third of the
network's depth and one kind (weight or bias). The paper names these three criteria without defining them; each function
documents its own choice. Chapter 2 of the book shows the groups of real models.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)

# The end of a class name reveals the layer type: BertSelfAttention, GPT2MLP, LlamaRMSNorm, BertEmbeddings.
_CLASS_NAMES = {
    "norm": re.compile(r"norm(\dd)?$", re.IGNORECASE),
    "embedding": re.compile(r"embeddings?$", re.IGNORECASE),
    "attention": re.compile(r"(attention|attn)$", re.IGNORECASE),
    "feed-forward": re.compile(r"(mlp|ffn|feed_?forward)$", re.IGNORECASE),
}

_PARAMETER_NAMES = {
    "norm": re.compile(r"norm|(^|[._])(ln|bn)(_?\w)?\."),
    "embedding": re.compile(r"embed|(^|\.)(wte|wpe)\."),
    "attention": re.compile(r"attn|attention|(in|q|k|v)_proj"),
    "feed-forward": re.compile(r"ffn|mlp|feed_?forward"),
}

# "layers.3." and "layer3." number blocks; "conv1", "bn2" or "linear1" number the parts of one block.
_BLOCK = re.compile(r"(?:^|\.)(?:(?:layer|block|stage)s?_?)?(\d+)(?=\.|$)")
_RECURRENT_LAYER = re.compile(r"_l(\d+)(?:_reverse)?$")


@dataclass(frozen=True)
class ModulationGroup:
    """Parameters that share one learning-rate factor α_g and one decay factor β_g.

    Attributes:
        name: ``layer type/depth/kind``, as in ``attention/shallow/weight``; ``param_group_0`` and so on under the
            "original" strategy.
        params: the group's tensors, in the optimizer's order.
        depth: mean position of the group's tensors in the network, 0 (first block) to 1 (last block).
        bias_ratio: share of the group's tensors that are biases, 0 to 1.
    """

    name: str
    params: tuple[Tensor, ...]
    depth: float
    bias_ratio: float

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.params)
        return f"ModulationGroup({self.name!r}, {len(self.params)} tensors, {count:,} parameters)"


def is_bias(name: str) -> bool:
    """Return whether a parameter's own name starts or ends with "bias", as ``in_proj_bias`` or ``bias_ih_l0``.

    The scale of a norm is one-dimensional, too, but multiplies and starts at one, so it counts as a weight.
    """
    leaf = name.rpartition(".")[2]
    return leaf.startswith("bias") or leaf.endswith("bias")


def get_shape(p: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape; empty for a lazy parameter, whose shape is not known yet."""
    return () if is_lazy(p) else tuple(p.shape)


class Place(NamedTuple):
    """The layer type of a parameter, and its depth in the network, 0 (first block) to 1 (last block)."""

    layer_type: str
    depth: float


def places_by_class(model: nn.Module) -> dict[Tensor, Place]:
    """Find the place of every parameter of a model; its module class decides the layer type, else its name."""
    named = list(model.named_parameters())
    shapes = {name: get_shape(p) for name, p in named}
    modules = dict(model.named_modules(remove_duplicate=False))
    types = [_find_type_by_class(name, modules) or _find_type_by_name(name, shapes, by_shape=False) for name in shapes]
    positions = depths(list(shapes))
    return {p: Place(t, depth) for (_, p), t, depth in zip(named, types, positions, strict=True)}


def places_by_name(param_groups: Sequence[Sequence[tuple[str, Tensor]]]) -> list[list[Place]]:
    """Find the place of every parameter from names and shapes alone; return one list for each parameter group.

    Two facts help: of the common layers only a norm has a one-dimensional ``weight``, and ``linear1`` beside
    ``self_attn`` is the feed-forward part of a Transformer layer.
    """
    joined = iter(depths([name for named in param_groups for name, _ in named]))
    result = []
    for named in param_groups:
        places = []
        for part in _split_models(named):
            names = [name for name, _ in part]
            positions = [next(joined) for _ in part]
            if any(block_index(name) is not None for name in names):
                # Weights and biases may come in separate parameter groups, so each group shows by itself which
                # parameters come before and after the blocks.
                within = zip(names, positions, depths(names), strict=True)
                positions = [mine if block_index(name) is None else depth for name, depth, mine in within]
            shapes = {name: get_shape(p) for name, p in part}
            types = [_find_type_by_name(name, shapes, by_shape=True) for name in names]
            places += [Place(t, depth) for t, depth in zip(types, positions, strict=True)]
        result.append(places)
    return result


def _split_models(named: Sequence[tuple[str, Tensor]]) -> list[list[tuple[str, Tensor]]]:
    """Split named parameters where a name repeats: another model begins there."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, p in named:
        if name in parts[-1]:
            parts.append({})
        parts[-1][name] = p
    return [list(part.items()) for part in parts]


def _find_type_by_class(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Walk outwards from the module that owns the parameter; the first class that reveals a layer type decides.

    The class name of the model itself is ignored: an ``AttentionClassifier`` may contain anything.
    """
    path = name.split(".")[:-1]
    while True:
        module = modules[".".join(path)]
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return "embedding"
        if isinstance(module, _NORMS):
            return "norm"
        if isinstance(module, nn.MultiheadAttention):
            return "attention"
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            return "feed-forward"  # the walk has already found its norms and attentions
        if not path:
            return None
        for type_, pattern in _CLASS_NAMES.items():
            if pattern.search(type(module).__name__):
                return type_
        path = path[:-1]


def _find_type_by_name(name: str, shapes: Mapping[str, Sequence[int]], by_shape: bool) -> str:
    module, _, leaf = name.rpartition(".")
    weight = shapes.get(f"{module}.weight" if module else "weight", (0, 0))
    if by_shape and leaf in ("weight", "bias") and len(weight) == 1:
        return "norm"
    parent, _, layer = module.rpartition(".")
    if layer in ("linear1", "linear2") and any(other.startswith(f"{parent}.self_attn.") for other in shapes):
        return "feed-forward"
    for type_, pattern in _PARAMETER_NAMES.items():
        if pattern.search(name.lower()):
            return type_
    return "other"


def block_index(name: str) -> int | None:
    """Return the block number of a parameter, the first one in its name, or None.

    ``encoder.layers.3.norm1.bias`` is in block 3, ``lstm.weight_hh_l1`` in block 1.
    """
    match = _BLOCK.search(name.rpartition(".")[0]) or _RECURRENT_LAYER.search(name)
    return int(match.group(1)) if match else None


def depths(names: Sequence[str]) -> list[float]:
    """Compute each parameter's depth in the network, 0 (first block) to 1 (last block).

    The paper speaks of a "depth bucket" but does not define depth. We take the block number in the name, scaled between
    the smallest and the largest one. Parameters before all blocks (an input projection) are at 0, those after them (a
    head) at 1, all others without a block number at 0.5.
    """
    indices = [block_index(name) for name in names]
    known = [i for i in indices if i is not None]
    if not known:
        return [0.5] * len(names)
    first_named = next(k for k, i in enumerate(indices) if i is not None)
    last_named = max(k for k, i in enumerate(indices) if i is not None)
    low, high = min(known), max(known)
    positions = []
    for k, i in enumerate(indices):
        if i is None:
            positions.append(0.0 if k < first_named else 1.0 if k > last_named else 0.5)
        else:
            positions.append((i - low) / (high - low) if high > low else 0.5)
    return positions


def depth_third(position: float) -> str:
    """Return "shallow" for depths below 1/3, "deep" for depths above 2/3, else "middle"."""
    return "shallow" if position < 1 / 3 else "deep" if position > 2 / 3 else "middle"


def fine_grained_groups(
    named_parameters: Iterable[tuple[str, Tensor]], model: nn.Module | None = None
) -> list[ModulationGroup]:
    """Group parameters by layer type, depth third and kind (section 3.2), in order of first appearance.

    Args:
        named_parameters: pairs of dotted name and tensor, as from ``model.named_parameters()``.
        model: the model, whose module classes decide layer types. Without it names and shapes decide.
    """
    named = list(named_parameters)
    known = {} if model is None else places_by_class(model)
    places = zip(named, places_by_name([named])[0], strict=True)
    return form_groups((p, known.get(p, place), is_bias(name)) for (name, p), place in places)


def form_groups(members: Iterable[tuple[Tensor, Place, bool]]) -> list[ModulationGroup]:
    """Form a group for each layer type, depth third and kind among members (tensor, place, whether it is a bias)."""
    collected: dict[str, list[tuple[Tensor, float, bool]]] = {}
    for p, place, bias in members:
        key = f"{place.layer_type}/{depth_third(place.depth)}/{'bias' if bias else 'weight'}"
        collected.setdefault(key, []).append((p, place.depth, bias))
    return [
        ModulationGroup(
            name=key,
            params=tuple(p for p, _, _ in group),
            depth=sum(depth for _, depth, _ in group) / len(group),
            bias_ratio=sum(bias for _, _, bias in group) / len(group),
        )
        for key, group in collected.items()
    ]


def native_groups(
    param_groups: Sequence[Sequence[Tensor]], names: Sequence[Sequence[str]] | None
) -> list[ModulationGroup]:
    """Form a modulation group from each non-empty parameter group of the optimizer (strategy "original").

    Args:
        param_groups: the tensors of each parameter group.
        names: their names in the same order, or None. Without names every tensor of at most one dimension counts as a
            bias, and every depth is 0.5.
    """
    if names is None:
        positions = [[0.5] * len(params) for params in param_groups]
        biases = [[len(get_shape(p)) <= 1 for p in params] for params in param_groups]
    else:
        flat = iter(depths([name for group in names for name in group]))
        positions = [[next(flat) for _ in group] for group in names]
        biases = [[is_bias(name) for name in group] for group in names]
    return [
        ModulationGroup(
            name=f"param_group_{k}",
            params=tuple(params),
            depth=sum(positions[k]) / len(params),
            bias_ratio=sum(biases[k]) / len(params),
        )
        for k, params in enumerate(param_groups)
        if params
    ]
