"""LiLAW in scripts that exist: models in low precision, outputs and batches of other kinds, frozen models, modes."""

import copy
import random
from collections import UserDict, namedtuple
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import assert_same
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from metaadamw_lite import LiLAW

cross_entropy = partial(F.cross_entropy, reduction="none")
HALVES = [torch.bfloat16, torch.float16]


class Classifier(nn.Module):
    """Four classes from two inputs; ``output`` makes something of the logits."""

    def __init__(self, output=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.output = nn.Linear(6, 8), nn.Linear(8, 4), output or (lambda logits: logits)

    def forward(self, x, scale=1.0):
        return self.output(self.head(self.body(scale * x).relu()))


def batch(seed=0, count=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def scalars(lilaw):
    return [x.detach().clone() for x in (lilaw.alpha, lilaw.delta, lilaw.beta)]


def after_a_step(model=None, val=None, loss_fn=cross_entropy, lilaw=None):
    """The loss that a meta-step returns, and the scalars after it."""
    lilaw = lilaw or LiLAW(lr=0.1)
    model = Classifier() if model is None else model  # some wrappers have a length, or none that can be asked for
    value = lilaw.meta_step(model, val or batch(), loss_fn)
    return torch.tensor(value), scalars(lilaw)


def refused(error, model=None, val=None, loss_fn=cross_entropy, lilaw=None, match=None):
    """The meta-step is refused, and neither the scalars nor the model's modes change."""
    model, lilaw = model if model is not None else Classifier(), lilaw or LiLAW()
    before = copy.deepcopy(lilaw.state_dict())
    with pytest.raises(error, match=match):
        lilaw.meta_step(model, val if val is not None else batch(), loss_fn)
    assert_same(lilaw.state_dict(), before)
    if isinstance(model, nn.Module):
        assert all(m.training for m in model.modules())


# ---------------------------------------------------------------- precision

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "to like": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "in a model": lambda m: nn.ModuleDict({"lilaw": m}).half()["lilaw"],
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_keeps_the_bits_of_the_three_scalars(cast):
    lilaw = LiLAW()
    after_a_step(lilaw=lilaw)
    before = scalars(lilaw)
    CASTS[cast](lilaw)
    assert_same(scalars(lilaw), before)
    assert before[0] != before[0].bfloat16(), "this number would be rounded"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", ["default precision", "cast", "state"])
def test_small_steps_are_not_lost_in_a_model_of_low_precision(dtype, how):
    torch.set_default_dtype(dtype if how == "default precision" else torch.float32)
    try:
        lilaw = LiLAW()
    finally:
        torch.set_default_dtype(torch.float32)
    if how == "cast":
        lilaw.to(dtype)
    elif how == "state":
        lilaw.load_state_dict(
            {
                name: x.to(dtype) if x.ndim == 0 and x.is_floating_point() else x
                for name, x in lilaw.state_dict().items()
            },
            assign=True,
        )
    wide = LiLAW()
    model = Classifier().to(dtype)
    for k in range(50):
        x, y = batch(k)
        lilaw.meta_step(model, (x.to(dtype), y), cross_entropy)
        wide.meta_step(copy.deepcopy(model).float(), (x.to(dtype).float(), y), cross_entropy)
    assert all(x.dtype == torch.float32 for x in lilaw.parameters())
    for x, expected, start in zip(scalars(lilaw), scalars(wide), (10.0, 6.0, 2.0), strict=True):
        assert (x - expected).abs() < 0.05 * (expected - start).abs()


def test_a_cast_to_float64_widens_the_scalars():
    lilaw = LiLAW().double()
    assert all(x.dtype == torch.float64 for x in lilaw.parameters())
    assert lilaw.half().alpha.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_that_was_saved_in_low_precision_is_loaded(dtype):
    lilaw = LiLAW()
    state = {name: x.to(dtype) for name, x in LiLAW(9.0, 5.0, 3.0).state_dict().items() if name != "steps"}
    lilaw.load_state_dict(state | {"steps": torch.tensor(7)})
    assert [x.item() for x in scalars(lilaw)] == [9.0, 5.0, 3.0]
    assert lilaw.alpha.dtype == torch.float32
    assert lilaw.steps == 7


@pytest.mark.parametrize("lilaw_in", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_in", [torch.float32, torch.float64])
def test_model_and_scalars_may_differ_in_precision(model_in, lilaw_in):
    x, y = batch()
    value, after = after_a_step(Classifier().to(model_in), (x.to(model_in), y), lilaw=LiLAW(lr=0.1).to(lilaw_in))
    expected, scalars_after = after_a_step(Classifier().double(), (x.double(), y), lilaw=LiLAW(lr=0.1).double())
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [s.item() for s in after] == pytest.approx([s.item() for s in scalars_after], rel=1e-6)
    assert {s.dtype for s in after} == {lilaw_in}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_meta_step_under_autocast(dtype):
    value, after = after_a_step()
    with torch.autocast("cpu", dtype):
        rough_value, rough = after_a_step()
        loss = LiLAW().loss(Classifier()(batch()[0]), batch()[1], cross_entropy)
    assert rough_value == pytest.approx(value.item(), rel=0.02)
    assert [s.item() for s in rough] == pytest.approx([s.item() for s in after], abs=1e-3)
    assert all(s.dtype == torch.float32 for s in rough)
    assert loss.dtype == torch.float32


def test_a_meta_step_does_not_see_the_weights_that_autocast_has_kept():
    model = Classifier()
    with torch.autocast("cpu", torch.bfloat16):
        model(batch()[0])
        with torch.no_grad():
            model.head.weight.mul_(3)  # a step of an optimizer
        value, _ = after_a_step(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = after_a_step(model)
    assert value == expected


def test_training_goes_on_after_a_meta_step_in_one_region_of_autocast():
    model = Classifier()
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        after_a_step(model)
        LiLAW().loss(model(x), y, cross_entropy).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------- outputs and batches

Named = namedtuple("Named", ["logits", "hidden"])
OUTPUTS = {
    "an output of transformers": lambda z: SequenceClassifierOutput(logits=z),
    "an output with a loss": lambda z: SequenceClassifierOutput(loss=z.sum(), logits=z, hidden_states=(z,)),
    "an object": lambda z: SimpleNamespace(logits=z),
    "a named tuple": lambda z: Named(z, z),
    "a dictionary": lambda z: {"logits": z, "hidden": z},
    "a mapping": lambda z: UserDict(logits=z),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_has_logits_is_as_good_as_logits(kind):
    x, y = batch()
    assert_same(after_a_step(Classifier(OUTPUTS[kind])), after_a_step())
    lilaw, model, plain = LiLAW(), Classifier(OUTPUTS[kind]), Classifier()
    assert_same(lilaw.parts(model(x), y), lilaw.parts(plain(x), y))
    assert_same(lilaw.weights(model(x), y), lilaw.weights(plain(x), y))
    for m in (model, plain):
        lilaw.loss(m(x), y, cross_entropy).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize(
    "output",
    [
        lambda z: (z,),
        lambda z: (z.sum(), z),
        lambda z: [z],
        lambda z: None,
        lambda z: {"scores": z},
        lambda z: SimpleNamespace(scores=z),
        lambda z: SequenceClassifierOutput(hidden_states=(z,)),
        lambda z: z.tolist(),
        lambda z: z.detach().numpy(),
        lambda z: z.argmax(dim=1),
        lambda z: z.long(),
        lambda z: z.unsqueeze(0),
        lambda z: z.expand(3, 2, *z.shape).movedim(-1, 1),
    ],
)
def test_an_output_without_logits_of_samples_is_refused(output):
    refused(ValueError, Classifier(output), match="logits|targets")


BATCHES = {
    "a tuple": lambda x, y: (x, y),
    "a list": lambda x, y: [x, y],
    "an iterator": lambda x, y: iter((x, y)),
    "two inputs": lambda x, y: (x, 1.0, y),
    "a dictionary": lambda x, y: {"x": x, "labels": y},
    "a dictionary, labels first": lambda x, y: {"labels": y, "scale": 1.0, "x": x},
    "a mapping": lambda x, y: UserDict(x=x, labels=y),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_may_be_a_sequence_or_a_mapping_and_is_left_alone(kind):
    val = BATCHES[kind](*batch())
    before = dict(val) if kind.startswith(("a dictionary", "a mapping")) else None
    assert_same(after_a_step(val=val), after_a_step())
    if before is not None:
        assert dict(val).keys() == before.keys()


@pytest.mark.parametrize(
    "val",
    [
        batch()[0],
        batch()[1],
        {"x": batch()[0], "y": batch()[1]},
        {"x": batch()[0], "label": batch()[1]},
        {},
        (),
        [batch()[1]],
        "batch",
        3,
        None,
        SimpleNamespace(x=batch()[0], labels=batch()[1]),
    ],
)
def test_a_batch_without_inputs_or_labels_is_refused(val):
    lilaw = LiLAW()
    with pytest.raises(ValueError, match="val_batch"):
        lilaw.meta_step(Classifier(), val, cross_entropy)
    assert lilaw.steps == 0


def test_a_model_of_transformers_with_its_own_batches():
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    val = {"input_ids": torch.randint(0, 11, (6, 5)), "attention_mask": torch.ones(6, 5), "labels": torch.arange(6) % 3}
    lilaw = LiLAW(lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    lilaw.loss(model(**val), val["labels"], cross_entropy).backward()
    optimizer.step()
    lilaw.meta_step(model, val, cross_entropy)
    assert lilaw.alpha < 10
    assert lilaw.beta > 2
    assert not torch.equal(model.state_dict()["classifier.weight"], before["classifier.weight"])


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integers_go_through_a_loss_that_takes_int64(dtype):
    x, y = batch()
    assert_same(after_a_step(val=(x, y.to(dtype))), after_a_step())
    model, lilaw = Classifier(), LiLAW()
    assert_same(lilaw.loss(model(x), y.to(dtype), cross_entropy), lilaw.loss(model(x), y, cross_entropy))


@pytest.mark.parametrize("labels", [batch()[1].tolist(), batch()[1].numpy(), None, F.one_hot(batch()[1], 4).float()])
def test_labels_that_are_no_tensor_of_class_numbers_are_refused(labels):
    refused(ValueError, val=(batch()[0], labels), match="targets are")
    with pytest.raises(ValueError, match="targets are"):
        LiLAW().loss(Classifier()(batch()[0]), labels, cross_entropy)


@pytest.mark.parametrize("returned", [1.0, None, torch.zeros(3), [0.0] * 16])
def test_a_loss_that_is_no_tensor_of_one_number_for_each_sample_is_refused(returned):
    refused(ValueError, loss_fn=lambda z, y: returned, match="one loss for each of 16")


@pytest.mark.parametrize("model", [lambda x: torch.zeros(len(x), 4), Classifier().forward, partial(Classifier()), None])
def test_a_model_that_is_no_module_is_refused(model):
    lilaw = LiLAW()
    with pytest.raises(ValueError, match=r"it must be an nn\.Module"):
        lilaw.meta_step(model, batch(), cross_entropy)
    assert lilaw.steps == 0


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "fully_shard": sharded,
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_model_inside_of_a_wrapper(one_process, kind):
    (value, after), (expected, scalars_after) = after_a_step(WRAPPERS[kind](Classifier())), after_a_step()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(after, scalars_after)


def test_a_step_after_a_meta_step_moves_what_fully_shard_trains(one_process):
    """The weights that it gathers for the meta-step are not those of the next forward pass."""
    x, y = batch()
    logits = {}
    for wrap in (lambda m: m, sharded):
        model = wrap(Classifier())
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        LiLAW().loss(model(x), y, cross_entropy).backward()
        LiLAW().meta_step(model, batch(), cross_entropy)
        optimizer.step()
        with torch.no_grad():
            logits[wrap] = model(x)
    torch.testing.assert_close(*logits.values())


# ---------------------------------------------------------------- the model's state


class Metric(nn.Module):
    """As those of ``torchmetrics`` are: sums in attributes, which are no buffers."""

    def __init__(self):
        super().__init__()
        self.total, self.count, self.seen = torch.zeros(()), 0, []

    def forward(self, x):
        self.total += x.sum()
        self.count += len(x)
        self.seen.append(x)
        return x


class Stateful(Classifier):
    """Each forward pass moves one kind of state; the logits depend on most kinds."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.metric = kind, Metric()
        self.register_buffer("n", torch.ones(()))
        self.h, self.own = torch.ones(8), torch.Generator().manual_seed(0)
        self.rate = 1.0
        self.tables = {"list": [1.0], "tensor": torch.ones(())}

    def forward(self, x, scale=1.0):
        h = self.body(x)
        if self.kind == "buffer":
            self.n += 1
        elif self.kind == "buffer that is replaced":
            self.n = self.n + 1
        elif self.kind == "hidden state":
            self.h = torch.tanh(h.detach().mean(0) + self.h)
        elif self.kind == "hidden state in place":
            self.h.mul_(0.5)
        elif self.kind == "number":
            self.rate *= 0.5
        elif self.kind == "container":
            self.tables["list"].append(2.0)
            self.tables["tensor"] += 1
        elif self.kind == "new attribute":
            self.last = h.detach()
        elif self.kind == "generator":
            h = h + torch.randn(h.shape, generator=self.own)
        elif self.kind == "global random numbers":
            h = h + torch.randn_like(h) + random.random() + float(np.random.rand())  # noqa: NPY002
        elif self.kind == "metric":
            self.metric(h.detach())
        return self.head((h * self.n + self.h).relu() * self.rate + sum(self.tables["list"]) * self.tables["tensor"])


def state_of(model):
    numpy_state = np.random.get_state()  # noqa: NPY002
    return copy.deepcopy(
        {
            "buffers": dict(model.named_buffers()),
            "attributes": [
                model.h,
                model.rate,
                model.tables["list"],
                model.tables["tensor"],
                getattr(model, "last", None),
            ],
            "metric": [model.metric.total, model.metric.count, len(model.metric.seen)],
            "generators": [model.own.get_state(), torch.get_rng_state(), torch.from_numpy(numpy_state[1].copy())],
            "others": [random.getstate(), numpy_state[2]],
        }
    )


LOGITS_DEPEND_ON = [
    "buffer",
    "buffer that is replaced",
    "hidden state",
    "hidden state in place",
    "number",
    "container",
    "generator",
    "global random numbers",
]


def broken(logits, labels):
    raise ZeroDivisionError


@pytest.mark.parametrize("kind", [*LOGITS_DEPEND_ON, "new attribute", "metric"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_meta_step_leaves_the_models_state_as_found(kind, fails):
    model, lilaw = Stateful(kind), LiLAW(lr=0.1)
    before = state_of(model)
    model(batch()[0])
    moved = state_of(model)
    with pytest.raises(AssertionError):
        assert_same(moved, before)
    before = state_of(model)  # in the middle of training
    for seed in range(2):
        if fails:
            refused(ZeroDivisionError, model, loss_fn=broken)
        else:
            lilaw.meta_step(model, batch(seed), cross_entropy)
        assert_same(state_of(model), before)


@pytest.mark.parametrize("kind", LOGITS_DEPEND_ON)
def test_training_with_meta_steps_at_rest_is_training_without(kind):
    runs = []
    for with_meta_steps in (False, True):
        model, lilaw = Stateful(kind), LiLAW(lr=0)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for seed in range(3):
            x, y = batch(seed)
            optimizer.zero_grad()
            lilaw.loss(model(x), y, cross_entropy).backward()
            optimizer.step()
            if with_meta_steps:
                lilaw.meta_step(model, batch(9), cross_entropy)
        runs.append([p.detach().clone() for p in model.parameters()])
    assert_same(*runs)


def test_a_model_whose_shapes_are_not_known_yet_is_refused_and_stays_so():
    model = Classifier()
    model.body = nn.LazyLinear(8)
    refused(ValueError, model, match="lazy")
    assert isinstance(model.body, nn.LazyLinear)
    model(batch()[0])
    after_a_step(model)


def test_a_lilaw_that_the_model_holds_goes_on():
    model = Classifier()
    model.lilaw = LiLAW(lr=0.1)
    _, after = after_a_step(model, lilaw=model.lilaw)
    assert_same(after, after_a_step()[1])
    assert model.lilaw.steps == 1


# ---------------------------------------------------------------- frozen models, no_grad and inference_mode


def test_a_model_that_is_frozen_as_a_whole():
    model = Classifier().requires_grad_(False)
    assert_same(after_a_step(model), after_a_step())
    assert not any(p.requires_grad for p in model.parameters())


def test_scalars_that_are_all_frozen_are_refused():
    model = Classifier()
    model.lilaw = LiLAW()
    model.requires_grad_(False)
    refused(ValueError, model, lilaw=model.lilaw, match="frozen")


@pytest.mark.parametrize("frozen", ["alpha", "delta", "beta"])
def test_a_scalar_that_is_frozen_rests_and_the_others_move(frozen):
    lilaw, free = LiLAW(lr=0.1), LiLAW(lr=0.1)
    getattr(lilaw, frozen).requires_grad_(False)
    after_a_step(lilaw=free)
    after_a_step(lilaw=lilaw)
    for name in ("alpha", "delta", "beta"):
        expected = LiLAW() if name == frozen else free
        assert torch.equal(getattr(lilaw, name), getattr(expected, name))


def test_a_meta_step_works_without_gradients_around_it():
    expected = after_a_step()
    with torch.no_grad():
        assert_same(after_a_step(), expected)
        assert not torch.is_grad_enabled()
    with torch.set_grad_enabled(False):
        assert_same(after_a_step(), expected)
    assert_same(torch.no_grad()(after_a_step)(), expected)


def test_a_meta_step_in_inference_mode_is_refused_and_names_it():
    with torch.inference_mode():
        refused(RuntimeError, match=r"outside of torch\.inference_mode")


def test_what_was_made_in_inference_mode_can_be_used_outside():
    expected = after_a_step()
    with torch.inference_mode():
        val, lilaw = tuple(x.clone() for x in batch()), LiLAW(lr=0.1)
    assert val[0].is_inference()
    assert_same(after_a_step(val=val, lilaw=lilaw), expected)

    class Wrapped(Classifier):
        forward = torch.inference_mode()(Classifier.forward)

    assert_same(after_a_step(Wrapped()), expected)
    assert_same(after_a_step(loss_fn=torch.inference_mode()(cross_entropy)), expected)
