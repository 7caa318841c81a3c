"""The released optimizer itself as an arm, from a clone of the authors' repository that the user names.

None of its code is here. ``METAADAMW_REFERENCE`` is the folder of the clone; the commands take it as ``--reference``,
too. ``Released`` is what stands between that code and our training: the same batches, random numbers that leave ours as
they are, double differentiation also through attention, and records like those of the other arms.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments.records import expanded_folder
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Variant, of_both
from metaadamw_lite.features import FeatureConfig
from metaadamw_lite.folded import in_one_buffer
from metaadamw_lite.groups import ModulationGroup
from metaadamw_lite.meta import LossFn, MetaLosses
from metaadamw_lite.modulator import Modulation
from metaadamw_lite.surroundings import same_random_numbers

VARIABLE = "METAADAMW_REFERENCE"
"""Of the environment: the folder of the clone."""


def reference() -> Path:
    """The clone that the environment names.

    Raises:
        ValueError: without ``METAADAMW_REFERENCE``, or if it is no folder.
    """
    path = os.environ.get(VARIABLE, "")
    if not path:
        raise ValueError(f"{VARIABLE} is not set; the released optimizer needs a clone of the authors' repository")
    return expanded_folder(path, VARIABLE)


def released_class(path: Path) -> Any:
    """The class of the released optimizer.

    Raises:
        FileNotFoundError: if there is no such code at ``path``.
    """
    if not (path / "experiments" / "meta_adamw.py").exists():
        raise FileNotFoundError(f"{path} has no experiments/meta_adamw.py; clone the authors' repository there")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return importlib.import_module("experiments.meta_adamw").MetaAdamW


def their_arguments(ours: Mapping[str, Any]) -> dict[str, Any]:
    """The released optimizer's arguments that stand for some of MetaAdamW's (Table 4)."""
    priorities = ours.get("huw_priorities", (1.0, 1.0, 1.0))
    version = ours.get("feature_version", "basic")
    named = ("attn_layers", "attn_hidden_dim", "attn_heads", "use_feature_gating", "meta_lr", "meta_weight_decay")
    return {
        "feature_dim": len(FeatureConfig(version).columns) + (4 if version == "enhanced" else 0),
        "feature_version": version,
        "use_v_norms": True,
        "group_strategy": ours.get("group_strategy", "fine_grained"),
        "meta_objective": ours.get("meta_objective", "combined"),
        "use_huw": priorities is not None,
        "task_types": ["regression"] * 3,
        "huw_priorities": [1.0, 1.0, 1.0] if priorities is None else list(priorities),
        **{name: ours[name] for name in named if name in ours},
    }


class TheirPhi(nn.Module):
    """The released Φ and its output layer, called as ours is."""

    embeddings = None

    def __init__(self, encoder: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.encoder, self.output = encoder, output

    def forward(self, features: Tensor) -> Modulation:
        """The factors (ranges of width 1) from features (G, D)."""
        alpha, beta, lambda1, lambda2 = torch.sigmoid(self.output(self.encoder(features.unsqueeze(1)).squeeze(1))).T
        return Modulation(0.5 + alpha, 0.5 + beta, lambda1, lambda2)


class TheirWeights(nn.Module):
    """The released uncertainty weights, with the attribute that ours have."""

    def __init__(self, huw: Any) -> None:
        super().__init__()
        self.huw = huw

    @property
    def log_var(self) -> Tensor:
        """Log σ² of the three losses."""
        weights: Tensor = self.huw.log_vars
        return weights


class ViewsOfAnyOrder(TorchFunctionMode):
    """Let ``view`` be ``reshape``: that code flattens gradients by it, which channels-last ones refuse."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, or ``reshape`` in its place."""
        return (Tensor.reshape if func is Tensor.view else func)(*args, **(kwargs or {}))


class Released(MetaAdamW):
    """The released optimizer, from outside like MetaAdamW.

    Args:
        model: whose parameters are trained.
        theirs: makes the released optimizer for it.
        seed: of Φ's random start, which theirs draws from torch's own generator.
        arguments: of AdamW; MetaAdamW's own are not used.
    """

    def __init__(self, model: nn.Module, theirs: Callable[[], Any], seed: int, **arguments: Any) -> None:
        super().__init__(model.named_parameters(), attn_layers=1, seed=seed, **arguments)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.theirs = theirs()
            everything = [p for group in self.theirs.param_groups for p in group["params"]]
            self.theirs._build_groups(everything)
            self.theirs._build_attention_module(len(self.theirs.group_indices), everything[0].device)
        self.modulator = TheirPhi(self.theirs._attention_encoder, self.theirs._output_proj)  # type: ignore[assignment]
        in_one_buffer(self.modulator)  # so that a resumed run rounds as the first one
        self.huw = None if self.theirs.huw is None else TheirWeights(self.theirs.huw)  # type: ignore[assignment]
        self._seen: list[Tensor] = []
        original = self.theirs._compute_scaling_factors

        def factors(*arguments: Any) -> Any:
            found = original(*arguments)
            self._seen = [x.detach().clone() for x in found[:2]]
            return found

        self.theirs._compute_scaling_factors = factors
        self.param_groups = self.theirs.param_groups  # a schedule that changes ours changes theirs

    @property
    def groups(self) -> list[ModulationGroup]:
        """Their groups; the names are those of the optimizer's first group criteria and a number."""
        if not hasattr(self, "theirs"):
            return super().groups
        params = self.theirs.all_params
        return [
            ModulationGroup(f"released/{k}", tuple(params[i] for i in indices), 0.0, 0.0)
            for k, indices in enumerate(self.theirs.group_indices)
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of theirs."""
        with ViewsOfAnyOrder():
            loss = self.theirs.step(closure)
        self.alpha, self.beta = self._seen
        return loss

    @torch.no_grad()
    def features(self) -> Tensor:
        """What their Φ would see now, (G, D)."""
        theirs, rows = self.theirs, []
        t_norm = theirs._get_t_norm(theirs.all_params[0].device)
        with ViewsOfAnyOrder():
            for k, indices in enumerate(theirs.group_indices):
                params = [theirs.all_params[i] for i in indices]
                rows.append(theirs._extract_group_features(params, theirs.state, t_norm, k))
        f = torch.stack(rows)
        return f if theirs._feature_gates is None else f * torch.sigmoid(theirs._feature_gates)

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
        """A meta-update of theirs. Of its losses only the total is known.

        It asks for pairs of inputs and targets: a batch of ours goes through as the first of a pair.
        """

        def unpacked(model: nn.Module, batch: Any) -> Tensor:
            return loss_fn(model, batch[0] if len(batch) == 2 and batch[1] is _NO_TARGETS else batch)

        self.theirs._get_val_batch = lambda device: (val_batch, _NO_TARGETS)
        devices = [p.device for p in model.parameters()]
        with same_random_numbers(devices), sdpa_kernel(SDPBackend.MATH), ViewsOfAnyOrder():
            total = self.theirs.update_attention(model, batch1, batch2, unpacked)
        return MetaLosses(float(total), *[float("nan")] * 3)

    def state_dict(self) -> dict[str, Any]:
        """Their moments, Φ, gates, uncertainty weights and step count; their own loading of a state fails with HUW."""
        theirs = self.theirs
        parts = {"modulator": self.modulator, "huw": self.huw}
        return {
            "adamw": torch.optim.Optimizer.state_dict(theirs),
            "t": theirs._step_count,
            **{name: module.state_dict() for name, module in parts.items() if module is not None},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        torch.optim.Optimizer.load_state_dict(self.theirs, state_dict["adamw"])
        for state in self.theirs.state.values():
            state["step"] = int(state["step"])  # torch's loading makes tensors of them, which round otherwise
        self.param_groups = self.theirs.param_groups
        self.theirs._step_count = state_dict["t"]
        self.modulator.load_state_dict(state_dict["modulator"])
        if self.huw is not None:
            self.huw.load_state_dict(state_dict["huw"])


class _NoTargets:
    """The second of a pair whose first is a whole batch."""


_NO_TARGETS = _NoTargets()


def released(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> MetaAdamW:
    """The released optimizer with a task's settings."""
    theirs, common = released_class(reference()), of_both(settings)

    def make() -> Any:
        arguments = their_arguments(settings.metaadamw)
        return theirs(model.parameters(), model=model, total_steps=total_steps, **common, **arguments)

    return Released(model, make, settings.metaadamw.get("seed", seed), **common)


RELEASED = {
    "released": Variant(make=released),
    "released-frozen": Variant(make=released, updates=False),
}
"""The released optimizer, trained and never updated."""
