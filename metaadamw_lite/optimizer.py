"""MetaAdamW: AdamW with a learning-rate factor α_g and a decay factor β_g for each parameter group g (Eq. 1 to 4).

One step is AdamW with learning rate ηα_g and weight decay β_gλ, by torch's own kernels (``fast``) or, on an NVIDIA GPU,
by Triton's (``triton_step``):

    θ ← θ − ηα_g (m̂/(√v̂ + ε) + β_gλθ)

The factors come from the attention module Φ (``modulator``), which sees statistics of every group (``features``).
Every K_meta steps the training loop calls ``update_attention``, which trains Φ (``meta``).
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
        params: ``model.named_parameters()``, ``model.parameters()`` or parameter-group dicts, as torch takes them; a
            model is taken for its ``named_parameters()``.
        lr, betas, eps, weight_decay: η, (β₁, β₂), ε and λ of AdamW, also per parameter group. ε stands outside the
            root, as in torch; Eq. 4 of the paper writes it inside.
        alpha_range: α_g stays in 1 ± alpha_range/2 (Eq. 7); 0 to 2.
        beta_range: β_g stays in 1 ± beta_range/2 (Eq. 8); 0 to 2.
        group_strategy: "fine_grained" (layer type × depth third × bias, section 3.2) or "original" (the optimizer's
            own parameter groups). Parameters without a name are grouped as in "original", with a warning.
        named_from: for "fine_grained": a model that decides layer types by module class, and names parameters that come
            without names. It is found by itself where ``params`` is ``model.named_parameters()``; where it is not
            known, names and shapes decide.
        model: another name of ``named_from``. The Trainer of Hugging Face takes it out of the arguments for itself.
        feature_version: "basic", "basic_plus", "enhanced", "norm_basic" or "norm_basic_plus" (section 3.3).
        use_v_norms, include_time_step: the optional feature columns.
        use_feature_gating: learn a gate for every feature column.
        feature_gating_sparsity: weight of the gates' L1 norm in the meta-loss.
        group_embed_dim: width of the learned group embedding ("enhanced" only).
        attn_layers, attn_hidden_dim, attn_heads: L, D_ff and H of the encoder; H must divide the feature size.
        meta_objective: "combined" (Eq. 13), "gradient" (Eq. 10), "loss_decrease" (Eq. 11) or "gen_gap" (Eq. 12).
        huw_priorities: p of Eq. 13, in the order gradient, loss decrease, generalisation gap; None for the plain sum.
            Used by the combined objective.
        meta_lr, meta_weight_decay: step size of Φ and of the uncertainty weights, and the L2 decay on Φ.
        meta_optimizer: "sgd" (Algorithm 2, line 33) or "adam".
        total_steps: length of the run, for the time column; None if unknown.
        seed: of Φ's random start. The global random number generators are not touched.
        amsgrad, maximize: as in torch. With ``maximize`` a meta-update takes the loss for its negative, too.
        foreach, fused: which of torch's AdamW kernels to use. Where neither is given, the fused one, which is the
            fastest, moves float32, float16 and bfloat16 (``buckets.runs_fused``).
        capturable, differentiable, decoupled_weight_decay: torch's AdamW has them; only its defaults are supported.

    Attributes:
        groups: the G modulation groups, in order, each with ``name`` and ``params``; formed anew where
            ``param_groups`` holds other parameters than before.
        alpha, beta: the factors that the last step used, shape (G,); ones before the first step, and
            where groups have changed.
        modulator: Φ, an ``nn.Module``.
        huw: the uncertainty weights, or None.

    Raises:
        ValueError: for an argument out of range (a parameter group's included), an unknown name, heads that do not
            divide the features, options of torch's AdamW that are not supported, complex parameters, parameters that
            FSDP1 has flattened, an empty parameter list, or nameless parameters that ``named_from`` does not have.
        RuntimeError: for ``foreach`` and ``fused`` together, as in torch.
        TypeError: for ``params`` that are neither tensors nor groups of them, as in torch.
    """

    _loss_is_repeatable = False  # not known before the first meta-update

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
            raise ValueError("named_from and model are two names of one argument; pass one of them")
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
        # The statistics need true gradients, so a GradScaler must unscale them before the step, not inside the kernel.
        self._step_supports_amp_scaling = False
        dtypes = {p.dtype for p in self._parameters()}
        if not dtypes:
            raise ValueError("the parameter groups are all empty; at least one parameter is needed")
        self._members.renew(self.param_groups)

        # Φ stays in the CPU's memory, wherever the parameters are: its many layers are a handful of numbers each.
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
        """Take one step (Algorithm 1) and return the closure's loss, if there is a closure.

        Parameters without a gradient are neither moved nor decayed; without any gradient nothing changes.

        Raises:
            RuntimeError: for sparse gradients, before anything is changed.
            ValueError: for an option of torch's AdamW that is not supported and was switched on in ``param_groups``.
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
        """The feature matrix F that Φ would see now (section 3.3), shape (G, D), from the gradients in ``.grad``.

        The columns are named by ``FeatureConfig.columns``. Gates and group embeddings belong to Φ and are not in it.

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
        """Train Φ by one step on the meta-objective (Algorithm 2) and return its terms.

        Everything but Φ, its optimizer and the uncertainty weights is left as it was: parameters, ``.grad``, moments,
        buffers, what modules hold in attributes (``surroundings.Surroundings`` says what is looked at), train/eval mode
        and random number generators, also when ``loss_fn`` raises. The losses are taken in the mode (train or eval) the
        model is in, from the same random numbers and this state, so that only θ makes a difference. The first
        meta-update takes the loss on B₁ two times more to see whether that is so. (Parameters are written to and put
        back: a graph that was made before cannot be used after.)

        Under ``DistributedDataParallel`` and ``fully_shard`` every process calls this with batches of its own; losses
        and gradients are means over the processes, so Φ stays the same in all of them. Under ``fully_shard`` call it
        where a step has just been made, not while gradients are being accumulated.

        Args:
            model: the model whose parameters this optimizer holds, or its ``DistributedDataParallel``, or the wrapper
                that Lightning Fabric, Accelerate or ``torch.compile`` makes of either.
            batch1, batch2: training batches B₁ and B₂. ``loss_fn`` gets copies of their containers, and may empty them.
            loss_fn: ``loss_fn(model, batch)`` returns a scalar tensor.
            val_batch: validation batch, required unless the objective is "gradient".
            also: other things that ``loss_fn`` changes, one or a list, to be put back, too: modules (a GAN's other
                network, whose batch norm moves; a metric), generators of random numbers, tensors, containers of these,
                and objects with ``state_dict`` and ``load_state_dict`` or with attributes.
            double_backward: differentiate twice through the model instead of taking a difference of two gradients.
                Slower, and not possible with every kernel; for checking.

        Raises:
            ValueError: without a ``val_batch`` that the objective needs, for a loss that is not one finite number or
                contains no parameter of this optimizer, for a gradient of Φ that is not finite, for ``double_backward``
                with several processes, for parameter groups of which only some maximise, and for parameters that FSDP1
                has flattened or of which only some are sharded.
                What is not finite is a ``metaadamw_lite.checks.NotFiniteError``. Φ stays as it was.
            RuntimeError: for checkpoints with ``use_reentrant=True`` (but under ``fully_shard``), and for a forward
                pass that changes parameters which are not trained and too large to be copied: these stay as the forward
                passes left them. Also for a ``loss_fn`` that writes to a tensor of a batch or returns another loss when
                it is called again, and under ``torch.inference_mode``. Φ stays as it was.
            TypeError: for a batch that is an iterator, and for an object in ``also`` that has no state to be read.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("update_attention takes gradients; call it outside of torch.inference_mode()")
        objective = self._meta_objective
        if val_batch is None and objective != "gradient":
            raise ValueError(f"val_batch is None, but meta_objective={objective!r} needs a validation batch")
        maximize = {bool(group["maximize"]) for group in self.param_groups if group["params"]}
        if len(maximize) > 1:
            raise ValueError(
                "maximize is True in some parameter groups only; a meta-update needs one direction for all"
            )
        sign = -1 if True in maximize else 1
        self._follow_param_groups()
        params = [p for p in self._parameters() if p.requires_grad]
        evaluate = Evaluator.of(model, loss_fn if sign == 1 else lambda *args: -loss_fn(*args), params)
        if double_backward and evaluate.processes:
            raise ValueError("double_backward is for checking, and does not work with several processes")
        batches = Batches(batch1=batch1, batch2=batch2, val_batch=val_batch)
        # Lines 1 to 4: keep θ and whatever else a loss may change.
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
                # Not under no_grad: some modules take another path there, and the difference would show it.
                val_at_theta = evaluate.value("val_batch", val_batch)
            route = double_backward_losses if double_backward else first_order_losses
            l_grad, val_at_theta_prime = route(
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
        """The G modulation groups of the parameters that ``param_groups`` holds now, in order."""
        self._follow_param_groups()
        return self._members.groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does; the modulation groups are formed anew.

        Φ keeps what it has learned. Where it has group embeddings, groups that exist already keep theirs (they are
        recognised by name) and new ones start at zero. Parameters without names are accepted beside named ones.

        Raises:
            ValueError: for complex parameters, for lr, betas, eps or weight_decay out of range, for options of torch's
                AdamW that this optimizer does not have, for nameless parameters that ``model`` does not have, and, as
                in torch, for parameters that have a group already or come with names where others have none.
            TypeError: for what is no group of tensors, as in torch.

        No group is added then.
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
        if hasattr(self, "modulator"):  # else the constructor is adding its groups
            self._follow_param_groups()

    def _follow_param_groups(self) -> None:
        """Form the modulation groups anew where ``param_groups`` holds other parameters; Φ stays.

        Group embeddings go with the names of the groups; new groups start at zero.
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
            self._meta_optimizer.state.pop(old, None)  # Adam's moments are of the old rows
            create_moments(self._meta_optimizer)

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @property
    def _phi_like(self) -> Tensor:
        """A tensor of Φ's type, on its device."""
        return next(self.modulator.parameters())

    def _reset_factors(self) -> None:
        phi = self._phi_like
        self.alpha = torch.ones(len(self._members.groups), dtype=phi.dtype, device=phi.device)
        self.beta = torch.ones_like(self.alpha)

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state and, under "meta", Φ, its optimizer, the uncertainty weights and the step count.

        Hooks that torch calls when it saves or loads a state see AdamW's part of it.
        """
        self._follow_param_groups()
        present = set(self._parameters())
        absent = {p: self.state.pop(p) for p in list(self.state) if isinstance(p, Tensor) and p not in present}
        try:  # torch's cannot number the moments of parameters that were taken away
            return pack(self, super().state_dict())
        finally:
            self.state.update(absent)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; training then goes on as if it had not stopped.

        The objective, the priorities, the sparsity of the gates and ``total_steps`` are not in a state: they stay as
        they were given to the constructor.

        Raises:
            ValueError: if the state was not saved by MetaAdamW, is of other parameters, groups or another Φ, or has
                settings that the constructor would refuse (``state`` has the checks). Nothing is changed then.
        """
        self._follow_param_groups()
        plain, meta = unpack(self, state_dict)
        super().load_state_dict(plain)
        self._t = meta["t"]
        self.alpha = meta["alpha"].to(self._phi_like.device)
        self.beta = meta["beta"].to(self._phi_like.device)
        self.modulator.load_state_dict(meta["modulator"])
        if self.huw is not None:
            self.huw.load_state_dict(meta["huw"])
        self._meta_optimizer.load_state_dict(meta["meta_optimizer_state"])
        create_moments(self._meta_optimizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state: called by unpickling, ``deepcopy`` and ``load_state_dict``."""
        super().__setstate__(state)
        self._factors = Factors(self.modulator)  # without the folded Φ, and the tables on a GPU

    def __getstate__(self) -> dict[str, Any]:
        """Everything, for pickle and ``deepcopy``; torch's own keeps ``defaults``, ``state`` and ``param_groups`` only.

        Attributes that others hang on the instance (a scheduler replaces ``step``) stay out, as in torch.
        """
        self._follow_param_groups()  # a copy does not know the model, which names new parameters
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in _OWN_ATTRIBUTES}}
