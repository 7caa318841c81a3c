"""The losses that train Φ: L_grad (Eq. 10) and L_val(θ′), with their derivatives by Φ (paper, section 3.5).

``optimizer.update_attention`` has Eq. 11 to 13 and the order of Algorithm 2; ``meta_optimizer`` has the step of Φ.

The hypothetical step θ′ = θ − ηα_g(u + β_gλθ), with u = m̂′/(√v̂′ + ε), depends on Φ only through the 2G numbers α
and β. So

    dL/dα_g = ⟨∂L/∂θ′, −η(u + β_gλθ)⟩_g     and     dL/dβ_g = ⟨∂L/∂θ′, −ηα_gλθ⟩_g .

∂L/∂θ′ remains to be computed. For L_loss it is an ordinary gradient. L_grad is a function of g′ = ∇L₂(θ′), so
∂L_grad/∂θ′ = H₂(θ′)·r with r = ∂L_grad/∂g′. This Hessian-vector product is a difference of two gradients:

    H₂(θ′)·r ≈ (∇L₂(θ′ + δr) − ∇L₂(θ′)) / δ.

``first_order_losses`` thus needs only first-order gradients of the model. ``double_backward_losses`` checks it: there
autograd differentiates twice. Chapter 5 of the book derives and compares both.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.stateless import _reparametrize_module

from metaadamw_lite.batches import copy_containers
from metaadamw_lite.buckets import State, moments_of
from metaadamw_lite.checks import NotFiniteError
from metaadamw_lite.modulator import Modulation
from metaadamw_lite.sharding import (
    is_sharded,
    list_process_groups,
    local,
    local_gradient,
    refuse_flat_parameters,
    refuse_mixtures,
    reshard,
    sum_over_shards,
)
from metaadamw_lite.surroundings import same_random_numbers, write

OBJECTIVES = ("combined", "gradient", "loss_decrease", "gen_gap")
ROUNDING = 100
"""A group's gradient counts as zero if its norm is at most ROUNDING machine epsilons of the whole gradient's norm."""

CACHED = 2**16
"""Elements that a CPU processes at a time, so that intermediate results stay in its cache."""

LossFn = Callable[[nn.Module, Any], Tensor]


class MetaLosses(NamedTuple):
    """The loss values of one meta-update; a term that the objective leaves out is NaN.

    Attributes:
        total: the meta-loss: Eq. 13, the unweighted sum or the single term, plus the penalty of the gates, if any.
        gradient: L_grad, Eq. 10.
        loss_decrease: L_loss, Eq. 11.
        gen_gap: L_gap, Eq. 12.
    """

    total: float
    gradient: float
    loss_decrease: float
    gen_gap: float


def gradient_alignment(
    modulation: Modulation,
    groups: Sequence[int],
    g: Sequence[Tensor],
    g_prime: Sequence[Tensor],
    params: Sequence[Tensor] = (),
) -> Tensor:
    """Compute L_grad of Eq. 10, a scalar: (1/G) Σ_g (λ₁‖g′_g‖² − λ₂ cos(g_g, g′_g)).

    Args:
        modulation: λ₁ and λ₂, each (G,).
        groups: the group index of each tensor.
        g: gradients on B₁ at θ, one for each parameter.
        g_prime: gradients on B₂ at θ′, of the same shapes.
        params: the parameters, if they are sharded; g and g_prime are then this process's parts.

    The gradient of a group concatenates those of its tensors. The cosine with a zero gradient is 0, and so is its
    derivative. Gradients that are only rounding count as zero (``ROUNDING``). A bias in front of a batch norm, for
    example, has numerical gradients of about 1e-8 instead of 0; their direction is random, but the cosine ignores size,
    and its derivative grows as 1/‖g′‖.
    """
    like = modulation.lambda1
    rows = [torch.stack([(x * x).sum(), (x * y).sum(), (y * y).sum()]) for x, y in zip(g, g_prime, strict=True)]
    sums = sum_over_shards(torch.stack([row.to(like) for row in rows]), params)
    return _align_sums(modulation, groups, sums, _precision(g))


def _precision(g: Sequence[Tensor]) -> float:
    """Return the machine ε of the least precise gradient, at most that of float32, the least precision of the sums."""
    return max(min(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps) for x in g)


def _align_sums(modulation: Modulation, groups: Sequence[int], sums: Tensor, precision: float) -> Tensor:
    """Compute ``gradient_alignment`` from ⟨g, g⟩, ⟨g, g′⟩ and ⟨g′, g′⟩ of each of n tensors, (n, 3)."""
    like = modulation.lambda1
    index = torch.tensor(groups, device=like.device)
    square_g, dot, square = like.new_zeros(len(like), 3).index_add(0, index, sums).unbind(dim=1)
    # The clamp is inside the root, whose derivative at zero is infinite.
    tiny = torch.finfo(like.dtype).tiny
    norms = square_g.sqrt() * square.clamp_min(tiny).sqrt()
    least = (ROUNDING * precision) ** 2
    is_rounding = (square_g <= least * square_g.sum()) | (square <= least * square.sum())
    cosine = (dot / norms.clamp_min(tiny)).masked_fill(is_rounding, 0)
    return (modulation.lambda1 * square - modulation.lambda2 * cosine).mean()


def compute_inner_products(vector: Iterable[Tensor], *others: Sequence[Tensor], like: Tensor) -> Tensor:
    """Compute ⟨x, y⟩ of each of n tensors x in ``vector`` with its counterpart y in each list: (n, len(others)).

    A CPU takes one tensor at a time, so ``vector`` may be a generator that saves memory. A GPU takes all tensors at
    once. There a signed sum is Σ|xy| − 2Σ|min(xy, 0)|, because norms are the only sums that torch takes of many tensors
    at once.

    Args:
        vector, others: n tensors each; counterparts have one shape.
        like: a tensor with the dtype and device of the result.
    """
    if others[0][0].device.type == "cpu":
        rows = [torch.stack([(x * y).sum() for y in ys]) for x, *ys in zip(vector, *others, strict=True)]
        return torch.stack([row.to(like) for row in rows])
    xs = list(vector)
    return torch.stack([_sum_each(torch._foreach_mul(xs, list(ys)), like) for ys in others], dim=1)


def _sum_each(tensors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Sum each of n tensors, (n,), in float64 if the device has it. Overwrites the tensors."""
    dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    total = _stack(torch._foreach_norm(tensors, 1, dtype=dtype), like.device)
    torch._foreach_clamp_max_(tensors, 0)
    return (total - 2 * _stack(torch._foreach_norm(tensors, 1, dtype=dtype), like.device)).to(like)


def _stack(scalars: Iterable[Tensor], device: torch.device) -> Tensor:
    """Stack scalars, which may be on several devices, to a vector on one."""
    return torch.stack([x.to(device) for x in scalars])


def _split_for_cache(tensors: Sequence[Tensor]) -> list[slice]:
    """Split a list for ``torch._foreach_*``: on a CPU into parts that fit its cache, elsewhere not at all."""
    if tensors[0].device.type != "cpu":
        return [slice(None)]
    bounds, size = [0], 0
    for i, x in enumerate(tensors):
        size += x.numel()
        if size >= CACHED or i + 1 == len(tensors):
            bounds.append(i + 1)
            size = 0
    return list(starmap(slice, pairwise(bounds)))


def directions(
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    max_v: Sequence[Tensor | None],
    t: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
) -> Sequence[Tensor]:
    """Compute u = m̂′/(√v̂′ + ε) of each tensor, with its moments m′ and v′ after step t with gradient g (Eq. 1 to 3).

    With ``amsgrad``, ``max_v`` is not None, and max(max_v, v′) replaces v′.

    Args:
        g, m, v: gradients, and moments before the step.
        max_v: the largest v so far of each tensor, or None.
        t: the number of each tensor's step, from 1.
        beta1, beta2, eps: β₁, β₂ and ε of each tensor.
    """
    m_hat, v_hat = torch._foreach_mul(m, beta1), torch._foreach_mul(v, beta2)
    torch._foreach_add_(m_hat, torch._foreach_mul(g, [1 - x for x in beta1]))  # Eq. 1
    torch._foreach_addcmul_(v_hat, g, g, [1 - x for x in beta2])  # Eq. 2
    for x, largest in zip(v_hat, max_v, strict=True):
        if largest is not None:
            x.copy_(torch.maximum(x, largest))
    torch._foreach_div_(m_hat, [1 - x**n for x, n in zip(beta1, t, strict=True)])  # Eq. 3
    torch._foreach_div_(v_hat, [1 - x**n for x, n in zip(beta2, t, strict=True)])
    torch._foreach_sqrt_(v_hat)
    torch._foreach_add_(v_hat, eps)
    torch._foreach_div_(m_hat, v_hat)
    return m_hat


@dataclass
class HypotheticalStep:
    """The hypothetical step θ′ = θ − ηα_g(u + β_gλθ) as a function of α and β (Algorithm 2, lines 12 to 17).

    Attributes:
        params: the parameters that have a gradient on B₁. If they are sharded, the lists below hold this process's
            parts.
        theta: copies of their values θ.
        g: their gradients on B₁.
        u: AdamW's direction m̂′/(√v̂′ + ε), with moments m′ and v′ that include g (line 14).
        lr, weight_decay: η and λ of each tensor.
        groups: the modulation group index of each tensor.
    """

    params: list[Tensor]
    theta: list[Tensor]
    g: list[Tensor]
    u: list[Tensor]
    lr: list[float]
    weight_decay: list[float]
    groups: list[int]

    @classmethod
    def of(
        cls,
        theta: Mapping[Tensor, Tensor],
        g: Mapping[Tensor, Tensor],
        param_groups: Sequence[Mapping[str, Any]],
        state: State,
        number: Mapping[Tensor, int],
    ) -> "HypotheticalStep":
        """Prepare the next step with gradients ``g``.

        Args:
            theta: copies of the values of the parameters.
            g: gradients on B₁, of the parameters that its loss contains.
            param_groups: parameter groups, with lr, betas, eps and weight_decay.
            state: moments and step counts before the step.
            number: the modulation group index of each parameter.
        """
        used = [(p, group) for group in param_groups for p in group["params"] if p in g]
        params, settings = [p for p, _ in used], [group for _, group in used]
        gradients = [g[p] for p in params]
        m, v, max_v = (list(column) for column in zip(*(moments_of(p, state) for p in params), strict=True))
        largest = [x if group["amsgrad"] else None for x, group in zip(max_v, settings, strict=True)]
        beta1, beta2 = ([float(group["betas"][i]) for group in settings] for i in (0, 1))
        lr, weight_decay, eps = ([float(group[x]) for group in settings] for x in ("lr", "weight_decay", "eps"))
        t = _get_step_numbers([state.get(p, {}).get("step") for p in params])
        u = [
            x
            for i in _split_for_cache(gradients)
            for x in directions(gradients[i], m[i], v[i], largest[i], t[i], beta1[i], beta2[i], eps[i])
        ]
        numbers = [number[p] for p in params]
        return cls(params, [theta[p] for p in params], gradients, u, lr, weight_decay, numbers)

    def theta_prime(self, alpha: Tensor, beta: Tensor) -> Iterator[Tensor]:
        """Yield θ′ of each parameter for factors α and β, each (G,), without gradients."""
        a, b = alpha.tolist(), beta.tolist()
        rates = [-lr * a[k] for k, lr in zip(self.groups, self.lr, strict=True)]
        decays = [b[k] * wd for k, wd in zip(self.groups, self.weight_decay, strict=True)]
        for i in _split_for_cache(self.theta):
            moved = torch._foreach_mul(self.theta[i], decays[i])
            torch._foreach_add_(moved, self.u[i])
            torch._foreach_mul_(moved, rates[i])
            torch._foreach_add_(moved, self.theta[i])
            yield from moved

    def pull_back(self, vector: Iterable[Tensor], alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (dL/dα, dL/dβ), each (G,), from ``vector`` = ∂L/∂θ′: its products with ∂θ′/∂α_g and ∂θ′/∂β_g."""
        rows = sum_over_shards(compute_inner_products(vector, self.u, self.theta, like=alpha), self.params)
        along_u, along_theta = rows.unbind(dim=1)
        lr, wd = alpha.new_tensor([self.lr, self.weight_decay]).unbind()
        index = torch.tensor(self.groups, device=alpha.device)
        by_alpha, by_beta = -lr * (along_u + beta[index] * wd * along_theta), -lr * alpha[index] * wd * along_theta
        zeros = torch.zeros_like(alpha)
        return zeros.index_add(0, index, by_alpha), zeros.index_add(0, index, by_beta)


def _get_step_numbers(step: Sequence[Tensor | None]) -> list[float]:
    """Return step counts plus one, where None is 0. Waits for a GPU once, not for each count."""
    present = [x for x in step if x is not None]
    counts = iter(_stack(present, present[0].device).tolist() if present else ())
    return [1.0 if x is None else next(counts) + 1 for x in step]


@dataclass
class Evaluator:
    """Losses and gradients of a model, all from the same random numbers and buffers, so that they differ only by θ.

    Attributes:
        model: the model; if it is wrapped in ``DistributedDataParallel``, the inner one, since the wrapper's reducer
            reads ``.grad`` only.
        loss_fn: maps the model and a batch to a scalar; it gets copies of the batch's containers.
        devices: devices whose random number generators are restored.
        processes: process groups that train together on different batches. Losses and gradients are means over them, as
            on the joined batch. Empty for a single process.
        sharded: True if each process holds only parts of the parameters.
        put_back: called before every loss, to restore everything but θ.
        check: called after every loss; raises an error for a change that cannot be undone.
    """

    model: nn.Module
    loss_fn: LossFn
    devices: list[torch.device]
    processes: Sequence["dist.ProcessGroup"] = ()
    sharded: bool = False
    put_back: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, model: nn.Module, loss_fn: LossFn, params: Sequence[Tensor]) -> "Evaluator":
        """Create an evaluator of an ordinary model, a ``DistributedDataParallel`` or one sharded by ``fully_shard``.

        Lightning Fabric's wrapper around any of them casts inputs and outputs as in training.

        Raises:
            ValueError: for parameters that FSDP1 has flattened, and if only some of them are sharded.
        """
        refuse_flat_parameters(params, model)
        refuse_mixtures(params, model)
        devices = [p.device for p in (*model.parameters(), *params)]  # frozen layers may draw random masks, too
        inside: Any = model._forward_module if is_fabrics(model) else model
        if isinstance(inside, DistributedDataParallel):
            bare = copy_without_backward_hooks(model, inside.module) if inside is not model else inside.module
            return cls(bare, loss_fn, devices, [inside.process_group])
        if inside is not model:
            model = copy_without_backward_hooks(model, inside)
        sharded = any(is_sharded(p) for p in params)
        if not sharded and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                "several processes train, but this model is neither a DistributedDataParallel nor sharded, so each "
                "process trains its own Φ. Pass the wrapped model",
                stacklevel=5,  # the third and fourth are torch's wrappers around ``update_attention``
            )
        return cls(model, loss_fn, devices, list_process_groups(params), sharded)

    def mean(self, x: Tensor) -> Tensor:
        """Average a tensor over the processes."""
        for group in self.processes:
            x = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(x, group=group)
            x /= dist.get_world_size(group)
        return x

    def loss(self, name: str, batch: Any) -> Tensor:
        """Compute the scalar loss on a batch: the mean over the processes, with the graph of this process.

        Args:
            name: name of the batch, for errors.
            batch: the batch.

        Raises:
            ValueError: if ``loss_fn`` does not return one number.
            NotFiniteError: if the loss is not finite.
        """
        torch.clear_autocast_cache()  # its copies of the weights would stay at the previous θ
        self.put_back()
        with same_random_numbers(self.devices):
            loss = self.loss_fn(self.model, copy_containers(batch))
        self.check()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            returned = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn returned {returned} on {name}; it must return a tensor with one element")
        loss = loss.reshape(())
        if self.processes:
            loss = loss + (self.mean(loss.detach()) - loss.detach())
        if not torch.isfinite(loss):
            raise NotFiniteError(f"the loss on {name} is {loss.item()}; a meta-update needs finite losses")
        return loss

    def value(self, name: str, batch: Any) -> Tensor:
        """Compute the loss on a batch, detached."""
        loss = self.loss(name, batch).detach()
        if self.sharded:
            reshard(self.model)
        return loss

    def gradient(self, name: str, batch: Any, params: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Compute the detached loss on a batch and its gradient by ``params``; zeros for unused parameters."""
        loss = self.loss(name, batch)
        pairs = zip(params, self._backward(loss, params), strict=True)
        return loss.detach(), [self._mean_gradient(torch.zeros_like(local(p)) if x is None else x) for p, x in pairs]

    def gradient_of_used(self, loss: Tensor, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Compute the gradient of a loss by those of ``params`` that it contains in any process."""
        found = self._backward(loss, params)
        used = torch.tensor([x is not None for x in found], dtype=torch.float32, device=loss.device)
        pairs = [
            (p, torch.zeros_like(local(p)) if x is None else x)
            for p, x, share in zip(params, found, self.mean(used).tolist(), strict=True)
            if share
        ]
        return {p: self._mean_gradient(x) for p, x in pairs}

    def _backward(self, loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Compute this process's gradient; for a sharded model its parts of the mean gradient of all processes."""
        if not (params and loss.requires_grad):
            return [None] * len(params)
        if not self.sharded:
            found = torch.autograd.grad(loss, params, allow_unused=True)
            if any(x is None for x in found):
                _refuse_reentrant_checkpoints(loss)
            return found
        torch.autograd.backward(loss)  # FSDP averages gradients in hooks that torch.autograd.grad does not call
        parts = [None if p.grad is None else local_gradient(p.grad, p) for p in params]
        for p in (*self.model.parameters(), *params):
            p.grad = None
        reshard(self.model)  # not done by backward after ``set_reshard_after_backward(False)``
        return parts

    def _mean_gradient(self, x: Tensor) -> Tensor:
        """Average a gradient from ``_backward`` over the processes; that of a sharded model is a mean already."""
        return x if self.sharded else self.mean(x)


def first_order_losses(
    evaluate: Evaluator, step: HypotheticalStep, modulation: Modulation, objective: str, batch2: Any, val_batch: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Compute L_grad and L_val(θ′) as functions of Φ, from first-order gradients of the model only.

    The parameters are left at or near θ′; the caller restores them.

    Args:
        evaluate: computes losses and gradients.
        step: the hypothetical step.
        modulation: the output of Φ, with its graph.
        objective: one of ``OBJECTIVES``.
        batch2, val_batch: B₂ and B_val.

    Returns:
        (L_grad, L_val(θ′)): scalars with the right value and derivative by Φ (that of L_grad up to the error of the
        difference); None for a term that ``objective`` does not need.
    """
    alpha, beta = modulation.alpha.detach(), modulation.beta.detach()
    with torch.no_grad():
        write([local(p) for p in step.params], list(step.theta_prime(alpha, beta)))

    def connect_to_phi(value: Tensor, vector: Iterable[Tensor]) -> Tensor:
        """Attach to ``value`` the derivatives by α and β that follow from ∂L/∂θ′ = ``vector``."""
        d_alpha, d_beta = step.pull_back(vector, alpha, beta)
        return value + (d_alpha * (modulation.alpha - alpha)).sum() + (d_beta * (modulation.beta - beta)).sum()

    l_grad = l_val = None
    if objective in ("loss_decrease", "combined"):
        l_val = connect_to_phi(*evaluate.gradient("val_batch", val_batch, step.params))
    if objective in ("gradient", "combined"):
        _, g_prime = evaluate.gradient("batch2", batch2, step.params)
        with torch.no_grad():
            pairs = [
                compute_inner_products(step.g, step.g, g_prime, like=alpha),
                compute_inner_products(g_prime, g_prime, like=alpha),
            ]
            sums = sum_over_shards(torch.cat(pairs, dim=1), step.params)
        # g′ is detached here, because H₂r stands for its dependence on Φ; λ₁ and λ₂ keep their graph.
        value = _align_sums(modulation, step.groups, sums.requires_grad_(), _precision(step.g))
        (by_sums,) = torch.autograd.grad(value, sums, retain_graph=True)
        with torch.no_grad():
            _, by_dot, by_square = by_sums.t().tolist()
            r: list[Tensor] = []
            for i in _split_for_cache(step.g):  # ∂⟨g′, g′⟩/∂g′ = 2g′ and ∂⟨g, g′⟩/∂g′ = g
                part = torch._foreach_mul(list(g_prime[i]), [2 * x for x in by_square[i]])
                torch._foreach_add_(part, torch._foreach_mul(step.g[i], by_dot[i]))
                r += part
            delta = _choose_delta(step.params, r)
            torch._foreach_add_([local(p) for p in step.params], r, alpha=delta)
        del r  # as large as the model
        _, moved = evaluate.gradient("batch2", batch2, step.params)
        l_grad = connect_to_phi(value, _divide_differences(moved, g_prime, delta))
    return l_grad, l_val


def double_backward_losses(
    evaluate: Evaluator, step: HypotheticalStep, modulation: Modulation, objective: str, batch2: Any, val_batch: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the two losses of ``first_order_losses`` with autograd differentiating twice through the model.

    Needs memory for the graph, and second derivatives of every operation in the model. Fused attention kernels and
    cuDNN's recurrent layers do not have them.
    """
    theta_prime = [
        theta - lr * modulation.alpha[k].to(theta) * (u + modulation.beta[k].to(theta) * wd * theta)
        for theta, u, lr, wd, k in zip(step.theta, step.u, step.lr, step.weight_decay, step.groups, strict=True)
    ]
    by_identity = {id(p): x for p, x in zip(step.params, theta_prime, strict=True)}
    swapped = {
        f"{prefix}.{name}" if prefix else name: by_identity[id(p)]
        for prefix, module in evaluate.model.named_modules()  # each module once, under any of its names
        for name, p in module._parameters.items()
        if id(p) in by_identity
    }
    l_grad = l_val = None
    with _reparametrize_module(evaluate.model, swapped):
        if objective in ("loss_decrease", "combined"):
            l_val = evaluate.loss("val_batch", val_batch)
        if objective in ("gradient", "combined"):
            loss = evaluate.loss("batch2", batch2)
            g_prime = torch.autograd.grad(loss, theta_prime, create_graph=True, materialize_grads=True)
            l_grad = gradient_alignment(modulation, step.groups, step.g, g_prime)
    return l_grad, l_val


def refuse_another_loss(first: Tensor, second: Tensor) -> None:
    """Raise a RuntimeError if two evaluations of the loss on B₁ differ.

    They must be bitwise equal on a CPU, and on other devices under ``torch.use_deterministic_algorithms``. Without it
    sums may run in any order; then half of the digits must agree.
    """
    exact = first.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    tolerance = 0.0 if exact else torch.finfo(first.dtype).eps ** 0.5
    one, two = first.item(), second.item()
    if abs(one - two) > tolerance * abs(one):
        raise RuntimeError(
            f"the loss on batch1 is {one!r} and then {two!r}, with the same parameters, buffers and random numbers. A "
            "meta-update compares losses, so loss_fn must depend on model and batch alone. Pass other objects that it "
            "changes as also=[...] (another model, a metric, a queue, a random number generator). It must not draw "
            "batches, or change objects that are neither modules nor containers"
        )


def is_fabrics(model: nn.Module) -> bool:
    """Return whether Lightning's ``Fabric.setup`` wraps a model, under either name of the package."""
    wrappers = (sys.modules.get(f"{name}.wrappers") for name in ("lightning.fabric", "lightning_fabric"))
    return any(module is not None and isinstance(model, module._FabricModule) for module in wrappers)


def copy_without_backward_hooks(model: nn.Module, inside: nn.Module) -> nn.Module:
    """Copy Fabric's wrapper around ``inside``: same precision, but its outputs do not require ``fabric.backward``."""
    twin = copy.copy(model)
    vars(twin)["_modules"] = {**model._modules, "_forward_module": inside}
    vars(twin)["_register_backward_hook"] = lambda output: output
    return twin


def _choose_delta(at: Sequence[Tensor], direction: Sequence[Tensor]) -> float:
    """Compute δ = √(machine ε)·(1 + ‖θ‖)/‖r‖ of a forward difference, which balances rounding against curvature."""
    precision = max(torch.finfo(p.dtype).eps for p in at)
    columns = (torch._foreach_norm([local(p) for p in at]), torch._foreach_norm(list(direction)))
    norms = torch.stack([_stack(column, at[0].device).double() for column in columns], dim=1).cpu()
    norm_at, norm_r = sum_over_shards(norms.square(), at).sum(dim=0).sqrt().tolist()
    return float(precision**0.5 * (1 + norm_at) / max(norm_r, 1e-30))


def _divide_differences(a: Sequence[Tensor], b: Sequence[Tensor], delta: float) -> Iterable[Tensor]:
    """Compute (a − b)/δ; on a CPU one tensor at a time, to save memory."""
    if a[0].device.type == "cpu":
        return ((x - y) / delta for x, y in zip(a, b, strict=True))
    difference: tuple[Tensor, ...] = torch._foreach_sub(list(a), list(b))
    torch._foreach_div_(difference, delta)
    return difference


def _refuse_reentrant_checkpoints(loss: Tensor) -> None:
    """Raise a RuntimeError for a graph with ``checkpoint(..., use_reentrant=True)``.

    Such a checkpoint hides its parameters from ``torch.autograd.grad``, which would treat them as unused.
    """
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise RuntimeError(
                "the model uses torch.utils.checkpoint with use_reentrant=True, which hides parameters from a "
                "meta-update; pass use_reentrant=False"
            )
        seen.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
