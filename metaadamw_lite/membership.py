"""Which parameter belongs to which modulation group, read from the optimizer's ``param_groups``.

``param_groups`` is the truth, as in torch: wrappers that shard a model replace parameters there, fine-tuning callbacks
add and assign groups. ``Membership`` notices that by comparing identities and then forms the groups anew (section 3.2).
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from inspect import getgeneratorlocals, isgenerator
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metaadamw_lite.groups import (
    ModulationGroup,
    Place,
    form_groups,
    is_bias,
    native_groups,
    places_by_class,
    places_by_name,
    shape_of,
)
from metaadamw_lite.sharding import is_sharded, refuse_flat_parameters

STRATEGIES = ("fine_grained", "original")

ParamGroups = Sequence[Mapping[str, Any]]


class Membership:
    """Names, places and modulation groups of the parameters that ``param_groups`` holds.

    A parameter keeps its name and its place in the network as long as it is there. A new one has the name that the
    model gives it, else that of the parameter whose position it takes, else none. Nameless parameters form one
    modulation group for each parameter group ("original"), beside the fine-grained groups of the others.

    Args:
        strategy: one of ``STRATEGIES``.
        model: what names parameters and tells their layer types; None if unknown. It is not kept alive.
        complete: whether the model has to have every parameter that comes without a name.

    Attributes:
        groups: the modulation groups, in order.
        number: the place in ``groups`` of the modulation group of each parameter.
        sharded: whether any parameter is a ``DTensor``.
    """

    def __init__(self, strategy: str, model: nn.Module | None, complete: bool) -> None:
        self.groups: list[ModulationGroup] = []
        self.number: dict[Tensor, int] = {}
        self.sharded = False
        self._strategy = strategy
        self._model = None if model is None else weakref.ref(model)
        self._complete = complete and strategy == "fine_grained"
        self._names: dict[Tensor, str] = {}
        self._places: dict[Tensor, Place] = {} if model is None else places_by_class(model)
        self._members: list[list[Tensor]] = []
        self._lazy: list[Tensor] = []
        self._has_warned = False

    def name_parameters(self, group: dict[str, Any], beside: ParamGroups) -> dict[str, Any]:
        """A parameter group in the form that torch adds beside others: names for all of its parameters, or for none.

        Parameters without a name get the one that the model has; where it has none, an empty one beside named ones.

        Raises:
            ValueError: if the model should have all parameters and does not.
        """
        params = group.get("params", ())
        if isinstance(params, set):  # torch refuses sets, which have no order
            return group
        params = [params] if isinstance(params, Tensor) else list(params)
        nameless = [p for p in params if isinstance(p, Tensor)]
        named = self._named_by_model() if self._strategy == "fine_grained" else {}
        if self._complete and (unknown := [p for p in nameless if p not in named]):
            raise ValueError(
                f"{len(unknown)} of {len(nameless)} parameters, the first of shape {tuple(unknown[0].shape)}, have no "
                "name and are not in model; pass named parameters, or a model that has them all"
            )
        names = group.get("param_names") or [named.get(p, "") for p in nameless]
        wanted = self._complete or any("param_names" in other for other in beside) or any(names)
        if not wanted or len(nameless) < len(params):  # named already, or in part, which torch refuses
            return {**group, "params": params}
        return {**group, "params": params, "param_names": names}

    def add(self, params: Sequence[Tensor], names: Sequence[str], model: nn.Module | None) -> None:
        """Learn the names of parameters, and their places in the model that ``named_parameters()`` came from."""
        self._names |= {p: name for p, name in zip(params, names, strict=True) if name}
        if model is not None:  # only a part of the constructor's, if there is one
            self._places = places_by_class(model) | self._places
            self._model = self._model or weakref.ref(model)

    def is_current(self, param_groups: ParamGroups) -> bool:
        """Whether the parameter groups hold the same parameters as when the modulation groups were formed.

        Parameters of lazy modules are others once they have a shape, which may tell their layer type.
        """
        members = self._members
        if self._lazy and not all(map(is_lazy, self._lazy)):
            return False
        return len(members) == len(param_groups) and all(
            len(group["params"]) == len(old) and all(map(is_, group["params"], old))
            for group, old in zip(param_groups, members, strict=True)
        )

    def renew(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Form the modulation groups of the parameters that are there now, and bring ``param_names`` up to date.

        Raises:
            ValueError: for complex parameters, and for those that FSDP1 has flattened. Nothing is changed then.
        """
        names: dict[Tensor, str] = {}
        named = self._named_by_model()
        present = {name for group in param_groups for p in group["params"] if (name := self._names.get(p))}
        for group in param_groups:
            before = list(group.get("param_names", ()))
            if len(before) != len(group["params"]):
                before = [""] * len(group["params"])
            for p, name in zip(group["params"], before, strict=True):
                names[p] = self._names.get(p) or named.get(p) or ("" if name in present else name)
        refuse_flat_parameters(names, None if self._model is None else self._model())
        check_parameters(names)

        if self._strategy == "original":
            every = [[names[p] for p in group["params"]] for group in param_groups]
            groups = native_groups([group["params"] for group in param_groups], every if all(names.values()) else None)
        else:
            groups = self._fine_grained(param_groups, names)
            nameless = [[p for p in group["params"] if not names[p]] for group in param_groups]
            groups += native_groups(nameless, None)
            self._warn(sum(map(len, nameless)), len(names))
        self.groups = groups
        self.number = {p: k for k, group in enumerate(groups) for p in group.params}
        self.sharded = any(map(is_sharded, names))
        self._names = {p: name for p, name in names.items() if name}
        self._places = {p: place for p, place in self._places.items() if p in names}
        self._members = [list(group["params"]) for group in param_groups]
        self._lazy = [p for p in names if is_lazy(p)]
        for group in param_groups:
            if self._names or self._complete:
                group["param_names"] = [names[p] for p in group["params"]]

    def _fine_grained(self, param_groups: ParamGroups, names: Mapping[Tensor, str]) -> list[ModulationGroup]:
        """The groups of section 3.2 over the parameters that have a name."""
        model = None if self._model is None else self._model()
        if model is not None and not self._places.keys() >= names.keys():
            self._places = places_by_class(model) | self._places
        times = Counter(self._names.values())
        inherited = {n: self._places[p] for p, n in self._names.items() if p in self._places and times[n] == 1}
        lists = [[(names[p], p) for p in group["params"] if names[p]] for group in param_groups]
        members = []
        for (name, p), guess in zip(chain(*lists), chain(*places_by_name(lists)), strict=True):
            if p not in self._places and name in inherited:
                self._places[p] = inherited[name]
            members.append((p, self._places.get(p, guess), is_bias(name)))
        return form_groups(members)

    def _named_by_model(self) -> dict[Tensor, str]:
        model = None if self._model is None else self._model()
        return {} if model is None else {p: name for name, p in model.named_parameters()}

    def _warn(self, nameless: int, all_: int) -> None:
        if nameless and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{nameless} of {all_} parameters have no name, so they form one modulation group for each parameter "
                "group instead of fine-grained ones (section 3.2 of the paper). Pass model.named_parameters(), or "
                "named_from=model beside parameters without names; group_strategy='original' asks for these groups",
                stacklevel=4,  # the caller of the constructor, or of ``add_param_group``
            )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model, which is not the optimizer's to save or copy."""
        return {**self.__dict__, "_model": None}


def check_parameters(names: Mapping[Tensor, str]) -> None:
    """Refuse complex parameters, by their names.

    Raises:
        ValueError: for the first one.
    """
    for p, name in names.items():
        if p.is_complex():
            raise ValueError(f"parameter {name or shape_of(p)} is {p.dtype}; only real parameters are supported")


def model_behind(params: Any) -> nn.Module | None:
    """The model whose ``named_parameters()`` this generator is, or None.

    Only the module classes tell an embedding from a linear layer for certain, and this spares the caller to pass the
    model beside its parameters.
    """
    is_named = isgenerator(params) and params.__name__ == "named_parameters"
    owner = getgeneratorlocals(params).get("self") if is_named else None
    return owner if isinstance(owner, nn.Module) else None
