"""LiLAW: three scalars weigh every training sample by how hard it is (arXiv 2509.20786).

For a sample with probabilities s = softmax(logits) and observed, maybe wrong, label ỹ:

    W_α = σ(α·s[ỹ] − max s)              large where the label is believed ("easy")
    W_δ = exp(−(δ·s[ỹ] − max s)²/2)      large in between ("moderate")
    W_β = σ(−(β·s[ỹ] − max s))           large where another class is believed ("hard")
    W   = W_α + W_δ + W_β                training loss = mean of W·ℓ

After each training batch α, δ and β take one step of gradient descent on the weighted loss of a validation batch, which
may be as noisy as the training data. The model's parameters θ are constants there: one forward pass without gradients.

What the formulas imply, before any experiment: ∂W_α/∂α ≥ 0 and ∂W_β/∂β ≤ 0 whatever the sample, and ℓ ≥ 0, so the
validation loss falls fastest where the weights shrink. Apart from weight decay, α can only fall and β only rise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaadamw_lite.checks import NotFiniteError, check_count, check_not_negative
from metaadamw_lite.precision import KeepsFloat32
from metaadamw_lite.sharding import reshard
from metaadamw_lite.surroundings import Surroundings, same_random_numbers

SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""From logits (N, C) and labels (N,), int64, to losses (N,): ``partial(F.cross_entropy, reduction="none")``, say."""


class Weights(NamedTuple):
    """The three parts of the weights of N samples, each (N,) (or of other probabilities, of their shape)."""

    easy: Tensor
    moderate: Tensor
    hard: Tensor

    @property
    def total(self) -> Tensor:
        """W, in (0, 3)."""
        return self.easy + self.moderate + self.hard


class LiLAW(KeepsFloat32):
    """Weights for the samples of any classifier of two or more classes, of any precision.

    Logits may come as the model's output: a tensor, an object with ``.logits`` or a mapping that has "logits", as the
    models of ``transformers`` return.

    >>> lilaw = LiLAW(warmup_steps=len(loader))
    >>> for (x, y), val_batch in zip(loader, val_batches):
    ...     lilaw.loss(model(x), y, loss_fn).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     lilaw.meta_step(model, val_batch, loss_fn)

    Args:
        alpha, delta, beta: where the three scalars start.
        lr, weight_decay: of their gradient descent.
        warmup_steps: so many calls of ``meta_step`` only count; until then ``loss`` is the plain mean. The paper warms
            up for one epoch. What the loss is meanwhile, our sources do not say; plain, because probabilities say
            nothing about samples before the model has learned anything.

    Attributes:
        alpha, delta, beta: scalars, in the default precision when it is made, but never narrower than float32, whatever
            the module is cast to. One that is frozen (``requires_grad=False``) rests.
        steps: how often ``meta_step`` was called.

    Raises:
        ValueError: for arguments that are negative or not finite, or steps that are no whole number.
    """

    steps: Tensor

    def __init__(
        self,
        alpha: float = 10.0,
        delta: float = 6.0,
        beta: float = 2.0,
        lr: float = 0.005,
        weight_decay: float = 1e-4,
        *,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        check_not_negative(alpha=alpha, delta=delta, beta=beta, lr=lr, weight_decay=weight_decay)
        check_count(0, warmup_steps=warmup_steps)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        with torch.inference_mode(False):  # scalars that are made inside of it never have a gradient
            self.alpha, self.delta, self.beta = (
                nn.Parameter(torch.tensor(float(x), dtype=dtype)) for x in (alpha, delta, beta)
            )
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps

    @property
    def warming_up(self) -> bool:
        """Whether the three scalars still rest and samples have equal weights."""
        return int(self.steps) < self.warmup_steps

    def parts(self, logits: Any, targets: Tensor) -> Weights:
        """The three weights of every sample, differentiable in α, δ and β and in the logits.

        Args:
            logits: (N, C), C ≥ 2, or an output that has them; a binary classifier has two.
            targets: observed labels (N,), integers of any type from 0 to C − 1, on any device.

        Raises:
            ValueError: for other shapes or types (regression, several labels a sample), labels out of range, or logits
                that are not finite.
        """
        logits, targets = _samples(logits, targets)
        return _parts(logits, targets, self.alpha, self.delta, self.beta)

    def weights(self, logits: Any, targets: Tensor) -> Tensor:
        """W of every sample, (N,), in (0, 3); arguments and errors as for ``parts``."""
        return self.parts(logits, targets).total

    def loss(self, logits: Any, targets: Tensor, loss_fn: SampleLoss) -> Tensor:
        """What the model descends: the mean of W·ℓ for fixed α, δ and β; the plain mean of ℓ during the warm-up.

        Its gradient by θ includes that of W, which is a function of the logits.

        Raises:
            ValueError: as ``parts`` does, and if ``loss_fn`` does not return one loss for each sample.
        """
        logits, targets = _samples(logits, targets)
        losses = _losses(logits, targets, loss_fn)
        if self.warming_up:
            return losses.mean()
        weights = _parts(logits, targets, self.alpha.detach(), self.delta.detach(), self.beta.detach()).total
        return (weights.to(losses.dtype) * losses).mean()

    def meta_step(self, model: nn.Module, val_batch: Mapping[str, Any] | Iterable[Any], loss_fn: SampleLoss) -> float:
        """One step of α, δ and β down the weighted loss on a validation batch; returns that loss before the step.

        The model is evaluated in eval mode and without gradients. Its modes, its buffers and its other state (as far
        as ``Surroundings`` looks at it) stay as they are, and so do the global random number generators. Its parameters
        are not copied: a forward pass in eval mode must not write to them. The model may be frozen. ``torch.no_grad``
        and autocast around the call are allowed.

        Args:
            model: from inputs to logits, or to an output that has them.
            val_batch: the model's inputs, and the labels last; or a mapping of its keyword arguments and "labels",
                which are not passed to the model.
            loss_fn: as for ``loss``.

        Raises:
            ValueError: as ``loss`` does, for a model or a batch of another kind, or if α, δ and β are all frozen; for
                logits or a gradient that are not finite a ``NotFiniteError``. Nothing is changed then.
            RuntimeError: under ``torch.inference_mode``, where nothing has a gradient.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "meta_step takes a gradient; call it outside of torch.inference_mode() (torch.no_grad() is allowed)"
            )
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; it must be an nn.Module that returns logits")
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise ValueError("model has lazy layers, whose shapes are not known yet; run it once first")
        scalars = [x for x in (self.alpha, self.delta, self.beta) if x.requires_grad]
        if not scalars:
            raise ValueError(
                "alpha, delta and beta are all frozen; call requires_grad_() of this LiLAW to let them move"
            )
        inputs, named, labels = _split(val_batch)
        with torch.no_grad(), evaluating(model):
            logits, targets = _samples(model(*inputs, **named), labels)
            losses = _losses(logits, targets, loss_fn).clone()  # autograd refuses a tensor of inference mode
        with torch.enable_grad():
            value = (_parts(logits, targets, self.alpha, self.delta, self.beta).total * losses).mean()
        gradient = torch.stack([x.to(value.device) for x in torch.autograd.grad(value, scalars)])
        if not torch.isfinite(gradient).all():
            raise NotFiniteError(f"the weighted validation loss is {value.item()} and its gradient is not finite")
        if not self.warming_up:
            with torch.no_grad():
                for x, slope in zip(scalars, gradient, strict=True):
                    x.sub_(self.lr * (slope.to(x) + self.weight_decay * x))
        self.steps += 1
        return value.item()

    def extra_repr(self) -> str:
        """The three scalars, for printing."""
        return ", ".join(f"{name}={getattr(self, name).item():.4g}" for name in ("alpha", "delta", "beta"))


def _parts(logits: Tensor, targets: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor) -> Weights:
    s = logits.to(torch.promote_types(logits.dtype, alpha.dtype)).softmax(dim=1)
    given, largest = s.gather(1, targets[:, None]).squeeze(1), s.amax(dim=1)
    return weights_of(given, largest, *(x.to(s.device) for x in (alpha, delta, beta)))


def weights_of(given: Tensor, largest: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor) -> Weights:
    """W_α, W_δ and W_β, each of the shape of its arguments.

    Args:
        given: s[ỹ], the probability of the given label.
        largest: max s, that of the class believed most.
        alpha, delta, beta: the three scalars.
    """
    return Weights(
        easy=(alpha * given - largest).sigmoid(),
        moderate=(-(delta * given - largest).square() / 2).exp(),
        hard=(largest - beta * given).sigmoid(),
    )


def _split(batch: Mapping[str, Any] | Iterable[Any]) -> tuple[list[Any], dict[str, Any], Any]:
    """A batch as positional and named arguments of the model, and labels."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f'val_batch has {", ".join(map(str, batch))}; the labels must stand under "labels"')
        return [], {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    parts = list(batch) if isinstance(batch, Iterable) and not isinstance(batch, Tensor | str) else []
    if len(parts) < 2:
        raise ValueError(
            f"val_batch is a {type(batch).__name__} of {len(parts)} parts; the model's inputs and the labels are "
            'needed, (x, y) for example, or a mapping with "labels"'
        )
    return parts[:-1], {}, parts[-1]


def _samples(output: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """The logits of an output, (N, C), finite, and its targets as int64 on the same device; else a ValueError."""
    logits = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"logits are a {type(output).__name__}; a tensor (N, C), an object with .logits or a mapping with "
            '"logits" is needed (put a model with another output into a module that returns one of these)'
        )
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets are a {type(targets).__name__}; a tensor of class numbers is needed")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets are {targets.dtype}; LiLAW needs class numbers (no regression, no several labels)")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; (N, C) with at least two classes is needed (two logits for a "
            "binary classifier; samples of several dimensions, tokens or pixels, in one)"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype}; floating-point numbers are needed")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, logits {tuple(logits.shape)}; (N,) is needed")
    if not len(targets):
        raise ValueError("the batch is empty; at least one sample is needed")
    targets = targets.to(logits.device, torch.long)
    low, high = targets.aminmax()
    if low < 0 or high >= logits.shape[1]:
        bad = low if low < 0 else high
        raise ValueError(f"a target is {bad.item()}; allowed are 0 to {logits.shape[1] - 1}, the classes of the logits")
    finite = torch.isfinite(logits).all(dim=1)
    if not finite.all():
        rows = (~finite).nonzero().flatten().tolist()
        raise NotFiniteError(f"logits of sample {rows[0]} are not finite ({len(rows)} of {len(finite)} samples)")
    return logits, targets


def _losses(logits: Tensor, targets: Tensor, loss_fn: SampleLoss) -> Tensor:
    losses = loss_fn(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape != targets.shape:
        returned = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"loss_fn returned {returned}; one loss for each of {len(targets)} samples is needed (reduction='none')"
        )
    return losses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run one forward pass with the model in eval mode, and leave modes and state as found, even if it raises.

    State is everything that ``Surroundings`` puts back but parameters, and the global random number generators.

    Copies of the weights, autocast's and those that ``fully_shard`` gathers, are from before the last step of an
    optimizer, or without gradients: they neither come into the block nor out of it.
    """
    modes = [(module, module.training) for module in model.modules()]
    params = list(model.parameters())
    surroundings = Surroundings(model, params)
    surroundings.put_back()  # before the first forward pass, as before each, it has nothing to do
    torch.clear_autocast_cache()
    model.eval()
    try:
        with same_random_numbers([x.device for x in (*params, *model.buffers())]):
            yield
    finally:
        for module, training in modes:
            module.training = training
        torch.clear_autocast_cache()
        reshard(model)
        surroundings.put_back()
