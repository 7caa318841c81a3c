"""Saved states of ``MetaAdamW``: AdamW's state, and the entry "meta" with Φ, its optimizer and the factors.

``pack`` builds a state to save; ``unpack`` checks that a saved state fits and splits it.
"""

import copy
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from metaadamw_lite.checks import check_count, check_settings, without_numpy
from metaadamw_lite.meta_optimizer import follow, get_name
from metaadamw_lite.modulator import Modulator

if TYPE_CHECKING:
    from metaadamw_lite.optimizer import MetaAdamW

VERSION = 1
"""Version of the entry "meta"."""


def pack(optimizer: "MetaAdamW", state_dict: dict[str, Any]) -> dict[str, Any]:
    """Add the entry "meta" to AdamW's state and convert NumPy numbers in its parameter groups to Python's."""
    meta = describe(optimizer)
    groups = [{name: without_numpy(value) for name, value in group.items()} for group in state_dict["param_groups"]]
    # Distributed checkpoints drop unknown entries at the top level, but keep those of parameter groups; all tensors
    # must be on one device.
    if groups and is_for_distributed_checkpoint():
        device = next(optimizer._parameters()).device
        groups[0]["meta"] = tree_map_only(Tensor, lambda x: x.to(device) if x.ndim else x, meta)
    return {**state_dict, "param_groups": groups, "meta": meta}


def is_for_distributed_checkpoint() -> bool:
    """Return whether ``torch.distributed.checkpoint.state_dict`` is on the call stack.

    Only its states have "meta" in a parameter group; in others the parameter groups are AdamW's.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False


def describe(optimizer: "MetaAdamW") -> dict[str, Any]:
    """Build the entry "meta": Φ, its optimizer, the uncertainty weights, the factors and the step count."""
    follow(optimizer._meta_optimizer, optimizer.modulator, optimizer.huw)
    return {
        "version": VERSION,
        "t": optimizer._t,
        "groups": [group.name for group in optimizer.groups],
        "phi": _phi_settings(optimizer),
        "alpha": optimizer.alpha,
        "beta": optimizer.beta,
        "modulator": dict(optimizer.modulator.state_dict()),
        "huw": None if optimizer.huw is None else dict(optimizer.huw.state_dict()),
        "meta_optimizer": get_name(optimizer._meta_optimizer),
        "meta_optimizer_state": optimizer._meta_optimizer.state_dict(),
    }


def _phi_settings(optimizer: "MetaAdamW") -> dict[str, Any]:
    """Return Φ's settings that its parameter shapes do not reveal."""
    phi, features = optimizer.modulator, optimizer._feature_config
    settings: dict[str, Any] = {"feature_version": str(features.version), "columns": list(features.columns)}
    if type(phi) is Modulator:  # another class, or a subclass, may compute something else
        layer = phi.encoder.layers[0]
        assert isinstance(layer, nn.TransformerEncoderLayer)
        settings["attn_heads"] = int(layer.self_attn.num_heads)
        settings |= {"alpha_range": float(phi.alpha_range), "beta_range": float(phi.beta_range)}
    return settings


def unpack(optimizer: "MetaAdamW", state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a saved state into AdamW's part and the entry "meta", after checks; both are deep copies.

    Without copies torch would keep the caller's tensors, if they need no conversion, and training would overwrite them.

    Raises:
        ValueError: if the state does not fit the optimizer. Nothing has changed.
    """
    groups = state_dict.get("param_groups", ())
    meta = next((part["meta"] for part in (state_dict, *groups) if "meta" in part), None)
    adamw_state = {key: value for key, value in state_dict.items() if key != "meta"}
    if groups:
        adamw_state["param_groups"] = [{k: x for k, x in group.items() if k != "meta"} for group in groups]
    mine = describe(optimizer)
    meta = fit_meta(restore_containers(meta, mine) if isinstance(meta, Mapping) else meta, mine)
    check_moments(adamw_state, optimizer.param_groups)
    if "meta" not in state_dict:
        check_steps(adamw_state, meta["t"])
    for group in adamw_state.get("param_groups", ()):
        check_settings({**optimizer.defaults, **group})
    for group in adamw_state.get("param_groups", ()):
        group["betas"] = tuple(group["betas"])
    return copy.deepcopy(adamw_state), copy.deepcopy(meta)


def restore_containers(saved: Any, like: Any) -> Any:
    """Restore the containers of a saved entry that ``torch.distributed.checkpoint`` drops or changes.

    With ``full_state_dict`` it drops empty containers and converts integer keys to strings and tuples to lists.

    Args:
        saved: the saved entry.
        like: the same entry of a fresh state.
    """
    if isinstance(like, Mapping) and isinstance(saved, Mapping):
        keys = {str(key): key for key in like}
        restored = {keys.get(str(key), key): value for key, value in saved.items()}
        empty = {key: value for key, value in like.items() if isinstance(value, dict | list) and not value}
        return {**empty, **{key: restore_containers(value, like.get(key)) for key, value in restored.items()}}
    if isinstance(like, list | tuple) and isinstance(saved, list | tuple) and len(like) == len(saved):
        return type(like)(restore_containers(x, y) for x, y in zip(saved, like, strict=True))
    return saved


def fit_meta(meta: Mapping[str, Any] | None, mine: Mapping[str, Any]) -> dict[str, Any]:
    """Check the entry "meta" of a saved state, and add the parts that the first revisions did not save.

    Args:
        meta: the entry, or None if the state has none.
        mine: the optimizer's own entry now.

    Raises:
        ValueError: if the entry is missing or incomplete, or differs in version, groups, Φ, meta-optimizer or
            uncertainty weights.
    """
    if meta is None:
        raise ValueError(
            "the state has no entry 'meta', which holds Φ: it was not saved by MetaAdamW, or a tool has dropped "
            "the entry (as torch.distributed.checkpoint does with flatten_optimizer_state_dict=True)"
        )
    meta = {"phi": mine["phi"], **meta}  # the first revisions saved neither "phi" nor the meta-optimizer's name
    if isinstance(meta.get("meta_optimizer"), dict):
        meta |= {"meta_optimizer_state": meta["meta_optimizer"], "meta_optimizer": mine["meta_optimizer"]}
    if meta.get("version") != VERSION:  # before the parts, which depend on the version
        raise ValueError(f"the state has version {meta.get('version')}; this code reads {VERSION}")
    if lacking := sorted(mine.keys() - meta.keys()):
        raise ValueError(f"the state's entry 'meta' lacks {', '.join(lacking)}")
    if meta["groups"] != mine["groups"]:
        raise ValueError(f"the state has modulation groups {meta['groups']}, this optimizer has {mine['groups']}")
    if (meta["huw"] is None) != (mine["huw"] is None):
        raise ValueError("only one of the state and this optimizer uses uncertainty weighting")
    for part, label in (("modulator", "attention module"), ("huw", "uncertainty weighting")):
        shapes, theirs = ({k: tuple(x.shape) for k, x in (state[part] or {}).items()} for state in (mine, meta))
        if differing := sorted(k for k in shapes.keys() | theirs.keys() if shapes.get(k) != theirs.get(k)):
            raise ValueError(f"the state's {label} has another architecture; differing: {', '.join(differing)}")
    settings, other = ({**state["phi"], "meta_optimizer": state["meta_optimizer"]} for state in (mine, meta))
    for name, value in settings.items():
        if other.get(name) != value:
            raise ValueError(f"the state's {name} is {other.get(name)!r}, this optimizer's {value!r}")
    for factor in ("alpha", "beta"):
        if meta[factor].shape != mine[factor].shape:
            raise ValueError(
                f"the state's {factor} has shape {tuple(meta[factor].shape)}; one number for each group is needed"
            )
    check_count(0, t=meta["t"])
    if "state" not in meta["meta_optimizer_state"]:
        raise ValueError("the state's meta_optimizer_state lacks 'state'")
    sizes, their_sizes = (
        [len(group["params"]) for group in state["meta_optimizer_state"].get("param_groups", ())]
        for state in (mine, meta)
    )
    if sizes != their_sizes:
        raise ValueError(f"the state's meta-optimizer has groups of {their_sizes} parameters, this one's of {sizes}")
    return meta


def check_moments(saved: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that the shapes and the order of saved moments fit the parameters.

    torch checks the number of parameters itself. Names may differ, since a wrapper adds a prefix; equal names must be
    in equal order.

    Args:
        saved: AdamW's part of the saved state.
        param_groups: the optimizer's parameter groups.

    Raises:
        ValueError: if shapes or order differ.
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


def check_steps(saved: Mapping[str, Any], t: int) -> None:
    """Check that no parameter of a state from a distributed checkpoint has taken more than ``t`` steps.

    It refuses states of AdamW: ``torch.distributed.checkpoint`` adds the entry "meta" of the loading optimizer to them.

    Args:
        saved: AdamW's part of the saved state.
        t: the step count in the entry "meta".

    Raises:
        ValueError: for a parameter with more steps.
    """
    states = [saved.get("state", {}).get(number, {}) for group in saved["param_groups"] for number in group["params"]]
    steps = [float(state["step"]) for state in states if "step" in state]
    if steps and max(steps) > t:
        raise ValueError(
            f"the state has parameters that have taken {max(steps):.0f} steps, but Φ has seen {t}: its entry "
            "'meta' is of another state, or it was not saved by MetaAdamW"
        )
