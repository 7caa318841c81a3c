"""Sharded parameters: the ``DTensor``s of ``fully_shard`` (FSDP2) and of tensor parallelism.

AdamW is elementwise, so each process moves its own part. Only sums over a whole tensor need the other parts: its
statistics, the inner products of a meta-update, and the step length of a difference. Each process sums over its own
part; ``sum_over_shards`` adds up all tensors in one message, or one for each mesh dimension that splits them.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(x: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``."""
    # The import is slow, and a DTensor exists only if its module is imported already.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Tensor:
    """Return this process's part of a sharded tensor, with shared memory, or the whole tensor if it is not sharded."""
    # ``to_local()`` would create a new tensor in each call.
    part: Tensor = x._local_tensor if is_sharded(x) else x
    return part


def local_gradient(grad: Any, param: Any) -> Tensor:
    """Return the part of a gradient that belongs to this process's part of a parameter."""
    if is_sharded(grad) and grad.placements != param.placements:  # a pending sum (``Partial``), for example
        part: Tensor = grad.redistribute(placements=param.placements).to_local()
        return part.wait() if hasattr(part, "wait") else part
    return local(grad)


def sum_over_shards(rows: Tensor, params: Sequence[Any]) -> Tensor:
    """Add up the processes' sums over their parts of the parameters.

    Args:
        rows: k sums over this process's part of each of n parameters, (n, k).
        params: the n parameters. Rows of parameters that are not sharded stay as they are.

    Returns:
        (n, k), with the derivative of ``rows``: the other processes' sums do not depend on this process's parts.
    """
    split: dict[tuple[Any, int], list[int]] = {}
    for i, p in enumerate(params):
        if is_sharded(p):
            for dim, placement in enumerate(p.placements):
                if not placement.is_replicate():  # not is_shard(): FSDP2 over tensor parallelism has its own kind
                    split.setdefault((p.device_mesh, dim), []).append(i)
    if not split:
        return rows
    total = rows.detach().clone()
    for (mesh, dim), indices in split.items():
        message = total[indices].to(mesh.device_type)
        dist.all_reduce(message, group=mesh.get_group(dim))
        total[indices] = message.to(total)
    return total + (rows - rows.detach()) if rows.requires_grad else total


def list_process_groups(params: Iterable[Any]) -> list[dist.ProcessGroup]:
    """List the process groups over which parameters are sharded or replicated."""
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))
    return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]


def reshard(model: nn.Module) -> None:
    """Free the parameters that ``fully_shard`` has gathered.

    After a forward pass without a backward pass it would use them again, although the parts may have changed since.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def refuse_flat_parameters(params: Iterable[Tensor], model: nn.Module | None) -> None:
    """Raise a ValueError for parameters of the first FSDP.

    They are pieces of one long vector, cut without regard to the bounds of parameters. Their statistics would be wrong,
    and different in each process.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    flat = any(isinstance(p, fsdp.FlatParameter) for p in params)
    if flat or (model is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())):
        raise ValueError(
            "the model is a FullyShardedDataParallel, whose parameters are cut without regard to their bounds; "
            "shard it with torch.distributed.fsdp.fully_shard instead"
        )


def refuse_mixtures(params: Iterable[Tensor], model: nn.Module) -> None:
    """Raise a ValueError for parameters whose gradients would not be averaged over the processes.

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
        raise ValueError("fully_shard holds only some of the parameters; apply fully_shard to the whole model")
