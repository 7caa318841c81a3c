"""What ``test_distributed`` starts: over how many dimensions of a 2 × 2 mesh each parameter's sums are added up."""

import json
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from metaadamw_lite import sharding

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
fully_shard(model, mesh=mesh["dp"])
messages = {}
for name, p in model.named_parameters():
    with mock.patch.object(sharding.dist, "all_reduce") as all_reduce:
        sharding.sum_over_shards(torch.ones(1, 5), [p])
    messages[name] = all_reduce.call_count
print(json.dumps(messages))
dist.destroy_process_group()
