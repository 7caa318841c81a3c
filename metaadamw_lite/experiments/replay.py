"""Is it the learning, or the learning rates? AdamW with the factors of a recorded run, held constant.

A record has the factors of about ten steps an epoch. Their means give each group the rates that it had in the run, or
the whole model one rate, or only the ends of the network theirs; their course over the steps gives a schedule.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Maker, Variant, of_both
from metaadamw_lite.groups import ModulationGroup, fine_grained_groups

Factors = tuple[list[float], list[float]]
"""α and β of each group."""


def mean_factors(record: dict[str, Any]) -> Factors:
    """The means of each group's α and β over the traced steps."""
    alpha, beta = (np.mean([point[name] for point in record["trace"]], axis=0).tolist() for name in ("alpha", "beta"))
    return alpha, beta


def for_all(record: dict[str, Any]) -> Factors:
    """One α and one β for all groups: the means of theirs, weighted by their numbers of parameters."""
    sizes = [group["parameters"] for group in record["groups"]]
    alpha, beta = (float(np.average(factor, weights=sizes)) for factor in mean_factors(record))
    return [alpha] * len(sizes), [beta] * len(sizes)


def at_the_ends(record: dict[str, Any]) -> Factors:
    """The embedding's and the output layer's factors (where the task has them); 1 for all other groups."""
    ends = [group["name"].startswith(("embedding/", "other/deep/")) for group in record["groups"]]
    alpha, beta = ([x if end else 1.0 for x, end in zip(f, ends, strict=True)] for f in mean_factors(record))
    return alpha, beta


def replaying(factors: Callable[[dict[str, Any]], Factors]) -> Maker:
    """AdamW whose parameter groups are the modulation groups of a recorded run, with learning rate ηα_g and decay β_gλ.

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
            **of_both(settings),
        )

    return make


def groups_of(model: nn.Module, record: dict[str, Any]) -> list[ModulationGroup]:
    """The modulation groups of the model, which are those of the record.

    Raises:
        ValueError: if they are not, or the record has no factors.
    """
    groups = fine_grained_groups(model.named_parameters(), model)
    key, names = RunKey(**record["run"]), [group["name"] for group in record.get("groups", [])]
    if names != [group.name for group in groups]:
        raise ValueError(f"the record of {key} has the groups {names}, the model {[group.name for group in groups]}")
    if not record["trace"]:
        raise ValueError(f"the record of {key} has no factors, since the run {record['status']} before the first look")
    return groups


class ScheduledAdamW(torch.optim.AdamW):
    """AdamW whose learning rate in step t is η·factor(t), with t from 1; t is read off AdamW's own state."""

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
    """AdamW with the course of a recorded run's mean α over the steps, without its groups.

    The mean is over groups, weighted by parameters; between traced steps it is a straight line, and constant outside.
    """
    groups_of(model, record)  # which refuses a record that does not fit
    sizes = [group["parameters"] for group in record["groups"]]
    steps = [point["step"] for point in record["trace"]]
    means = [np.average(point["alpha"], weights=sizes) for point in record["trace"]]
    return ScheduledAdamW(model.parameters(), lambda t: float(np.interp(t, steps, means)), **of_both(settings))


def _replay(source: str, make: Maker) -> Variant:
    return Variant(make=make, source=lambda key: replace(key, variant=source))


ENDS = {f"replay-ends-of-{source}": source for source in ("metaadamw", "metaadamw-frozen")}
"""The replays ``at_the_ends``, with their sources."""

WITH_ENDS = ("etth1", "wikitext2", "multi30k")
"""Tasks whose group ``other/deep/weight`` is the output layer; on the others it holds more than that."""

_CONSTANT = {"groups": mean_factors, "one": for_all}
REPLAY = {
    **{
        f"replay-{what}-of-{source}": _replay(source, replaying(factors))
        for source in ("metaadamw", "metaadamw-frozen")
        for what, factors in _CONSTANT.items()
    },
    **{name: _replay(source, replaying(at_the_ends)) for name, source in ENDS.items()},
    "replay-groups-of-ladder-phi": _replay("ladder-phi", replaying(mean_factors)),
    "replay-one-of-ladder-phi": _replay("ladder-phi", replaying(for_all)),
    "replay-schedule-of-ladder-phi": _replay("ladder-phi", mean_schedule),
}
"""Each replays the run of its source with the same task, protocol, profile and seed."""
