"""What ``test_distributed`` starts twice by torchrun: training under DistributedDataParallel, against one process.

Prints one line of JSON on the first process: the largest gaps found.
"""

import copy
import json

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metaadamw_lite import MetaAdamW


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*layers).double()


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch[:, :4]) - batch[:, 4:]).square().mean()


def train(model: nn.Module, optimizer: MetaAdamW, batches: list[torch.Tensor]) -> list[float]:
    totals = []
    for k, batch in enumerate(batches[:-3]):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        if k % 2:
            totals += optimizer.update_attention(model, *batches[-3:-1], loss_fn, batches[-1])
    return totals


def gap(xs: object, ys: object) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(xs, ys, strict=True))


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    joined = [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(9)]
    mine = [batch[4 * rank : 4 * rank + 4] for batch in joined]
    settings = {"lr": 0.05, "meta_lr": 0.1, "use_feature_gating": True, "fused": True}

    model = build()
    optimizer = MetaAdamW(model.named_parameters(), **settings)
    ddp = DistributedDataParallel(model)
    totals = train(ddp, optimizer, mine)

    alone = build()
    reference = MetaAdamW(alone.named_parameters(), **settings)
    expected = train(alone, reference, joined)

    phi = torch.cat([p.detach().reshape(-1) for p in (*optimizer.modulator.parameters(), optimizer.alpha)])
    others = [torch.empty_like(phi) for _ in range(dist.get_world_size())]
    dist.all_gather(others, phi)
    try:
        optimizer.update_attention(ddp, mine[0] * float("nan") if rank else mine[0], mine[1], loss_fn, mine[2])
        refused = ""
    except ValueError as error:
        refused = str(error)
    moved = copy.deepcopy(build())
    if rank == 0:
        found = {
            "parameters": gap(model.parameters(), alone.parameters()),
            "phi": gap(optimizer.modulator.parameters(), reference.modulator.parameters()),
            "totals": max(abs(a - b) for a, b in zip(totals, expected, strict=True)),
            "ranks": gap(others, others[::-1]),
            "trained": gap(model.parameters(), moved.parameters()),
            "refused": refused,
        }
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
