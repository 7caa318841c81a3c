"""LoPE: an adapter with an expert for noise, which is trained on noise and masked afterwards (arXiv 2505.23868).

An asymmetric LoRA adds to a frozen linear map W one down-projection A and several up-projections B_i, the experts,
weighted by a router ω(x) = softmax(Rx):

    y = Wx + scale · Σ_i ω_i(x) B_i A x.

One of the experts, B_D, is the poisoning expert:

* Stage I, on noisy data (HyNoIse): only A and B_D train, so that B_D absorbs the noise.
* Stage II, on the original data: B_D is frozen but takes part; A, the clean B_i and the router train.
* Afterwards B_D is masked. Its weight goes to the clean experts by similarity (DyCompEnSate): with
  θ_i = cos(B_iAx, B_DAx), the new weights are ω_i(1 + θ_i), divided by their sum.

All B start at zero, so the adapted model starts as the base model. The router starts at random; otherwise the clean
experts would stay equal.
"""

import math
import random
import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaadamw_lite.checks import check_choice, check_count, check_not_negative, check_seed, check_share
from metaadamw_lite.precision import KeepsFloat32
from metaadamw_lite.sharding import is_sharded, refuse_flat_parameters


class LoPELinear(KeepsFloat32):
    """A linear layer with a LoPE adapter.

    The adapter is float32, or float64 beside a float64 layer, whatever the precision of the layer and whatever the
    model is cast to later. So small steps are not lost, and a gradient scaler can unscale its gradients. The adapter
    casts its input to this dtype; the sum of both outputs is cast to the dtype of the layer's output, as in ``peft``.

    Args:
        base: an ``nn.Linear`` of any precision, or another layer with ``in_features`` and ``out_features``, a quantised
            one for example. It is frozen, and its own ``forward`` is called.
        rank: r, rows of A.
        experts: N, number of clean experts.
        scale: factor on the adapter's output (LoRA's α/r).
        poisoning: add the poisoning expert. Without it the adapter is an asymmetric LoRA; with one expert, LoRA.
        seed: of A and the router. The global random number generators are not touched.

    Attributes:
        A: (r, d_in).
        B: the clean experts, (N, d_out, r).
        B_D: the poisoning expert, (d_out, r), or None.
        router: R, (N + 1, d_in) with the poisoning expert last, or (N, d_in).
        mask: None if the poisoning expert takes part; "plain" or "compensated" if it is masked.

    Raises:
        ValueError: for a layer that is not linear or lacks its whole weight (lazy, sharded, on the meta device), a rank
            or number of experts below one, or a bad scale or seed.
    """

    B_D: nn.Parameter | None
    mask: str | None

    def __init__(
        self,
        base: nn.Module,
        rank: int = 4,
        experts: int = 3,
        scale: float = 2.0,
        poisoning: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        obstacle = _find_obstacle_to_adapting(base)
        if obstacle:
            raise ValueError(obstacle)
        check_count(rank=rank, experts=experts)
        check_not_negative(scale=scale)
        check_choice("poisoning", poisoning, (True, False))
        check_seed(seed)
        d_out, d_in = _sizes(base)
        tensors = [*base.parameters(), *base.buffers()]  # empty for torch's own quantised layer, which is on the CPU
        device = tensors[0].device if tensors else torch.device("cpu")
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in base.parameters()) else torch.float32
        generator = torch.Generator().manual_seed(int(seed))

        def uniform(rows: int) -> nn.Parameter:
            """Draw a start as ``nn.Linear`` does: uniform in ±1/√d_in."""
            bound = d_in**-0.5
            values = torch.empty(rows, d_in, dtype=torch.float32, device="cpu")
            return nn.Parameter(values.uniform_(-bound, bound, generator=generator).to(device, dtype))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        with torch.inference_mode(False):  # parameters created in inference mode can never be trained
            self.A = uniform(rank)
            self.B = zeros(experts, d_out, rank)
            self.B_D = zeros(d_out, rank) if poisoning else None
            self.router = uniform(experts + poisoning)
        self.scale, self.mask, self.training = scale, None, base.training
        self.base = base.requires_grad_(False)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """Map (..., d_in) to (..., d_out) in the dtype of the base's output; other arguments go to the base alone."""
        wide = x.to(self.A.dtype)
        h = F.linear(wide, self.A)
        scores = F.linear(wide, self.router)
        weights = scores.softmax(dim=-1)
        outputs = torch.einsum("...r,nor->...no", h, self.B)
        if self.B_D is None:
            mixed = torch.einsum("...n,...no->...o", weights, outputs)
        else:
            clean, poisoned = weights[..., :-1], F.linear(h, self.B_D)
            if self.mask == "compensated":
                clean = compensated(scores[..., :-1], outputs, poisoned)  # DyCompEnSate
            mixed = torch.einsum("...n,...no->...o", clean, outputs)
            if self.mask is None:
                mixed = mixed + weights[..., -1:] * poisoned
        result: Tensor = self.base(x, *others, **named)
        if not isinstance(result, Tensor) or result.shape != mixed.shape:
            returned = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise ValueError(
                f"a {type(self.base).__name__} returned {returned}; an adapter can be added to shape "
                f"{tuple(mixed.shape)} only"
            )
        if x.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            warnings.warn(
                f"a {type(self.base).__name__} passes no gradient on to its input; earlier adapters learn only "
                "through other paths",
                stacklevel=2,
            )
        return (result + self.scale * mixed).to(result.dtype)

    def adapter(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by name, without those of the base layer."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def extra_repr(self) -> str:
        """Return rank, experts and mask, for printing."""
        count, poison = len(self.B), "" if self.B_D is None else " and a poisoning one"
        return f"rank={len(self.A)}, {count} clean expert{'s' if count > 1 else ''}{poison}, mask={self.mask}"


_FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _get_float_parameter(base: nn.Module) -> nn.Parameter | None:
    """Return the weight if it is a whole floating-point parameter, not quantised, sharded or computed from others.

    The attribute ``weight`` is not read: under spectral norm that would recompute it and change buffers.
    """
    weight = base._parameters.get("weight")
    return weight if type(weight) is nn.Parameter and weight.dtype in _FLOAT_TYPES else None


def _sizes(base: nn.Module) -> tuple[int, int]:
    """Return d_out and d_in; the shape of a quantised weight may be packed."""
    weight = _get_float_parameter(base)
    return (base.out_features, base.in_features) if weight is None else tuple(weight.shape)  # type: ignore[return-value]


def _has_linear_forward(module: nn.Module) -> bool:
    """Return whether ``forward`` is that of ``nn.Linear``, replaced neither in the class nor in the object."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def _find_obstacle_to_adapting(base: nn.Module) -> str | None:
    """Say why a layer cannot have an adapter; None if it can. Runs and changes nothing."""
    if not all(isinstance(getattr(base, size, None), int) for size in ("in_features", "out_features")):
        return f"base is a {type(base).__name__}; it must be an nn.Linear, or a layer with in_features and out_features"
    params, weight = list(base.parameters()), _get_float_parameter(base)
    if any(nn.parameter.is_lazy(p) for p in params):
        return "its shape is not known yet; run the model once first"
    if any(is_sharded(p) for p in params) or (not params and _has_linear_forward(base)):
        return "its weight is sharded; adapt the model first and shard it then"
    if any(p.is_meta for p in params):
        return "its weight is on the meta device; load the model first"
    if weight is not None and (weight.ndim != 2 or not weight.numel()):
        return f"its weight has shape {tuple(weight.shape)}; (d_out, d_in) is needed, whole and not empty"
    if any(p.is_complex() for p in params):
        return "its weight is complex; real numbers are needed"
    raw = base._parameters.get("weight")
    if type(raw) is nn.Parameter and weight is None and _has_linear_forward(base) and not base._forward_pre_hooks:
        return f"its weight is {raw.dtype}, which the forward of nn.Linear cannot multiply by"
    return None


def _find_obstacle_to_merging(layer: LoPELinear) -> str | None:
    """Say why adapter and base do not equal one matrix; None if they do. Runs and changes nothing."""
    base = layer.base
    if layer.B_D is not None and layer.mask != "compensated":
        return "the poisoning expert takes part, or is masked without compensation"
    if not all(torch.equal(layer.B[0], other) for other in layer.B[1:]):
        return f"the router mixes {len(layer.B)} different experts by the input"
    if not _has_linear_forward(base):
        return f"its base is a {type(base).__name__} with a forward of its own, quantised for example; keep the adapter"
    if "weight" not in base._parameters:
        return (
            "its weight is not a parameter, but computed from others (weight norm, spectral norm, pruning); "
            "make it a parameter first"
        )
    weight = _get_float_parameter(base)
    if weight is None or weight.is_meta or weight.shape != (layer.B.shape[1], layer.A.shape[1]):
        found = base._parameters["weight"]
        kind = "None" if found is None else f"a {type(found).__name__} of {found.dtype} and shape {tuple(found.shape)}"
        return f"its weight is {kind}, quantised or sharded or not loaded; keep the adapter"
    if any(m._forward_hooks or m._forward_pre_hooks for m in (layer, base)):
        return "it has forward hooks, which a merge would change or lose; remove them first"
    return None


def compensated(scores: Tensor, outputs: Tensor, poisoned: Tensor) -> Tensor:
    """Compute the weights of the clean experts when the poisoning one is masked (DyCompEnSate).

    Args:
        scores: the router's scores of the clean experts, before the softmax, (..., N).
        outputs: outputs of the clean experts, (..., N, d).
        poisoned: output of the poisoning expert, (..., d).

    Returns:
        ω_i(1 + θ_i) divided by their sum, (..., N). An expert opposite to the poisoning one (θ within 1e-6 of −1) gets
        weight 0; if all are opposite, the result is the softmax of ``scores``.
    """
    raised = 1 + F.cosine_similarity(outputs, poisoned.unsqueeze(-2), dim=-1)
    raised = torch.where(raised > 1e-6, raised, 0)
    raised = torch.where((raised > 0).any(dim=-1, keepdim=True), raised, 1)
    # A softmax of scores: the weights themselves may have underflowed if the poisoning expert had nearly all of it.
    return (scores + raised.log()).softmax(dim=-1)


class LoPE:
    """The LoPE adapters of a model.

    >>> lope = LoPE.wrap(model, ["q_proj", "v_proj"])
    >>> lope.stage(1)  # then train on noisy data
    >>> lope.stage(2)  # then train on the original data
    >>> lope.mask_poisoning_expert()

    Attributes:
        model: the model; its target layers are ``LoPELinear``, and all parameters but the adapters' are frozen.
        layers: the adapted layers by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LoPELinear]) -> None:
        self.model, self.layers = model, dict(layers)

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        target_modules: Sequence[str],
        rank: int = 4,
        experts: int = 3,
        scale: float = 2.0,
        poisoning: bool = True,
        seed: int = 0,
    ) -> "LoPE":
        """Add adapters to some linear layers of a model, in place, freeze the rest and begin stage I.

        A layer with several names gets one adapter, under all of them, even if only one name is a target.

        Args:
            model: any module.
            target_modules: names of layers, or their last parts: "q_proj" selects every layer of that name.
            rank, experts, scale, poisoning, seed: as for ``LoPELinear``; each layer's seed is derived from ``seed``.

        Raises:
            ValueError: as ``LoPELinear`` does, if a name matches nothing, or for a layer that cannot be replaced: one
                that has an adapter already, is inside another target or a ``DistributedDataParallel``, or whose weight
                torch's attention and encoder layers read directly. The error names all such layers, and nothing has
                changed.
        """
        if isinstance(target_modules, str):
            raise ValueError(f"target_modules is {target_modules!r}; a sequence of names is needed")
        check_seed(seed)
        refuse_flat_parameters(model.parameters(), model)
        named = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if "parametrizations" not in name.split(".")  # these modules compute weights
        }
        found: dict[str, nn.Module] = {}
        for target in target_modules:
            matches = {n: m for n, m in named.items() if n == target or n.endswith(f".{target}")}
            if not matches:
                linear = sorted({n.rpartition(".")[2] for n, m in named.items() if isinstance(m, nn.Linear)})
                raise ValueError(f"target_modules has {target!r}, which matches no layer; linear ones are {linear}")
            found |= matches
        if not found:
            raise ValueError("target_modules is empty; at least one name is needed")
        found = {name: module for name, module in named.items() if name in found}  # in the model's order
        targets = set(found.values())
        places = {name: module for name, module in named.items() if module in targets}  # with all names of a target
        obstacles = {
            name: _find_obstacle_to_replacing(name, named, places) or _find_obstacle_to_adapting(m)
            for name, m in places.items()
        }
        _refuse("adapted", obstacles)
        flags = {p: p.requires_grad for p in model.parameters()}
        try:
            adapted: dict[nn.Module, LoPELinear] = {}
            for module in found.values():  # the same module for each of its names
                if module not in adapted:
                    own = int(np.random.SeedSequence([seed, len(adapted)]).generate_state(1)[0])
                    adapted[module] = LoPELinear(module, rank, experts, scale, poisoning, own)
        except BaseException:  # bad settings, or out of memory
            for p, wanted in flags.items():
                p.requires_grad_(wanted)
            raise
        for p in model.parameters():
            p.requires_grad_(False)
            p.grad = None  # otherwise an optimizer would still move it
        layers: dict[str, LoPELinear] = {}
        for name, module in places.items():
            _set_module(model, name, adapted[module])
            if name in found and adapted[module] not in layers.values():
                layers[name] = adapted[module]
        lope = cls(model, layers)
        if poisoning:
            lope.stage(1)
        return lope

    def stage(self, number: int) -> None:
        """Train A and the poisoning expert (stage 1), or A, the clean experts and the router (stage 2).

        Unmasks the poisoning expert. Frozen parameters lose their ``.grad``, so that no optimizer moves them.

        Raises:
            ValueError: for another number, merged adapters, or adapters without a poisoning expert.
        """
        check_choice("stage", number, (1, 2))
        self._check_poisoning()
        trains = {1: ("A", "B_D"), 2: ("A", "B", "router")}[number]
        for layer in self.layers.values():
            layer.mask = None
            for name, p in layer.adapter().items():
                p.requires_grad_(name in trains)
                if name not in trains:
                    p.grad = None

    def mask_poisoning_expert(self, compensate: bool = True) -> None:
        """Mask the poisoning expert, for inference; ``stage`` unmasks it.

        Args:
            compensate: raise the clean experts' weights by DyCompEnSate; else these sum to less than one.

        Raises:
            ValueError: for merged adapters, adapters without a poisoning expert, or a ``compensate`` that is not a
                bool.
        """
        check_choice("compensate", compensate, (True, False))
        self._check_poisoning()
        for layer in self.layers.values():
            layer.mask = "compensated" if compensate else "plain"

    def merge(self) -> nn.Module:
        """Merge the adapters into the base layers, if that is exact, and return the model.

        It is exact for one clean expert whose weight is always one: without a poisoning expert, or with it masked and
        compensated. The input mixes several different experts, so no single matrix equals them. A layer gets a new
        weight; a module that shared the old one keeps the old one.

        The sum is taken in the adapter's precision and rounded to that of the layer's weight.

        Raises:
            ValueError: if a merge is not exact, the base's weight is quantised, sharded or computed from other
                parameters, the model also uses the base without its adapter, a layer has forward hooks, or the sum is
                not finite. The error names all such layers, and nothing has changed.
        """
        named = dict(self.model.named_modules(remove_duplicate=False))
        names = {
            name: module
            for name, module in named.items()
            if isinstance(module, LoPELinear) and module in self.layers.values()
        }
        bare = {}  # a name of every module that is not only the base of an adapter
        for name, module in named.items():
            parent, _, leaf = name.rpartition(".")
            if leaf != "base" or parent not in names:
                bare[module] = name

        def find_obstacle(layer: LoPELinear) -> str | None:
            if layer not in names.values():
                return "it is no longer in the model"
            if layer.base in bare:
                return f"its base is also {bare[layer.base]}, without an adapter"
            return _find_obstacle_to_merging(layer)

        obstacles = {name: find_obstacle(layer) for name, layer in self.layers.items()}
        _refuse("merged", obstacles)
        merged: dict[str, Tensor] = {}
        with torch.no_grad(), torch.inference_mode(False):
            for name, layer in self.layers.items():
                weight = layer.base._parameters["weight"]
                assert weight is not None
                with torch.autocast(weight.device.type, enabled=False):
                    merged[name] = (weight + layer.scale * layer.B[0] @ layer.A).to(weight.dtype)
                if not merged[name].isfinite().all():
                    obstacles[name] = f"its weight would not be finite in {weight.dtype}"
            _refuse("merged", obstacles)
            for name, layer in self.layers.items():  # from here on nothing fails
                layer.base.weight = nn.Parameter(merged[name], requires_grad=False)
        for name, module in names.items():
            _set_module(self.model, name, module.base)
        self.layers = {}
        return self.model

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all adapters, frozen ones included."""
        for layer in self.layers.values():
            yield from layer.adapter().values()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapters' tensors by name, for ``torch.save`` or safetensors, without ``mask``."""
        return {
            f"{name}.{part}": p.detach() for name, layer in self.layers.items() for part, p in layer.adapter().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state from ``state_dict``.

        Raises:
            ValueError: if names or shapes differ. Then nothing has changed.
        """
        mine = self.state_dict()
        shapes, theirs = ({k: tuple(x.shape) for k, x in s.items()} for s in (mine, state))
        if shapes != theirs:
            differing = sorted(k for k in shapes.keys() | theirs.keys() if shapes.get(k) != theirs.get(k))
            raise ValueError(f"the state is of other adapters; differing: {', '.join(differing)}")
        with torch.no_grad():
            for name, x in mine.items():
                x.copy_(state[name])

    def _check_poisoning(self) -> None:
        if not self.layers:
            raise ValueError("the adapters are merged into the model; none is left")
        if any(layer.B_D is None for layer in self.layers.values()):
            raise ValueError("the adapters have no poisoning expert; wrap with poisoning=True")


def _find_obstacle_to_replacing(
    name: str, named: Mapping[str, nn.Module], found: Mapping[str, nn.Module]
) -> str | None:
    """Say why an adapter cannot replace a module; None if it can.

    Args:
        name: the module's name in the model.
        named: all modules of the model.
        found: the modules to replace.
    """
    if not name:
        return "it is the model itself, which an adapter cannot replace in place; put it into an nn.Sequential"
    parts = name.split(".")
    above = {".".join(parts[:i]): named[".".join(parts[:i])] for i in range(len(parts))}
    parent = above[name.rpartition(".")[0]]
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"it is part of a {type(parent).__name__}, which reads the weight and would ignore an adapter"
    for outer, module in above.items():
        if outer in found:
            return f"it is inside of {outer}, which is a target, too"
        if isinstance(module, LoPELinear):
            return f"it is inside of {outer}, which is adapted already"
        if isinstance(module, torch.jit.ScriptModule | nn.parallel.DistributedDataParallel):
            return f"it is inside of a {type(module).__name__}, which would not register it; adapt the model first"
    return None


def _refuse(act: str, obstacles: Mapping[str, str | None]) -> None:
    """Raise a ValueError that names every layer with an obstacle, if there is one."""
    refused = [f"{name or 'the model'} cannot be {act}: {why}" for name, why in obstacles.items() if why]
    if refused:
        raise ValueError("; ".join(refused))


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# ---------------------------------------------------------------- HyNoIse


class NoisyWords(NamedTuple):
    """Words with discrete noise, and the sorted positions of the noisy words of each kind."""

    words: list[str]
    shuffled: list[int]
    inserted: list[int]
    deleted: list[int]


def discrete_noise(words: Sequence[str], share: float = 0.05, seed: int = 0) -> NoisyWords:
    """Apply the discrete noise of HyNoIse: shuffle, lengthen or shorten a share of the words, a third each.

    Shuffled words exchange places (equal words look unchanged). The others gain a random letter at a random place, or
    lose a letter; a word of one letter gains one instead. round(share · n) of n words are chosen. A single word cannot
    exchange places, so of three or fewer chosen words the kinds are drawn; of two or three, each kind gets a third on
    average.

    Args:
        words: the words of a text.
        share: share of the words that get noise, in [0, 1].
        seed: of all draws.

    Raises:
        ValueError: for a string instead of words, a share outside [0, 1] or a bad seed.
    """
    if isinstance(words, str):
        raise ValueError(f"words is {words!r}; a sequence of words is needed")
    check_share(share=share)
    check_seed(seed)
    rng = random.Random(int(seed))
    chosen = rng.sample(range(len(words)), round(share * len(words)))
    moving, lengthened = _draw_counts(len(chosen), rng)
    # Words that lose a letter come last; only words of two or more letters can.
    chosen.sort(key=lambda i: len(words[i]) > 1)
    deleted = [i for i in chosen[moving + lengthened :] if len(words[i]) > 1]
    others = [i for i in chosen if i not in set(deleted)]
    rng.shuffle(others)
    shuffled, inserted = others[:moving], others[moving:]

    noisy = list(words)
    for i, j in zip(shuffled, shuffled[1:] + shuffled[:1], strict=True):
        noisy[i] = words[j]
    for i in inserted:
        place = rng.randint(0, len(words[i]))
        noisy[i] = words[i][:place] + rng.choice(string.ascii_lowercase) + words[i][place:]
    for i in deleted:
        place = rng.randrange(len(words[i]))
        noisy[i] = words[i][:place] + words[i][place + 1 :]
    return NoisyWords(noisy, sorted(shuffled), sorted(inserted), sorted(deleted))


def _draw_counts(count: int, rng: random.Random) -> tuple[int, int]:
    """Draw how many of ``count`` words are shuffled and how many lengthened; the others are shortened."""
    if count > 3:
        return math.ceil(count / 3), math.ceil((count - 1) / 3)
    shuffled = 2 if count > 1 and rng.random() < count / 6 else 0  # a third on average, never a single word
    rest = count - shuffled
    return shuffled, rest // 2 + (rest % 2) * rng.getrandbits(1)


def continuous_noise(
    embeddings: Tensor, valid: Tensor, scale: float, generator: torch.Generator | None = None
) -> Tensor:
    """Apply the continuous noise of HyNoIse: embeddings + scale · U(−1, 1) at valid tokens.

    Args:
        embeddings: (..., T, d).
        valid: False at padding tokens, (..., T), boolean.
        scale: bound of the noise, at least 0.
        generator: a CPU generator; None for torch's global one.

    Raises:
        ValueError: if shapes do not fit, embeddings are not floating-point, ``valid`` is not boolean or the scale is
            negative.
    """
    check_not_negative(scale=scale)
    if not embeddings.is_floating_point():
        raise ValueError(f"embeddings are {embeddings.dtype}; floating-point embeddings are needed, not token numbers")
    if valid.dtype != torch.bool or valid.shape != embeddings.shape[:-1]:
        raise ValueError(
            f"valid is {valid.dtype} of shape {tuple(valid.shape)}; booleans of shape {tuple(embeddings.shape[:-1])} "
            "are needed"
        )
    noise = 2 * torch.rand(embeddings.shape, generator=generator, device="cpu").to(embeddings) - 1
    return embeddings + scale * noise * valid.unsqueeze(-1)
