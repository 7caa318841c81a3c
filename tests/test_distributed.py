"""More than one process: two do what one does on the joined batches, however the model is spread over them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import cross_entropy, tiny, train

from metaadamw_lite import MetaAdamW

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
SHARDS = hasattr(torch.cpu.Stream, "record_event")
"""Whether ``fully_shard`` works on a CPU; not so with torch 2.6."""
WAYS = ("ddp", "fsdp", "fsdp kept", "tp") if SHARDS else ("ddp", "tp")
VERSIONS = ("basic", "enhanced", "norm_basic_plus", "foreach", "gen_gap", "loss_decrease")
has_gloo = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not has_gloo, reason="this torch has no gloo")


def two_processes(ways, device):
    """What two processes found: ``two_processes.py`` says what that is."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "two_processes.py"), ",".join(ways), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return two_processes(WAYS, "cpu")


@needs_gloo
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one_on_the_joined_batch(found, way, version):
    run = found[f"{way} {version}"]
    assert run["trained"] > 0.1
    assert run["parameters"] < 1e-8
    assert run["alpha"] < 1e-7, "of the last step"
    assert run["phi"] < 1e-6, "the Hessian-vector product is a difference of two gradients"
    assert run["totals"] < 1e-6
    assert run["ranks"] == 0.0, "bit for bit the same on every rank"


@needs_gloo
@pytest.mark.parametrize("way", WAYS)
def test_a_bad_batch_of_one_process_is_refused_by_all(found, way):
    run = found[f"{way} basic"]
    assert "the loss on batch1 is nan" in run["refused"]
    assert run["moved by the refused"] == 0.0


@needs_gloo
@pytest.mark.parametrize("way", WAYS)
def test_several_processes_resume_with_the_same_bits(found, way):
    assert found[f"{way} basic"]["resumed"] == 0.0


@pytest.mark.skipif(not SHARDS, reason="this torch shards nothing on a CPU")
@needs_gloo
@pytest.mark.parametrize("version", VERSIONS)
def test_statistics_of_shards_are_added_up_in_one_message(found, version):
    assert found[f"fsdp {version}"]["messages of a step"] == 1
    assert found[f"ddp {version}"]["messages of a step"] == 0


@needs_gloo
def test_the_first_fsdp_is_refused(found):
    assert "fully_shard" in found["refusals"]["constructor"]
    assert "fully_shard" in found["refusals"]["update"]


@needs_gloo
def test_differentiating_twice_is_refused_with_several_processes(found):
    assert "several processes" in found["refusals"]["double"]


@needs_gloo
def test_whole_parameters_beside_sharded_ones_are_refused(found):
    assert "apply fully_shard to the whole model" in found["refusals"]["mixture"]


@needs_gloo
def test_whoever_passes_the_bare_model_is_warned(found):
    assert "Pass the wrapped model" in found["warning"]


@needs_gloo
def test_shards_of_shards_are_added_up_over_both_dimensions():
    """FSDP2 over tensor parallelism; one process stands for four, and what it would send is looked at."""
    script = HERE / "four_pretended.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    messages = json.loads(done.stdout.strip().splitlines()[-1])
    assert messages == {"0.weight": 2, "0.bias": 2, "1.weight": 2, "1.bias": 1}


@needs_gloo
def test_gradients_that_are_still_to_be_added_up_are(found):
    assert found["partial gradient"] == 0.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one_on_the_joined_batch():
    runs = two_processes(("ddp", "fsdp"), "cuda")
    runs = {name: run for name, run in runs.items() if name.startswith(("ddp", "fsdp"))}
    assert max(run["parameters"] for run in runs.values()) < 1e-8
    assert max(run["ranks"] for run in runs.values()) == 0.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_a_gpu_does_what_the_cpu_does(batches, fused, dtype, precision):
    runs = []
    for device in ("cpu", "cuda"):
        model = tiny(dtype, dropout=0.0).to(device)
        optimizer = MetaAdamW(model.named_parameters(), lr=0.01, meta_lr=0.1, fused=fused)
        data = [tuple(x.to(device) for x in batch) for batch in batches]
        train(model, optimizer, data[:3])
        optimizer.update_attention(model, data[3], data[4], cross_entropy, data[5])
        train(model, optimizer, data[6:9])
        runs.append([x.detach().cpu() for x in (*model.parameters(), *optimizer.modulator.parameters())])
    torch.testing.assert_close(*runs, rtol=0, atol=precision)
