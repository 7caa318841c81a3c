"""MetaAdamW: AdamW with a learning-rate factor α_g and a decay factor β_g for each modulation group g (Eq. 1 to 4).

A step is AdamW with learning rate ηα_g and weight decay β_gλ, with torch's kernels (``fast``) or, on an NVIDIA GPU, in
Triton (``triton_step``):

    θ ← θ − ηα_g (m̂/(√v̂ + ε) + β_gλθ)

The attention module Φ (``modulator``) computes the factors from statistics of every group (``features``). Every K_meta
steps the training loop calls ``update_attention``, which trains Φ (``meta``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from metaadamw_lite.batches import Batches
from metaadamw_lite.buckets import gather
from metaadamw_lite.checks import (
    check_choice,
    check_count,
    check_not_negative,
    check_priorities,
    check_range,
    check_seed,
    check_settings,
    check_supported,
    without_numpy,
)
from metaadamw_lite.factors import Factors, feature_matrix
from metaadamw_lite.fast import move
from metaadamw_lite.features import FeatureConfig, time_feature
from metaadamw_lite.groups import ModulationGroup
from metaadamw_lite.huw import PriorityHUW
from metaadamw_lite.membership import STRATEGIES, Membership, check_parameters, model_behind
from metaadamw_lite.meta import (
    OBJECTIVES,
    Evaluator,
    HypotheticalStep,
    LossFn,
    MetaLosses,
    double_backward_losses,
    first_order_losses,
    refuse_another_loss,
)
from metaadamw_lite.meta_optimizer import META_OPTIMIZERS, create_meta_optimizer, create_moments, descend, follow
from metaadamw_lite.modulator import Modulator
from metaadamw_lite.state import pack, unpack
from metaadamw_lite.surroundings import as_found

_OWN_ATTRIBUTES = (
    "alpha",
    "beta",
    "modulator",
    "huw",
    "_feature_config",
    "_members",
    "_meta_objective",
    "_feature_gating_sparsity",
    "_total_steps",
    "_t",
    "_step_supports_amp_scaling",
    "_meta_optimizer",
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
        params: ``model.named_parameters()``, ``model.parameters()`` or parameter-group dicts, as for torch; or a model,
            for its ``named_parameters()``.
        lr, betas, eps, weight_decay: η, (β₁, β₂), ε and λ of AdamW, also per parameter group. ε is outside the root, as
            in torch; Eq. 4 of the paper has it inside.
        alpha_range: α_g stays in 1 ± alpha_range/2 (Eq. 7); 0 to 2.
        beta_range: β_g stays in 1 ± beta_range/2 (Eq. 8); 0 to 2.
        group_strategy: "fine_grained" (layer type × depth third × kind, section 3.2) or "original" (the optimizer's own
            parameter groups). Parameters without a name are grouped as in "original", with a warning.
        named_from: for "fine_grained", the model: its module classes decide layer types, and it names parameters
            without a name. If ``params`` is ``model.named_parameters()``, that model is the default. Without a model
            names and shapes decide layer types.
        model: synonym of ``named_from``; Hugging Face's Trainer removes this one from the arguments.
        feature_version: "basic", "basic_plus", "enhanced", "norm_basic" or "norm_basic_plus" (section 3.3).
        use_v_norms, include_time_step: the optional feature columns (``FeatureConfig``).
        use_feature_gating: learn a gate for every feature column.
        feature_gating_sparsity: weight of the gates' L1 norm in the meta-loss.
        group_embed_dim: width of the learned group embedding ("enhanced" only).
        attn_layers, attn_hidden_dim, attn_heads: L, D_ff and H of the encoder; H must divide the feature size.
        meta_objective: "combined" (Eq. 13), "gradient" (Eq. 10), "loss_decrease" (Eq. 11) or "gen_gap" (Eq. 12).
        huw_priorities: p of Eq. 13 for gradient, loss decrease and generalization gap; None for the unweighted sum.
            "combined" only.
        meta_lr, meta_weight_decay: learning rate of Φ and of the uncertainty weights, and the L2 decay on Φ.
        meta_optimizer: "sgd" (Algorithm 2, line 33) or "adam".
        total_steps: number of steps of the run, for the time column; None if unknown.
        seed: of Φ's random start. The global random number generators are not touched.
        amsgrad, maximize: as in torch. With ``maximize`` meta-updates negate the loss, too.
        foreach, fused: choice of torch's AdamW kernel. By default the fused one, the fastest, moves float32, float16
            and bfloat16 (``buckets.runs_fused``).
        capturable, differentiable, decoupled_weight_decay: options of torch's AdamW; only the defaults are supported.

    Attributes:
        groups: the G modulation groups, in order, each with ``name`` and ``params``; formed again after a change of the
            parameters in ``param_groups``.
        alpha, beta: the factors of the last step, shape (G,); ones before the first step and after a change of groups.
        modulator: Φ, an ``nn.Module``.
        huw: the uncertainty weights, or None.

    Raises:
        ValueError: for an argument out of range (also in a parameter group), an unknown name, heads that do not divide
            the features, unsupported options of torch's AdamW, complex parameters, parameters that FSDP1 has flattened,
            an empty parameter list, or parameters without a name that ``named_from`` does not have.
        RuntimeError: for ``foreach`` and ``fused`` together, as in torch.
        TypeError: for ``params`` that are neither tensors nor groups of them, as in torch.
    """

    _loss_is_repeatable = False  # until the first meta-update has checked it

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        alpha_range: float = 1.0,
        beta_range: float = 1.0,
        group_strategy: str = "fine_grained",
        named_from: nn.Module | None = None,
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
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        decoupled_weight_decay: bool = True,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": foreach}
        settings |= {"fused": fused, "amsgrad": amsgrad, "maximize": maximize, "capturable": capturable}
        settings |= {"differentiable": differentiable}
        check_settings({**settings, "decoupled_weight_decay": decoupled_weight_decay})
        check_not_negative(meta_lr=meta_lr, meta_weight_decay=meta_weight_decay)
        check_not_negative(feature_gating_sparsity=feature_gating_sparsity)
        check_range(alpha_range=alpha_range, beta_range=beta_range)
        check_count(attn_layers=attn_layers, attn_hidden_dim=attn_hidden_dim, attn_heads=attn_heads)
        check_count(group_embed_dim=group_embed_dim, total_steps=1 if total_steps is None else total_steps)
        check_seed(seed)
        check_choice("group_strategy", group_strategy, STRATEGIES)
        check_choice("meta_objective", meta_objective, OBJECTIVES)
        check_choice("meta_optimizer", meta_optimizer, META_OPTIMIZERS)
        check_choice("use_feature_gating", use_feature_gating, (True, False))
        for name, value in (("named_from", named_from), ("model", model)):
            if not (value is None or isinstance(value, nn.Module)):
                raise ValueError(f"{name} is {value!r}; it must be an nn.Module or None")
        if named_from is not None and model is not None:
            raise ValueError("named_from and model are synonyms; pass one of them")
        if huw_priorities is not None:
            check_priorities(huw_priorities, 3)

        self._feature_config = FeatureConfig(feature_version, use_v_norms, include_time_step)
        self._meta_objective = meta_objective
        self._feature_gating_sparsity = float(feature_gating_sparsity)
        self._total_steps = total_steps
        self._t = 0
        if isinstance(params, nn.Module):
            params = params.named_parameters()
        known = model if named_from is None else named_from
        found = model_behind(params) if known is None else known
        self._members = Membership(group_strategy, found, complete=known is not None)
        super().__init__(params, **{name: without_numpy(value) for name, value in settings.items()})
        # The statistics need unscaled gradients, so a GradScaler must unscale before the step, not in the kernel.
        self._step_supports_amp_scaling = False
        dtypes = {p.dtype for p in self._parameters()}
        if not dtypes:
            raise ValueError("the parameter groups are all empty; at least one parameter is needed")
        self._members.renew(self.param_groups)

        # Φ is always on the CPU: its many layers have few numbers each.
        with torch.device("cpu"):
            self.modulator = Modulator(
                len(self._feature_config.columns),
                len(self._members.groups),
                layers=attn_layers,
                heads=attn_heads,
                hidden_dim=attn_hidden_dim,
                alpha_range=float(alpha_range),
                beta_range=float(beta_range),
                group_embed_dim=group_embed_dim if feature_version == "enhanced" else 0,
                gating=use_feature_gating,
                generator=torch.Generator().manual_seed(int(seed)),
            )
            self.huw: PriorityHUW | None = None
            if meta_objective == "combined" and huw_priorities is not None:
                self.huw = PriorityHUW(("regression",) * 3, tuple(huw_priorities))
        for module in (self.modulator, self.huw):
            if module is not None:
                module.to(torch.float64 if dtypes == {torch.float64} else torch.float32)
        self._factors = Factors(self.modulator)
        self._meta_optimizer = create_meta_optimizer(
            meta_optimizer, self.modulator, self.huw, float(meta_lr), float(meta_weight_decay)
        )
        self._reset_factors()

    # ---------------------------------------------------------------- the step (Algorithm 1)

    # In a compiled loop a step stays as it is: it calls kernels that are fused already. (`torch.compiler.disable` is
    # the same, but imports the compiler here, which takes a second; torch's optimizers use this, which does not.)
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step (Algorithm 1) and return the loss of the closure, if any.

        Parameters without a gradient are neither moved nor decayed. Without any gradient nothing changes.

        Raises:
            RuntimeError: for sparse gradients; then nothing has changed.
            ValueError: for an unsupported option of torch's AdamW that is switched on in ``param_groups``.
        """
        for group in self.param_groups:
            check_supported(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_param_groups()
        buckets = gather(self.param_groups, self._members, self.state, to_move=True)
        if not buckets:
            return loss
        config, time = self._feature_config, time_feature(self._t, self._total_steps)
        taken = self._factors.step_on_device(self.modulator, buckets, self._members, config, time)
        if taken is not None:
            self.alpha, self.beta = taken
        else:
            f = feature_matrix(buckets, self._members, config, time)  # line 2
            self.alpha, self.beta = self._factors.of(self.modulator, f, like=self._phi_like)  # line 3
            factors = list(zip(self.alpha.tolist(), self.beta.tolist(), strict=True))
            for bucket in buckets:
                move(bucket, *factors[bucket.k])  # lines 4 to 7
        self._t += 1
        return loss

    def features(self) -> Tensor:
        """Compute the feature matrix F of the next step (section 3.3), shape (G, D), from the gradients in ``.grad``.

        ``FeatureConfig.columns`` names the columns. Gates and group embeddings belong to Φ, not to F.

        Raises:
            RuntimeError: for sparse gradients.
        """
        self._follow_param_groups()
        return self._features(None)

    @torch.no_grad()
    def _features(self, gradients: Mapping[Tensor, Tensor] | None) -> Tensor:
        buckets = gather(self.param_groups, self._members, self.state, gradients)
        time = time_feature(self._t, self._total_steps)
        return feature_matrix(buckets, self._members, self._feature_config, time).to(self._phi_like)

    # ---------------------------------------------------------------- the meta-update (Algorithm 2)

    @_disable_dynamo
    def update_attention(
        self,
        model: nn.Module,
        batch1: Any,
        batch2: Any,
        loss_fn: LossFn,
        val_batch: Any = None,
        *,
        also: Any = (),
        double_backward: bool = False,
    ) -> MetaLosses:
        """Train Φ by one step on the meta-objective (Algorithm 2) and return the losses.

        All state except Φ, its optimizer and the uncertainty weights is restored, also if ``loss_fn`` raises:
        parameters, ``.grad``, moments, buffers, attributes of modules (see ``surroundings.Surroundings``), train/eval
        modes and random number generators. A graph built before the call cannot be used after it, because parameters
        are overwritten and restored.

        The losses use the model's current mode (train or eval) and the same state and random numbers, so they differ
        only by θ. To check this, the first meta-update evaluates the loss on B₁ twice more.

        Under ``DistributedDataParallel`` and ``fully_shard`` every process calls this with its own batches. Losses and
        gradients are means over the processes, so Φ stays the same in all of them. Under ``fully_shard`` call it right
        after a step, not during gradient accumulation.

        Args:
            model: the model whose parameters this optimizer holds, or its ``DistributedDataParallel``, or the wrapper
                of Lightning Fabric, Accelerate or ``torch.compile`` around either.
            batch1, batch2: training batches B₁ and B₂. ``loss_fn`` gets copies of their containers, and may empty them.
            loss_fn: ``loss_fn(model, batch)`` returns a scalar tensor.
            val_batch: validation batch, required unless the objective is "gradient".
            also: other objects that ``loss_fn`` changes, one or a list, to restore as well: modules (a GAN's other
                network, a metric), random number generators, tensors, containers of these, and objects with
                ``state_dict`` and ``load_state_dict`` or with attributes.
            double_backward: differentiate twice through the model instead of taking a difference of two gradients; for
                checks. Slower, and not every kernel supports it.

        Returns:
            The meta-loss and its terms.

        Raises:
            ValueError: for a missing ``val_batch``, a loss that is not one number or contains no parameter of this
                optimizer, ``double_backward`` with several processes, ``maximize`` in some parameter groups only, and
                for parameters that FSDP1 has flattened or of which only some are sharded.
            NotFiniteError: a ``ValueError`` of ``metaadamw_lite.checks``, for a loss or a gradient of Φ that is not
                finite.
            RuntimeError: for checkpoints with ``use_reentrant=True`` (except under ``fully_shard``), a ``loss_fn`` that
                writes to a tensor of a batch or is not repeatable, and under ``torch.inference_mode``. Also for a
                forward pass that changes untrained parameters that are too large to copy; these keep the change.
            TypeError: for a batch that is an iterator, and for an object in ``also`` whose state cannot be read.

        After an error Φ has not changed.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("update_attention needs gradients; call it outside of torch.inference_mode()")
        objective = self._meta_objective
        if val_batch is None and objective != "gradient":
            raise ValueError(f"val_batch is None, but meta_objective={objective!r} needs a validation batch")
        maximize = {bool(group["maximize"]) for group in self.param_groups if group["params"]}
        if len(maximize) > 1:
            raise ValueError("maximize is True in some parameter groups only; a meta-update needs one value for all")
        sign = -1 if True in maximize else 1
        self._follow_param_groups()
        params = [p for p in self._parameters() if p.requires_grad]
        evaluate = Evaluator.of(model, loss_fn if sign == 1 else lambda *args: -loss_fn(*args), params)
        if double_backward and evaluate.processes:
            raise ValueError("double_backward is True; with several processes only False is supported")
        batches = Batches(batch1=batch1, batch2=batch2, val_batch=val_batch)
        # Lines 1 to 4: save θ and all other state that a loss may change.
        with torch.enable_grad(), batches.as_found(), as_found(model, params, also) as (theta, surroundings):
            evaluate.put_back, evaluate.check = surroundings.put_back, batches.refuse_counted_writes
            if not self._loss_is_repeatable:
                twice = [evaluate.value("batch1", batch1) for _ in range(2)]
                surroundings.refuse_changes()
                batches.refuse_writes()
                refuse_another_loss(*twice)
                self._loss_is_repeatable = True
            loss1 = evaluate.loss("batch1", batch1)  # line 6
            g = evaluate.gradient_of_used(loss1, params)  # line 7
            if not g:
                raise ValueError("the loss on batch1 contains no parameter of this optimizer; is it the right model?")
            modulation = self.modulator(self._features(g))  # lines 9 and 10
            before = dict(zip(params, theta, strict=True))
            step = HypotheticalStep.of(before, g, self.param_groups, self.state, self._members.number)  # lines 12 to 17
            if objective != "gradient":
                # Not under no_grad: some modules compute differently there, and that would enter the loss decrease.
                val_at_theta = evaluate.value("val_batch", val_batch)
            compute_losses = double_backward_losses if double_backward else first_order_losses
            l_grad, val_at_theta_prime = compute_losses(
                evaluate, step, modulation, objective, batch2, val_batch
            )  # lines 19 to 22, and L_val(θ′) of line 24
            l_loss = l_gap = None
            if val_at_theta_prime is not None:
                l_loss = val_at_theta_prime - val_at_theta  # line 24, Eq. 11
            if objective in ("gen_gap", "combined"):
                l_gap = (loss1.detach() - val_at_theta).abs()  # line 27, Eq. 12: without θ′, so it cannot move Φ
            terms = [term.to(modulation.alpha) for term in (l_grad, l_loss, l_gap) if term is not None]
            total = self.huw(terms) if self.huw is not None else torch.stack(terms).sum()  # line 29, Eq. 13
            penalty = self.modulator.gate_penalty()
            if penalty is not None:
                total = total + self._feature_gating_sparsity * penalty
            surroundings.refuse_changes()
            batches.refuse_writes()
            follow(self._meta_optimizer, self.modulator, self.huw)
            descend(self._meta_optimizer, total)  # lines 31 to 33
        return MetaLosses(total.item(), *(nan if x is None else x.item() for x in (l_grad, l_loss, l_gap)))

    # ---------------------------------------------------------------- groups

    @property
    def groups(self) -> list[ModulationGroup]:
        """The G modulation groups of the parameters in ``param_groups``, in order."""
        self._follow_param_groups()
        return self._members.groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does, and form the modulation groups again.

        Φ is kept. Its group embeddings, if any, stay with the names of the groups; those of new groups are zero.
        Parameters without a name are accepted beside named ones.

        Raises:
            ValueError: for complex parameters, lr, betas, eps or weight_decay out of range, unsupported options of
                torch's AdamW, and parameters without a name that ``named_from`` does not have; as in torch, for
                parameters that have a group already, or have names where others have none.
            TypeError: for an argument that is not a group of tensors, as in torch.

        After an error no group has been added.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # raises torch's TypeError
        model = model_behind(param_group.get("params"))
        super().add_param_group(self._members.name_parameters(param_group, self.param_groups))
        group = self.param_groups[-1]
        names = group.get("param_names", [""] * len(group["params"]))
        try:
            check_settings(group)
            check_parameters(dict(zip(group["params"], names, strict=True)))
        except Exception:
            self.param_groups.pop()
            raise
        group |= {name: without_numpy(value) for name, value in group.items()}
        self._members.add(group["params"], names, model)
        if hasattr(self, "modulator"):  # not during construction
            self._follow_param_groups()

    def _follow_param_groups(self) -> None:
        """Form the modulation groups again if the parameters in ``param_groups`` have changed; Φ is kept.

        Group embeddings stay with the names of the groups; those of new groups are zero.
        """
        if self._members.is_current(self.param_groups):
            return
        before = [group.name for group in self._members.groups]
        self._members.renew(self.param_groups)
        after = [group.name for group in self._members.groups]
        if after == before:
            return
        self._reset_factors()
        if (old := self.modulator.embeddings) is not None:
            new = old.new_zeros(len(after), old.shape[1])
            for row, name in enumerate(after):
                if name in before:
                    new[row] = old.detach()[before.index(name)]
            old.data = new
            self._meta_optimizer.state.pop(old, None)  # Adam's moments have the old rows
            create_moments(self._meta_optimizer)

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @property
    def _phi_like(self) -> Tensor:
        """A tensor with Φ's dtype, on its device."""
        return next(self.modulator.parameters())

    def _reset_factors(self) -> None:
        phi = self._phi_like
        self.alpha = torch.ones(len(self._members.groups), dtype=phi.dtype, device=phi.device)
        self.beta = torch.ones_like(self.alpha)

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state and, under "meta", Φ, its optimizer, the uncertainty weights and the step count.

        torch's hooks for saving and loading see AdamW's part only.
        """
        self._follow_param_groups()
        present = set(self._parameters())
        absent = {p: self.state.pop(p) for p in list(self.state) if isinstance(p, Tensor) and p not in present}
        try:  # torch's state_dict cannot number the moments of parameters that were removed
            return pack(self, super().state_dict())
        finally:
            self.state.update(absent)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from ``state_dict``; training then continues as if it had not stopped.

        ``meta_objective``, ``huw_priorities``, ``feature_gating_sparsity`` and ``total_steps`` are not in a state; the
        constructor's values stay.

        Raises:
            ValueError: if the state was not saved by MetaAdamW, has other parameters, groups or another Φ, or settings
                that the constructor would refuse (module ``state`` has the checks). Then nothing has changed.
        """
        self._follow_param_groups()
        adamw_state, meta = unpack(self, state_dict)
        super().load_state_dict(adamw_state)
        self._t = meta["t"]
        self.alpha = meta["alpha"].to(self._phi_like.device)
        self.beta = meta["beta"].to(self._phi_like.device)
        self.modulator.load_state_dict(meta["modulator"])
        if self.huw is not None:
            self.huw.load_state_dict(meta["huw"])
        self._meta_optimizer.load_state_dict(meta["meta_optimizer_state"])
        create_moments(self._meta_optimizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the instance, for unpickling, ``deepcopy`` and ``load_state_dict``."""
        super().__setstate__(state)
        self._factors = Factors(self.modulator)  # drops cached copies of Φ and tables on a GPU

    def __getstate__(self) -> dict[str, Any]:
        """Return all state, for pickle and ``deepcopy``; torch's has ``defaults``, ``state`` and ``param_groups`` only.

        Attributes that other code sets on the instance (a scheduler replaces ``step``) are left out, as in torch.
        """
        self._follow_param_groups()  # a copy has no reference to the model, which names new parameters
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _OWN_ATTRIBUTES}}
