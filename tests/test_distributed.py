"""More than one process: each rank keeps the same Φ, and two ranks do what one does on the joined batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_are_one_on_the_joined_batch():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(HERE / "two_processes.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["trained"] > 0.1
    assert found["parameters"] < 1e-9
    assert found["phi"] < 1e-6, "the Hessian-vector product is a difference of two gradients"
    assert found["totals"] < 1e-6
    assert found["ranks"] == 0.0, "bit for bit the same on every rank"
    assert "the loss on batch1 is nan" in found["refused"], "on every rank, although one batch alone is bad"
