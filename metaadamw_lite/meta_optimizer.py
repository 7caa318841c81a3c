"""The meta-optimizer, which trains Φ and the uncertainty weights (Algorithm 2, lines 31 to 33): torch's SGD or Adam.

Its first parameter group is Φ, with an L2 decay; the second is the uncertainty weights, without.
"""

from collections.abc import Sequence
from itertools import chain
from math import inf

import torch
from torch import Tensor, nn

from metaadamw_lite.checks import NotFiniteError

META_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def create_meta_optimizer(
    name: str, modulator: nn.Module, huw: nn.Module | None, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Create the optimizer of Φ and the uncertainty weights.

    Args:
        name: a key of ``META_OPTIMIZERS``.
        modulator, huw: Φ, and the uncertainty weights or None.
        lr, weight_decay: step size of both, and L2 decay on Φ.
    """
    weights = {"params": list(modulator.parameters()), "weight_decay": weight_decay}
    variances = {"params": [] if huw is None else list(huw.parameters()), "weight_decay": 0.0}
    # foreach: Φ may have over a thousand small tensors.
    optimizer: torch.optim.Optimizer = META_OPTIMIZERS[name]([weights, variances], lr=lr, foreach=True)
    create_moments(optimizer)
    return optimizer


def get_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the optimizer's key in ``META_OPTIMIZERS``."""
    return next(name for name, kind in META_OPTIMIZERS.items() if type(optimizer) is kind)


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create Adam's moments before its first step: a sharded checkpoint loads only entries that already exist."""
    if type(optimizer) is torch.optim.Adam:
        for p in chain.from_iterable(group["params"] for group in optimizer.param_groups):
            if not optimizer.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.tensor(0.0, device="cpu"), **moments}


def follow(optimizer: torch.optim.Optimizer, modulator: nn.Module, huw: nn.Module | None) -> None:
    """Give the optimizer the current parameters of Φ and the uncertainty weights.

    ``load_state_dict(..., assign=True)`` or another Φ may have replaced them; the optimizer would train the old ones.
    """
    for group, module in zip(optimizer.param_groups, (modulator, huw), strict=True):
        now = [] if module is None else list(module.parameters())
        for p in set(group["params"]).difference(now):
            optimizer.state.pop(p, None)
        group["params"] = now
    create_moments(optimizer)


def descend(optimizer: torch.optim.Optimizer, total: Tensor) -> None:
    """Take one step down the meta-loss ``total``.

    Raises:
        NotFiniteError: if ``total`` or its gradient is not finite; then nothing has changed.
    """
    phi = [p for group in optimizer.param_groups for p in group["params"]]
    grads: Sequence[Tensor | None] = [None] * len(phi)
    if total.requires_grad:  # False for "gen_gap" without gates, which does not depend on Φ
        grads = torch.autograd.grad(total, phi, allow_unused=True)
    largest = torch._foreach_norm([x for x in (total.detach(), *grads) if x is not None], inf)
    if not torch.isfinite(torch.stack(largest)).all():
        raise NotFiniteError(f"the meta-loss is {total.item()} and its gradient is not finite; Φ has not changed")
    for p, grad in zip(phi, grads, strict=True):
        p.grad = torch.zeros_like(p) if grad is None else grad
    optimizer.step()
    optimizer.zero_grad()
