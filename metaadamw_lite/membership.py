"""The assignment of parameters to modulation groups (section 3.2), kept in step with ``param_groups``.

As in torch, ``param_groups`` may change at any time: wrappers that shard a model replace parameters there, fine-tuning
callbacks add and assign groups. ``Membership`` compares identities and, after a change, forms the groups again.
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
    get_shape,
    is_bias,
    native_groups,
    places_by_class,
    places_by_name,
)
from metaadamw_lite.sharding import is_sharded, refuse_flat_parameters

STRATEGIES = ("fine_grained", "original")

ParamGroups = Sequence[Mapping[str, Any]]


class Membership:
    """Names, places and modulation groups of the parameters in ``param_groups``.

    A parameter keeps its name and place while it is in ``param_groups``. A new parameter gets its name from the model,
    else from the parameter whose position it takes. Parameters without a name form one modulation group for each
    parameter group ("original"), beside the fine-grained groups of the others.

    Args:
        strategy: one of ``STRATEGIES``.
        model: source of names and layer types, or None; held by a weak reference.
        complete: True if the model must contain every parameter that comes without a name.

    Attributes:
        groups: the modulation groups, in order.
        number: the index in ``groups`` of each parameter's modulation group.
        sharded: True if any parameter is a ``DTensor``.
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
        """Complete a parameter group's names for torch, which wants them for all parameters or for none.

        Missing names come from the model. Parameters that it does not have get an empty name beside named ones.

        Args:
            group: the new parameter group.
            beside: the existing parameter groups.

        Raises:
            ValueError: if the model must contain all parameters and does not (``complete``).
        """
        params = group.get("params", ())
        if isinstance(params, set):  # has no order; torch refuses it
            return group
        params = [params] if isinstance(params, Tensor) else list(params)
        nameless = [p for p in params if isinstance(p, Tensor)]
        named = self._read_names() if self._strategy == "fine_grained" else {}
        if self._complete and (unknown := [p for p in nameless if p not in named]):
            raise ValueError(
                f"{len(unknown)} of {len(nameless)} parameters, the first of shape {tuple(unknown[0].shape)}, have no "
                "name and are not in model; pass named parameters, or a model that has them all"
            )
        names = group.get("param_names") or [named.get(p, "") for p in nameless]
        wanted = self._complete or any("param_names" in other for other in beside) or any(names)
        if not wanted or len(nameless) < len(params):  # already named; torch refuses a mixture
            return {**group, "params": params}
        return {**group, "params": params, "param_names": names}

    def add(self, params: Sequence[Tensor], names: Sequence[str], model: nn.Module | None) -> None:
        """Register the names of parameters, and their places in ``model``, the source of ``named_parameters()``."""
        self._names |= {p: name for p, name in zip(params, names, strict=True) if name}
        if model is not None:  # may be a part of the constructor's model, whose places stay
            self._places = places_by_class(model) | self._places
            self._model = self._model or weakref.ref(model)

    def is_current(self, param_groups: ParamGroups) -> bool:
        """Return whether ``param_groups`` holds the parameters that the modulation groups were formed from.

        A lazy parameter counts as changed once it has a shape, which may reveal its layer type.
        """
        members = self._members
        if self._lazy and not all(map(is_lazy, self._lazy)):
            return False
        return len(members) == len(param_groups) and all(
            len(group["params"]) == len(old) and all(map(is_, group["params"], old))
            for group, old in zip(param_groups, members, strict=True)
        )

    def renew(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Form the modulation groups again from ``param_groups``, and update its ``param_names``.

        Raises:
            ValueError: for complex parameters, and for those that FSDP1 has flattened. Then nothing has changed.
        """
        names: dict[Tensor, str] = {}
        named = self._read_names()
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
            groups = self._form_fine_grained(param_groups, names)
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

    def _form_fine_grained(self, param_groups: ParamGroups, names: Mapping[Tensor, str]) -> list[ModulationGroup]:
        """Form the groups of section 3.2 from the parameters with a name."""
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

    def _read_names(self) -> dict[Tensor, str]:
        """Return the names of the model's parameters; empty without a model."""
        model = None if self._model is None else self._model()
        return {} if model is None else {p: name for name, p in model.named_parameters()}

    def _warn(self, nameless: int, all_: int) -> None:
        if nameless and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{nameless} of {all_} parameters have no name, so they form one modulation group for each parameter "
                "group instead of fine-grained ones (section 3.2 of the paper). Pass model.named_parameters(), or add "
                "named_from=model; if you want these groups, pass group_strategy='original'",
                stacklevel=4,  # the caller of the constructor, or of ``add_param_group``
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes except the model, which pickle and ``deepcopy`` leave out."""
        return {**self.__dict__, "_model": None}


def check_parameters(names: Mapping[Tensor, str]) -> None:
    """Refuse complex parameters.

    Args:
        names: parameters with their names, which may be empty.

    Raises:
        ValueError: names the first complex one, or gives its shape.
    """
    for p, name in names.items():
        if p.is_complex():
            raise ValueError(f"parameter {name or get_shape(p)} is {p.dtype}; only real parameters are supported")


def model_behind(params: Any) -> nn.Module | None:
    """Return the model whose ``named_parameters()`` this generator is, or None.

    Only module classes reliably tell an embedding from a linear layer; so callers need not pass the model as well.
    """
    is_named = isgenerator(params) and params.__name__ == "named_parameters"
    owner = getgeneratorlocals(params).get("self") if is_named else None
    return owner if isinstance(owner, nn.Module) else None
