"""LiLAW: three learned scalars weight every training sample by its difficulty (arXiv 2509.20786).

For a sample with probabilities s = softmax(logits) and an observed, possibly wrong label ỹ:

    W_α = σ(α·s[ỹ] − max s)              large if the model believes the label ("easy")
    W_δ = exp(−(δ·s[ỹ] − max s)²/2)      large in between ("moderate")
    W_β = σ(−(β·s[ỹ] − max s))           large if the model believes another class ("hard")
    W   = W_α + W_δ + W_β                training loss = mean of W·ℓ

After each training batch α, δ and β take one step of gradient descent on the weighted loss of a validation batch, which
may be as noisy as the training data. The model is constant in this step: one forward pass without gradients.

The formulas alone imply: ∂W_α/∂α ≥ 0 and ∂W_β/∂β ≤ 0 for every sample, and ℓ ≥ 0, so descent shrinks the weights.
Apart from weight decay, α can only fall and β only rise.
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
"""Logits (N, C) and int64 labels (N,) to losses (N,), for example ``partial(F.cross_entropy, reduction="none")``."""


class Weights(NamedTuple):
    """The three parts of the sample weights, each (N,), or of the shape of the arguments of ``weights_of``."""

    easy: Tensor
    moderate: Tensor
    hard: Tensor

    @property
    def total(self) -> Tensor:
        """W, in (0, 3)."""
        return self.easy + self.moderate + self.hard


class LiLAW(KeepsFloat32):
    """Sample weights for a classifier of two or more classes, of any precision.

    Logits are a tensor or a model's output: an object with ``.logits`` or a mapping with "logits", as from models of
    ``transformers``.

    >>> lilaw = LiLAW(warmup_steps=len(loader))
    >>> for (x, y), val_batch in zip(loader, val_batches):
    ...     lilaw.loss(model(x), y, loss_fn).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     lilaw.meta_step(model, val_batch, loss_fn)

    Args:
        alpha, delta, beta: the start of the three scalars.
        lr, weight_decay: of their gradient descent.
        warmup_steps: number of calls of ``meta_step`` that move nothing; meanwhile ``loss`` is the unweighted mean. The
            paper warms up for one epoch and does not define this loss. We chose the unweighted one: before training,
            probabilities say nothing about samples.

    Attributes:
        alpha, delta, beta: scalar parameters in torch's default dtype at construction, at least float32; no cast makes
            them narrower. A frozen one (``requires_grad=False``) does not move.
        steps: number of calls of ``meta_step``.

    Raises:
        ValueError: for arguments that are negative or not finite, or a ``warmup_steps`` that is no whole number.
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
        with torch.inference_mode(False):  # parameters created in inference mode can never have a gradient
            self.alpha, self.delta, self.beta = (
                nn.Parameter(torch.tensor(float(x), dtype=dtype)) for x in (alpha, delta, beta)
            )
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps

    @property
    def warming_up(self) -> bool:
        """True during the warm-up: the three scalars do not move, and samples have equal weights."""
        return int(self.steps) < self.warmup_steps

    def parts(self, logits: Any, targets: Tensor) -> Weights:
        """Compute the three weights of every sample, differentiable in α, δ, β and the logits.

        Args:
            logits: (N, C), C ≥ 2, or an output that has them; a binary classifier needs two logits.
            targets: observed labels (N,), integers of any dtype from 0 to C − 1, on any device.

        Raises:
            ValueError: for other shapes or dtypes (regression, several labels a sample), labels out of range, or logits
                that are not finite.
        """
        logits, targets = _check_samples(logits, targets)
        return _weights(logits, targets, self.alpha, self.delta, self.beta)

    def weights(self, logits: Any, targets: Tensor) -> Tensor:
        """Compute W of every sample, (N,), in (0, 3); arguments and errors as for ``parts``."""
        return self.parts(logits, targets).total

    def loss(self, logits: Any, targets: Tensor, loss_fn: SampleLoss) -> Tensor:
        """Compute the training loss, a scalar: the mean of W·ℓ for fixed α, δ and β; during the warm-up the mean of ℓ.

        The gradient with respect to the model includes that of W, which depends on the logits.

        Args:
            logits, targets: as for ``parts``.
            loss_fn: from logits and targets to one loss for each sample.

        Raises:
            ValueError: as ``parts`` does, and if ``loss_fn`` does not return one loss for each sample.
        """
        logits, targets = _check_samples(logits, targets)
        losses = _sample_losses(logits, targets, loss_fn)
        if self.warming_up:
            return losses.mean()
        weights = _weights(logits, targets, self.alpha.detach(), self.delta.detach(), self.beta.detach()).total
        return (weights.to(losses.dtype) * losses).mean()

    def meta_step(self, model: nn.Module, val_batch: Mapping[str, Any] | Iterable[Any], loss_fn: SampleLoss) -> float:
        """Take one step of α, δ and β down the weighted loss of a validation batch; return the loss before the step.

        The model runs in eval mode without gradients. Modes, buffers, other state (all that ``Surroundings`` covers)
        and the global random number generators are restored. Parameters are not copied: a forward pass in eval mode
        must not write to them. The model may be frozen. ``torch.no_grad`` and autocast around the call are allowed.

        Args:
            model: maps inputs to logits, or to an output that has them.
            val_batch: a sequence of the model's inputs and, last, the labels; or a mapping of its keyword arguments and
                "labels", which the model does not get.
            loss_fn: as for ``loss``.

        Raises:
            ValueError: as ``loss`` does, for a model or a batch of another kind, or if α, δ and β are all frozen.
            NotFiniteError: a ``ValueError``, for logits or a gradient that are not finite.
            RuntimeError: under ``torch.inference_mode``, which has no gradients.

        After an error nothing has changed.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "meta_step needs a gradient; call it outside of torch.inference_mode() (torch.no_grad() is allowed)"
            )
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; it must be an nn.Module that returns logits")
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise ValueError("model has lazy layers, whose shapes are unknown; run the model once first")
        scalars = [x for x in (self.alpha, self.delta, self.beta) if x.requires_grad]
        if not scalars:
            raise ValueError("alpha, delta and beta are all frozen; call requires_grad_() on this LiLAW to train them")
        inputs, named, labels = _split(val_batch)
        with torch.no_grad(), evaluating(model):
            logits, targets = _check_samples(model(*inputs, **named), labels)
            losses = _sample_losses(logits, targets, loss_fn).clone()  # autograd refuses inference tensors
        with torch.enable_grad():
            value = (_weights(logits, targets, self.alpha, self.delta, self.beta).total * losses).mean()
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
        """Return the three scalars, for printing."""
        return ", ".join(f"{name}={getattr(self, name).item():.4g}" for name in ("alpha", "delta", "beta"))


def _weights(logits: Tensor, targets: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor) -> Weights:
    s = logits.to(torch.promote_types(logits.dtype, alpha.dtype)).softmax(dim=1)
    given, largest = s.gather(1, targets[:, None]).squeeze(1), s.amax(dim=1)
    return weights_of(given, largest, *(x.to(s.device) for x in (alpha, delta, beta)))


def weights_of(given: Tensor, largest: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor) -> Weights:
    """Compute W_α, W_δ and W_β, each of the shape of ``given``.

    Args:
        given: s[ỹ], the probability of the observed label.
        largest: max s, the largest class probability.
        alpha, delta, beta: the three scalars.
    """
    return Weights(
        easy=(alpha * given - largest).sigmoid(),
        moderate=(-(delta * given - largest).square() / 2).exp(),
        hard=(largest - beta * given).sigmoid(),
    )


def _split(batch: Mapping[str, Any] | Iterable[Any]) -> tuple[list[Any], dict[str, Any], Any]:
    """Split a batch into positional arguments of the model, keyword arguments and labels."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f'val_batch has {", ".join(map(str, batch))}; the labels must be under "labels"')
        return [], {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    parts = list(batch) if isinstance(batch, Iterable) and not isinstance(batch, Tensor | str) else []
    if len(parts) < 2:
        raise ValueError(
            f"val_batch is a {type(batch).__name__} of {len(parts)} parts; the model's inputs and the labels are "
            'needed, (x, y) for example, or a mapping with "labels"'
        )
    return parts[:-1], {}, parts[-1]


def _check_samples(output: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Return the finite logits of an output, (N, C), and the targets as int64 on their device; else a ValueError."""
    logits = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"logits are a {type(output).__name__}; a tensor (N, C), an object with .logits or a mapping with "
            '"logits" is needed (wrap a model with another output in a module that returns one of these)'
        )
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets are a {type(targets).__name__}; a tensor of class numbers is needed")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets are {targets.dtype}; LiLAW needs class numbers (no regression, no several labels)")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; (N, C) with at least two classes is needed (two logits for a "
            "binary classifier; flatten tokens or pixels into one dimension)"
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


def _sample_losses(logits: Tensor, targets: Tensor, loss_fn: SampleLoss) -> Tensor:
    losses = loss_fn(logits, targets)
    if not isinstance(losses, Tensor) or losses.shape != targets.shape:
        returned = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(
            f"loss_fn returned {returned}; one loss for each of {len(targets)} samples is needed (reduction='none')"
        )
    return losses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode for one forward pass; restore modes and state afterwards, also after an error.

    State is everything that ``Surroundings`` restores, except parameters, and the global random number generators.

    The copies of weights that autocast and ``fully_shard`` keep are dropped before and after the block: they may be
    older than the last step, or lack gradients.
    """
    modes = [(module, module.training) for module in model.modules()]
    params = list(model.parameters())
    surroundings = Surroundings(model, params)
    surroundings.put_back()  # the first call, before the first forward pass, restores nothing
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
