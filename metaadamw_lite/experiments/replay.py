"""Is it the learning, or the learning rates? AdamW with the factors of a recorded run, held constant.

A record has the factors of about ten steps an epoch. Their means give each group its rates in the run, or the whole
model one rate, or only the ends of the network their rates. Their course over the steps gives a schedule.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Maker, Variant, adamw_arguments
from metaadamw_lite.groups import ModulationGroup, fine_grained_groups

Factors = tuple[list[float], list[float]]
"""α and β of each group."""


def mean_factors(record: dict[str, Any]) -> Factors:
    """Average each group's α and β over the traced steps."""
    alpha, beta = (np.mean([point[name] for point in record["trace"]], axis=0).tolist() for name in ("alpha", "beta"))
    return alpha, beta


def uniform_factors(record: dict[str, Any]) -> Factors:
    """Return one α and one β for all groups: their means, weighted by parameters."""
    sizes = [group["parameters"] for group in record["groups"]]
    alpha, beta = (float(np.average(factor, weights=sizes)) for factor in mean_factors(record))
    return [alpha] * len(sizes), [beta] * len(sizes)


def end_factors(record: dict[str, Any]) -> Factors:
    """Return the mean factors of the embedding and the output layer, and 1 for all other groups."""
    ends = [group["name"].startswith(("embedding/", "other/deep/")) for group in record["groups"]]
    alpha, beta = ([x if end else 1.0 for x, end in zip(f, ends, strict=True)] for f in mean_factors(record))
    return alpha, beta


def replay(factors: Callable[[dict[str, Any]], Factors]) -> Maker:
    """Return the maker of AdamW with a recorded run's modulation groups, with learning rates ηα_g and decays β_gλ.

    Args:
        factors: from the record to the constant factors of each of its groups.
    """

    def make(
        model: nn.Module, settings: Settings, total_steps: int, seed: int, record: dict[str, Any]
    ) -> torch.optim.Optimizer:
        groups = zip(groups_of(model, record), *factors(record), strict=True)
        return torch.optim.AdamW(
            [
                {"params": group.params, "lr": settings.lr * alpha, "weight_decay": settings.weight_decay * beta}
                for group, alpha, beta in groups
            ],
            **adamw_arguments(settings),
        )

    return make


def groups_of(model: nn.Module, record: dict[str, Any]) -> list[ModulationGroup]:
    """Return the modulation groups of the model, which must be those of the record.

    Raises:
        ValueError: if they are others, or the record has no factors.
    """
    groups = fine_grained_groups(model.named_parameters(), model)
    key, names = RunKey(**record["run"]), [group["name"] for group in record.get("groups", [])]
    if names != [group.name for group in groups]:
        raise ValueError(f"the record of {key} has the groups {names}, the model {[group.name for group in groups]}")
    if not record["trace"]:
        raise ValueError(f"the record of {key} has no factors, since the run {record['status']} before the first look")
    return groups


class ScheduledAdamW(torch.optim.AdamW):
    """AdamW with the learning rate η·factor(t) in step t, counted from 1 by AdamW's own state."""

    def __init__(self, params: Any, factor: Callable[[int], float], **settings: Any) -> None:
        super().__init__(params, **settings)
        self._factor = factor
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    def step(self, closure: Any = None) -> Any:
        """Take AdamW's step with the learning rate of this step."""
        t = 1 + max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(t)
        return super().step(closure)


def mean_schedule(
    model: nn.Module, settings: Settings, total_steps: int, seed: int, record: dict[str, Any]
) -> torch.optim.Optimizer:
    """Make AdamW with a recorded run's mean α over the steps as its schedule, without its groups.

    The mean is over groups, weighted by parameters. It is linear between traced steps, and constant outside.
    """
    groups_of(model, record)  # refuses a record that does not fit
    sizes = [group["parameters"] for group in record["groups"]]
    steps = [point["step"] for point in record["trace"]]
    means = [np.average(point["alpha"], weights=sizes) for point in record["trace"]]
    return ScheduledAdamW(model.parameters(), lambda t: float(np.interp(t, steps, means)), **adamw_arguments(settings))


def _replay(source: str, make: Maker) -> Variant:
    return Variant(make=make, source=lambda key: replace(key, variant=source))


ENDS = {f"replay-ends-of-{source}": source for source in ("metaadamw", "metaadamw-frozen")}
"""The replays of ``end_factors``, with their sources."""

WITH_ENDS = ("etth1", "wikitext2", "multi30k")
"""Tasks whose group ``other/deep/weight`` is the output layer; on the others it holds further layers."""

_CONSTANT = {"groups": mean_factors, "one": uniform_factors}
REPLAY = {
    **{
        f"replay-{what}-of-{source}": _replay(source, replay(factors))
        for source in ("metaadamw", "metaadamw-frozen")
        for what, factors in _CONSTANT.items()
    },
    **{name: _replay(source, replay(end_factors)) for name, source in ENDS.items()},
    "replay-groups-of-ladder-phi": _replay("ladder-phi", replay(mean_factors)),
    "replay-one-of-ladder-phi": _replay("ladder-phi", replay(uniform_factors)),
    "replay-schedule-of-ladder-phi": _replay("ladder-phi", mean_schedule),
}
"""Each replays the run of its source with the same task, protocol, profile and seed."""
