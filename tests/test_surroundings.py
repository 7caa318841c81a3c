"""What a meta-update puts back beside parameters and buffers, what it refuses, and which wrappers it takes."""

import collections
import copy
import itertools
import random
from collections import UserDict, deque, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
from conftest import assert_same
from torch import nn

from metaadamw_lite import MetaAdamW

Pair = namedtuple("Pair", "x labels")


def samples(count=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(count)
    ]


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run(build, meta, loss_fn=cross_entropy, also=None, batches=None):
    """Parameters, buffers and losses of five steps, with or without a meta-update of rate 0 after each."""
    torch.manual_seed(0)
    model = build()
    extra = () if also is None else also()
    optimizer = MetaAdamW(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], meta_lr=0.0, huw_priorities=None
    )
    batches = samples() if batches is None else batches
    seen = []
    for i in range(5):
        optimizer.zero_grad()
        loss = loss_fn(model, copy.copy(batches[i]))
        loss.backward()
        optimizer.step()
        seen.append(loss.detach().clone())
        if meta:
            optimizer.update_attention(model, batches[i], batches[i + 1], loss_fn, batches[i], also=extra)
    return model.state_dict(), seen, model


# ---------------------------------------------------------------- batches


class Batch(UserDict):
    pass


@dataclass
class Record:
    x: torch.Tensor
    labels: list = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    labels: list


def hugging_face(x, y):
    from transformers import BatchEncoding

    return BatchEncoding({"x": x, "labels": y})


EMPTIED = {
    "dict": (lambda x, y: {"x": x, "labels": y}, lambda b: (b["x"], b.pop("labels"))),
    "list": (lambda x, y: [x, y], lambda b: (b.pop(0), b.pop(0))),
    "deque": (lambda x, y: deque([x, y]), lambda b: (b.popleft(), b.popleft())),
    "nested": (lambda x, y: ({"in": [{"x": x}], "y": [y]},), lambda b: (b[0].pop("in").pop()["x"], b[0]["y"].pop())),
    "named tuple": (lambda x, y: Pair({"x": x}, [y]), lambda b: (b.x.pop("x"), b.labels.pop())),
    "UserDict": (lambda x, y: Batch(x=x, labels=y), lambda b: (b["x"], b.pop("labels"))),
    "BatchEncoding": (hugging_face, lambda b: (b["x"], b.pop("labels"))),
    "OrderedDict": (lambda x, y: collections.OrderedDict(x=x, y=y), lambda b: (b["x"], b.popitem()[1])),
    "dataclass": (lambda x, y: Record(x, [y]), lambda b: (b.x, b.labels.pop())),
    "slots": (lambda x, y: Slotted(x, [y]), lambda b: (b.x, b.labels.pop())),
    "read-only mapping": (lambda x, y: MappingProxyType({"x": x, "y": [y]}), lambda b: (b["x"], b["y"].pop())),
    "namespace": (lambda x, y: SimpleNamespace(x=x, y=[y]), lambda b: (vars(b).pop("x"), b.y.pop())),
}


@pytest.mark.parametrize("kind", EMPTIED)
def test_a_loss_may_empty_the_containers_of_its_batch(kind):
    build, empty = EMPTIED[kind]
    model = nn.Linear(4, 3)
    batches = [build(*pair) for pair in samples(3)]
    before = str(batches[0])
    optimizer = MetaAdamW(model.named_parameters())
    optimizer.update_attention(
        model, batches[0], batches[1], lambda model, b: cross_entropy(model, empty(b)), batches[0]
    )
    assert str(batches[0]) == before


WRITES = {
    "counted": lambda x: x.mul_(2.0),
    ".data": lambda x: x.data.mul_(2.0),
    "through numpy": lambda x: x.numpy().__imul__(2.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("name", ["batch1", "batch2", "val_batch"])
def test_a_write_to_a_batch_is_refused_by_name_and_undone(write, name):
    model, batches = nn.Linear(4, 3), [dict(zip(("x", "y"), pair, strict=True)) for pair in samples(3)]
    optimizer = MetaAdamW(model.named_parameters())
    named = dict(zip(("batch1", "batch2", "val_batch"), batches, strict=True))
    target = named[name]["x"]
    before = copy.deepcopy((batches, model.state_dict(), optimizer.state_dict()))

    def loss_fn(model, batch):
        if batch["x"] is target:
            write(batch["x"])
        return cross_entropy(model, (batch["x"], batch["y"]))

    with pytest.raises(RuntimeError, match=rf"{name}\['x'\]"):
        optimizer.update_attention(model, named["batch1"], named["batch2"], loss_fn, named["val_batch"])
    assert_same((batches, model.state_dict(), optimizer.state_dict()), before)


ITERATORS = {
    "generator": lambda: (pair for pair in samples()),
    "iterator": lambda: iter(samples()),
    "inside of a dict": lambda: {"micro": itertools.cycle(samples())},
    "loader": lambda: iter(torch.utils.data.DataLoader(samples())),
}


@pytest.mark.parametrize("make", ITERATORS.values(), ids=ITERATORS)
def test_a_batch_that_can_be_read_once_is_refused(make):
    model = nn.Linear(4, 3)
    optimizer = MetaAdamW(model.named_parameters())
    with pytest.raises(TypeError, match=r"batch2.* is a "):
        optimizer.update_attention(model, samples()[0], make(), cross_entropy, samples()[1])


# ---------------------------------------------------------------- state of modules


class Stateful(nn.Module):
    """A linear layer whose forward pass reads and changes ``state`` by ``change(self, h)``, which returns a shift."""

    def __init__(self, change, **state):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.change = change
        for name, x in state.items():
            setattr(self, name, x)

    def forward(self, x):
        h = self.head(x)
        return h * (1 + self.change(self, h.detach()))


def hidden_in_tuple(m, h):
    m.hidden = tuple(0.5 * x + h.mean(0) for x in m.hidden)
    return m.hidden[0]


def hidden_in_place(m, h):
    m.hidden.mul_(0.5).add_(h.mean(0))
    return m.hidden


def hidden_by_data(m, h):
    m.hidden.data = 0.5 * m.hidden + h.mean(0)
    return m.hidden


def memory(m, h):
    m.memory.append(h.mean(0))
    return sum(m.memory)


def nested(m, h):
    m.table["layers"][0]["h"] = m.table["layers"][0]["h"] + h.mean(0)
    m.table["count"] += 1
    return m.table["layers"][0]["h"] * m.table["count"]


def counter(m, h):
    m.steps += 1
    m.rate *= 0.9
    return m.steps * m.rate


def lazily_made(m, h):
    if not hasattr(m, "late"):
        m.late = h.mean(0)
    m.late = m.late + 0.1
    return m.late


def by_record(m, h):
    m.record.x = m.record.x + h.mean(0)
    m.record.labels.append(1)
    return m.record.x * len(m.record.labels)


def by_array(m, h):
    m.array += 1
    return float(m.array.sum())


def by_module_in_a_list(m, h):
    return 0.1 * m.hidden_away[0](h)


def by_teacher(m, h):
    teacher = m.teacher[0]
    with torch.no_grad():
        teacher.weight.lerp_(m.head.weight[:, :3], 0.1)
    return teacher(h)


def by_set(m, h):
    m.seen.add(len(m.seen))
    return len(m.seen)


STATES = {
    "hidden state in a tuple": (hidden_in_tuple, lambda: {"hidden": (torch.zeros(3), torch.ones(3))}),
    "written in place": (hidden_in_place, lambda: {"hidden": torch.zeros(3)}),
    "written by .data": (hidden_by_data, lambda: {"hidden": torch.zeros(3)}),
    "list": (memory, lambda: {"memory": []}),
    "deque": (memory, lambda: {"memory": deque([torch.ones(3)], maxlen=3)}),
    "nested": (nested, lambda: {"table": {"layers": [{"h": torch.zeros(3)}], "count": 0}}),
    "numbers": (counter, lambda: {"steps": 0, "rate": 1.0}),
    "made by the forward pass": (lazily_made, dict),
    "dataclass": (by_record, lambda: {"record": Record(torch.zeros(3))}),
    "array": (by_array, lambda: {"array": np.zeros(3)}),
    "module in a list": (by_module_in_a_list, lambda: {"hidden_away": [nn.BatchNorm1d(3).requires_grad_(False)]}),
    "teacher in a list": (by_teacher, lambda: {"teacher": [nn.Linear(3, 3).requires_grad_(False)]}),
    "set": (by_set, lambda: {"seen": set()}),
    "generator": (
        lambda m, h: torch.randn(3, generator=m.generator),
        lambda: {"generator": torch.Generator().manual_seed(5)},
    ),
    "NumPy's generator": (lambda m, h: float(m.draw.normal()), lambda: {"draw": np.random.default_rng(0)}),
    "Python's generator": (lambda m, h: m.draw[0].random(), lambda: {"draw": (random.Random(3),)}),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_meta_update_does_not_change_training_where_modules_hold_state(kind):
    change, state = STATES[kind]
    plain, disturbed = (run(lambda: Stateful(change, **state()), meta) for meta in (False, True))
    assert_same(disturbed[:2], plain[:2])


@pytest.mark.parametrize("kind", STATES)
def test_the_state_that_modules_hold_is_the_same_for_every_loss(kind):
    torch.manual_seed(0)
    change, state = STATES[kind]
    model = Stateful(change, **state())
    optimizer = MetaAdamW(model.head.named_parameters(), lr=0.0)
    assert optimizer.update_attention(model, *samples(2), cross_entropy, samples(3)[2]).loss_decrease == 0


class Measured(nn.Module):
    """A model with torchmetrics' metrics inside: one with a sum, one with lists, and a collection."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.curve = torchmetrics.AUROC(task="multiclass", num_classes=3)
        self.mean = torchmetrics.MeanMetric()
        self.both = torchmetrics.MetricCollection([torchmetrics.CatMetric(), torchmetrics.SumMetric()])


def measured_loss(model, batch):
    h = model.head(batch[0])
    model.accuracy(h, batch[1])
    model.curve.update(h.detach(), batch[1])
    model.both.update(h.detach().mean())
    model.mean.update(h.detach().mean())
    return nn.functional.cross_entropy(h * (1 + model.mean.compute()), batch[1])


def test_metrics_inside_of_a_model_see_training_only():
    plain, disturbed = (run(Measured, meta, measured_loss) for meta in (False, True))
    assert_same(disturbed[:2], plain[:2])
    for name in ("accuracy", "curve", "mean"):
        one, two = (getattr(result[2], name) for result in (plain, disturbed))
        assert one._update_count == two._update_count == 5
        assert torch.equal(one.compute(), two.compute())
    assert_same(disturbed[2].both.compute(), plain[2].both.compute())


def test_an_attribute_that_shares_memory_with_a_parameter_follows_it():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    model.rows = list(model.weight.detach().unbind())
    seen = []

    def loss_fn(model, batch):
        seen.append(torch.equal(torch.stack(model.rows), model.weight))
        return cross_entropy(model, batch)

    MetaAdamW(model.named_parameters(), lr=1.0).update_attention(model, *samples(2), loss_fn, samples(3)[2])
    assert all(seen)


# ---------------------------------------------------------------- state elsewhere


class Aliased(nn.Module):
    """A layer whose weight has a second name."""

    def __init__(self, kind):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        if kind == "frozen":
            self.alias = nn.Parameter(self.layer.weight.data, requires_grad=False)
        elif kind == "buffer":
            self.register_buffer("alias", self.layer.weight.data)
        elif kind == "array":
            self.alias = self.layer.weight.detach().numpy()
        elif kind == "view of an array":
            self.alias = [self.layer.weight.detach().numpy()[1:]]

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("kind", ["frozen", "buffer", "array", "view of an array"])
def test_a_second_name_of_a_trained_weight_follows_it_to_the_next_parameters(kind):
    def after(kind):
        torch.manual_seed(0)
        model = Aliased(kind)
        optimizer = MetaAdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=0.1)
        batches = samples(3)
        cross_entropy(model, batches[0]).backward()
        optimizer.step()
        return optimizer.update_attention(model, batches[0], batches[1], cross_entropy, batches[2])

    assert_same(after(kind), after("none"))


def test_requires_grad_that_a_loss_changes_is_left_as_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = MetaAdamW(model[0].named_parameters())

    def loss_fn(model, batch):
        model[1].requires_grad_(False)
        return cross_entropy(model, batch)

    optimizer.update_attention(model, *samples(2), loss_fn, samples(3)[2])
    assert all(p.requires_grad for p in model.parameters())


def test_a_batch_whose_gradient_a_loss_takes_is_left_as_found():
    model, batches = nn.Linear(4, 3), samples(3)
    optimizer = MetaAdamW(model.named_parameters())

    def loss_fn(model, batch):
        return cross_entropy(model, (batch[0].requires_grad_(True), batch[1]))

    optimizer.update_attention(model, batches[0], batches[1], loss_fn, batches[2])
    assert not any(x.requires_grad for x, _ in batches)


READ_ONLY = {
    "frombuffer": lambda: np.frombuffer(b"12345678", dtype=np.uint8),
    "broadcast": lambda: np.broadcast_to(np.ones(1), (5,)),
}


@pytest.mark.parametrize("make", READ_ONLY.values(), ids=READ_ONLY)
def test_an_array_that_cannot_be_written_to_is_no_obstacle(make):
    def build():
        model = nn.Sequential(nn.Linear(4, 3))
        model.table = make()
        return model

    assert_same(run(build, True)[:2], run(build, False)[:2])


LAZY_VIEWS = {
    "conjugate": lambda: torch.randn(50, 50, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(50, 50, dtype=torch.complex64).conj().imag,
    "expanded": lambda: torch.ones(1).expand(9000),
}


@pytest.mark.parametrize("make", LAZY_VIEWS.values(), ids=LAZY_VIEWS)
def test_a_large_frozen_weight_that_is_a_view_is_no_obstacle(make):
    def build():
        model = nn.Sequential(nn.Linear(4, 3))
        model.frozen = nn.Parameter(make(), requires_grad=False)
        return model

    assert_same(run(build, True)[1], run(build, False)[1])


class Queue:
    def __init__(self):
        self.rows = torch.zeros(20, 3)

    def push(self, row):
        self.rows = torch.cat([self.rows[1:], row[None]])


class Saving(Queue):
    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]


def outside():
    """Each kind of object outside of the model, and a number that depends on it and changes it."""
    return {
        "batch norm of another network": (
            lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()),
            lambda o, h: o(h).mean() + o[0].running_mean.sum(),
        ),
        "generator": (
            lambda: torch.Generator().manual_seed(1),
            lambda o, h: torch.rand((), generator=o),
        ),
        "metric": (torchmetrics.SumMetric, lambda o, h: (o.update(h.detach()), o.compute())[1]),
        "tensor": (lambda: torch.zeros(3), lambda o, h: o.add_(h.detach().mean(0)).sum().clone()),
        "list": (list, lambda o, h: (o.append(h.detach().mean()), sum(o))[1]),
        "dict": (lambda: {"n": 0}, lambda o, h: (o.update(n=o["n"] + 1), o["n"])[1]),
        "with a state": (Saving, lambda o, h: (o.push(h.detach().mean(0)), o.rows.sum())[1]),
        "with attributes": (Queue, lambda o, h: (o.push(h.detach().mean(0)), o.rows.sum())[1]),
        "in a dict": (
            lambda: {"queue": Queue()},
            lambda o, h: (o["queue"].push(h.detach().mean(0)), o["queue"].rows.sum())[1],
        ),
        "with slots": (lambda: Slotted(0, []), lambda o, h: (setattr(o, "x", o.x + 1), o.labels.append(1), o.x)[2]),
        "bytes": (bytearray, lambda o, h: (o.append(1), len(o))[1]),
    }


@pytest.mark.parametrize("kind", outside())
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a list"])
def test_what_is_passed_as_also_is_put_back(kind, alone):
    make, number = outside()[kind]
    results = []
    for meta in (False, True):
        torch.manual_seed(2)
        thing = make()

        def loss_fn(model, batch, thing=thing):
            h = model(batch[0])
            return nn.functional.cross_entropy(h * (1 + number(thing, h)), batch[1])

        results.append(
            run(lambda: nn.Linear(4, 3), meta, loss_fn, also=lambda thing=thing: thing if alone else [thing])
        )
    assert_same(results[1][:2], results[0][:2])


@pytest.mark.parametrize("kind", outside())
def test_a_loss_that_changes_when_it_is_called_again_is_refused(kind):
    torch.manual_seed(0)
    make, number = outside()[kind]
    thing, model = make(), nn.Linear(4, 3)
    optimizer = MetaAdamW(model.named_parameters())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def loss_fn(model, batch):
        h = model(batch[0])
        return nn.functional.cross_entropy(h * (1 + number(thing, h)), batch[1])

    for _ in range(2):  # not the first time only
        with pytest.raises(RuntimeError, match="also="):
            optimizer.update_attention(model, *samples(2), loss_fn, samples(3)[2])
        assert_same((model.state_dict(), optimizer.state_dict()), before)


def test_gradients_and_modes_of_another_network_are_left_as_found():
    torch.manual_seed(0)
    model, other = nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    other(torch.randn(4, 3)).sum().backward()
    before = copy.deepcopy([p.grad for p in other.parameters()])

    def loss_fn(model, batch):
        other.eval()
        other(model(batch[0]).detach()).square().sum().backward()
        return nn.functional.cross_entropy(other(model(batch[0])), batch[1])

    MetaAdamW(model.named_parameters()).update_attention(model, *samples(2), loss_fn, samples(3)[2], also=other)
    assert_same([p.grad for p in other.parameters()], before)
    assert all(m.training for m in other.modules())


@pytest.mark.parametrize(
    "thing", [3, "queue", len, nn.Linear, object()], ids=["number", "name", "function", "class", "bare object"]
)
def test_an_object_without_a_state_is_refused_as_also(thing):
    model = nn.Linear(4, 3)
    with pytest.raises(TypeError, match="also contains"):
        MetaAdamW(model.named_parameters()).update_attention(
            model, *samples(2), cross_entropy, samples(3)[2], also=[thing]
        )


# ---------------------------------------------------------------- weights that cannot be copied or compared


def torchao(config):
    def quantised(model):
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model[0], getattr(quantization, config)())

    return quantised


def eight_bits(model):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(model[0].state_dict())
    model[0] = layer.to("cpu")


def four_bits(model):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(model[0].state_dict())
    model[0] = layer.to("cpu")


def held(make):
    """A frozen parameter that the forward pass does not use."""

    def beside(model):
        model.register_parameter("held", nn.Parameter(make(), requires_grad=False))

    return beside


class Closed(torch.Tensor):
    """A subclass that knows no operation, as libraries write them for packed weights."""

    @staticmethod
    def __new__(cls, data):
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)
        made.inside = data
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inside)
        raise NotImplementedError(func)


KINDS = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8, activations too": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao of any width": torchao("IntxWeightOnlyConfig"),
    "bitsandbytes, 8 bits": eight_bits,
    "bitsandbytes, 4 bits": four_bits,
    "packed, 4 bits": held(lambda: torch.empty(64, 64, dtype=torch.uint4)),
    "float8": held(lambda: torch.randn(64, 64).to(torch.float8_e4m3fn)),
    "complex32": held(lambda: torch.randn(64, 64, dtype=torch.complex64).to(torch.complex32)),
    "jagged": held(lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)),
    "nested": held(lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])),
    "subclass that knows no operation": held(lambda: Closed(torch.randn(64, 64))),
    "unsigned": held(lambda: torch.ones(64, 64).to(torch.uint16)),
    "torch's own int8": held(lambda: torch.quantize_per_tensor(torch.randn(64, 64), 0.1, 0, torch.qint8)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", [2, 4000], ids=["watched", "copied"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_of_any_kind_are_no_obstacle(kind, adapter):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, adapter)).requires_grad_(False)
    KINDS[kind](model)
    model[1].requires_grad_(True)
    inputs, state = torch.randn(8, 64), model[1].state_dict()

    def loss_fn(model, batch):
        return model(batch).square().mean()

    optimizer = MetaAdamW(model[1].named_parameters(), meta_lr=1.0)
    before, output = copy.deepcopy(state), model(inputs).detach()
    phi = copy.deepcopy(optimizer.modulator.state_dict())
    optimizer.update_attention(model, inputs, 2 * inputs, loss_fn, 3 * inputs)
    assert_same(model[1].state_dict(), before)
    assert torch.equal(model(inputs), output)
    assert any(not torch.equal(x, phi[name]) for name, x in optimizer.modulator.state_dict().items())


@pytest.mark.parametrize("adapter", [2, 8000], ids=["refused", "put back"])
@pytest.mark.parametrize("name", ["packed, 4 bits", "float8", "complex32", "jagged", "unsigned", "torchao int8"])
def test_a_forward_pass_that_moves_a_frozen_weight_of_any_kind_is_noticed(name, adapter):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, adapter)).requires_grad_(False)
    KINDS[name](model)
    weight = model.held if hasattr(model, "held") else model[0].weight
    weight = getattr(weight, "qdata", weight)
    weight = weight._values if weight.is_nested else weight
    numbers = torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage())
    before = numbers.clone()
    model[1].requires_grad_(True)

    def loss_fn(model, batch):
        numbers.add_(1)
        return model[1](batch).square().mean()

    optimizer = MetaAdamW(model[1].named_parameters())
    update = (model, torch.randn(8, 64), torch.randn(8, 64), loss_fn, torch.randn(8, 64))
    if adapter == 2 and name != "jagged":  # which is small
        with pytest.raises(RuntimeError, match="changes the parameter"):
            optimizer.update_attention(*update)
    else:
        optimizer.update_attention(*update)
        assert torch.equal(numbers, before)


# ---------------------------------------------------------------- QLoRA


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", [four_bits, KINDS["torchao int8"]], ids=["bitsandbytes", "torchao"])
@pytest.mark.parametrize("everything", [True, False], ids=["all parameters", "adapters only"])
def test_adapters_over_a_quantised_base_are_trained(quantise, everything):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    quantise(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"]))
    named = list(model.named_parameters())
    optimizer = MetaAdamW([(n, p) for n, p in named if everything or p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(16, 64, generator=generator), torch.randint(0, 3, (16,), generator=generator)) for _ in range(3)
    ]

    def output_of_the_base():
        with model.disable_adapter(), torch.no_grad():
            return model(batches[0][0])

    before, adapters = output_of_the_base(), {n: p.detach().clone() for n, p in named if p.requires_grad}
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = cross_entropy(model, batches[0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        found = {n: (p.detach().clone(), p.grad.clone()) for n, p in named if p.requires_grad}
        phi = optimizer.modulator.output.weight.detach().clone()
        optimizer.update_attention(model, *batches[:2], cross_entropy, batches[2])
        assert_same({n: (p.detach(), p.grad) for n, p in named if p.requires_grad}, found)
        assert not torch.equal(optimizer.modulator.output.weight, phi)
    assert losses[-1] < losses[0]
    assert torch.equal(output_of_the_base(), before)
    assert all(not torch.equal(p, adapters[n]) for n, p in named if p.requires_grad)


# ---------------------------------------------------------------- wrappers


def fabric(precision):
    def wrap(model):
        lightning = pytest.importorskip("lightning.fabric")
        return lightning.Fabric(accelerator="cpu", devices=1, precision=precision).setup(model)

    return wrap


def accelerate(model):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(model)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "Fabric": fabric("32-true"),
    "Fabric, bfloat16": fabric("bf16-mixed"),
    "Fabric, compiled": lambda model: fabric("bf16-mixed")(compiled(model)),
    "Accelerate": accelerate,
    "compiled": compiled,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("double_backward", [False, True])
def test_a_wrapped_model_is_evaluated_as_it_is_trained(kind, double_backward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    wrapped = WRAPPERS[kind](model)
    half = {"Fabric, bfloat16": torch.bfloat16, "Fabric, compiled": torch.bfloat16}

    def by_hand(model, batch):
        dtype = half.get(kind)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            h = model(batch[0].to(dtype or torch.float32))
        return nn.functional.cross_entropy(h.float(), batch[1])

    before, results = copy.deepcopy(model.state_dict()), []
    for m, loss_fn in ((wrapped, cross_entropy), (twin, by_hand)):
        optimizer = MetaAdamW((model if m is wrapped else twin).named_parameters(), meta_lr=1.0)
        losses = optimizer.update_attention(m, *samples(2), loss_fn, samples(3)[2], double_backward=double_backward)
        results.append((tuple(losses), optimizer.modulator.state_dict()))
    assert_same(results[0], results[1])
    assert_same(model.state_dict(), before)
    loss = cross_entropy(wrapped, samples(1)[0])
    if kind == "Fabric, bfloat16":
        with pytest.raises(RuntimeError, match=r"fabric\.backward"):  # is still asked for outside of a meta-update
            loss.backward()
