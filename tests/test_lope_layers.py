"""LoPE over layers of all kinds: which have an adapter, which are merged, in which precision, and what stays."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.parametrizations as parametrizations
from conftest import assert_same
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

from metaadamw_lite import LoPE, LoPELinear

HALVES = [torch.float16, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.* is deprecated:FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


class Chain(nn.Module):
    """Three layers in a row; the second is of the kind that is tested."""

    def __init__(self, middle, width=32):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(width, width), middle, nn.Linear(width, width)

    def forward(self, x):
        return self.last(self.middle(self.first(x).tanh()).tanh())


TARGETS = ["first", "middle", "last"]


def inputs(width=32, seed=0):
    return torch.randn(5, width, generator=torch.Generator().manual_seed(seed))


def linear(width=32):
    torch.manual_seed(0)
    return nn.Linear(width, width)


def adapters(model, targets=TARGETS, **settings):
    """Adapters of one expert that are not zero."""
    lope = LoPE.wrap(model, targets, **({"experts": 1, "poisoning": False} | settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lope.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return lope


def everything(model):
    """All of a model that a refused call must leave: modules, modes, values, and what is trained and has a gradient."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    flags = [(name, id(x), x.requires_grad, id(x.grad)) for name, x in tensors]
    return modules, flags


def values(model):
    return copy.deepcopy(dict(model.named_buffers())), {n: p.detach().clone() for n, p in model.named_parameters()}


# ---------------------------------------------------------------- layers that have no adapter


def lazy():
    return nn.LazyLinear(32)


def on_meta():
    return nn.Linear(32, 32, device="meta")


def flat():
    """As the first FSDP and ZeRO leave a layer."""
    layer = linear()
    layer.weight = nn.Parameter(layer.weight.detach().flatten())
    return layer


def emptied():
    layer = linear()
    layer.weight = nn.Parameter(torch.empty(0))
    return layer


def without_parameters():
    layer = linear()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    return layer


def raw(dtype):
    """Numbers that a forward of the layer's own would have to turn into others; ``nn.Linear``'s does not."""
    layer = linear()
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


def scripted():
    return torch.jit.script(nn.Sequential(linear()))


CANNOT_BE_ADAPTED = {
    "convolution": lambda: nn.Conv1d(32, 32, 1),
    "embedding": lambda: nn.Embedding(3, 32),
    "activation": nn.Tanh,
    "container": lambda: nn.Sequential(linear()),
    "bilinear": lambda: nn.Bilinear(32, 32, 32),
    "lazy": lazy,
    "on the meta device": on_meta,
    "complex": lambda: nn.Linear(32, 32, dtype=torch.complex64),
    "no inputs": lambda: nn.Linear(0, 32),
    "flat": flat,
    "emptied": emptied,
    "without parameters": without_parameters,
    "adapted": lambda: LoPELinear(linear()),
    "inside of attention": lambda: nn.MultiheadAttention(32, 2),
    "scripted": scripted,
    "float8": lambda: raw(torch.float8_e4m3fn),
    "int8": lambda: raw(torch.int8),
}


@pytest.mark.parametrize("kind", CANNOT_BE_ADAPTED)
@pytest.mark.parametrize("training", [True, False])
def test_what_cannot_be_adapted_is_named_and_nothing_is_changed(kind, training):
    model = Chain(CANNOT_BE_ADAPTED[kind]()).train(training)
    model.last.weight.requires_grad_(False)
    model.first.bias.grad = torch.ones(32)
    inner = {"inside of attention": "middle.out_proj", "scripted": "middle.0"}.get(kind, "middle")
    before = everything(model)
    with pytest.raises(ValueError, match=rf"{inner} cannot be adapted: "):
        LoPE.wrap(model, ["first", inner, "last"])
    assert everything(model) == before


def test_all_layers_that_cannot_be_adapted_are_named_and_no_others():
    model = nn.ModuleDict({"a": linear(), "b": nn.Conv1d(3, 3, 1), "c": on_meta(), "d": linear(), "e": lazy()})
    with pytest.raises(ValueError) as error:
        LoPE.wrap(model, ["a", "b", "c", "d", "e"])
    assert [name for name in "abcde" if f"{name} cannot be adapted" in str(error.value)] == ["b", "c", "e"]


@pytest.mark.parametrize("targets", [["base"], ["first", "first.base"], [""]])
def test_a_place_that_an_adapter_cannot_take_is_refused(targets):
    model = Chain(linear())
    LoPE.wrap(model, ["first"])
    before = everything(model)
    with pytest.raises(ValueError, match="cannot be adapted"):
        LoPE.wrap(model, targets)
    assert everything(model) == before


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in (model.first, model.middle, model.last):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_layers_of_the_first_fsdp_are_refused(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Chain(linear()), use_orig_params=True, device_id=torch.device("cpu"))
    before = everything(model)
    with pytest.raises(ValueError, match="fully_shard"):
        LoPE.wrap(model, TARGETS)
    assert everything(model) == before


@pytest.mark.parametrize("wrap", [sharded, nn.parallel.DistributedDataParallel])
def test_layers_that_are_spread_over_processes_are_adapted_before_or_refused(one_process, wrap):
    model = wrap(Chain(linear()))
    before = everything(model)
    with pytest.raises(ValueError, match="middle cannot be adapted"):
        LoPE.wrap(model, ["first", "middle"])
    assert everything(model) == before

    plain = Chain(linear())
    lope = adapters(plain)
    expected = plain(inputs())
    model = wrap(plain)
    torch.testing.assert_close(model(inputs()), expected)
    if wrap is sharded:
        before = everything(plain)
        with pytest.raises(ValueError, match="middle cannot be merged"):
            lope.merge()
        assert everything(plain) == before


def test_memory_that_is_not_enough_leaves_everything_as_found():
    huge = nn.Linear(32, 32)
    model = Chain(linear())
    model.last = huge
    before = everything(model)
    with pytest.raises((RuntimeError, MemoryError)):
        LoPE.wrap(model, TARGETS, rank=2**50)
    assert everything(model) == before


# ---------------------------------------------------------------- layers that have one, by their own forward


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shouting(nn.Module):
    def forward(self, weight):
        return 3 * weight


def pruned():
    layer = linear()
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def parametrized():
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Shouting())
    return layer


def hooked(kind):
    layer = linear()
    if kind == "before":
        layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    else:
        layer.register_forward_hook(lambda module, args, output: 3 * output)
    return layer


def with_a_forward_of_its_own():
    """As libraries do that change layers one by one."""
    layer = linear()
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)
    return layer


def torchao(config, width=32):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear(width))
    quantization.quantize_(holder, getattr(quantization, config)())
    return holder[0]


def torch_quantised():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear}, torch.qint8)[0]


def bitsandbytes_8bit():
    layer = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(32, 32, has_fp16_weights=False)
    layer.load_state_dict(linear().state_dict())
    return layer


def bitsandbytes_4bit():
    layer = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    layer.load_state_dict(linear(64).state_dict())
    return layer.to("cpu")  # which packs it


CANNOT_BE_MERGED = {
    "weight norm, by a hook": lambda: weight_norm(linear()),
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "spectral norm, by a hook": lambda: spectral_norm(linear()),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "another parametrisation": parametrized,
    "pruned": pruned,
    "a subclass": lambda: Doubling(32, 32),
    "a hook before": lambda: hooked("before"),
    "a hook after": lambda: hooked("after"),
    "a forward of its own": with_a_forward_of_its_own,
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
    "torch's own int8": torch_quantised,
    "bitsandbytes int8": bitsandbytes_8bit,
    "bitsandbytes 4 bits": bitsandbytes_4bit,
}


@pytest.mark.parametrize("kind", CANNOT_BE_MERGED)
def test_a_layer_with_a_forward_of_its_own_is_adapted_and_its_merge_refused(kind):
    layer = CANNOT_BE_MERGED[kind]()
    width = layer.in_features
    model, x = Chain(layer, width).eval(), inputs(width)
    model(x)  # which quantises the layers of some libraries
    expected = model(x)
    before = {name: (p, p._version) for name, p in model.named_parameters()}
    start = LoPE.wrap(model, TARGETS, experts=1, poisoning=False)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert all(p.dtype == torch.float32 for p in start.parameters())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"{layer}.{part}" for layer in TARGETS for part in ("A", "B", "router")
    ]
    optimizer = torch.optim.AdamW(start.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(bool(p.any()) for name, p in model.named_parameters() if name.endswith(".B"))
    trained = model(x)
    assert not torch.allclose(trained, expected)
    for name, p in model.named_parameters():
        if ".base." in name:
            same, version = before[name.replace(".base.", ".")]
            assert p is same
            assert p._version == version

    modules = everything(model)
    with pytest.raises(ValueError, match="middle cannot be merged: ") as error:
        start.merge()
    assert str(error.value).count("cannot be merged") == 1
    assert everything(model) == modules
    assert_same(model(x), trained)


def test_what_computes_a_weight_is_not_taken_for_a_layer_of_that_name():
    model = nn.Sequential(parametrizations.weight_norm(linear()), linear())
    assert list(LoPE.wrap(model, ["0", "1"]).layers) == ["0", "1"]


def test_looking_at_a_layer_does_not_move_its_buffers():
    """Spectral norm computes the weight anew, from a vector that it moves, whenever it is read."""
    for layer in (parametrizations.spectral_norm(linear()), spectral_norm(linear())):
        model = Chain(layer).train()
        before = list(values(model)[0].values())
        lope = adapters(model)
        with pytest.raises(ValueError, match="middle cannot be merged"):
            lope.merge()
        assert_same(list(values(model)[0].values()), before)


def late_weight_norm(model, lope):
    parametrizations.weight_norm(model.middle.base)


def late_pruning(model, lope):
    prune.random_unstructured(model.middle.base, "weight", 0.5)


def late_hook(model, lope):
    model.middle.register_forward_hook(lambda module, args, output: output)


def late_alias(model, lope):
    """Another name, under which the layer has no adapter, and would have one by the merge."""
    model.other = nn.Sequential(model.middle.base)


def late_replacement(model, lope):
    model.middle = linear()


def a_number_that_is_none(model, lope):
    with torch.no_grad():
        model.middle.B[0, 0, 0] = torch.nan


def too_large(model, lope):
    model.middle.base.half()
    with torch.no_grad():
        model.middle.B.fill_(1e5)


def other_shape(model, lope):
    model.middle.base.weight = nn.Parameter(torch.zeros(40, 32))


def different_experts(model, lope):
    model.middle = LoPELinear(linear(), experts=2, poisoning=False)
    nn.init.normal_(model.middle.B)
    lope.layers["middle"] = model.middle


@pytest.mark.parametrize(
    "change",
    [
        late_weight_norm,
        late_pruning,
        late_hook,
        late_alias,
        late_replacement,
        a_number_that_is_none,
        too_large,
        other_shape,
        different_experts,
    ],
)
def test_merging_changes_all_layers_or_none(change):
    model = Chain(linear()).eval()
    lope = adapters(model)
    change(model, lope)
    before, numbers, layers = everything(model), values(model), dict(lope.layers)
    with pytest.raises(ValueError, match="middle cannot be merged: ") as error:
        lope.merge()
    assert str(error.value).count("cannot be merged") == 1
    assert everything(model) == before
    torch.testing.assert_close(values(model), numbers, rtol=0, atol=0, equal_nan=True)
    assert lope.layers == layers


class Twice(Chain):
    """The second layer has a second name, below another module, and the forward pass takes it by both."""

    def __init__(self, middle, width=32):
        super().__init__(middle, width)
        self.other = nn.ModuleDict({"middle_too": middle})

    def forward(self, x):
        return super().forward(x) + self.other["middle_too"](x)


class FirstByTheOtherName(Twice):
    def __init__(self, middle, width=32):
        super().__init__(middle, width)
        del self.middle
        self.middle = middle  # now behind ``other``


@pytest.mark.parametrize("target", ["middle", "middle_too"])
@pytest.mark.parametrize("kind", [Twice, FirstByTheOtherName])
def test_a_layer_of_two_names_has_one_adapter_under_both(kind, target):
    model, x = kind(linear()), inputs()
    lope = adapters(model, [target])
    assert list(lope.layers) == ["other.middle_too" if target == "middle_too" else "middle"]
    assert model.middle is model.other["middle_too"] is next(iter(lope.layers.values()))
    expected = model(x)
    lope.merge()
    torch.testing.assert_close(model(x), expected)
    assert type(model.middle) is nn.Linear
    assert model.middle is model.other["middle_too"]


def test_a_second_name_where_no_adapter_can_be_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2)})
    model["out"] = model["attention"].out_proj
    before = everything(model)
    with pytest.raises(ValueError, match=r"attention\.out_proj cannot be adapted"):
        LoPE.wrap(model, ["out"])
    assert everything(model) == before


def test_float8_is_adapted_where_something_else_widens_it():
    model, x = Chain(raw(torch.float8_e4m3fn)), inputs()

    def forward(x, layer=model.middle):
        return nn.functional.linear(x, layer.weight.float(), layer.bias)

    model.middle.forward = forward
    expected = model(x)
    LoPE.wrap(model, TARGETS)
    assert_same(model(x), expected)


def test_all_layers_that_cannot_be_merged_are_named():
    model = Chain(Doubling(32, 32))
    model.last = parametrizations.weight_norm(model.last)
    lope = adapters(model)
    with pytest.raises(ValueError, match=r"middle cannot be merged: .*; last cannot be merged: "):
        lope.merge()
    with pytest.raises(ValueError, match=r"first cannot be merged: .*; middle cannot be merged: .*; last cannot"):
        LoPE.wrap(Chain(linear()), TARGETS).merge()


def test_what_was_in_the_way_of_merging_can_be_removed():
    model, x = Chain(pruned()), inputs()
    lope = adapters(model)
    expected = model(x)
    with pytest.raises(ValueError, match="middle cannot be merged"):
        lope.merge()
    prune.remove(model.middle.base, "weight")
    lope.merge()
    torch.testing.assert_close(model(x), expected)
    assert [type(m) for m in model.children()] == [nn.Linear] * 3


def test_a_bias_may_be_computed_where_the_weight_is_plain():
    layer, x = linear(), inputs()
    parametrize.register_parametrization(layer, "bias", Shouting())
    model = Chain(layer)
    lope = adapters(model)
    expected = model(x)
    lope.merge()
    torch.testing.assert_close(model(x), expected)


class Gated(nn.Linear):
    def forward(self, x, gate, *, shift=0.0):
        return gate * super().forward(x) + shift


def test_other_arguments_go_to_the_layer():
    model, x = nn.ModuleDict({"gated": Gated(32, 32)}), inputs()
    expected = model["gated"](x, 2.0, shift=1.0)
    lope = LoPE.wrap(model, ["gated"])
    assert_same(model["gated"](x, 2.0, shift=1.0), expected)
    assert list(lope.layers) == ["gated"]


@pytest.mark.parametrize("output", [lambda y: (y, None), lambda y: y.sum(dim=-1, keepdim=True), lambda y: y[None]])
def test_an_output_that_an_adapter_cannot_be_added_to_is_refused(output):
    model = Chain(linear())
    forward = model.middle.forward
    model.middle.forward = lambda x: output(forward(x))
    LoPE.wrap(model, ["middle"])
    with pytest.raises(ValueError, match="an adapter can be added to shape"):
        model(inputs())


def test_a_layer_that_passes_no_gradient_on_is_warned_of():
    model = Chain(torchao("Int8DynamicActivationInt8WeightConfig"))
    lope = adapters(model)
    with pytest.warns(UserWarning, match="passes no gradient on"):
        model(inputs())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        model(inputs())
    assert len(lope.layers) == 3


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_adapters_are_float32_or_wider_beside_a_base_of_any_precision(base, adapter):
    model, x = Chain(linear()).to(base), inputs().to(base)
    expected = model(x)
    lope = LoPE.wrap(model, TARGETS)
    assert {p.dtype for p in lope.parameters()} == {adapter}
    assert_same(model(x), expected)
    assert {p.dtype for name, p in model.named_parameters() if ".base." in name} == {base}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_precision_does_not_decide_where_adapters_start(dtype):
    expected = LoPE.wrap(Chain(linear()), TARGETS).state_dict()
    model = Chain(linear())
    torch.set_default_dtype(dtype)
    try:
        lope = LoPE.wrap(model, TARGETS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(lope.state_dict(), expected)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "to like": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "and back": lambda m: m.half().float(),
    "wrapped": lambda m: nn.Sequential(m).half(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_model_that_is_cast_keeps_the_adapters_bits(cast):
    model = Chain(linear())
    lope = adapters(model)
    optimizer = torch.optim.SGD(lope.parameters(), lr=1e-6)  # a step that half precision would lose
    before = {name: x.clone() for name, x in lope.state_dict().items()}
    CASTS[cast](model)
    assert_same(lope.state_dict(), before)
    assert model.last.base.weight.dtype == {
        "bfloat16": torch.bfloat16,
        "to": torch.bfloat16,
        "and back": torch.float32,
    }.get(cast, torch.float16)
    x = inputs().to(model.last.base.weight.dtype)
    out = model(x)
    assert out.dtype == x.dtype
    out.float().square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(x, before[name]) for name, x in lope.state_dict().items() if "router" not in name)


def test_a_cast_to_float64_widens_adapters_too():
    model = Chain(linear())
    lope = adapters(model)
    model.double()
    assert {p.dtype for p in lope.parameters()} == {torch.float64}
    assert model(inputs().double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_in_half_precision_does_not_narrow_adapters(dtype):
    model, other = Chain(linear()), Chain(linear())
    adapters(model)
    lope = adapters(other)
    state = {name: x.to(dtype) for name, x in model.state_dict().items()}
    other.load_state_dict(state, assign=True)
    assert {p.dtype for p in lope.parameters()} == {torch.float32}
    assert other.first.base.weight.dtype == dtype
    assert_same(lope.state_dict()["first.A"], state["first.A"].float())


def peft_beside(model, lope):
    """The same adapters as ``peft`` has them, for one expert: (α/r) B A."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    other = get_peft_model(model, config)
    with torch.no_grad():
        for name, layer in lope.layers.items():
            lora = other.base_model.model.get_submodule(name)
            lora.lora_A["default"].weight.copy_(layer.A)
            lora.lora_B["default"].weight.copy_(layer.B[0])
    return other


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_one_expert_is_pefts_lora_in_every_precision(base, autocast):
    model = Chain(linear()).to(base)
    lope = adapters(copy_of := copy.deepcopy(model))
    peft, x = peft_beside(model, lope), inputs().to(base)
    region = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with region:
        mine, theirs = copy_of(x), peft(x)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs)
    mine.float().square().sum().backward()
    theirs.float().square().sum().backward()
    for name, layer in lope.layers.items():
        lora = peft.base_model.model.get_submodule(name)
        assert layer.A.grad.dtype == lora.lora_A["default"].weight.grad.dtype == torch.float32
        close = {"rtol": 0.05, "atol": 0.05} if base != torch.float32 or autocast else {}
        torch.testing.assert_close(layer.A.grad, lora.lora_A["default"].weight.grad, **close)


@pytest.mark.parametrize("poisoning", [True, False])
@pytest.mark.parametrize("mask", [None, "plain", "compensated"])
@pytest.mark.parametrize("base", HALVES)
def test_every_mask_gives_the_type_of_the_base(base, mask, poisoning):
    model = Chain(linear())
    lope = adapters(model, poisoning=poisoning, experts=3)
    for layer in lope.layers.values():
        layer.mask = mask
    x = inputs()
    wide = model(x)
    model.to(base)
    out = model(x.to(base))
    assert out.dtype == base
    torch.testing.assert_close(out.float(), wide, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", base):
        assert model(x.to(base)).dtype == base


@pytest.mark.parametrize("base", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_scaler_takes_the_adapters_gradients(base, stage):
    model, x = Chain(linear()).to(base), inputs().to(base)
    lope = adapters(model, poisoning=True)
    lope.stage(stage)
    optimizer, scaler = torch.optim.AdamW(lope.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=64.0)
    before = {name: p.clone() for name, p in lope.state_dict().items()}
    with torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(list(lope.parameters()), 1.0)
    scaler.step(optimizer)
    scaler.update()
    moved = {name.rpartition(".")[2] for name, p in lope.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {1: {"A", "B_D"}, 2: {"A", "B", "router"}}[stage]


@pytest.mark.parametrize("region", ["none", "autocast", "inference mode"])
@pytest.mark.parametrize("base", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_merge_is_the_sum_rounded_once(base, region):
    model = Chain(linear()).to(base)
    lope = adapters(model)
    wide = {n: (x.base.weight.double() + 2.0 * x.B[0].double() @ x.A.double()).detach() for n, x in lope.layers.items()}
    regions = {"autocast": torch.autocast("cpu", torch.bfloat16), "inference mode": torch.inference_mode()}
    with regions.get(region, contextlib.nullcontext()):
        lope.merge()
    for name, weight in wide.items():
        merged = model.get_submodule(name).weight
        assert merged.dtype == base
        torch.testing.assert_close(merged.double(), weight, rtol=torch.finfo(base).eps, atol=1e-6)
        assert not merged.is_inference()


def test_adapters_made_in_inference_mode_can_be_trained():
    model = Chain(linear())
    with torch.inference_mode():
        lope = LoPE.wrap(model, TARGETS)
    model(inputs()).square().sum().backward()
    assert lope.layers["last"].B_D.grad is not None


# ---------------------------------------------------------------- what wrapping does to the rest


@pytest.mark.parametrize("training", [True, False])
def test_adapters_have_the_mode_of_their_layer(training):
    model = Chain(linear()).train(training)
    LoPE.wrap(model, TARGETS)
    assert {m.training for m in model.modules()} == {training}


def test_an_optimizer_does_not_go_on_moving_what_is_frozen():
    model = Chain(linear())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(inputs()).sum().backward()
    LoPE.wrap(model, ["middle"])
    before = values(model)
    optimizer.step()
    assert_same(values(model), before)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_adapters_go_into_a_model_inside_of_a_wrapper(wrap):
    model, x = wrap(Chain(linear())), inputs()
    expected = model(x)
    lope = adapters(model)
    adapted = model(x)
    assert not torch.allclose(adapted, expected)
    lope.merge()
    torch.testing.assert_close(model(x), adapted)
