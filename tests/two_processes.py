"""What ``test_distributed`` starts twice by torchrun: training on two processes, against one on the joined batches.

The first argument says how the model is spread, with commas between several ways: "ddp" (copies), "fsdp" (each process
holds a part of each parameter), "fsdp kept" (in meta-updates it keeps what it has gathered) or "tp" (tensor
parallelism of two layers; both processes see the same batches). The second one is "cpu" or "cuda". Prints one line of
JSON on the first process: the largest gaps found.
"""

import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from conftest import largest_gap
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from metaadamw_lite import MetaAdamW, sharding

HOWS, DEVICE = sys.argv[1:]
SETTINGS = {
    "basic": {},
    "enhanced": {"feature_version": "enhanced", "attn_heads": 7},
    "norm_basic_plus": {"feature_version": "norm_basic_plus", "attn_heads": 11},
    "foreach": {"fused": None, "foreach": True},
    "gen_gap": {"meta_objective": "gen_gap"},
    "loss_decrease": {"meta_objective": "loss_decrease"},
}


def build(how: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    # Three rows on two processes are uneven (tensor parallelism does not do that), and one row leaves one without any.
    width = 4 if how == "tp" else 3
    middle = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))
    layers = [nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), middle, nn.Tanh(), nn.Linear(8, 1)]
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def spread(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(DEVICE, (2,))
    if how == "tp":
        parallelize_module(model[3], mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return model
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.keeps = how == "fsdp kept"
    return model


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch[:, :4]) - batch[:, 4:]).square().mean()


def train(model: nn.Module, optimizer: MetaAdamW, batches: list[torch.Tensor]) -> list[float]:
    totals = []
    for k, batch in enumerate(batches[:-3]):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        if k % 2:  # before the step, which must not go from parameters that the meta-update has gathered
            if keeps := getattr(model, "keeps", False):
                model.set_reshard_after_backward(False)
            losses = optimizer.update_attention(model, *batches[-3:-1], loss_fn, batches[-1])
            if keeps:
                model.set_reshard_after_backward(True)
            totals += [x for x in losses if not math.isnan(x)]
        optimizer.step()
    return totals


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gap(xs: Iterable[torch.Tensor], ys: Iterable[torch.Tensor]) -> float:
    return largest_gap(map(whole, xs), ys)


def resumed(model: nn.Module, optimizer: MetaAdamW, how: str, settings: dict, batches: list[torch.Tensor]) -> float:
    """How far a run that goes on from a file is from the one that did not stop."""
    path = Path(tempfile.mkdtemp()) / f"rank{dist.get_rank()}"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    again = build(how, seed=1)
    twin = spread(again, how)
    twin.load_state_dict(saved["model"])
    twin_optimizer = MetaAdamW(again.named_parameters(), **settings)
    twin_optimizer.load_state_dict(saved["optimizer"])
    train(twin, twin_optimizer, batches)
    train(model, optimizer, batches)
    phis = (twin_optimizer.modulator.parameters(), optimizer.modulator.parameters())
    return max(gap(twin.parameters(), map(whole, model.parameters())), gap(*phis))


def compare(how: str, version: str) -> dict[str, object]:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    joined = [torch.randn(8, 5, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(9)]
    mine = joined if how == "tp" else [batch[4 * rank : 4 * rank + 4] for batch in joined]
    settings = {"lr": 0.05, "meta_lr": 0.1, "use_feature_gating": True, "fused": True, **SETTINGS[version]}

    model = build(how)
    model_to_train = spread(model, how)
    optimizer = MetaAdamW(model.named_parameters(), **settings)
    totals = train(model_to_train, optimizer, mine)

    alone = build(how)
    reference = MetaAdamW(alone.named_parameters(), **settings)
    expected = train(alone, reference, joined)

    phi = torch.cat([p.detach().reshape(-1) for p in (*optimizer.modulator.parameters(), optimizer.alpha)])
    others = [torch.empty_like(phi) for _ in range(dist.get_world_size())]
    dist.all_gather(others, phi)
    found: dict[str, object] = {
        "parameters": gap(model.parameters(), alone.parameters()),
        "phi": gap(optimizer.modulator.parameters(), reference.modulator.parameters()),
        "alpha": float((optimizer.alpha - reference.alpha).abs().max()),
        "totals": largest_gap([torch.tensor(totals)], [torch.tensor(expected)]),
        "ranks": gap(others, others[::-1]),
        "trained": gap(model.parameters(), build(how).parameters()),
    }
    before = [whole(p).clone() for p in (*model.parameters(), *optimizer.modulator.parameters())]
    bad = mine[0] * float("nan") if rank or how == "tp" else mine[0]
    try:
        optimizer.update_attention(model_to_train, bad, mine[1], loss_fn, mine[2])
        found["refused"] = ""
    except ValueError as error:
        found["refused"] = str(error)
    found["moved by the refused"] = gap((*model.parameters(), *optimizer.modulator.parameters()), before)
    loss_fn(model_to_train, mine[0]).backward()
    with mock.patch.object(sharding.dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        optimizer.step()
    found["messages of a step"] = all_reduce.call_count
    found["resumed"] = resumed(model_to_train, optimizer, how, settings, mine)
    return found


def partial_gradient() -> float:
    """How far the gradient of a shard is from the right one where autograd leaves sums that are still to be made."""
    mesh = init_device_mesh(DEVICE, (2,))
    ones = torch.ones(3, 2, device=DEVICE)
    param = distribute_tensor(ones, mesh, [Shard(0)])
    grad = DTensor.from_local(ones * (dist.get_rank() + 1), mesh, [Partial()])
    return float((sharding.local_gradient(grad, param) - 3).abs().max())


def mixture(batch: torch.Tensor) -> None:
    """A meta-update of a model of which fully_shard has only a part."""
    model = build("fsdp")
    fully_shard(model[3], mesh=init_device_mesh(DEVICE, (2,)))
    MetaAdamW(model.named_parameters()).update_attention(model, batch, batch, loss_fn, batch)


def bare_model() -> str:
    """What is said to a process that passes the model inside its DistributedDataParallel."""
    model = build("ddp")
    batch = torch.ones(2, 5, dtype=torch.float64, device=DEVICE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        MetaAdamW(model.named_parameters()).update_attention(model, batch, batch, loss_fn, batch)
    return " ".join(str(w.message) for w in said if w.filename == __file__)  # where the mistake was made


def refusals() -> dict[str, str]:
    """What is said of a model under the first FSDP, and of differentiating twice over processes."""
    device = torch.device(DEVICE, dist.get_rank() if DEVICE == "cuda" else None)
    flat = FullyShardedDataParallel(build("ddp"), device_id=device, use_orig_params=True)
    found = {}
    batch = torch.ones(2, 5, dtype=torch.float64, device=DEVICE)
    model = build("ddp")
    optimizer, ddp = MetaAdamW(model.named_parameters()), spread(model, "ddp")
    attempts = {
        "mixture": lambda: mixture(batch),
        "double": lambda: optimizer.update_attention(ddp, batch, batch, loss_fn, batch, double_backward=True),
        "constructor": lambda: MetaAdamW(flat.named_parameters()),
        "update": lambda: MetaAdamW(list(flat.parameters())).update_attention(flat, batch, batch, loss_fn, batch),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def main() -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    torch.set_num_threads(1)
    found = {f"{how} {version}": compare(how, version) for how in HOWS.split(",") for version in SETTINGS}
    found["refusals"], found["partial gradient"], found["warning"] = refusals(), partial_gradient(), bare_model()
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
