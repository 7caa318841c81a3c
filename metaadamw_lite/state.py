"""Whether a saved state fits an optimizer: what is checked before ``MetaAdamW.load_state_dict`` changes anything."""

from collections.abc import Mapping, Sequence
from typing import Any

from metaadamw_lite.checks import check_count

VERSION = 1
"""Of the entry "meta"."""


def fitting_meta(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """The entry "meta" of a saved state, completed where the first revisions saved less.

    Args:
        saved: the whole state.
        mine: the entry "meta" that the optimizer would save now.

    Raises:
        ValueError: if it is missing, lacks a part, or is of another version, of other groups, another Φ, another
            meta-optimizer or other uncertainty weights.
    """
    if (meta := saved.get("meta")) is None:
        raise ValueError("the state has no entry 'meta': it was not saved by MetaAdamW")
    meta = {"phi": mine["phi"], **meta}  # the first revisions saved neither this nor the meta-optimizer's name
    if isinstance(meta.get("meta_optimizer"), dict):
        meta |= {"meta_optimizer_state": meta["meta_optimizer"], "meta_optimizer": mine["meta_optimizer"]}
    if meta.get("version") != VERSION:  # first, since another one has other parts
        raise ValueError(f"the state has version {meta.get('version')}; this code reads {VERSION}")
    if lacking := sorted(mine.keys() - meta.keys()):
        raise ValueError(f"the state's entry 'meta' lacks {', '.join(lacking)}")
    if meta["groups"] != mine["groups"]:
        raise ValueError(f"the state has modulation groups {meta['groups']}, this optimizer has {mine['groups']}")
    if (meta["huw"] is None) != (mine["huw"] is None):
        raise ValueError("the state and this optimizer differ in whether they use uncertainty weighting")
    for part, what in (("modulator", "attention module"), ("huw", "uncertainty weighting")):
        shapes, theirs = ({k: tuple(x.shape) for k, x in (state[part] or {}).items()} for state in (mine, meta))
        if differing := sorted(k for k in shapes.keys() | theirs.keys() if shapes.get(k) != theirs.get(k)):
            raise ValueError(f"the state's {what} has another architecture; differing: {', '.join(differing)}")
    settings, other = ({**state["phi"], "meta_optimizer": state["meta_optimizer"]} for state in (mine, meta))
    for name, value in settings.items():
        if other.get(name) != value:
            raise ValueError(f"the state's {name} is {other.get(name)!r}, this optimizer's {value!r}")
    for factor in ("alpha", "beta"):
        if meta[factor].shape != mine[factor].shape:
            raise ValueError(
                f"the state's {factor} has shape {tuple(meta[factor].shape)}; one number a group is needed"
            )
    check_count(0, t=meta["t"])
    if "state" not in meta["meta_optimizer_state"]:
        raise ValueError("the state's meta_optimizer_state lacks 'state'")
    sizes, theirs_are = (
        [len(group["params"]) for group in state["meta_optimizer_state"].get("param_groups", ())]
        for state in (mine, meta)
    )
    if sizes != theirs_are:
        raise ValueError(f"the state's meta-optimizer has groups of {theirs_are} parameters, this one's of {sizes}")
    return meta


def check_moments(saved: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]) -> None:
    """The moments of a saved state are those of these parameters, as far as shapes and the order of names can tell.

    How many parameters there are torch checks itself. Names need not agree (a wrapper puts a prefix before them), but
    the same ones have to come in the same order.

    Raises:
        ValueError: if they are not.
    """
    groups = saved.get("param_groups", ())
    numbers = [number for group in groups for number in group["params"]]
    params = [p for group in param_groups for p in group["params"]]
    theirs, names = ([n for group in state for n in group.get("param_names", ())] for state in (groups, param_groups))
    if theirs != names and sorted(theirs) == sorted(names):
        first, mine = next((a, b) for a, b in zip(theirs, names, strict=True) if a != b)
        raise ValueError(f"the state has the parameters in another order: {first!r} where this optimizer has {mine!r}")
    for k, (number, p) in enumerate(zip(numbers, params, strict=False)):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = saved.get("state", {}).get(number, {}).get(name)
            if moment is not None and moment.shape != p.shape:
                raise ValueError(
                    f"the state's {name} of parameter {names[k] if names else k} has shape {tuple(moment.shape)}, the "
                    f"parameter {tuple(p.shape)}"
                )
