"""Section 3.2: layer type × depth third × bias."""

import copy
from collections import OrderedDict

import pytest
import torch
from conftest import tiny
from torch import nn

from metaadamw_lite import MetaAdamW, fine_grained_groups
from metaadamw_lite.groups import block_index, depth_third, depths, is_bias, places_by_class, places_by_name


def type_of(model: nn.Module, by_class: bool) -> dict[str, str]:
    names = dict(model.named_parameters())
    by_name = dict(zip(names, places_by_name([list(names.items())])[0], strict=True))
    by_class_too = places_by_class(model)
    places = {name: by_class_too[p] for name, p in names.items()} if by_class else by_name
    return {name: place.layer_type for name, place in places.items()}


@pytest.mark.parametrize("by_class", [True, False], ids=["classes", "names only"])
def test_layer_types_of_a_transformer(by_class):
    types = type_of(tiny(), by_class)
    assert types["token_embedding.weight"] == "embedding"
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        assert types[f"layers.0.self_attn.{name}"] == "attention"
    for name in ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"):
        assert types[f"layers.1.{name}"] == "feed-forward"
    for name in ("layers.0.norm1.weight", "layers.1.norm2.bias", "batch_norm.weight", "batch_norm.bias"):
        assert types[name] == "norm"
    assert types["head.weight"] == types["head.bias"] == "other"


def test_the_class_decides_before_the_name():
    model = nn.ModuleDict(
        {"attention": nn.Embedding(3, 2), "embedding": nn.Linear(2, 2), "mlp": nn.LayerNorm(2), "x": nn.BatchNorm2d(2)}
    )
    types = type_of(model, by_class=True)
    assert types["attention.weight"] == "embedding"
    assert types["mlp.weight"] == types["mlp.bias"] == types["x.bias"] == "norm"
    assert types["embedding.weight"] == "embedding", "a linear layer says nothing, so its name decides"


def test_classes_of_users_are_known_by_their_names():
    class CausalSelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_proj = nn.Linear(2, 2)

    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 1))

    class AttentionClassifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = CausalSelfAttention(), LlamaRMSNorm(), nn.Linear(2, 2)

    types = type_of(AttentionClassifier(), by_class=True)
    assert types == {
        "a.c_proj.weight": "attention",
        "a.c_proj.bias": "attention",
        "b.weight": "norm",
        "fc.weight": "other",
        "fc.bias": "other",
    }


@pytest.mark.parametrize(
    ("name", "owner", "layer_type"),
    [
        ("transformer.wte.weight", "Part", "embedding"),  # GPT-2
        ("wpe.weight", "Part", "embedding"),
        ("h.0.attn.c_attn.weight", "Part", "attention"),
        ("h.0.ln_1.weight", "Part", "norm"),
        ("h.0.mlp.c_fc.weight", "Part", "feed-forward"),
        ("ln_f.weight", "Part", "norm"),
        ("part.weight", "GPT2Attention", "attention"),
        ("part.weight", "GPT2MLP", "feed-forward"),
        ("embeddings.LayerNorm.gamma", "Part", "norm"),  # BERT
        ("embeddings.word_embeddings.weight", "Part", "embedding"),
        ("encoder.layer.0.attention.self.query.weight", "Part", "attention"),
        ("encoder.layer.0.attention.output.LayerNorm.beta", "Part", "norm"),
        ("transformer.layer.0.ffn.lin1.weight", "Part", "feed-forward"),
        ("part.weight", "BertEmbeddings", "embedding"),
        ("part.weight", "BertSelfAttention", "attention"),
        ("part.weight", "FFN", "feed-forward"),
        ("model.embed_tokens.weight", "Part", "embedding"),  # Llama
        ("model.norm.weight", "Part", "norm"),
        ("layers.0.feed_forward.w1.weight", "Part", "feed-forward"),
        ("layers.0.q_proj.weight", "Part", "attention"),
        ("layers.0.k_proj.weight", "Part", "attention"),
        ("layers.0.v_proj.weight", "Part", "attention"),
        ("part.weight", "LlamaRMSNorm", "norm"),
        ("part.weight", "FeedForward", "feed-forward"),
        ("layers.0.in_proj_weight", "Part", "attention"),  # others
        ("layers.0.feedforward.0.weight", "Part", "feed-forward"),
        ("layer1.0.bn1.weight", "Part", "norm"),
        ("final_ln.weight", "Part", "norm"),
        ("part.weight", "FrozenBatchNorm2d", "norm"),
        ("part.weight", "PatchEmbedding", "embedding"),
        ("part.weight", "ClassAttn", "attention"),
        ("part.weight", "Feed_Forward", "feed-forward"),
        ("part.weight", "Part", "other"),
    ],
)
def test_names_in_well_known_models_tell_the_layer_type(name, owner, layer_type):
    """Either the parameter's name tells it, or the class of the module that owns the parameter."""
    path, _, leaf = name.rpartition(".")
    model = type(owner, (nn.Module,), {})()
    model.register_parameter(leaf, nn.Parameter(torch.ones(2, 2)))
    for part in reversed(path.split(".")):
        model = nn.ModuleDict({part: model})
    (group,) = fine_grained_groups(model.named_parameters(), model)
    assert group.name.split("/")[0] == layer_type


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("layers.3.norm1.bias", 3),
        ("encoder.layers.12.linear1.weight", 12),
        ("layer4.1.bn2.weight", 4),
        ("0.weight", 0),
        ("lstm.weight_hh_l1_reverse", 1),
        ("blocks.2.mlp.0.weight", 2),
        ("conv1.weight", None),
        ("head.linear1.bias", None),
    ],
)
def test_block_index_is_the_first_block_number(name, index):
    assert block_index(name) == index


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(1, "m"), (2, "sd"), (3, "smd"), (4, "smmd"), (6, "ssmmdd"), (12, "ssssmmmmdddd")],
)
def test_depth_thirds(blocks, expected):
    positions = depths([f"layers.{i}.weight" for i in range(blocks)])
    assert "".join(depth_third(x)[0] for x in positions) == expected


def test_what_stands_before_the_blocks_is_shallow_and_after_them_deep():
    names = ["embed.weight", "layers.0.w", "layers.1.w", "extra.w", "layers.2.w", "head.weight"]
    assert [depth_third(x) for x in depths(names)] == ["shallow", "shallow", "middle", "middle", "deep", "deep"]
    assert depths(["a.weight", "b.weight"]) == [0.5, 0.5]


def test_biases_by_name():
    assert all(is_bias(n) for n in ("bias", "a.bias", "a.in_proj_bias", "lstm.bias_ih_l0"))
    assert not any(is_bias(n) for n in ("norm.weight", "bias_net.weight"))


def test_every_parameter_is_in_exactly_one_group():
    model = tiny()
    groups = fine_grained_groups(model.named_parameters(), model)
    members = [p for g in groups for p in g.params]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    assert len({g.name for g in groups}) == len(groups)
    for group in groups:
        assert group.bias_ratio == (1.0 if group.name.endswith("/bias") else 0.0)


def test_the_optimizer_finds_the_classes_behind_named_parameters():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2, bias=False))
    assert MetaAdamW(model.named_parameters()).groups[0].name == "embedding/shallow/weight"
    assert MetaAdamW(list(model.named_parameters()), model=model).groups[0].name == "embedding/shallow/weight"
    assert MetaAdamW(list(model.named_parameters())).groups[0].name == "other/shallow/weight"


def test_a_class_that_is_known_is_not_overruled_by_the_shape():
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU(2))
    assert type_of(model, by_class=True)["1.weight"] == "other"
    assert type_of(model, by_class=False)["1.weight"] == "norm"


def split_by_decay(model: nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [{"params": [x for x in named if (x[1].ndim > 1) == matrix]} for matrix in (True, False)]


@pytest.mark.parametrize("by_class", [True, False])
def test_the_same_parameters_are_in_the_same_groups_however_they_are_passed(by_class):
    model = tiny()

    def names_of(optimizer):
        return {p: group.name for group in optimizer.groups for p in group.params}

    known = model if by_class else None
    whole = names_of(MetaAdamW(list(model.named_parameters()), model=known))
    assert names_of(MetaAdamW(split_by_decay(model), model=known)) == whole


def test_a_model_knows_its_parameters_whatever_they_are_called():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    (linear, _, scale, _) = (p for _, p in model[1].named_parameters())
    for named in (model[1].named_parameters(), list(model[1].named_parameters())):
        groups = {p: group.name for group in MetaAdamW(named, model=model).groups for p in group.params}
        assert groups[linear] == "other/deep/weight", "0.weight is the name of an embedding elsewhere in the model"
        assert groups[scale] == "norm/deep/weight"
    prefixed = MetaAdamW(model.named_parameters(prefix="net"))
    assert prefixed.groups[0].name == "embedding/shallow/weight"
    assert [g.name for g in fine_grained_groups(model.named_parameters(prefix="net"), model)] == [
        g.name for g in prefixed.groups
    ]


def test_the_depth_of_a_part_is_that_in_the_whole_model():
    model = nn.ModuleDict({"front": nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 1)})
    parts = [{"params": part.named_parameters()} for part in model.values()]
    whole = {p: group.name for group in MetaAdamW(model.named_parameters()).groups for p in group.params}
    split = {p: group.name for group in MetaAdamW(parts, model=model).groups for p in group.params}
    assert split == whole


def test_generators_inside_parameter_groups_tell_the_classes_too():
    model = nn.ModuleDict({"a": nn.Embedding(4, 3), "b": nn.LayerNorm(3), "c": nn.Linear(3, 1)})
    optimizer = MetaAdamW([{"params": model[k].named_parameters(), "lr": 0.1} for k in "abc"])
    types = [group.name.split("/")[0] for group in optimizer.groups]
    assert types == ["embedding", "norm", "norm", "other", "other"]


def test_copies_keep_their_groups_when_more_parameters_come():
    model = nn.ModuleDict({"a": nn.Embedding(4, 3), "b": nn.Linear(3, 1)})
    optimizer = MetaAdamW([("a.weight", model["a"].weight)], model=model)
    copied = copy.deepcopy(optimizer)
    for o in (optimizer, copied):
        o.add_param_group({"params": [("b.weight", nn.Parameter(torch.ones(1, 3)))]})
        assert [g.name for g in o.groups] == ["embedding/middle/weight", "other/middle/weight"]


def test_fallback_and_original_strategy_are_the_native_groups():
    model = tiny()
    native = [{"params": model.layers.parameters()}, {"params": model.head.parameters()}]
    unnamed = MetaAdamW(native)
    assert [g.name for g in unnamed.groups] == ["param_group_0", "param_group_1"]
    assert unnamed.groups[1].params == tuple(model.head.parameters())
    original = MetaAdamW(model.named_parameters(), group_strategy="original")
    assert len(original.groups) == 1
    assert len(original.groups[0].params) == len(list(model.parameters()))


def test_names_that_come_again_are_of_another_model():
    """As in ``chain(encoder.named_parameters(), decoder.named_parameters())``."""
    first = nn.Sequential(OrderedDict(**{"0": nn.Linear(2, 2), "1": nn.LayerNorm(2), "end": nn.Linear(2, 2)}))
    second = nn.Sequential(OrderedDict(**{"0": nn.LayerNorm(2), "1": nn.Linear(2, 2), "end": nn.LayerNorm(2)}))
    both = [*first.named_parameters(), *second.named_parameters()]
    places = places_by_name([both])[0]
    assert places == places_by_name([both[:6]])[0] + places_by_name([both[6:]])[0]
    types = [place.layer_type for place in places]
    assert types == [t for t in ("other", "norm", "other", "norm", "other", "norm") for _ in range(2)]
    groups = MetaAdamW(both).groups
    norms = {p for group in groups if group.name.startswith("norm") for p in group.params}
    assert norms == {*first[1].parameters(), *second[0].parameters(), *second[2].parameters()}


def test_a_group_knows_the_mean_depth_and_the_share_of_biases_of_its_tensors():
    blocks = nn.Sequential(*(nn.Linear(2, 2) for _ in range(7)))
    groups = {group.name: group for group in fine_grained_groups(blocks.named_parameters(), blocks)}
    assert groups["other/shallow/weight"].depth == pytest.approx((0 + 1 / 6) / 2)
    assert groups["other/deep/bias"].depth == pytest.approx((5 / 6 + 1) / 2)
    assert (groups["other/deep/bias"].bias_ratio, groups["other/deep/weight"].bias_ratio) == (1, 0)
    native = MetaAdamW(blocks.named_parameters(), group_strategy="original").groups
    assert (native[0].depth, native[0].bias_ratio) == (pytest.approx(0.5), 0.5)
    only_biases = [("6.bias", blocks[6].bias), ("0.bias", blocks[0].bias), ("0.weight", blocks[0].weight)]
    native = MetaAdamW([{"params": only_biases[:1]}, {"params": only_biases[1:]}], group_strategy="original").groups
    assert [(g.depth, g.bias_ratio) for g in native] == [(1, 1), (0, 0.5)]


def test_a_scripted_model_has_groups_by_name():
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(4, 3), out=nn.Linear(3, 1)))
    names = [group.name for group in MetaAdamW(torch.jit.script(model).named_parameters()).groups]
    assert names == [group.name for group in MetaAdamW(list(model.named_parameters())).groups]
