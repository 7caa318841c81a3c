"""Departures of the released code from the paper, with a switch for each.

The package has the paper's algorithm. Each departure was seen in the released optimizer; none of its code is here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from metaadamw_lite import MetaAdamW, optimizer
from metaadamw_lite.buckets import State, moments_of
from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Maker, Variant, metaadamw_arguments
from metaadamw_lite.features import FeatureConfig
from metaadamw_lite.meta import HypotheticalStep, LossFn, MetaLosses
from metaadamw_lite.modulator import Modulation
from metaadamw_lite.surroundings import as_found, same_random_numbers

DEPARTURES = {
    "u1": "the bias correction 1/(1 − β₁ᵗ) of the step size multiplies the decay, too: tenfold in the first step",
    "u2": "no gradient goes through β of the hypothetical step, so that the decay factors are never trained",
    "u3": "the gates are penalised and never updated",
    "u4": "the hypothetical step takes the moments as they are, and Φ the training gradient; g on B₁ is for the cosine",
    "u5": "`basic_plus` is the first columns of `enhanced`, and zeros",
    "u6": "L_gap adds its gradient by θ to the model's own gradients, which the next step's `zero_grad` takes away",
    "u9": "Φ is held small by the sum of its norms, not by weight decay",
    "u13": "L_val(θ) and L_val(θ′) have dropout masks of their own, and meta-updates move batch statistics",
}
"""The behaviour in place of the paper's, by name."""

GROUP_EMBEDDING = 4
"""Columns that ``enhanced`` leaves to the group embeddings, also where there are none."""


def changes(departure: str, settings: Settings) -> bool:
    """Tell whether a departure can change a run with these settings of MetaAdamW."""
    if departure == "u3":
        return bool(settings.metaadamw.get("use_feature_gating", False))
    if departure == "u5":
        return settings.metaadamw.get("feature_version") == "basic_plus"
    return departure != "u6"  # training calls ``zero_grad`` before each backward pass


class StaleStep(HypotheticalStep):
    """U4: the hypothetical step along m̂/(√v̂ + ε) of the step that was taken last."""

    @classmethod
    def of(
        cls,
        theta: Mapping[Tensor, Tensor],
        g: Mapping[Tensor, Tensor],
        param_groups: Sequence[Mapping[str, Any]],
        state: State,
        number: Mapping[Tensor, int],
    ) -> "StaleStep":
        """Make the step as ``HypotheticalStep.of`` does, in another direction."""
        step = super().of(theta, g, param_groups, state, number)
        settings = {p: group for group in param_groups for p in group["params"]}
        step.u = [_last_direction(p, settings[p], state) for p in step.params]
        assert isinstance(step, cls)
        return step


def _last_direction(p: Tensor, group: Mapping[str, Any], state: State) -> Tensor:
    m, v, _ = moments_of(p, state)
    t = float(state[p]["step"])
    beta1, beta2 = map(float, group["betas"])
    u: Tensor = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + float(group["eps"]))
    return u


def _without_gradient_by_beta(_: nn.Module, __: Any, modulation: Modulation) -> Modulation:
    """U2, as a forward hook of Φ."""
    return modulation._replace(beta=modulation.beta.detach())


def _cut(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """U5, as a hook before the forward pass of Φ, which takes as many columns as ``basic_plus`` has."""
    (f,) = inputs
    width = len(FeatureConfig("basic_plus").columns)
    kept = f[:, : width - GROUP_EMBEDDING]
    return (torch.cat([kept, kept.new_zeros(len(f), width - kept.shape[1])], dim=1),)


class DepartedMetaAdamW(MetaAdamW):
    """MetaAdamW with some of ``DEPARTURES``; for models all of whose parameters have a gradient in every step.

    Args:
        params, arguments: as MetaAdamW takes them; U5 needs the 11 columns of ``basic_plus``.
        departures: names of ``DEPARTURES``.

    Raises:
        ValueError: for an unknown departure, and for arguments that MetaAdamW refuses.
    """

    def __init__(self, params: Any, departures: Iterable[str], **arguments: Any) -> None:
        self._departures = frozenset(departures)
        for name in self._departures:
            check_choice("departure", name, DEPARTURES)
        super().__init__(params, **arguments)
        self._training_gradients: dict[Tensor, Tensor] = {}
        if "u5" in self._departures and self._feature_config.version == "basic_plus":
            self._feature_config = FeatureConfig("enhanced")
            self.modulator.register_forward_pre_hook(_cut)
        if "u9" in self._departures:
            of_phi = self._meta_optimizer.param_groups[0]
            penalty, of_phi["weight_decay"] = of_phi["weight_decay"], 0.0
            self._meta_optimizer.register_step_pre_hook(lambda *_: self._add_gradient_of_norms(penalty))

    @torch.no_grad()
    def _add_gradient_of_norms(self, penalty: float) -> None:
        """U9: the gradient of Σ‖W‖ over all of Φ but the bias of its output; nothing where W is zero."""
        for p in (*self.modulator.encoder.parameters(), self.modulator.output.weight):
            if p.grad is not None:
                p.grad += penalty * p / p.norm().clamp_min(torch.finfo(p.dtype).tiny)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of MetaAdamW, with U1 and U5 if they are switched on."""
        with self._decay_of_step(self._t + 1):
            return super().step(closure)

    @contextmanager
    def _decay_of_step(self, t: int) -> Iterator[None]:
        """U1: λ/(1 − β₁ᵗ) in place of λ."""
        before = [group["weight_decay"] for group in self.param_groups]
        if "u1" in self._departures:
            for group in self.param_groups:
                group["weight_decay"] = group["weight_decay"] / (1 - float(group["betas"][0]) ** t)
        try:
            yield
        finally:
            for group, weight_decay in zip(self.param_groups, before, strict=True):
                group["weight_decay"] = weight_decay

    def update_attention(
        self,
        model: nn.Module,
        batch1: Any,
        batch2: Any,
        loss_fn: LossFn,
        val_batch: Any = None,
        **options: Any,
    ) -> MetaLosses:
        """Make a meta-update of MetaAdamW, with the departures that are switched on."""
        stale, params = "u4" in self._departures, [p for p in self._parameters() if p.requires_grad]
        gates = self.modulator.gates if "u3" in self._departures else None
        gates_before = None if gates is None else gates.detach().clone()
        weight = 1.0 if self.huw is None else 0.5 * float(torch.exp(-self.huw.log_var[2].detach()))
        loss = with_other_masks(loss_fn, val_batch) if "u13" in self._departures else loss_fn
        with ExitStack() as stack:
            stack.enter_context(self._decay_of_step(self._t if stale else self._t + 1))
            if stale:
                self._training_gradients = {p: p.grad for p in params if p.grad is not None}
                stack.callback(self._training_gradients.clear)
                stack.enter_context(patch.object(optimizer, "HypotheticalStep", StaleStep))
            if "u2" in self._departures:
                stack.callback(self.modulator.register_forward_hook(_without_gradient_by_beta).remove)
            losses: MetaLosses = super().update_attention(model, batch1, batch2, loss, val_batch, **options)
        if gates is not None and gates_before is not None:
            gates.data.copy_(gates_before)
        if "u13" in self._departures:
            self._move_statistics(model, batch1, batch2, loss_fn, val_batch)
        if "u6" in self._departures and self._meta_objective in ("gen_gap", "combined"):
            self._add_gradient_of_gap(model, batch1, loss_fn, val_batch, params, weight)
        return losses

    def _features(self, gradients: Mapping[Tensor, Tensor] | None) -> Tensor:
        f: Tensor = super()._features(self._training_gradients or gradients)  # U4
        return f

    def _add_gradient_of_gap(
        self, model: nn.Module, batch1: Any, loss_fn: Any, val_batch: Any, params: list[Tensor], weight: float
    ) -> None:
        """U6: add the gradient by θ of L_gap's term to ``.grad``."""
        with torch.enable_grad(), as_found(model, params), same_random_numbers([p.device for p in params]):
            with torch.no_grad():
                at_val = loss_fn(model, val_batch)
            found = torch.autograd.grad((loss_fn(model, batch1) - at_val).abs(), params, allow_unused=True)
        for p, x in zip(params, found, strict=True):
            if x is not None:
                p.grad = weight * x if p.grad is None else p.grad + weight * x

    @torch.no_grad()
    def _move_statistics(self, model: nn.Module, batch1: Any, batch2: Any, loss_fn: Any, val_batch: Any) -> None:
        """U13: make forward passes at θ that change the running statistics of batch norms."""
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        if not any(norm.track_running_stats for norm in norms):
            return
        passes = [batch1, batch2]
        if self._meta_objective in ("loss_decrease", "combined"):
            passes += [val_batch, val_batch]
        if self._meta_objective in ("gen_gap", "combined"):
            passes += [batch1, val_batch]
        with same_random_numbers([p.device for p in self._parameters()]):
            for batch in passes:
                loss_fn(model, batch)


def with_other_masks(loss_fn: Any, val_batch: Any) -> Any:
    """U13: draw other random numbers in the second loss of the validation batch, at θ′.

    The two passes on B₂ keep theirs, since their difference of gradients stands for a second derivative, with one mask.
    """
    looks = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal looks
        if val_batch is not None and batch[0] is val_batch[0]:
            looks += 1
            if looks > 1:
                torch.manual_seed(int(torch.randint(2**31, ())))  # the meta-update puts the generators back
        value: Tensor = loss_fn(model, batch)
        return value

    return loss


def depart(*departures: str) -> Maker:
    """Return the maker of MetaAdamW with some departures."""

    def make(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> MetaAdamW:
        return DepartedMetaAdamW(
            model.named_parameters(), departures, **metaadamw_arguments(settings, total_steps, seed)
        )

    return make


ALL = "departure-all"
DEPARTED = {f"departure-{name}": Variant(make=depart(name)) for name in DEPARTURES} | {
    ALL: Variant(make=depart(*DEPARTURES))
}
"""MetaAdamW with one departure, and with all of them."""
