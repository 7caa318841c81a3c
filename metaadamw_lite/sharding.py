"""Parameters that are spread over processes: the ``DTensor``s of ``fully_shard`` (FSDP2) and tensor parallelism.

AdamW treats every number by itself, so each process moves the part that it holds. Only sums over a whole tensor ask for
the other parts: its statistics, the inner products of a meta-update, and the length of a difference. Each process sums
over its own part, and ``sum_over_shards`` adds up, for all tensors in one message (one for each dimension of the mesh
that they are split over).
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    # Whoever has one has imported its module, and nobody else should have to wait for the import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; the tensor itself if it is whole."""
    # The attribute and not ``to_local()``, which makes a new tensor each time.
    part: Tensor = x._local_tensor if is_sharded(x) else x
    return part


def local_gradient(grad: Any, param: Any) -> Tensor:
    """The part of a gradient that belongs to this process's part of a parameter."""
    if is_sharded(grad) and grad.placements != param.placements:  # a sum that is still to be made, for example
        part: Tensor = grad.redistribute(placements=param.placements).to_local()
        return part.wait() if hasattr(part, "wait") else part
    return local(grad)


def sum_over_shards(rows: Tensor, params: Sequence[Any]) -> Tensor:
    """Add up what the processes have summed over their parts.

    Args:
        rows: sums over this process's part of each of n parameters, (n, k).
        params: these parameters. The rows of those that are whole stay as they are.

    Returns:
        (n, k). Its derivative by this process's parts is that of its own sums: the others do not contain them.
    """
    split: dict[tuple[Any, int], list[int]] = {}
    for i, p in enumerate(params):
        if is_sharded(p):
            for dim, placement in enumerate(p.placements):
                if not placement.is_replicate():  # FSDP2 over tensor parallelism has a kind of shard of its own
                    split.setdefault((p.device_mesh, dim), []).append(i)
    if not split:
        return rows
    total = rows.detach().clone()
    for (mesh, dim), indices in split.items():
        message = total[indices].to(mesh.device_type)
        dist.all_reduce(message, group=mesh.get_group(dim))
        total[indices] = message.to(total)
    return total + (rows - rows.detach()) if rows.requires_grad else total


def processes_of(params: Iterable[Any]) -> list[dist.ProcessGroup]:
    """The process groups over which parameters are spread, or replicated."""
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))
    return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]


def reshard(model: nn.Module) -> None:
    """Let go of what ``fully_shard`` has gathered: after a forward pass without a backward pass it would be used again.

    The parts may have changed until then.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def refuse_flat_parameters(params: Iterable[Tensor], model: nn.Module | None) -> None:
    """A ValueError for parameters of the first FSDP.

    They are pieces of one long vector, cut without regard to where a parameter begins. Statistics of them would be
    wrong, and different in each process.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    flat = any(isinstance(p, fsdp.FlatParameter) for p in params)
    if flat or (model is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())):
        raise ValueError(
            "the model is a FullyShardedDataParallel, whose parameters are cut without regard to their bounds; "
            "shard it by torch.distributed.fsdp.fully_shard instead"
        )


def refuse_mixtures(params: Iterable[Tensor], model: nn.Module) -> None:
    """A ValueError for parameters whose gradients nobody would average over the processes.

    These are whole parameters beside those of ``fully_shard`` (its ``ignored_params``, or modules that it was not
    applied to), and ``DTensor``s inside ``DistributedDataParallel``.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = {is_sharded(p) for p in params}
    if isinstance(model, nn.parallel.DistributedDataParallel):
        if True in kinds:
            raise ValueError(
                "DistributedDataParallel holds sharded parameters; use fully_shard over a mesh of two dimensions"
            )
    elif fsdp is not None and kinds == {True, False} and any(isinstance(m, fsdp.FSDPModule) for m in model.modules()):
        raise ValueError("some parameters are whole beside those of fully_shard; apply fully_shard to the whole model")
