"""MetaAdamW: AdamW with a learning-rate factor α_g and a decay factor β_g for each parameter group g (Eq. 1 to 4).

One step is torch's AdamW with learning rate ηα_g and weight decay β_gλ, run by torch's own kernels (``fast``):

    θ ← θ − ηα_g (m̂/(√v̂ + ε) + β_gλθ)

The factors come from the attention module Φ (``modulator``), which sees statistics of every group (``features``).
Every K_meta steps the training loop calls ``update_attention``, which trains Φ (``meta``).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import getgeneratorlocals, isgenerator
from typing import Any

import torch
from torch import Tensor, nn

from metaadamw_lite.checks import (
    NotFiniteError,
    check_betas,
    check_choice,
    check_count,
    check_not_negative,
    check_priorities,
    check_range,
    check_seed,
    without_numpy,
)
from metaadamw_lite.fast import FULL, Bucket, Memory, PlainModulator, fused_adamw, in_one_buffer, torch_adamw
from metaadamw_lite.features import (
    FeatureConfig,
    constant,
    group_features,
    tensor_statistics,
    time_feature,
    zero_counts,
)
from metaadamw_lite.groups import (
    ModulationGroup,
    Place,
    form_groups,
    is_bias,
    native_groups,
    places_by_class,
    places_by_name,
)
from metaadamw_lite.huw import PriorityHUW
from metaadamw_lite.meta import (
    OBJECTIVES,
    Evaluator,
    HypotheticalStep,
    LossFn,
    MetaLosses,
    double_backward_losses,
    first_order_losses,
)
from metaadamw_lite.modulator import Modulator
from metaadamw_lite.sharding import is_sharded, local, local_gradient, refuse_flat_parameters, sum_over_shards
from metaadamw_lite.state import VERSION, check_moments, fitting_meta
from metaadamw_lite.surroundings import as_found

GROUP_STRATEGIES = ("fine_grained", "original")
META_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

_UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")
_OWN_ATTRIBUTES = (
    "groups",
    "alpha",
    "beta",
    "modulator",
    "huw",
    "_feature_config",
    "_group_strategy",
    "_names",
    "_places",
    "_meta_objective",
    "_feature_gating_sparsity",
    "_total_steps",
    "_t",
    "_step_supports_amp_scaling",
    "_meta_optimizer_name",
    "_meta_optimizer",
    "_buckets",
    "_sharded",
)


class MetaAdamW(torch.optim.AdamW):
    r"""AdamW with per-group factors from a self-attentive meta-optimizer (arXiv 2605.04055).

    .. code-block:: text

        every step (Algorithm 1)                       every K_meta steps (Algorithm 2)
        F      = statistics of g, m, θ, v per group    g  = ∇L(θ; B₁)
        α, β   = Φ(F)                                  θ′ = one step of the left column with g
        m, v   = AdamW's moments                       g′ = ∇L(θ′; B₂)
        θ      = θ − ηα(m̂/(√v̂ + ε) + βλθ)              Φ  = Φ − η_meta ∇_Φ L_meta(g, g′, θ′)

    >>> optimizer = MetaAdamW(model.named_parameters(), lr=5e-4)
    >>> for step, batch in enumerate(batches, start=1):
    ...     loss_fn(model, batch).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     if step % K_meta == 0:
    ...         optimizer.update_attention(model, train_batch_1, train_batch_2, loss_fn, val_batch)

    With ``alpha_range=beta_range=0`` it is ``torch.optim.AdamW``.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()`` or parameter-group dicts, as torch takes them.
        lr, betas, eps, weight_decay: η, (β₁, β₂), ε and λ of AdamW, also per parameter group. ε stands outside the
            root, as in torch; Eq. 4 of the paper writes it inside.
        alpha_range: α_g stays in 1 ± alpha_range/2 (Eq. 7); 0 to 2.
        beta_range: β_g stays in 1 ± beta_range/2 (Eq. 8); 0 to 2.
        group_strategy: "fine_grained" (layer type × depth third × bias, section 3.2) or "original" (the optimizer's
            own parameter groups). Without parameter names and ``model`` it is "original".
        model: for "fine_grained": decides layer types by module class, and names parameters that come without names. It
            is found by itself where ``params`` is ``model.named_parameters()``; where it is not known, names and shapes
            decide.
        feature_version: "basic", "basic_plus", "enhanced", "norm_basic" or "norm_basic_plus" (section 3.3).
        use_v_norms, include_time_step: the optional feature columns.
        use_feature_gating: learn a gate for every feature column.
        feature_gating_sparsity: weight of the gates' L1 norm in the meta-loss.
        group_embed_dim: width of the learned group embedding ("enhanced" only).
        attn_layers, attn_hidden_dim, attn_heads: L, D_ff and H of the encoder; H must divide the feature size.
        meta_objective: "combined" (Eq. 13), "gradient" (Eq. 10), "loss_decrease" (Eq. 11) or "gen_gap" (Eq. 12).
        huw_priorities: p of Eq. 13, in the order gradient, loss decrease, generalisation gap; None for the plain sum.
            Used by the combined objective.
        meta_lr, meta_weight_decay: step size of Φ and the L2 decay on it.
        meta_optimizer: "sgd" (Algorithm 2, line 33) or "adam".
        total_steps: length of the run, for the time column; None if unknown.
        seed: of Φ's random start. The global random number generators are not touched.
        foreach, fused: which of torch's AdamW kernels to use, as in torch. ``fused=True`` is the fastest; on a GPU the
            host then never waits inside ``step``.

    Attributes:
        groups: the G modulation groups, in order, each with ``name`` and ``params``.
        alpha, beta: the factors that the last step used, shape (G,); ones before the first step.
        modulator: Φ, an ``nn.Module``.
        huw: the uncertainty weights, or None.

    Raises:
        ValueError: for an argument out of range (a parameter group's included), an unknown name, heads that do not
            divide the features, options of torch's AdamW that are not supported, complex parameters, parameters that
            FSDP1 has flattened, an empty parameter list, or nameless parameters that ``model`` does not have.
        RuntimeError: for ``foreach`` and ``fused`` together, as in torch.
        TypeError: for ``params`` that are neither tensors nor groups of them, as in torch.
    """

    _plain: PlainModulator | None
    _memory: Memory

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        alpha_range: float = 1.0,
        beta_range: float = 1.0,
        group_strategy: str = "fine_grained",
        model: nn.Module | None = None,
        feature_version: str = "basic",
        use_v_norms: bool = True,
        include_time_step: bool = True,
        use_feature_gating: bool = False,
        feature_gating_sparsity: float = 1e-4,
        group_embed_dim: int = 4,
        attn_layers: int = 8,
        attn_hidden_dim: int = 16,
        attn_heads: int = 6,
        meta_objective: str = "combined",
        huw_priorities: Sequence[float] | None = (1.0, 1.0, 1.0),
        meta_lr: float = 1e-4,
        meta_weight_decay: float = 1e-4,
        meta_optimizer: str = "sgd",
        total_steps: int | None = None,
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay, meta_lr=meta_lr)
        check_not_negative(meta_weight_decay=meta_weight_decay, feature_gating_sparsity=feature_gating_sparsity)
        check_betas(betas)
        check_range(alpha_range=alpha_range, beta_range=beta_range)
        check_count(attn_layers=attn_layers, attn_hidden_dim=attn_hidden_dim, attn_heads=attn_heads)
        check_count(group_embed_dim=group_embed_dim, total_steps=1 if total_steps is None else total_steps)
        check_seed(seed)
        check_choice("group_strategy", group_strategy, GROUP_STRATEGIES)
        check_choice("meta_objective", meta_objective, OBJECTIVES)
        check_choice("meta_optimizer", meta_optimizer, META_OPTIMIZERS)
        check_choice("use_feature_gating", use_feature_gating, (True, False))
        check_choice("foreach", foreach, (None, True, False))
        check_choice("fused", fused, (None, True, False))
        if not (model is None or isinstance(model, nn.Module)):
            raise ValueError(f"model is {model!r}; it must be an nn.Module or None")
        if huw_priorities is not None:
            check_priorities(huw_priorities, 3)

        self._feature_config = FeatureConfig(feature_version, use_v_norms, include_time_step)
        self._group_strategy = group_strategy
        found = model if model is not None else _model_behind(params)
        self._names: dict[Tensor, str] = {}
        if model is not None and group_strategy == "fine_grained":
            self._names = {p: n for n, p in model.named_parameters()}
        self._places: dict[Tensor, Place] = {} if found is None else places_by_class(found)
        self._meta_objective = meta_objective
        self._feature_gating_sparsity = float(feature_gating_sparsity)
        self._total_steps = total_steps
        self._t = 0
        self.groups: list[ModulationGroup] = []
        settings = _plain_numbers({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        super().__init__(params, **settings, foreach=foreach, fused=fused)
        # The statistics need true gradients, so a GradScaler must unscale them before the step, not inside the kernel.
        self._step_supports_amp_scaling = False
        reference = next(self._parameters(), None)
        if reference is None:
            raise ValueError("the parameter groups are all empty; at least one parameter is needed")
        refuse_flat_parameters(self._parameters(), found)
        self._regroup()

        double = all(p.dtype == torch.float64 for p in self._parameters())
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # whatever the default device is
            torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would reseed the GPUs too
            self.modulator = Modulator(
                len(self._feature_config.columns),
                len(self.groups),
                layers=attn_layers,
                heads=attn_heads,
                hidden_dim=attn_hidden_dim,
                alpha_range=float(alpha_range),
                beta_range=float(beta_range),
                group_embed_dim=group_embed_dim if feature_version == "enhanced" else 0,
                gating=use_feature_gating,
            )
        self.modulator.to(reference.device, torch.float64 if double else torch.float32)
        self._forget()
        self.huw: PriorityHUW | None = None
        if meta_objective == "combined" and huw_priorities is not None:
            with torch.device("cpu"):
                self.huw = PriorityHUW(("regression",) * 3, tuple(huw_priorities))
            self.huw.to(self._phi_device, self._phi_dtype)
        weights = {"params": list(self.modulator.parameters()), "weight_decay": float(meta_weight_decay)}
        variances = {"params": list(self.huw.parameters()) if self.huw else [], "weight_decay": 0.0}
        self._meta_optimizer_name = meta_optimizer
        # Φ may have over a thousand small tensors.
        self._meta_optimizer = META_OPTIMIZERS[meta_optimizer]([weights, variances], lr=float(meta_lr), foreach=True)
        self.alpha = torch.ones(len(self.groups), device=self._phi_device, dtype=self._phi_dtype)
        self.beta = torch.ones_like(self.alpha)

    # ---------------------------------------------------------------- the step

    # In a compiled loop a step stays as it is: it calls kernels that are fused already. (The decorator imports torch's
    # compiler, which takes a second; torch's own way to put that off is private.)
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step (Algorithm 1) and return the closure's loss, if there is a closure.

        Parameters without a gradient are neither moved nor decayed; without any gradient nothing changes.

        Raises:
            RuntimeError: for sparse gradients, before anything is changed.
            ValueError: for an option of torch's AdamW that is not supported and was switched on in ``param_groups``.
        """
        for group in self.param_groups:
            _refuse_unsupported(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = self._gather()
        if not buckets:
            return loss
        self.alpha, self.beta = self._factors(buckets)
        by_torch, on_host = [], []
        for bucket in buckets:
            if not bucket.settings["fused"]:
                by_torch.append(bucket)
            elif bucket.theta[0].device.type == "cpu":
                on_host.append(bucket)
            elif bucket.theta[0].dtype == torch.float64:  # a GPU's kernel reads a rate that is a tensor as float32
                by_torch.append(bucket)
            else:
                self._move_on_device(bucket)
        if by_torch or on_host:  # a GPU's factors are waited for only here
            factors = list(zip(self.alpha.tolist(), self.beta.tolist(), strict=True))
            if on_host:
                self._memory.fused_adamw(on_host, factors)
            for bucket in by_torch:
                settings, (alpha, beta) = bucket.settings, factors[bucket.k]
                lr, weight_decay = settings["lr"] * alpha, beta * settings["weight_decay"]
                lr = float(lr) if settings["fused"] else lr
                torch_adamw(bucket, lr, weight_decay, settings["foreach"], settings["fused"])
        self._t += 1
        return loss

    def _gather(self, gradients: Mapping[Tensor, Tensor] | None = None) -> list[Bucket]:
        """The tensors that have a gradient, with their moments.

        Args:
            gradients: to be used instead of those in ``.grad``; nothing is to move then, and nothing is made.

        Raises:
            RuntimeError: for a sparse gradient, before anything is made.
        """
        buckets = []
        for index, k, params in self._buckets:
            used, g = [], []
            for p in params:
                grad = p.grad if gradients is None else gradients.get(p)
                if grad is not None:
                    used.append(p)
                    g.append(local_gradient(grad, p) if self._sharded else grad)
            if used:
                theta = [local(p) for p in used] if self._sharded else used
                buckets.append(Bucket(self.param_groups[index], k, used, theta, g, [], [], []))
        _refuse_sparse(buckets)
        for bucket in buckets:
            for p in bucket.params:
                if gradients is None:
                    state = self._state_of(p, fused=bool(bucket.settings["fused"]))
                    bucket.step.append(state["step"])
                m, v = self._moments(p)
                bucket.m.append(m)
                bucket.v.append(v)
        return buckets

    def _factors(self, buckets: Sequence[Bucket]) -> tuple[Tensor, Tensor]:
        """α and β, each (G,)."""
        f = self._group_features(buckets)
        if type(self.modulator) is Modulator and self._phi_device.type == "cpu" and self._phi_dtype in FULL:
            if self._plain is None or not self._plain.is_current(self.modulator):
                self._plain = PlainModulator(self.modulator)
            factors = None if self._plain.is_hooked() else self._plain(f.cpu().numpy())
            if factors is not None:
                alpha, beta = (torch.from_numpy(x).to(self._phi_dtype) for x in factors)
                return alpha, beta
        modulation = self.modulator(f.to(self._phi_device, self._phi_dtype))
        return modulation.alpha.detach(), modulation.beta.detach()

    def _move_on_device(self, bucket: Bucket) -> None:
        """Eq. 4 by the fused kernel of a GPU, which takes α as a tensor, so that the host need not wait for it.

        It takes no tensor for the decay, so that is done before, as the kernel would.
        """
        device, weight_decay = bucket.theta[0].device, bucket.settings["weight_decay"]
        lr = (bucket.settings["lr"] * self.alpha[bucket.k].to(device)).float()
        if weight_decay:
            torch._foreach_mul_(bucket.theta, 1 - lr * self.beta[bucket.k].to(device) * weight_decay)
        torch._foreach_add_(bucket.step, 1)
        fused_adamw(bucket, lr, 0.0)

    def _state_of(self, p: Tensor, fused: bool) -> dict[str, Tensor]:
        """Moments and step count of a parameter, made at its first step in the form that torch's kernels take."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            wide = not fused and torch.get_default_dtype() == torch.float64
            dtype, device = torch.float64 if wide else torch.float32, p.device if fused else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=dtype, device=device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def features(self) -> Tensor:
        """What Φ would see now: the feature matrix F (section 3.3), shape (G, D), from the gradients in ``.grad``.

        The columns are named by ``FeatureConfig.columns``. Gates and group embeddings belong to Φ and are not in it.

        Raises:
            RuntimeError: for sparse gradients.
        """
        return self._features({p: p.grad for p in self._parameters() if p.grad is not None})

    def _features(self, gradients: Mapping[Tensor, Tensor]) -> Tensor:
        return self._group_features(self._gather(gradients)).to(self._phi_device, self._phi_dtype)

    def _group_features(self, buckets: Sequence[Bucket]) -> Tensor:
        params = [p for bucket in buckets for p in bucket.params]
        members = [bucket.k for bucket in buckets for _ in bucket.params]
        sums = self._memory.inner_products(buckets)
        enhanced = self._feature_config.version == "enhanced"
        if enhanced:
            zeros = zero_counts([x for b in buckets for x in b.g], [x for b in buckets for x in b.m], sums)
            sums = torch.cat([sums, zeros], dim=1)
        if self._sharded:
            sums = sum_over_shards(sums, params)
        measured = tensor_statistics(sums[:, :5])
        if enhanced:
            sizes = constant(tuple(max(p.numel(), 1) for p in params), sums)  # an empty tensor has no zeros
            measured = torch.cat([measured, sums[:, 5:] / sizes.unsqueeze(1)], dim=1)
        time = time_feature(self._t, self._total_steps)
        return group_features(self._feature_config, self.groups, members, measured, time)

    def _moments(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of m and v of a parameter; zeros (that take no memory) before its first step."""
        state = self.state.get(p)
        if not state:
            part = local(p)
            zero = part.new_zeros(()).expand_as(part)
            return zero, zero
        m, v = state["exp_avg"], state["exp_avg_sq"]
        return (local(m), local(v)) if self._sharded else (m, v)

    # ---------------------------------------------------------------- the meta-update

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update_attention(
        self,
        model: nn.Module,
        batch1: Any,
        batch2: Any,
        loss_fn: LossFn,
        val_batch: Any = None,
        *,
        double_backward: bool = False,
    ) -> MetaLosses:
        """Train Φ by one step on the meta-objective (Algorithm 2) and return its terms.

        Everything but Φ, its optimizer and the uncertainty weights is left as it was: parameters, ``.grad``, moments,
        buffers, train/eval mode and random number generators, also when ``loss_fn`` raises. The losses are taken in the
        mode (train or eval) the model is in, from the same random numbers and buffers, so that only θ makes a
        difference. (Parameters are written to and put back: a graph that was made before cannot be used after.)

        Under ``DistributedDataParallel`` and ``fully_shard`` every process calls this with batches of its own; losses
        and gradients are means over the processes, so Φ stays the same in all of them. Under ``fully_shard`` call it
        where a step has just been made, not while gradients are being accumulated.

        Args:
            model: the model whose parameters this optimizer holds, or its ``DistributedDataParallel``.
            batch1, batch2: training batches B₁ and B₂.
            loss_fn: ``loss_fn(model, batch)`` returns a scalar tensor.
            val_batch: validation batch, required unless the objective is "gradient".
            double_backward: differentiate twice through the model instead of taking a difference of two gradients.
                Slower, and not possible with every kernel; for checking.

        Raises:
            ValueError: without a ``val_batch`` that the objective needs, for a loss that is not one finite number or
                contains no parameter of this optimizer, for a gradient of Φ that is not finite, for ``double_backward``
                with several processes, and for parameters that FSDP1 has flattened or of which only some are sharded.
                What is not finite is a ``metaadamw_lite.checks.NotFiniteError``. Φ stays as it was.
            RuntimeError: for checkpoints with ``use_reentrant=True`` (but under ``fully_shard``), and for a forward
                pass that changes parameters which are not trained and too large to be copied: these stay as the forward
                passes left them. Also under ``torch.inference_mode``. Φ stays as it was.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("update_attention takes gradients; call it outside of torch.inference_mode()")
        objective = self._meta_objective
        if val_batch is None and objective != "gradient":
            raise ValueError(f"val_batch is None, but meta_objective={objective!r} needs a validation batch")
        params = [p for p in self._parameters() if p.requires_grad]
        evaluate = Evaluator.of(model, loss_fn, params)
        if double_backward and evaluate.processes:
            raise ValueError("double_backward is for checking, and does not work with several processes")
        with torch.enable_grad(), as_found(model, params) as (theta, surroundings):
            evaluate.put_back = surroundings.put_back
            loss1 = evaluate.loss("batch1", batch1)
            g = evaluate.gradient_of_used(loss1, params)
            if not g:
                raise ValueError("the loss on batch1 contains no parameter of this optimizer; is it the right model?")
            modulation = self.modulator(self._features(g))
            step = self._hypothetical_step(g, dict(zip(params, theta, strict=True)))
            l_loss = l_gap = None
            if objective != "gradient":
                # Not under no_grad: some modules take another path there, and the difference would show it.
                val_at_theta = evaluate.value("val_batch", val_batch)
            if objective in ("gen_gap", "combined"):
                l_gap = (loss1.detach() - val_at_theta).abs()  # Eq. 12 contains no θ′, so it cannot move Φ
            route = double_backward_losses if double_backward else first_order_losses
            l_grad, val_at_theta_prime = route(evaluate, step, modulation, objective, batch2, val_batch)
            if val_at_theta_prime is not None:
                l_loss = val_at_theta_prime - val_at_theta  # Eq. 11
            terms = [term.to(modulation.alpha) for term in (l_grad, l_loss, l_gap) if term is not None]
            total = self.huw(terms) if self.huw is not None else torch.stack(terms).sum()
            penalty = self.modulator.gate_penalty()
            if penalty is not None:
                total = total + self._feature_gating_sparsity * penalty
            surroundings.refuse_changes()
            self._descend(total)
        return MetaLosses(total.item(), *(math.nan if x is None else x.item() for x in (l_grad, l_loss, l_gap)))

    def _hypothetical_step(self, g: Mapping[Tensor, Tensor], theta: Mapping[Tensor, Tensor]) -> HypotheticalStep:
        """What ``step`` would do now with gradients ``g``, as a function of α and β."""
        used = [(p, k, self.param_groups[index]) for index, k, params in self._buckets for p in params if p in g]
        params, groups, settings = (list(column) for column in zip(*used, strict=True))
        m, v = (list(column) for column in zip(*map(self._moments, params), strict=True))
        count = [self.state[p]["step"] if self.state.get(p) else None for p in params]
        return HypotheticalStep.of(
            params, [theta[p] for p in params], [g[p] for p in params], m, v, count, settings, groups
        )

    def _descend(self, total: Tensor) -> None:
        """One step of the meta-optimizer down ``total``; a NotFiniteError before it if the gradient is not finite."""
        self._follow_phi()
        phi = [p for group in self._meta_optimizer.param_groups for p in group["params"]]
        grads: Sequence[Tensor | None] = [None] * len(phi)
        if total.requires_grad:  # not so for "gen_gap" without gates: nothing in it depends on Φ
            grads = torch.autograd.grad(total, phi, allow_unused=True)
        largest = torch._foreach_norm([x for x in (total.detach(), *grads) if x is not None], math.inf)
        if not torch.isfinite(torch.stack(largest)).all():
            raise NotFiniteError(f"the meta-loss is {total.item()} and its gradient is not finite; Φ is left as it was")
        for p, grad in zip(phi, grads, strict=True):
            p.grad = torch.zeros_like(p) if grad is None else grad
        self._meta_optimizer.step()
        self._meta_optimizer.zero_grad()

    def _follow_phi(self) -> None:
        """Let the meta-optimizer hold the parameters that Φ and the uncertainty weights have now.

        They may have been replaced (``load_state_dict(..., assign=True)``, another Φ); it would train the old ones.
        """
        for group, module in zip(self._meta_optimizer.param_groups, (self.modulator, self.huw), strict=True):
            now = [] if module is None else list(module.parameters())
            for old in set(group["params"]).difference(now):
                self._meta_optimizer.state.pop(old, None)
            group["params"] = now

    # ---------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does; the modulation groups are formed anew.

        Φ keeps what it has learned. Where it has group embeddings, groups that exist already keep theirs (they are
        recognised by name) and new ones start at zero.

        Raises:
            ValueError: for complex parameters, for lr, betas, eps or weight_decay out of range, for options of torch's
                AdamW that this optimizer does not have, for nameless parameters that ``model`` does not have, and, as
                in torch, for parameters that have a group already or come with names where others have none.
            TypeError: for what is no group of tensors, as in torch.

        No group is added then.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # raises torch's TypeError
        model = _model_behind(param_group.get("params"))
        super().add_param_group(self._with_names(param_group))
        group = self.param_groups[-1]
        names = group.get("param_names", [None] * len(group["params"]))
        try:
            _check_settings(group)
            group |= _plain_numbers(group)
            for name, p in zip(names, group["params"], strict=True):
                if p.is_complex():
                    raise ValueError(
                        f"parameter {name or tuple(p.shape)} is {p.dtype}; only real parameters are supported"
                    )
        except Exception:
            self.param_groups.pop()
            raise
        if model is not None:  # only a part of the constructor's, if there is one
            self._places = places_by_class(model) | self._places
        if not hasattr(self, "modulator"):
            return  # the constructor is adding its groups
        before = [group.name for group in self.groups]
        self._regroup()
        after = [group.name for group in self.groups]
        self.alpha = torch.ones(len(after), device=self._phi_device, dtype=self._phi_dtype)
        self.beta = torch.ones_like(self.alpha)
        if self.modulator.embeddings is not None:
            old = self.modulator.embeddings
            new = old.new_zeros(len(after), old.shape[1])
            for row, name in enumerate(after):
                if name in before:
                    new[row] = old.detach()[before.index(name)]
            old.data = new
            self._meta_optimizer.state.pop(old, None)  # Adam's moments have the old number of rows

    def _with_names(self, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter group, with the names that ``model`` has for parameters that come without.

        Raises:
            ValueError: if it does not have them all.
        """
        params = group.get("params", ())
        if not self._names or isinstance(params, set):  # torch refuses sets, which have no order
            return group
        params = [params] if isinstance(params, Tensor) else list(params)
        if not params:
            return {**group, "params": [], "param_names": []}  # or torch would take it for one without names
        nameless = [p for p in params if isinstance(p, Tensor)]
        if unknown := [p for p in nameless if p not in self._names]:
            raise ValueError(
                f"{len(unknown)} of {len(nameless)} parameters, the first of shape {tuple(unknown[0].shape)}, have no "
                "name and are not in model; pass named parameters, or a model that has them all"
            )
        return {**group, "params": [(self._names[p], p) if isinstance(p, Tensor) else p for p in params]}

    def _regroup(self) -> None:
        """Form the modulation groups, and the buckets that share one parameter group and one modulation group."""
        params = [group["params"] for group in self.param_groups]
        all_named = all("param_names" in group for group in self.param_groups)
        names = [group["param_names"] for group in self.param_groups] if all_named else None
        if names is not None and self._group_strategy == "fine_grained":
            named_groups = [list(zip(ns, ps, strict=True)) for ns, ps in zip(names, params, strict=True)]
            by_name = places_by_name(named_groups)
            self.groups = form_groups(
                (p, self._places.get(p, place), is_bias(name))
                for named, places in zip(named_groups, by_name, strict=True)
                for (name, p), place in zip(named, places, strict=True)
            )
        else:
            self.groups = native_groups(params, names)
        number = {p: k for k, group in enumerate(self.groups) for p in group.params}
        self._sharded = any(is_sharded(p) for p in self._parameters())
        buckets: dict[tuple[int, int, torch.device, torch.dtype], list[Tensor]] = {}
        for index, ps in enumerate(params):
            for p in ps:  # a fused kernel takes tensors of one device and type
                buckets.setdefault((index, number[p], p.device, p.dtype), []).append(p)
        self._buckets = [(index, k, ps) for (index, k, *_), ps in buckets.items()]

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    @property
    def _phi_dtype(self) -> torch.dtype:
        return self.modulator.output.weight.dtype

    @property
    def _phi_device(self) -> torch.device:
        return self.modulator.output.weight.device

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state and, under "meta", Φ, its optimizer, the uncertainty weights and the step count.

        Hooks that torch calls when it saves or loads a state see AdamW's part of it.
        """
        return {**super().state_dict(), "meta": self._meta_state()}

    def _meta_state(self) -> dict[str, Any]:
        self._follow_phi()
        return {
            "version": VERSION,
            "t": self._t,
            "groups": [group.name for group in self.groups],
            "phi": self._phi_settings(),
            "alpha": self.alpha,
            "beta": self.beta,
            "modulator": dict(self.modulator.state_dict()),
            "huw": None if self.huw is None else dict(self.huw.state_dict()),
            "meta_optimizer": self._meta_optimizer_name,
            "meta_optimizer_state": self._meta_optimizer.state_dict(),
        }

    def _phi_settings(self) -> dict[str, Any]:
        """What decides the function that Φ computes and the shapes of its parameters do not show."""
        phi, features = self.modulator, self._feature_config
        decide: dict[str, Any] = {"feature_version": str(features.version), "columns": list(features.columns)}
        if type(phi) is Modulator:  # another class, or a subclass, may compute something else
            layer = phi.encoder.layers[0]
            assert isinstance(layer, nn.TransformerEncoderLayer)
            decide["attn_heads"] = int(layer.self_attn.num_heads)
            decide |= {"alpha_range": float(phi.alpha_range), "beta_range": float(phi.beta_range)}
        return decide

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; training then goes on as if it had not stopped.

        The objective, the priorities, the sparsity of the gates and ``total_steps`` are not in a state: they stay as
        they were given to the constructor.

        Raises:
            ValueError: if the state was not saved by MetaAdamW, is of other parameters, groups or another Φ, or has
                settings that the constructor would refuse (``state`` has the checks). Nothing is changed then.
        """
        meta = fitting_meta(state_dict, self._meta_state())
        check_moments(state_dict, self.param_groups)
        for group in state_dict.get("param_groups", ()):
            _check_settings({**self.defaults, **group})
        meta = copy.deepcopy(meta)
        # torch keeps the caller's tensors where it need not convert them, and would then train into them.
        super().load_state_dict(copy.deepcopy({k: x for k, x in state_dict.items() if k != "meta"}))
        self._t = meta["t"]
        self.alpha = meta["alpha"].to(self._phi_device)
        self.beta = meta["beta"].to(self._phi_device)
        self.modulator.load_state_dict(meta["modulator"])
        if self.huw is not None:
            self.huw.load_state_dict(meta["huw"])
        self._meta_optimizer.load_state_dict(meta["meta_optimizer_state"])

    def _forget(self) -> None:
        """Drop what ``fast`` keeps from one step to the next.

        Φ is moved into its buffer here and not in the first step, since where numbers lie in memory decides how a
        matrix product rounds, and a resumed run has to round as the first one did.
        """
        self._plain = None
        self._memory = Memory()
        if isinstance(self.modulator, Modulator):
            in_one_buffer(self.modulator)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What unpickling, ``deepcopy`` and ``load_state_dict`` call."""
        super().__setstate__(state)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Everything, for pickle and ``deepcopy``; torch's own keeps the moments only.

        What others hang on the instance (a scheduler replaces ``step``) is theirs and stays out, as in torch.
        """
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _OWN_ATTRIBUTES}}


def _check_settings(group: Mapping[str, Any]) -> None:
    """A ValueError for settings of a parameter group that are out of range or not supported."""
    check_not_negative(**{name: group[name] for name in ("lr", "eps", "weight_decay")})
    check_betas(group["betas"])
    for kernel in ("foreach", "fused"):
        check_choice(kernel, group[kernel], (None, True, False))
    _refuse_unsupported(group)


def _plain_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of AdamW with Python's numbers in the place of NumPy's, which a checkpoint must not hold."""
    plain = {name: without_numpy(settings[name]) for name in ("lr", "eps", "weight_decay") if name in settings}
    if isinstance(betas := settings.get("betas"), tuple | list):  # others are refused
        plain["betas"] = tuple(map(without_numpy, betas))
    return {**settings, **plain}


def _refuse_unsupported(group: Mapping[str, Any]) -> None:
    """A ValueError for options of torch's AdamW that this optimizer would have to ignore."""
    for name in _UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"{name} is {group[name]}; only False is supported")
    if not group.get("decoupled_weight_decay", True):  # torch's way to make Adam of AdamW
        raise ValueError("decoupled_weight_decay is False; only True is supported")


def _refuse_sparse(buckets: Sequence[Bucket]) -> None:
    for bucket in buckets:
        for p, grad in zip(bucket.params, bucket.g, strict=True):
            if grad.is_sparse:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient; MetaAdamW, like AdamW, needs dense "
                    "ones (for nn.Embedding: sparse=False)"
                )


def _model_behind(params: Any) -> nn.Module | None:
    """The model whose ``named_parameters()`` this generator is, or None.

    Only the module classes tell an embedding from a linear layer for certain, and this spares the caller to pass the
    model beside its parameters.
    """
    owner = getgeneratorlocals(params).get("self") if isgenerator(params) else None
    return owner if isinstance(owner, nn.Module) else None
