"""Φ travels in every kind of checkpoint: torch's distributed ones keep a state's parameters and groups only."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import assert_same, cross_entropy, tiny, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from metaadamw_lite import MetaAdamW

HERE = Path(__file__).resolve().parent
VERSIONS = {
    "basic": {},
    "adam": {"meta_optimizer": "adam"},
    "enhanced": {"feature_version": "enhanced", "attn_heads": 7, "use_feature_gating": True, "meta_optimizer": "adam"},
    "no huw": {"huw_priorities": None, "meta_optimizer": "adam"},
    "gradient": {"meta_objective": "gradient"},
    "original": {"group_strategy": "original"},
    "amsgrad": {"amsgrad": True},
}
OPTIONS = {
    "default": {},
    "full": {"full_state_dict": True},
    "full on the host": {"full_state_dict": True, "cpu_offload": True},
    "on the host": {"cpu_offload": True},
    "not strict": {"strict": False},
}

has_gloo = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not has_gloo, reason="this torch has no gloo")


def make(seed=0, **settings):
    model = tiny(seed=seed)
    return model, MetaAdamW(model.named_parameters(), **{"lr": 0.02, "meta_lr": 0.1, "seed": seed, **settings})


def go_on(model, optimizer, batches):
    """Steps and two meta-updates, and steps that feel them."""
    train(model, optimizer, batches[:3])
    for _ in range(2):
        optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    train(model, optimizer, batches[6:9])


def in_order(x):
    """Dictionaries sorted and tuples made lists: torch's routes keep neither."""
    if isinstance(x, dict):
        return {key: in_order(x[key]) for key in sorted(x)}
    return [in_order(y) for y in x] if isinstance(x, list | tuple) else x


def assert_goes_on_alike(first, second, batches):
    for model, optimizer in (first, second):
        go_on(model, optimizer, batches)
    assert_same(dict(first[0].state_dict()), dict(second[0].state_dict()))
    for part in ("state", "meta"):
        assert_same(in_order(first[1].state_dict()[part]), in_order(second[1].state_dict()[part]))
    assert "meta" not in first[1].param_groups[0]
    assert "meta" not in second[1].param_groups[0]


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_that_torch_gathers_by_name_goes_on_with_the_same_bits(batches, version, options):
    first, second = make(**VERSIONS[version]), make(seed=9, **VERSIONS[version])
    go_on(*first, batches)
    options = StateDictOptions(**OPTIONS[options])
    state = copy.deepcopy(get_optimizer_state_dict(*first, options=options))
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second, state, options=options)
    assert_goes_on_alike(first, second, batches)


@pytest.mark.parametrize("options", OPTIONS)
def test_model_and_optimizer_together(batches, options):
    first, second = make(), make(seed=9)
    go_on(*first, batches)
    options = StateDictOptions(**OPTIONS[options])
    model_state, state = copy.deepcopy(get_state_dict(*first, options=options))
    set_state_dict(*second, model_state_dict=model_state, optim_state_dict=state, options=options)
    assert_goes_on_alike(first, second, batches)


@needs_gloo
@pytest.mark.parametrize("version", VERSIONS)
def test_a_state_that_is_sent_from_the_first_process(batches, one_process, version):
    first, second = make(**VERSIONS[version]), make(seed=9, **VERSIONS[version])
    go_on(*first, batches)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model_state, state = copy.deepcopy(get_state_dict(*first, options=StateDictOptions(full_state_dict=True)))
    set_state_dict(*second, model_state_dict=model_state, optim_state_dict=state, options=options)
    assert_goes_on_alike(first, second, batches)


def save(model, optimizer, folder, options=None):
    model_state, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder)


def load(model, optimizer, folder, options=None):
    model_state, state = get_state_dict(model, optimizer, options=options)
    saved = {"model": model_state, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_distributed_checkpoint_goes_on_with_the_same_bits(batches, tmp_path, version, options):
    first, second = make(**VERSIONS[version]), make(seed=9, **VERSIONS[version])
    go_on(*first, batches)
    save(*first, tmp_path, StateDictOptions(**OPTIONS[options]))
    load(*second, tmp_path, StateDictOptions(**OPTIONS[options]))
    assert_goes_on_alike(first, second, batches)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_distributed_checkpoint_of_a_run_without_meta_updates(batches, tmp_path, steps):
    first, second = make(meta_optimizer="adam"), make(seed=9, meta_optimizer="adam")
    train(*first, batches[:steps])
    save(*first, tmp_path)
    load(*second, tmp_path)
    assert_goes_on_alike(first, second, batches)


def test_a_distributed_checkpoint_before_the_first_step(batches, tmp_path):
    """torch makes a step without gradients and rate then, with every optimizer; both know of it."""
    first, second = make(meta_optimizer="adam"), make(seed=9, meta_optimizer="adam")
    before = copy.deepcopy(first[0].state_dict())
    save(*first, tmp_path)
    assert_same(dict(first[0].state_dict()), dict(before))
    load(*second, tmp_path)
    assert_goes_on_alike(first, second, batches)


def test_a_distributed_checkpoint_into_an_optimizer_that_has_gone_on(batches, tmp_path):
    first, second = make(), make(seed=9)
    go_on(*first, batches)
    go_on(*second, batches[3:])
    go_on(*second, batches)
    save(*first, tmp_path)
    load(*second, tmp_path)
    assert_goes_on_alike(first, second, batches)


class Training(Stateful):
    """Model and optimizer in one, as torch's tutorial on distributed checkpoints has it."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def test_torchs_tutorial(batches, tmp_path):
    first, second = make(), make(seed=9)
    go_on(*first, batches)
    dcp.save({"app": Training(*first)}, checkpoint_id=tmp_path)
    dcp.load({"app": Training(*second)}, checkpoint_id=tmp_path)
    assert_goes_on_alike(first, second, batches)


def test_a_plain_state_in_a_distributed_checkpoint(batches, tmp_path):
    """``optimizer.state_dict()`` itself, which has "meta" twice."""
    first, second = make(meta_optimizer="adam"), make(seed=9, meta_optimizer="adam")
    go_on(*first, batches)
    go_on(*second, batches[3:])
    dcp.save({"model": first[0].state_dict(), "optimizer": first[1].state_dict()}, checkpoint_id=tmp_path)
    saved = {"model": second[0].state_dict(), "optimizer": copy.deepcopy(second[1].state_dict())}
    dcp.load(saved, checkpoint_id=tmp_path)
    second[0].load_state_dict(saved["model"])
    second[1].load_state_dict(saved["optimizer"])
    assert_goes_on_alike(first, second, batches)


@pytest.mark.parametrize("options", OPTIONS)
def test_two_optimizers_of_one_model_keep_their_own_phi(batches, tmp_path, options):
    def make_two(seed):
        model = tiny(seed=seed)
        parts = (
            [p for p in model.named_parameters() if p[0].startswith("layers")],
            list(model.head.named_parameters("head")),
        )
        return model, [MetaAdamW(part, lr=0.02, meta_lr=0.1, seed=seed + k) for k, part in enumerate(parts)]

    (model, optimizers), (twin, others) = make_two(0), make_two(9)
    for optimizer in optimizers:
        go_on(model, optimizer, batches)
    optimizers[1].update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    options = StateDictOptions(**OPTIONS[options])
    save(model, optimizers, tmp_path, options)
    load(twin, others, tmp_path, options)
    assert not torch.equal(others[0].modulator.output.weight, others[1].modulator.output.weight)
    for ours, theirs in zip(optimizers, others, strict=True):
        assert_goes_on_alike((model, ours), (twin, theirs), batches)


@pytest.mark.parametrize("options", OPTIONS)
def test_several_groups_in_another_order(batches, options):
    """torch puts a group's entries where the group's parameters are now."""

    def make_groups(seed, turn):
        model = tiny(seed=seed)
        named = dict(model.named_parameters())
        parts = [[(n, p) for n, p in named.items() if ("norm" in n) is norm] for norm in (True, False)]
        groups = [{"params": part, "lr": lr} for part, lr in zip(parts, (0.01, 0.02), strict=True)]
        return model, MetaAdamW(groups[::turn], model=model, meta_lr=0.1, seed=seed)

    first, second = make_groups(0, 1), make_groups(9, 1)
    go_on(*first, batches)
    options = StateDictOptions(**OPTIONS[options])
    state = copy.deepcopy(get_optimizer_state_dict(*first, options=options))
    if not options.full_state_dict:  # there, groups are told by their place
        state["param_groups"].reverse()
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second, state, options=options)
    assert [group["lr"] for group in second[1].param_groups] == [0.01, 0.02]
    assert_goes_on_alike(first, second, batches)


# ---------------------------------------------------------------- what is refused


def assert_refuses(optimizer, act, message):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        act()
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_state_of_adamw_is_refused_and_named(batches, options):
    model, optimizer = make()
    train(model, optimizer, batches[:2])
    plain = tiny()
    adamw = torch.optim.AdamW(plain.parameters())
    train(plain, adamw, batches[:5])
    options = StateDictOptions(**OPTIONS[options])
    state = copy.deepcopy(get_optimizer_state_dict(plain, adamw, options=options))
    # A full state is laid over the optimizer's own by torch: there the counts of steps tell.
    message = "step" if options.full_state_dict else "meta"
    assert_refuses(optimizer, lambda: set_optimizer_state_dict(model, optimizer, state, options=options), message)


def test_a_flattened_state_is_refused_and_named(batches):
    """torch loads only those settings of a group that it has now, so Φ is lost on the way."""
    model, optimizer = make()
    train(model, optimizer, batches[:2])
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    assert_refuses(
        optimizer,
        lambda: set_optimizer_state_dict(model, optimizer, state, options=options),
        "flatten_optimizer_state_dict",
    )


@pytest.mark.parametrize("change", [{"attn_layers": 2}, {"meta_optimizer": "adam"}, {"huw_priorities": None}], ids=str)
def test_a_gathered_state_of_another_phi_is_refused(batches, change):
    first, second = make(), make(seed=9, **change)
    train(*first, batches[:2])
    train(*second, batches[:2])
    state = copy.deepcopy(get_optimizer_state_dict(*first))
    assert_refuses(second[1], lambda: set_optimizer_state_dict(*second, state), r"encoder|meta_optimizer|uncertainty")


# ---------------------------------------------------------------- where "meta" is


def test_meta_is_in_a_group_of_a_distributed_checkpoint_only(batches):
    """Other states have AdamW's groups, and so has the optimizer that has loaded one."""
    model, optimizer = make()
    go_on(model, optimizer, batches)
    gathered = get_optimizer_state_dict(model, optimizer)
    assert_same(gathered["param_groups"][0]["meta"], optimizer.state_dict()["meta"])
    other_model, other = make(seed=9)
    set_optimizer_state_dict(other_model, other, gathered)
    for o in (optimizer, other):
        assert "meta" in o.state_dict()
        for group in (*o.state_dict()["param_groups"], *o.param_groups):
            assert "meta" not in group
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    assert "meta" not in other.param_groups[1]
    train(other_model, other, batches[:2])


@pytest.mark.parametrize("place", ["top", "group"])
def test_either_of_the_two_places_is_enough(batches, place):
    first, second = make(), make(seed=9)
    go_on(*first, batches)
    state = copy.deepcopy(first[1].state_dict())
    if place == "group":
        state["param_groups"][0]["meta"] = state.pop("meta")
    untouched = copy.deepcopy(state)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(state)
    assert_same(state, untouched)
    assert_goes_on_alike(first, second, batches)


# ---------------------------------------------------------------- numbers of NumPy's


def test_numbers_of_numpy_that_a_scheduler_writes_do_not_reach_a_checkpoint(batches):
    """``weights_only=True`` reads no types of NumPy's."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.float64(0.5) ** epoch)
    for batch in batches[:3]:
        train(model, optimizer, [batch])
        scheduler.step()
    group = optimizer.param_groups[0]
    group["weight_decay"], group["eps"] = np.float64(0.25), np.float64(1e-8)
    group["betas"] = (np.float64(0.9), np.float64(0.99))
    group["step of a scheduler"], group["warmup"] = np.int64(3), [np.float64(0.5), {"end": np.float32(2.0)}]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    (read,) = saved["param_groups"]
    assert (read["lr"], read["weight_decay"], read["betas"]) == (0.02 * 0.5**3, 0.25, (0.9, 0.99))
    assert (read["step of a scheduler"], read["warmup"]) == (3, [0.5, {"end": 2.0}])
    second = make(seed=9)
    second[0].load_state_dict(model.state_dict())
    second[1].load_state_dict(saved)
    assert_goes_on_alike((model, optimizer), second, batches)


@pytest.mark.parametrize("options", OPTIONS)
def test_numbers_of_numpy_go_through_a_distributed_checkpoint(batches, tmp_path, options):
    first, second = make(), make(seed=9)
    train(*first, batches[:2])
    first[1].param_groups[0].update(lr=np.float64(0.01), weight_decay=np.float64(0.5))
    options = StateDictOptions(**OPTIONS[options])
    save(*first, tmp_path, options)
    load(*second, tmp_path, options)
    assert type(second[1].param_groups[0]["lr"]) is float
    assert_goes_on_alike(first, second, batches)


def test_a_tensor_as_rate_goes_through_a_distributed_checkpoint(batches, tmp_path):
    first, second = make(lr=torch.tensor(0.02)), make(seed=9, lr=torch.tensor(0.5))
    go_on(*first, batches)
    save(*first, tmp_path)
    load(*second, tmp_path)
    assert_goes_on_alike(first, second, batches)


# ---------------------------------------------------------------- two processes

ROUTES = ("gathered", "full", "sent from the first", "folder", "folder, full", "folder, other way", "plain file")


@pytest.fixture(scope="module")
def found():
    """What two processes found: ``checkpoints_of_two.py`` says what that is."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("torch 2.6 shards nothing on a CPU")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(HERE / "checkpoints_of_two.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("meta_optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_go_on_with_the_same_bits(found, way, meta_optimizer, route):
    run = found[f"{way} {meta_optimizer} {route}"]
    assert run["error"] == ""
    assert run["trained"] > 0.1
    assert run["parameters"] == run["phi"] == run["factors"] == run["log_var"] == 0.0
    assert run["steps"] == 0
    assert run["ranks"] == 0.0, "Φ is the same in both processes"


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_refuse_a_state_of_adamw(found, way):
    assert "meta" in found[f"{way} adamw"]


@needs_gloo
@pytest.mark.slow
def test_one_process_goes_on_with_what_two_have_saved(found, tmp_path):
    """The shards of both are put together; sums are rounded otherwise from then on."""
    run = found["one from two"]
    assert run["loaded"] == 0.0
    assert run["went on"] < 1e-8
