"""The method in one file, in the paper's notation (arXiv 2605.04055): written for reading, not for speed.

===============================================  ===================================================
Eq. 1 to 4, AdamW's step with factors α, β       ``adamw_step``
section 3.3, features of the groups              ``features`` (a row: ``statistics``), ``progress``
Eq. 5, the Transformer encoder of Φ              ``encoder`` (in it: ``attention``)
Eq. 6 to 9, Φ                                    ``modulation``
Eq. 10, gradient alignment                       ``gradient_alignment``
Eq. 11, loss decrease                            ``loss_decrease``
Eq. 12, generalization gap                       ``generalization_gap``
Eq. 13, uncertainty weighting with priorities    ``huw``
Algorithm 1, a training step                     ``metaadamw_step`` (lines 4 to 7: ``move``)
Algorithm 2, a meta-update of Φ                  ``meta_update``
===============================================  ===================================================

The functions change none of their arguments. ``MetaAdamW`` computes the same numbers with less work; the tests compare
both. ``groups.py`` has section 3.2. Not included: ``amsgrad``, ``maximize``, several processes, and Adam for Φ.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------- Eq. 1 to 4


def adamw_step(
    theta: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, alpha: Tensor | float, beta: Tensor | float, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return θ, m and v of one tensor after a step. With α = β = 1 this is ``torch.optim.AdamW``.

    ε is outside the root, as in torch and in the code behind the paper's numbers; Eq. 4 has it inside.

    Args:
        theta, g, m, v: θ_{t−1}, ∇L(θ_{t−1}), m_{t−1} and v_{t−1}, all of one shape.
        t: number of this step, from 1.
        alpha, beta: α_g and β_g of the tensor's group.
        lr, betas, eps, weight_decay: η, (β₁, β₂), ε and λ.
    """
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g  # Eq. 1
    v = beta2 * v + (1 - beta2) * g**2  # Eq. 2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)  # Eq. 3
    theta = theta - lr * alpha * (m_hat / (v_hat.sqrt() + eps) + beta * weight_decay * theta)  # Eq. 4
    return theta, m, v


class Parameter(NamedTuple):
    """A parameter of the model, with AdamW's state.

    Attributes:
        theta, m, v: value and moments.
        g: gradient; None if the parameter takes no part in this step.
        t: number of steps so far.
        adamw: lr, betas, eps and weight_decay.
    """

    theta: Tensor
    g: Tensor | None
    m: Tensor
    v: Tensor
    t: int
    adamw: Mapping[str, Any]


class Group(NamedTuple):
    """A modulation group 𝒫_g. Its mean depth and share of biases, each in [0, 1], are features of "enhanced"."""

    params: Sequence[Parameter]
    depth: float = 0.5
    bias_ratio: float = 0.0


# ---------------------------------------------------------------- section 3.3


def features(groups: Sequence[Group], time: float | None, version: str = "basic", use_v_norms: bool = True) -> Tensor:
    """Compute F, shape (G, D), in float64: the statistics of every group and, if not None, the time as last column.

    "norm_basic" and "norm_basic_plus" standardise the statistics over the groups with a gradient; the others get zeros.
    """
    f = torch.stack([statistics(group, version, use_v_norms) for group in groups])
    some = torch.tensor([any(p.g is not None for p in group.params) for group in groups], device=f.device)
    if version.startswith("norm_") and some.any():
        centred, std = f - f[some].mean(dim=0), f[some].std(dim=0, correction=0)
        rounding = std <= 1e-6 * f[some].abs().amax(dim=0)  # the groups agree up to rounding
        f = torch.where(rounding | ~some.unsqueeze(1), 0.0, centred / std)
    return f if time is None else torch.cat([f, torch.full_like(f[:, :1], time)], dim=1)


def statistics(group: Group, version: str, use_v_norms: bool) -> Tensor:
    """Compute a row of F without the time: means and spreads over a group's tensors; zeros without any gradient."""
    rows = []
    for p in group.params:
        if p.g is not None:
            theta, g, m, v = (x.detach().double().flatten() for x in (p.theta, p.g, p.m, p.v))
            cosine = (g @ m / (g.norm() * m.norm()).clamp_min(torch.finfo(g.dtype).tiny)).clamp(-1, 1)
            zeros = [(x == 0).double().sum() / max(len(x), 1) for x in (g, m)]
            rows.append(torch.stack([g.norm(), m.norm(), theta.norm(), cosine, v.norm(), *zeros]))
    x = torch.stack(rows or [torch.zeros(7, dtype=torch.float64, device=group.params[0].theta.device)])
    mean, var, n = x.mean(dim=0), x.var(dim=0, correction=0), 5 if use_v_norms else 4
    if version == "enhanced":
        structure = [math.log1p(sum(p.theta.numel() for p in group.params)), group.bias_ratio, group.depth]
        return torch.cat([mean[:1], var[:1], mean[1:2], var[1:2], mean[5:], mean.new_tensor(structure)])
    std = var.sqrt()
    return torch.cat([mean[:4], std[:4], mean[4:n], std[4:n]]) if version.endswith("plus") else mean[:n]


def progress(t: int, total_steps: int | None = None) -> float:
    """Compute the time column after t steps: t/T, or 2σ(t/1000) − 1 if the number of steps T is unknown."""
    return t / total_steps if total_steps else 2 / (1 + math.exp(-t / 1000)) - 1


# ---------------------------------------------------------------- Eq. 5 to 9


class Phi(NamedTuple):
    """The attention module Φ.

    Attributes:
        weights: its parameters φ by their names in ``modulator.Modulator``, with gates and group embeddings.
        heads: H.
        range_alpha, range_beta: range_α and range_β of Eq. 7 and 8.
    """

    weights: Mapping[str, Tensor]
    heads: int
    range_alpha: float
    range_beta: float

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Compute Wx + b for each row x."""
        return x @ self.weights[f"{name}weight"].mT + self.weights[f"{name}bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Apply a layer norm to each row x."""
        return torch.nn.functional.layer_norm(
            x, x.shape[1:], self.weights[f"{name}weight"], self.weights[f"{name}bias"]
        )


def encoder(f: Tensor, phi: Phi) -> Tensor:
    """Compute Z of Eq. 5, shape (G, D): a pre-norm Transformer encoder over F, with the groups as tokens."""
    z = f
    for k in range(sum(name.endswith("norm1.weight") for name in phi.weights)):
        layer = f"encoder.layers.{k}."
        z = z + attention(phi.norm(z, f"{layer}norm1."), phi, f"{layer}self_attn.")
        hidden = torch.relu(phi.linear(phi.norm(z, f"{layer}norm2."), f"{layer}linear1."))
        z = z + phi.linear(hidden, f"{layer}linear2.")
    return z


def attention(x: Tensor, phi: Phi, name: str) -> Tensor:
    """Apply self-attention with H heads of width D/H over the rows of x, (G, D)."""
    q, k, v = phi.linear(x, f"{name}in_proj_").view(len(x), 3, phi.heads, -1).permute(1, 2, 0, 3)  # each (H, G, D/H)
    attended = torch.softmax(q @ k.mT / math.sqrt(q.shape[2]), dim=2) @ v
    return phi.linear(attended.transpose(0, 1).flatten(1), f"{name}out_proj.")


def modulation(f: Tensor, phi: Phi) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply Φ: compute α, β, λ₁ and λ₂, each (G,), from F. NaN counts as 0; magnitudes above 1e15 are cut."""
    f = torch.nan_to_num(f, nan=0.0).clamp(-1e15, 1e15).to(phi.weights["output.weight"].dtype)
    if "embeddings" in phi.weights:
        f = torch.cat([f, phi.weights["embeddings"]], dim=1)
    if "gates" in phi.weights:
        f = f * torch.sigmoid(phi.weights["gates"])
    z = encoder(f, phi)  # Eq. 5
    alpha_raw, beta_raw, lambda1_raw, lambda2_raw = phi.linear(z, "output.").mT  # Eq. 6
    alpha = 1 + phi.range_alpha * (torch.sigmoid(alpha_raw) - 0.5)  # Eq. 7
    beta = 1 + phi.range_beta * (torch.sigmoid(beta_raw) - 0.5)  # Eq. 8
    return alpha, beta, torch.sigmoid(lambda1_raw), torch.sigmoid(lambda2_raw)  # Eq. 9


# ---------------------------------------------------------------- Algorithm 1


@torch.no_grad()
def metaadamw_step(groups: Sequence[Group], phi: Phi, **feature: Any) -> tuple[list[Group], Tensor, Tensor]:
    """Take a step (Algorithm 1 without the meta-update); return the new groups, and α and β, each (G,).

    ``feature`` holds the keyword arguments of ``features``; ``time`` is the ``progress`` before this step.
    """
    f = features(groups, **feature)  # line 2
    alpha, beta, _, _ = modulation(f, phi)  # line 3
    return move(groups, alpha, beta), alpha, beta  # lines 4 to 7


def move(groups: Sequence[Group], alpha: Tensor, beta: Tensor) -> list[Group]:
    """Move the groups one step with factors α and β; a parameter without a gradient is neither moved nor decayed."""

    def moved(p: Parameter, k: int) -> Parameter:
        if p.g is None:
            return p
        theta, m, v = adamw_step(p.theta, p.g, p.m, p.v, p.t + 1, alpha[k].to(p.theta), beta[k].to(p.theta), **p.adamw)
        return p._replace(theta=theta, m=m, v=v, t=p.t + 1)

    return [group._replace(params=[moved(p, k) for p in group.params]) for k, group in enumerate(groups)]


# ---------------------------------------------------------------- Eq. 10 to 13


def gradient_alignment(g: Sequence[Tensor], g_prime: Sequence[Tensor], lambda1: Tensor, lambda2: Tensor) -> Tensor:
    """Compute L_grad of Eq. 10; g and g′ have one vector for each group, its tensors' gradients concatenated.

    The cosine is 0 if a group's part of g or g′ is only rounding: at most 100 machine epsilons of the whole norm.
    """
    rounding = 100 * torch.finfo(g[0].dtype).eps
    least, least_prime = rounding * torch.cat([*g]).norm(), rounding * torch.cat([*g_prime]).norm()
    terms = []
    for a, b, lambda1_g, lambda2_g in zip(g, g_prime, lambda1, lambda2, strict=True):
        cosine = a @ b / (a.norm() * b.norm()) if a.norm() > least and b.norm() > least_prime else 0.0
        terms.append(lambda1_g * (b @ b) - lambda2_g * cosine)
    return torch.stack(terms).mean()


def loss_decrease(val_at_theta_prime: Tensor, val_at_theta: Tensor) -> Tensor:
    """Compute L_loss of Eq. 11: L_val(θ′) − L_val(θ)."""
    return val_at_theta_prime - val_at_theta


def generalization_gap(train_at_theta: Tensor, val_at_theta: Tensor) -> Tensor:
    """Compute L_gap of Eq. 12: |L_train(θ, B₁) − L_val(θ)|. It does not depend on θ′, so it cannot move Φ."""
    return (train_at_theta - val_at_theta).abs()


def huw(losses: Tensor, s: Tensor, priorities: Sequence[float]) -> Tensor:
    """Compute L_meta of Eq. 13: Σ_i ½ e^{−s_i} L_i + ½ p_i s_i, with s_i = log σ_i²."""
    return ((torch.exp(-s) * losses + s.new_tensor(priorities) * s) / 2).sum()


# ---------------------------------------------------------------- Algorithm 2


def meta_update(
    groups: Sequence[Group], phi: Phi, s: Tensor, loss: Callable[[list[Tensor], Any], Tensor],
    batch1: Any, batch2: Any, val_batch: Any = None, *,
    objective: str = "combined", priorities: Sequence[float] | None = (1.0, 1.0, 1.0),
    meta_lr: float = 1e-4, meta_weight_decay: float = 1e-4, gate_sparsity: float = 1e-4, **feature: Any,
) -> tuple[Phi, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Take a step of Φ (Algorithm 2), differentiating twice; return the new Φ, the new s, and the losses by name.

    Lines 1 to 4 and 35 to 38 save and restore θ; here θ is not overwritten.

    Args:
        groups, phi: θ, m, v and Φ. Each θ must require gradients; the groups' g is ignored.
        s: log σ² of Eq. 13, (3,), which weights the terms of "combined".
        loss: L_task(θ, batch), a scalar that depends on its arguments alone and has second derivatives. θ lists the
            tensors of all groups. Dropout masks must be the same in each call.
        batch1, batch2, val_batch: B₁, B₂ and B_val.
        objective: "combined", or a single term: "gradient", "loss_decrease" or "gen_gap".
        priorities: p of Eq. 13; None for the unweighted sum of the terms.
        meta_lr: η_meta.
        meta_weight_decay, gate_sparsity: ours: the L2 decay of Φ, and the weight of Σ σ(gate) in L_meta.
        feature: keyword arguments of ``features``.
    """
    phi = phi._replace(weights={name: w.detach().requires_grad_() for name, w in phi.weights.items()})
    s = s.detach().requires_grad_()
    theta = [p.theta for group in groups for p in group.params]
    loss1 = loss(theta, batch1)  # line 6
    g = torch.autograd.grad(loss1, theta, retain_graph=True, allow_unused=True)  # line 7
    found = iter(g)
    groups = [x._replace(params=[p._replace(g=next(found)) for p in x.params]) for x in groups]
    f = features(groups, **feature)  # line 9
    alpha, beta, lambda1, lambda2 = modulation(f, phi)  # line 10
    theta_prime = [p.theta for group in move(groups, alpha, beta) for p in group.params]  # lines 12 to 17
    losses: dict[str, Tensor] = {}
    if objective in ("gradient", "combined"):
        loss2 = loss(theta_prime, batch2)  # line 19
        g_prime = torch.autograd.grad(loss2, theta_prime, create_graph=True, allow_unused=True)  # line 20
        g_g, g_prime_g = by_group(groups, g), by_group(groups, g_prime)
        losses["L_grad"] = gradient_alignment(g_g, g_prime_g, lambda1, lambda2)  # line 22
    if objective in ("loss_decrease", "combined"):  # line 23
        losses["L_loss"] = loss_decrease(loss(theta_prime, val_batch), loss(theta, val_batch))  # line 24
    if objective in ("gen_gap", "combined"):  # line 26
        losses["L_gap"] = generalization_gap(loss1, loss(theta, val_batch))  # line 27
    terms = torch.stack([x.to(s) for x in losses.values()])
    l_meta = huw(terms, s, priorities) if objective == "combined" and priorities else terms.sum()  # line 29
    if "gates" in phi.weights:
        l_meta = l_meta + gate_sparsity * torch.sigmoid(phi.weights["gates"]).sum()
    *slopes, slope_s = torch.autograd.grad(l_meta, [*phi.weights.values(), s], materialize_grads=True)  # line 31
    pairs = zip(phi.weights.items(), slopes, strict=True)
    weights = {name: (w - meta_lr * (x + meta_weight_decay * w)).detach() for (name, w), x in pairs}  # line 33
    return phi._replace(weights=weights), (s - meta_lr * slope_s).detach(), {"L_meta": l_meta, **losses}


def by_group(groups: Sequence[Group], x: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Concatenate each group's tensors in x to one vector; zeros for parameters without a gradient on B₁."""
    params = [p for group in groups for p in group.params]
    filled = [torch.zeros_like(p.theta) if p.g is None or y is None else y for p, y in zip(params, x, strict=True)]
    sizes = [sum(p.theta.numel() for p in group.params) for group in groups]
    return torch.split(torch.cat([y.flatten() for y in filled]), sizes)
