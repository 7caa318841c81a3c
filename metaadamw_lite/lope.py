"""LoPE: an adapter with an expert for noise, which is trained on noise and left out afterwards (arXiv 2505.23868).

An asymmetric LoRA adds to a frozen linear map W one down-projection A and several up-projections B_i, its experts,
weighed by a router ω(x) = softmax(Rx):

    y = Wx + scale · Σ_i ω_i(x) B_i A x,

and one of the experts, B_D, is there to be poisoned:

* Stage I, on noisy data (HyNoIse): only A and B_D train. Noise goes where it can be found again.
* Stage II, on the original data: B_D is frozen but takes part; A, the clean B_i and the router train.
* Afterwards B_D is masked. Its weight is shared out by likeness (DyCompEnSate): with θ_i = cos(B_iAx, B_DAx), ω_i
  becomes ω_i(1 + θ_i), divided by the sum of these, so that the weights still sum to one.

All B start at zero, so the adapted model starts as the base model; the router starts at random, or the clean experts
would stay copies of one another.
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
    """A linear layer with a LoPE adapter beside it.

    The adapter is float32 (float64 beside a float64 layer), also where the layer is in half precision or quantised and
    when the model is cast later: small steps are kept, and a gradient scaler can unscale gradients. It takes the input
    in this type, and the sum of both outputs is cast to the type of the layer's, as ``peft`` does.

    Args:
        base: an ``nn.Linear`` of any precision, or another layer with ``in_features`` and ``out_features`` (quantised,
            for example), whose own forward is called. It is kept as it is and frozen.
        rank: r, rows of A.
        experts: N, the clean experts.
        scale: factor on the adapter's output (LoRA's α/r).
        poisoning: with the poisoning expert; without it this is a plain asymmetric LoRA, and with one expert a LoRA.
        seed: of A and the router; the global random number generators are not touched.

    Attributes:
        A: (r, d_in).
        B: the clean experts, (N, d_out, r).
        B_D: the poisoning expert, (d_out, r), or None.
        router: R, (N + 1, d_in) with the poisoning expert last, or (N, d_in).
        mask: None while the poisoning expert takes part; "plain" or "compensated" once it is masked.

    Raises:
        ValueError: for a layer that is not linear, or whose weight is not there as a whole (lazy, sharded, on the meta
            device), a rank or number of experts below one, or a bad scale or seed.
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
        obstacle = _obstacle_to_adapting(base)
        if obstacle:
            raise ValueError(obstacle)
        check_count(rank=rank, experts=experts)
        check_not_negative(scale=scale)
        check_choice("poisoning", poisoning, (True, False))
        check_seed(seed)
        d_out, d_in = _sizes(base)
        tensors = [*base.parameters(), *base.buffers()]  # none in torch's own quantised layer, which is on the CPU
        device = tensors[0].device if tensors else torch.device("cpu")
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in base.parameters()) else torch.float32
        generator = torch.Generator().manual_seed(int(seed))

        def uniform(rows: int) -> nn.Parameter:
            """As ``nn.Linear`` starts: uniform within 1/√d_in."""
            bound = d_in**-0.5
            values = torch.empty(rows, d_in, dtype=torch.float32, device="cpu")
            return nn.Parameter(values.uniform_(-bound, bound, generator=generator).to(device, dtype))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

        with torch.inference_mode(False):  # what is made inside of it can never be trained
            self.A = uniform(rank)
            self.B = zeros(experts, d_out, rank)
            self.B_D = zeros(d_out, rank) if poisoning else None
            self.router = uniform(experts + poisoning)
        self.scale, self.mask, self.training = scale, None, base.training
        self.base = base.requires_grad_(False)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """(..., d_in) to (..., d_out), in the type of the base layer's output; other arguments go to that alone."""
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
                clean = compensated(scores[..., :-1], outputs, poisoned)
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
                f"a {type(self.base).__name__} passes no gradient on to its input; adapters in front of it learn only "
                "through other paths",
                stacklevel=2,
            )
        return (result + self.scale * mixed).to(result.dtype)

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name; the base layer's are not among them."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        count, poison = len(self.B), "" if self.B_D is None else " and a poisoning one"
        return f"rank={len(self.A)}, {count} clean expert{'s' if count > 1 else ''}{poison}, mask={self.mask}"


_TYPES_OF_PLAIN_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _plain_weight(base: nn.Module) -> nn.Parameter | None:
    """The weight, if it is an ordinary parameter: not computed from others, not quantised, not sharded.

    The attribute ``weight`` is not read, since spectral norm computes it anew and moves its buffers then.
    """
    weight = base._parameters.get("weight")
    return weight if type(weight) is nn.Parameter and weight.dtype in _TYPES_OF_PLAIN_WEIGHTS else None


def _sizes(base: nn.Module) -> tuple[int, int]:
    """d_out and d_in; a quantised weight may be packed and have another shape."""
    weight = _plain_weight(base)
    return (base.out_features, base.in_features) if weight is None else tuple(weight.shape)  # type: ignore[return-value]


def _is_plain_map(module: nn.Module) -> bool:
    """Whether the forward is that of ``nn.Linear``; a library may have replaced it in the class or in the object."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module)


def _obstacle_to_adapting(base: nn.Module) -> str | None:
    """Why a layer can have no adapter; None if it can. Nothing is run and nothing changed."""
    if not all(isinstance(getattr(base, size, None), int) for size in ("in_features", "out_features")):
        return f"base is a {type(base).__name__}; it must be an nn.Linear, or a layer with in_features and out_features"
    params, weight = list(base.parameters()), _plain_weight(base)
    if any(nn.parameter.is_lazy(p) for p in params):
        return "its shape is not known yet; run the model once first"
    if any(is_sharded(p) for p in params) or (not params and _is_plain_map(base)):
        return "its weight is sharded; adapt the model first and shard it then"
    if any(p.is_meta for p in params):
        return "its weight is on the meta device; load the model first"
    if weight is not None and (weight.ndim != 2 or not weight.numel()):
        return f"its weight has shape {tuple(weight.shape)}; (d_out, d_in) is needed, whole and not empty"
    if any(p.is_complex() for p in params):
        return "its weight is complex; real numbers are needed"
    raw = base._parameters.get("weight")
    if type(raw) is nn.Parameter and weight is None and _is_plain_map(base) and not base._forward_pre_hooks:
        return f"its weight is {raw.dtype}, by which an nn.Linear without a forward of its own cannot multiply"
    return None


def _obstacle_to_merging(layer: LoPELinear) -> str | None:
    """Why adapter and base are not one matrix times the input; None if they are. Nothing is run and nothing changed."""
    base = layer.base
    if layer.B_D is not None and layer.mask != "compensated":
        return "the poisoning expert takes part, or is masked without compensation"
    if not all(torch.equal(layer.B[0], other) for other in layer.B[1:]):
        return f"the router mixes {len(layer.B)} different experts by the input"
    if not _is_plain_map(base):
        return f"its base is a {type(base).__name__} with a forward of its own, quantised for example; keep the adapter"
    if "weight" not in base._parameters:
        return (
            "its weight is no parameter, but computed from others (weight norm, spectral norm, pruning); "
            "make it a parameter first"
        )
    weight = _plain_weight(base)
    if weight is None or weight.is_meta or weight.shape != (layer.B.shape[1], layer.A.shape[1]):
        found = base._parameters["weight"]
        kind = "None" if found is None else f"a {type(found).__name__} of {found.dtype} and shape {tuple(found.shape)}"
        return f"its weight is {kind}, quantised or sharded or not loaded; keep the adapter"
    if any(m._forward_hooks or m._forward_pre_hooks for m in (layer, base)):
        return "it has forward hooks, which would see the sum, or be lost; remove them first"
    return None


def compensated(scores: Tensor, outputs: Tensor, poisoned: Tensor) -> Tensor:
    """DyCompEnSate: the weights of the clean experts once the poisoning one is masked.

    Args:
        scores: the router's, of the clean experts, before the softmax, (..., N).
        outputs: of the clean experts, (..., N, d).
        poisoned: of the poisoning expert, (..., d).

    Returns:
        ω_i(1 + θ_i) divided by their sum, (..., N): they sum to one, as all experts' weights did before. An expert that
        is the opposite of the poisoning one (θ within 1e-6 of −1) gets nothing; if all are, θ is left out.
    """
    raised = 1 + F.cosine_similarity(outputs, poisoned.unsqueeze(-2), dim=-1)
    raised = torch.where(raised > 1e-6, raised, 0)
    raised = torch.where((raised > 0).any(dim=-1, keepdim=True), raised, 1)
    # As a softmax, since the weights themselves may all have underflowed where the poisoning expert had them all.
    return (scores + raised.log()).softmax(dim=-1)


class LoPE:
    """The LoPE adapters of a model.

    >>> lope = LoPE.wrap(model, ["q_proj", "v_proj"])
    >>> lope.stage(1)  # then train on noisy data
    >>> lope.stage(2)  # then train on the original data
    >>> lope.mask_poisoning_expert()

    Attributes:
        model: the model; its target layers are ``LoPELinear`` now, and everything but the adapters is frozen.
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
        """Put adapters beside some linear layers of a model, in place, and freeze the rest; stage I begins.

        A layer that has several names gets one adapter, under all of them, also where only one name is a target.

        Args:
            model: any module.
            target_modules: names of layers, or their last parts: "q_proj" means every layer of that name.
            rank, experts, scale, poisoning, seed: as for ``LoPELinear``; each layer has a seed of its own.

        Raises:
            ValueError: as ``LoPELinear`` does, if a name matches nothing, or for a layer that cannot be replaced: it is
                adapted already, inside of another one that is to be, read directly by torch's attention and encoder
                layers, or inside of a ``DistributedDataParallel``. All such layers are named, and nothing is changed.
        """
        if isinstance(target_modules, str):
            raise ValueError(f"target_modules is {target_modules!r}; a sequence of names is needed")
        check_seed(seed)
        refuse_flat_parameters(model.parameters(), model)
        named = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if "parametrizations" not in name.split(".")  # what computes a layer's weight is no layer
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
        places = {name: module for name, module in named.items() if module in targets}  # under names not found, too
        obstacles = {
            name: _obstacle_to_replacing(name, named, places) or _obstacle_to_adapting(m) for name, m in places.items()
        }
        _refuse("adapted", obstacles)
        flags = {p: p.requires_grad for p in model.parameters()}
        try:
            adapted: dict[nn.Module, LoPELinear] = {}
            for module in found.values():  # one may have several names
                if module not in adapted:
                    own = int(np.random.SeedSequence([seed, len(adapted)]).generate_state(1)[0])
                    adapted[module] = LoPELinear(module, rank, experts, scale, poisoning, own)
        except BaseException:  # bad settings, or memory that is not enough
            for p, wanted in flags.items():
                p.requires_grad_(wanted)
            raise
        for p in model.parameters():
            p.requires_grad_(False)
            p.grad = None  # an optimizer would go on moving it
        layers: dict[str, LoPELinear] = {}
        for name, module in places.items():
            _put(model, name, adapted[module])
            if name in found and adapted[module] not in layers.values():
                layers[name] = adapted[module]
        lope = cls(model, layers)
        if poisoning:
            lope.stage(1)
        return lope

    def stage(self, number: int) -> None:
        """Choose what trains: 1, A and the poisoning expert; 2, A, the clean experts and the router.

        What is frozen loses its ``.grad``, so that no optimizer moves it.

        Raises:
            ValueError: for another number, adapters without a poisoning expert, which have no stages, or merged ones.
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
        """Leave the poisoning expert out, for inference; ``stage`` puts it back.

        Args:
            compensate: by DyCompEnSate; else the clean experts keep their weights, which then sum to less than one.

        Raises:
            ValueError: for adapters without a poisoning expert, or merged ones, or if ``compensate`` is no truth value.
        """
        check_choice("compensate", compensate, (True, False))
        self._check_poisoning()
        for layer in self.layers.values():
            layer.mask = "compensated" if compensate else "plain"

    def merge(self) -> nn.Module:
        """Fold the adapters into the base layers, where that is exact, and return the model.

        It is exact for one clean expert whose weight is always one: without a poisoning expert, or with it masked and
        compensated. Several different experts are mixed by the input, which no single matrix does. A layer gets a new
        weight; a module that shared the old one keeps that.

        The sum is taken in the adapter's precision and rounded to that of the layer's weight.

        Raises:
            ValueError: where it is not exact, where the base has no plain weight to fold the adapter into (it is
                quantised, sharded, or computed from other parameters), where the model uses the base without the
                adapter, too, where hooks would see something else, or where the sum is not finite. All such layers are
                named, and nothing is changed.
        """
        named = dict(self.model.named_modules(remove_duplicate=False))
        names = {
            name: module
            for name, module in named.items()
            if isinstance(module, LoPELinear) and module in self.layers.values()
        }
        bare = {}  # the names of all modules that are reached in another way than as the base of an adapter
        for name, module in named.items():
            parent, _, leaf = name.rpartition(".")
            if leaf != "base" or parent not in names:
                bare[module] = name

        def obstacle(layer: LoPELinear) -> str | None:
            if layer not in names.values():
                return "it is no longer in the model"
            if layer.base in bare:
                return f"its base is also {bare[layer.base]}, where no adapter is"
            return _obstacle_to_merging(layer)

        obstacles = {name: obstacle(layer) for name, layer in self.layers.items()}
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
            _put(self.model, name, module.base)
        self.layers = {}
        return self.model

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all adapters, frozen ones included."""
        for layer in self.layers.values():
            yield from layer.adapter().values()

    def state_dict(self) -> dict[str, Tensor]:
        """The adapters alone, for ``torch.save`` or safetensors. Whether the expert is masked is not part of it."""
        return {
            f"{name}.{part}": p.detach() for name, layer in self.layers.items() for part, p in layer.adapter().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ValueError: if names or shapes differ. Nothing is changed then.
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


def _obstacle_to_replacing(name: str, named: Mapping[str, nn.Module], found: Mapping[str, nn.Module]) -> str | None:
    """Why an adapter cannot take the place of a module of this name; None if it can.

    Args:
        name: in the model.
        named: all modules of the model.
        found: those that are to be replaced.
    """
    if not name:
        return "it is the model itself, which has no place to put an adapter in; put it into an nn.Sequential"
    parts = name.split(".")
    above = {".".join(parts[:i]): named[".".join(parts[:i])] for i in range(len(parts))}
    parent = above[name.rpartition(".")[0]]
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"it is part of a {type(parent).__name__}, which reads the weight and would pass an adapter by"
    for outer, module in above.items():
        if outer in found:
            return f"it is inside of {outer}, which is to be adapted, too"
        if isinstance(module, LoPELinear):
            return f"it is inside of {outer}, which is adapted already"
        if isinstance(module, torch.jit.ScriptModule | nn.parallel.DistributedDataParallel):
            return f"it is inside of a {type(module).__name__}, which would not know of it; adapt the model first"
    return None


def _refuse(act: str, obstacles: Mapping[str, str | None]) -> None:
    """A ValueError that names every layer with an obstacle, if there is one."""
    refused = [f"{name or 'the model'} cannot be {act}: {why}" for name, why in obstacles.items() if why]
    if refused:
        raise ValueError("; ".join(refused))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# ---------------------------------------------------------------- HyNoIse


class NoisyWords(NamedTuple):
    """Words with discrete noise, and which of them have which kind: numbers in increasing order."""

    words: list[str]
    shuffled: list[int]
    inserted: list[int]
    deleted: list[int]


def discrete_noise(words: Sequence[str], share: float = 0.05, seed: int = 0) -> NoisyWords:
    """The discrete part of HyNoIse: a share of the words, in equal thirds, is shuffled, lengthened or shortened.

    Shuffled words change places among themselves (one that meets its like looks unchanged); others get a random letter
    at a random place, or lose a letter. A word of one letter that should lose it gets one. Of n words exactly the
    nearest whole number to share · n is chosen. One word alone cannot change places: where three or fewer are chosen,
    their kinds are drawn, of two or three words each kind a third on average.

    Raises:
        ValueError: for one string instead of words, a share outside [0, 1] or a bad seed.
    """
    if isinstance(words, str):
        raise ValueError(f"words is {words!r}; a sequence of words is needed")
    check_share(share=share)
    check_seed(seed)
    rng = random.Random(int(seed))
    chosen = rng.sample(range(len(words)), round(share * len(words)))
    moving, lengthened = _thirds(len(chosen), rng)
    # Those that are to lose a letter come last, and long words can lose one.
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


def _thirds(count: int, rng: random.Random) -> tuple[int, int]:
    """How many of some words are shuffled and how many lengthened; the others are shortened."""
    if count > 3:
        return math.ceil(count / 3), math.ceil((count - 1) / 3)
    shuffled = 2 if count > 1 and rng.random() < count / 6 else 0  # a third on average, and never one word alone
    rest = count - shuffled
    return shuffled, rest // 2 + (rest % 2) * rng.getrandbits(1)


def continuous_noise(
    embeddings: Tensor, valid: Tensor, scale: float, generator: torch.Generator | None = None
) -> Tensor:
    """The continuous part of HyNoIse: embeddings + scale · U(−1, 1) at valid tokens.

    Args:
        embeddings: (..., T, d).
        valid: which tokens are no padding, (..., T), boolean.
        scale: largest noise.
        generator: of torch's random numbers, on the CPU; None for the global one.

    Raises:
        ValueError: if shapes do not fit, embeddings are no floating-point numbers, ``valid`` is not boolean or the
            scale is negative.
    """
    check_not_negative(scale=scale)
    if not embeddings.is_floating_point():
        raise ValueError(f"embeddings are {embeddings.dtype}; floating-point numbers are needed, not numbers of words")
    if valid.dtype != torch.bool or valid.shape != embeddings.shape[:-1]:
        raise ValueError(
            f"valid is {valid.dtype} of shape {tuple(valid.shape)}; booleans of shape {tuple(embeddings.shape[:-1])} "
            "are needed"
        )
    noise = 2 * torch.rand(embeddings.shape, generator=generator, device="cpu").to(embeddings) - 1
    return embeddings + scale * noise * valid.unsqueeze(-1)
