"""What ``test_checkpoints`` starts twice by torchrun: a run is saved in every way that torch has, and another goes on.

Prints one line of JSON on the first process: how far the run that goes on is from the one that did not stop.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import largest_gap
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from metaadamw_lite import MetaAdamW

FULL = StateDictOptions(full_state_dict=True)
SENT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
ON_HOST = StateDictOptions(full_state_dict=True, cpu_offload=True)
OTHER_WAY = {"ddp": "fsdp", "fsdp": "ddp"}


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    middle = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8))  # three rows on two processes are uneven
    layers = [nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), middle, nn.Tanh(), nn.Linear(8, 1)]
    return nn.Sequential(*layers).double()


def spread(model: nn.Module, way: str) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch[:, :4]) - batch[:, 4:]).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
    for k, batch in enumerate(batches[:-3]):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        if k % 2 and isinstance(optimizer, MetaAdamW):
            optimizer.update_attention(model, *batches[-3:-1], loss_fn, batches[-1])


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gap(xs, ys) -> float:
    return largest_gap(map(whole, xs), map(whole, ys))


def make(way: str, seed: int, **settings) -> tuple[nn.Module, MetaAdamW]:
    model = build(seed)
    wrapped = spread(model, way) if way else model
    return wrapped, MetaAdamW(model.named_parameters(), lr=0.05, meta_lr=0.1, seed=seed, **settings)


def put(state: tuple[dict, dict], twin: tuple, options: StateDictOptions | None = None) -> None:
    # One by one: torch's ``set_state_dict`` takes an empty state, which all but the first process have, for none.
    set_model_state_dict(twin[0], state[0], options=options)
    set_optimizer_state_dict(*twin, state[1], options=options)


def gathered(run: tuple, twin: tuple, folder: str) -> None:
    put(copy.deepcopy(get_state_dict(*run)), twin)


def full(run: tuple, twin: tuple, folder: str) -> None:
    put(copy.deepcopy(get_state_dict(*run, options=FULL)), twin, FULL)


def sent(run: tuple, twin: tuple, folder: str) -> None:
    """Gathered on the first process only, and sent from there to one that has never made a step."""
    state = copy.deepcopy(get_state_dict(*run, options=ON_HOST))
    put(state if dist.get_rank() == 0 else ({}, {}), twin, SENT)


def by_folder(run: tuple, twin: tuple, folder: str, options: StateDictOptions | None = None) -> None:
    dcp.save(dict(zip("mo", get_state_dict(*run, options=options), strict=True)), checkpoint_id=folder)
    saved = dict(zip("mo", get_state_dict(*twin, options=options), strict=True))
    dcp.load(saved, checkpoint_id=folder)
    put((saved["m"], saved["o"]), twin, options)


def by_plain_file(run: tuple, twin: tuple, folder: str) -> None:
    """A full state that the first process has written with ``torch.save`` and both read."""
    state = get_state_dict(*run, options=FULL)
    if dist.get_rank() == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.barrier()
    put(torch.load(f"{folder}/state.pt", weights_only=True), twin, FULL)


ROUTES: dict[str, Callable[[tuple, tuple, str], None]] = {
    "gathered": gathered,
    "full": full,
    "sent from the first": sent,
    "folder": by_folder,
    "folder, full": lambda run, twin, folder: by_folder(run, twin, folder, FULL),
    "folder, other way": by_folder,
    "plain file": by_plain_file,
}


def factors(optimizer: MetaAdamW) -> list[torch.Tensor]:
    return [optimizer.alpha, optimizer.beta]


def compare(way: str, route: str, folder: str, batches: list[torch.Tensor], **settings) -> dict[str, object]:
    """How far the run that goes on is from the one that did not stop."""
    run = make(way, 0, **settings)
    train(*run, batches)
    twin = make(way, 9, **settings)
    found: dict[str, object] = {"trained": gap(run[0].parameters(), build(0).parameters()), "error": ""}
    try:
        if route == "folder, other way":  # copies into shards and back again
            between = make(OTHER_WAY[way], 7, **settings)
            by_folder(run, between, f"{folder}/1")
            by_folder(between, twin, f"{folder}/2")
        else:
            ROUTES[route](run, twin, folder)
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {error}"}
    for model, optimizer in (run, twin):
        train(model, optimizer, batches)
    (model, optimizer), (other, other_optimizer) = run, twin
    phi = torch.cat([p.detach().reshape(-1) for p in (*other_optimizer.modulator.parameters(), other_optimizer.alpha)])
    ranks = [torch.empty_like(phi) for _ in range(2)]
    dist.all_gather(ranks, phi)
    return found | {
        "parameters": gap(model.parameters(), other.parameters()),
        "phi": gap(optimizer.modulator.parameters(), other_optimizer.modulator.parameters()),
        "factors": gap(factors(optimizer), factors(other_optimizer)),
        "log_var": gap([optimizer.huw.log_var], [other_optimizer.huw.log_var]),
        "steps": abs(optimizer.state_dict()["meta"]["t"] - other_optimizer.state_dict()["meta"]["t"]),
        "ranks": gap(ranks[:1], ranks[1:]),
    }


def adamw(way: str, batches: list[torch.Tensor]) -> str:
    """What is said of a state of torch's AdamW."""
    model = build(0)
    wrapped = spread(model, way)
    optimizer = torch.optim.AdamW(model.parameters())
    train(wrapped, optimizer, batches)
    try:
        put(copy.deepcopy(get_state_dict(wrapped, optimizer)), make(way, 9))
    except ValueError as error:
        return str(error)
    return ""


def one_from_two(folder: str, batches: list[torch.Tensor], joined: list[torch.Tensor]) -> dict[str, float]:
    """What two processes have saved is read by one, which goes on with the joined batches."""
    run = make("fsdp", 0)
    train(*run, batches)
    dcp.save(dict(zip("mo", get_state_dict(*run), strict=True)), checkpoint_id=folder)
    alone = make("", 9)
    saved = dict(zip("mo", get_state_dict(*alone), strict=True))
    dcp.load(saved, checkpoint_id=folder, no_dist=True)
    put((saved["m"], saved["o"]), alone)
    loaded = gap(run[0].parameters(), alone[0].parameters())
    loaded = max(loaded, gap(run[1].modulator.parameters(), alone[1].modulator.parameters()))
    train(*run, batches)
    train(*alone, joined)
    return {"loaded": loaded, "went on": gap(run[0].parameters(), alone[0].parameters())}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    joined = [torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(7)]
    mine = [batch[4 * rank : 4 * rank + 4] for batch in joined]
    root = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(root)
    found: dict[str, object] = {}
    for way in OTHER_WAY:
        for meta_optimizer in ("sgd", "adam"):
            for route in ROUTES:
                folder = [tempfile.mkdtemp(dir=root[0]) if rank == 0 else ""]
                dist.broadcast_object_list(folder)
                name = f"{way} {meta_optimizer} {route}"
                found[name] = compare(way, route, folder[0], mine, meta_optimizer=meta_optimizer)
        found[f"{way} adamw"] = adamw(way, mine)
    found["one from two"] = one_from_two(f"{root[0]}/two", mine, joined)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(root[0])
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
