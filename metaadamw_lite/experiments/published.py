"""The released optimizer itself as an arm, from the user's clone of the authors' repository.

None of its code is here. ``METAADAMW_REFERENCE``, or ``--reference`` of the commands, is the folder of the clone.
``Released`` adapts that code to our training: the same batches, random numbers apart from ours, double differentiation
also through attention, and records like those of the other arms.
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
from metaadamw_lite.experiments.variant import Variant, adamw_arguments
from metaadamw_lite.features import FeatureConfig
from metaadamw_lite.folded import in_one_buffer
from metaadamw_lite.groups import ModulationGroup
from metaadamw_lite.meta import LossFn, MetaLosses
from metaadamw_lite.modulator import Modulation
from metaadamw_lite.surroundings import same_random_numbers

VARIABLE = "METAADAMW_REFERENCE"
"""The environment variable with the folder of the clone."""


def reference() -> Path:
    """Return the folder of the clone.

    Raises:
        ValueError: without ``METAADAMW_REFERENCE``, or if that is no folder.
    """
    path = os.environ.get(VARIABLE, "")
    if not path:
        raise ValueError(f"{VARIABLE} is not set; the released optimizer needs a clone of the authors' repository")
    return expanded_folder(path, VARIABLE)


def released_class(path: Path) -> Any:
    """Import the class of the released optimizer.

    Raises:
        FileNotFoundError: if ``path`` has no such code.
    """
    if not (path / "experiments" / "meta_adamw.py").exists():
        raise FileNotFoundError(f"{path} has no experiments/meta_adamw.py; clone the authors' repository there")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return importlib.import_module("experiments.meta_adamw").MetaAdamW


def their_arguments(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Translate arguments of MetaAdamW (Table 4) into the released optimizer's."""
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
        """Return the factors (ranges of width 1) from features (G, D)."""
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
    """Replace ``view`` by ``reshape``: the released code flattens gradients, and channels-last ones refuse ``view``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, or ``reshape`` in place of ``view``."""
        return (Tensor.reshape if func is Tensor.view else func)(*args, **(kwargs or {}))


class Released(MetaAdamW):
    """The released optimizer with the interface of MetaAdamW.

    Args:
        model: the model to train.
        theirs: makes the released optimizer for the model.
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
        in_one_buffer(self.modulator)  # so that a resumed run rounds like the first
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
        """Their groups, with numbers for names: ``released/0`` and so on."""
        if not hasattr(self, "theirs"):
            return super().groups
        params = self.theirs.all_params
        return [
            ModulationGroup(f"released/{k}", tuple(params[i] for i in indices), 0.0, 0.0)
            for k, indices in enumerate(self.theirs.group_indices)
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of theirs."""
        with ViewsOfAnyOrder():
            loss = self.theirs.step(closure)
        self.alpha, self.beta = self._seen
        return loss

    @torch.no_grad()
    def features(self) -> Tensor:
        """Compute their Φ's present features, (G, D)."""
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
        """Make a meta-update of theirs, and return its total loss; the other losses are unknown (NaN).

        Theirs asks for pairs of inputs and targets, so a batch of ours becomes the first of a pair.
        """

        def unpacked(model: nn.Module, batch: Any) -> Tensor:
            return loss_fn(model, batch[0] if len(batch) == 2 and batch[1] is _NO_TARGETS else batch)

        self.theirs._get_val_batch = lambda device: (val_batch, _NO_TARGETS)
        devices = [p.device for p in model.parameters()]
        with same_random_numbers(devices), sdpa_kernel(SDPBackend.MATH), ViewsOfAnyOrder():
            total = self.theirs.update_attention(model, batch1, batch2, unpacked)
        return MetaLosses(float(total), *[float("nan")] * 3)

    def state_dict(self) -> dict[str, Any]:
        """Return their moments, Φ, gates, uncertainty weights and step count.

        Their own ``load_state_dict`` fails with HUW.
        """
        theirs = self.theirs
        parts = {"modulator": self.modulator, "huw": self.huw}
        return {
            "adamw": torch.optim.Optimizer.state_dict(theirs),
            "t": theirs._step_count,
            **{name: module.state_dict() for name, module in parts.items() if module is not None},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state from ``state_dict``."""
        torch.optim.Optimizer.load_state_dict(self.theirs, state_dict["adamw"])
        for state in self.theirs.state.values():
            state["step"] = int(state["step"])  # torch loads them as tensors, which round differently
        self.param_groups = self.theirs.param_groups
        self.theirs._step_count = state_dict["t"]
        self.modulator.load_state_dict(state_dict["modulator"])
        if self.huw is not None:
            self.huw.load_state_dict(state_dict["huw"])


class _NoTargets:
    """The second of a pair whose first is a whole batch."""


_NO_TARGETS = _NoTargets()


def make_released(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> MetaAdamW:
    """Make the released optimizer with a task's settings."""
    theirs, common = released_class(reference()), adamw_arguments(settings)

    def make() -> Any:
        arguments = their_arguments(settings.metaadamw)
        return theirs(model.parameters(), model=model, total_steps=total_steps, **common, **arguments)

    return Released(model, make, settings.metaadamw.get("seed", seed), **common)


RELEASED = {
    "released": Variant(make=make_released),
    "released-frozen": Variant(make=make_released, updates=False),
}
"""The released optimizer with Φ trained, and with Φ untrained."""
