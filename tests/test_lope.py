"""LoPE: formulas against plain Python, what trains in each stage, the mask, merging, saving, both kinds of noise."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import assert_same
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from metaadamw_lite import LoPE, LoPELinear
from metaadamw_lite.lope import compensated, continuous_noise, discrete_noise


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 5), "v": nn.Linear(5, 6)}) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["v"](block["q"](x).tanh())
        return self.head(x)


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def batch(seed=0, count=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator).double(), torch.randint(0, 3, (count,), generator=generator)


def train(model, lope, steps=5, seed=0, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(lope.parameters(), lr=0.05, weight_decay=0.1)
    for k in range(steps):
        optimizer.zero_grad()
        x, y = batch(seed + k)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def filled(layer, seed=0):
    """The layer with experts that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.adapter().values():
            p.copy_(torch.randn(p.shape, generator=generator))
    return layer


def times(matrix, vector):
    return [sum(a * v for a, v in zip(row, vector, strict=True)) for row in matrix]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def by_hand(layer, row, mask):
    """What a layer makes of one row, in plain Python."""
    h = times(layer.A.tolist(), row)
    exps = [math.exp(score) for score in times(layer.router.tolist(), row)]
    weights = [e / sum(exps) for e in exps]
    outputs = [times(expert, h) for expert in layer.B.tolist()]
    poison = times(layer.B_D.tolist(), h)
    clean = weights[:-1]
    if mask == "compensated":
        raised = [w * (1 + cosine(out, poison)) for w, out in zip(clean, outputs, strict=True)]
        clean = [w / sum(raised) for w in raised]
    mixed = [sum(w * out[j] for w, out in zip(clean, outputs, strict=True)) for j in range(len(poison))]
    if mask is None:
        mixed = [m + weights[-1] * p for m, p in zip(mixed, poison, strict=True)]
    base = times(layer.base.weight.tolist(), row)
    return [b + c + layer.scale * m for b, c, m in zip(base, layer.base.bias.tolist(), mixed, strict=True)]


@pytest.mark.parametrize("mask", [None, "plain", "compensated"])
def test_a_layer_is_its_formula(mask):
    layer = filled(LoPELinear(nn.Linear(4, 3).double(), rank=2, experts=3, scale=1.5))
    layer.mask = mask
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.tensor([by_hand(layer, row, mask) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x.view(5, 1, 4)).squeeze(1), layer(x))


def test_compensation_keeps_the_scale():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 3, generator=generator)
    outputs, poisoned = torch.randn(50, 3, 7, generator=generator), torch.randn(50, 7, generator=generator)
    assert (compensated(scores, outputs, poisoned).sum(dim=-1) - 1).abs().max() < 1e-6
    one = poisoned[0]
    alike = compensated(torch.zeros(2), torch.stack([one, -one]), one)
    torch.testing.assert_close(alike, torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    quarter = torch.tensor([0.25, 0.75])
    for p in poisoned:
        torch.testing.assert_close(compensated(quarter.log(), torch.stack([-p, -3 * p]), p), quarter)
    torch.testing.assert_close(compensated(quarter.log(), torch.zeros(2, 7), torch.zeros(7)), quarter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_poisoning_expert_may_have_had_all_the_weight(dtype):
    layer = filled(LoPELinear(nn.Linear(4, 3), rank=2, experts=3)).to(dtype)
    with torch.no_grad():
        layer.router[-1] = 1000 * torch.ones(4)
    layer.mask = "compensated"
    assert torch.isfinite(layer(torch.ones(2, 4, dtype=dtype))).all()


@pytest.mark.parametrize("poisoning", [True, False])
def test_wrapping_changes_nothing_and_training_leaves_the_base_alone(poisoning):
    model = net()
    x, _ = batch()
    expected, before = model(x), copy.deepcopy(model.state_dict())
    lope = LoPE.wrap(model, ["q", "v"], poisoning=poisoning)
    assert torch.equal(model(x), expected)
    assert list(lope.layers) == ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v"]
    if poisoning:
        lope.mask_poisoning_expert()
        assert torch.equal(model(x), expected)
        lope.stage(1)
    train(model, lope)
    assert not torch.equal(model(x), expected)
    for name, value in before.items():
        name = name.replace(".q.", ".q.base.").replace(".v.", ".v.base.")
        assert torch.equal(model.state_dict()[name], value)


def test_each_stage_moves_its_own_parameters():
    model = net()
    lope = LoPE.wrap(model, ["q", "v"])
    moved = {}
    optimizer = torch.optim.AdamW(lope.parameters(), lr=0.05, weight_decay=0.1)
    for stage in (1, 2):
        lope.stage(stage)
        before = {name: x.clone() for name, x in lope.state_dict().items()}
        train(model, lope, optimizer=optimizer, seed=10 * stage)
        after = lope.state_dict()
        moved[stage] = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {1: {"A", "B_D"}, 2: {"A", "B", "router"}}


def test_experts_do_not_stay_copies_of_one_another():
    model = net()
    lope = LoPE.wrap(model, ["q"], poisoning=False)
    train(model, lope, steps=10)
    experts = lope.layers["blocks.0.q"].B
    assert not torch.allclose(experts[0], experts[1])


def test_the_poisoning_expert_takes_part_until_it_is_masked():
    model = net()
    lope = LoPE.wrap(model, ["q", "v"])
    train(model, lope)
    lope.stage(2)
    x, _ = batch()
    with_it = model(x)
    with pytest.raises(ValueError, match="compensate is 'plain'; allowed are True, False"):
        lope.mask_poisoning_expert("plain")
    assert torch.equal(model(x), with_it)
    lope.mask_poisoning_expert(compensate=False)
    assert not torch.allclose(model(x), with_it)
    torch.testing.assert_close(model(x), net()(x), msg="the clean experts are still zero")
    lope.stage(2)
    assert torch.equal(model(x), with_it)


def test_it_has_the_parameters_of_a_lora_of_three_times_its_rank():
    """The arms of a comparison can have equally many trainable parameters; on square layers exactly."""
    one = nn.ModuleDict({"q": nn.Linear(8, 8)})
    lope = LoPE.wrap(copy.deepcopy(one), ["q"], rank=4, experts=3)
    plain = LoPE.wrap(copy.deepcopy(one), ["q"], rank=4, experts=4, poisoning=False)
    peft = get_peft_model(one, LoraConfig(r=12, target_modules=["q"]))
    count = sum(p.numel() for p in lope.parameters())
    assert count == sum(p.numel() for p in plain.parameters())
    assert count == sum(p.numel() for p in peft.parameters() if p.requires_grad)


@pytest.mark.parametrize("poisoning", [True, False])
def test_one_expert_merges_exactly(poisoning):
    model = net()
    lope = LoPE.wrap(model, ["q", "v"], experts=1, poisoning=poisoning)
    train(model, lope)
    if poisoning:
        lope.stage(2)
        train(model, lope)
        with pytest.raises(ValueError, match=r"blocks\.0\.q cannot be merged: the poisoning expert takes part"):
            lope.merge()
        lope.mask_poisoning_expert()
    x, _ = batch(5)
    expected = model(x)
    assert lope.merge() is model
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert type(model.blocks[0]["q"]) is nn.Linear
    assert set(model.state_dict()) == set(net().state_dict())


def test_merging_leaves_what_shared_the_weight_alone():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)}).double()
    model["head"].weight = model["embedding"].weight
    lope = LoPE.wrap(model, ["head"], experts=1, poisoning=False)
    with torch.no_grad():
        lope.layers["head"].B.normal_()
    words = torch.arange(5)
    expected = model["head"](model["embedding"](words))
    lope.merge()
    torch.testing.assert_close(model["head"](model["embedding"](words)), expected)


def test_a_layer_under_two_names_has_one_adapter_in_both_places():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": shared}), "b": nn.ModuleDict({"q": shared})})
    lope = LoPE.wrap(model, ["q"], experts=1, poisoning=False)
    assert model["a"]["q"] is model["b"]["q"]
    assert list(lope.layers) == ["a.q"]
    lope.merge()
    assert model["a"]["q"] is model["b"]["q"] is shared


@pytest.mark.parametrize("target", ["linear1", "out_proj"])
def test_layers_that_torch_reads_directly_are_refused(target):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"reads the weight and would ignore an adapter"):
        LoPE.wrap(model, [target])
    assert all(p.requires_grad for p in model.parameters())


def test_several_experts_do_not_merge_and_nothing_is_changed():
    model = net()
    lope = LoPE.wrap(model, ["q"], experts=2, poisoning=False)
    train(model, lope)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="the router mixes 2 different experts by the input"):
        lope.merge()
    assert_same(model.state_dict(), before)


def test_saving_holds_the_adapters_alone_and_training_goes_on(tmp_path):
    model = net()
    lope = LoPE.wrap(model, ["q", "v"])
    optimizer = train(model, lope)
    save_file(lope.state_dict(), tmp_path / "adapters.safetensors")
    saved_optimizer = copy.deepcopy(optimizer.state_dict())
    assert {name.rpartition(".")[2] for name in lope.state_dict()} == {"A", "B", "B_D", "router"}
    lope.stage(2)
    train(model, lope, optimizer=optimizer, seed=7)

    again = net()
    resumed = LoPE.wrap(again, ["q", "v"], seed=9)
    resumed.load_state_dict(load_file(tmp_path / "adapters.safetensors"))
    other = torch.optim.AdamW(resumed.parameters(), lr=0.05, weight_decay=0.1)
    other.load_state_dict(saved_optimizer)
    resumed.stage(2)
    train(again, resumed, optimizer=other, seed=7)
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("change", [{"rank": 3}, {"experts": 2}, {"poisoning": False}])
def test_a_state_of_other_adapters_is_refused_by_name(change):
    lope, other = LoPE.wrap(net(), ["q"]), LoPE.wrap(net(), ["q"], **change)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"differing: blocks\.0\.q\."):
        other.load_state_dict(lope.state_dict())
    assert_same(other.state_dict(), before)


@pytest.mark.parametrize(
    ("targets", "change", "message"),
    [
        (["query"], {}, r"'query', which matches no layer; linear ones are \['head', 'q', 'v'"),
        (["q", "k"], {}, "'k'"),
        (["q", "blocks"], {}, "base is a ModuleList"),
        ([], {}, "empty"),
        ("q", {}, "a sequence of names"),
        (["q"], {"rank": 0}, "rank is 0"),
        (["q"], {"experts": 0}, "experts is 0"),
        (["q"], {"rank": 2.5}, r"rank is 2\.5"),
        (["q"], {"scale": math.nan}, "scale is nan"),
        (["q"], {"seed": -1}, "seed is -1"),
        (["q"], {"poisoning": "yes"}, "poisoning is 'yes'"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_changed(targets, change, message):
    model = net()
    model.head.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        LoPE.wrap(model, targets, **change)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_what_has_no_stages_and_what_is_wrapped_twice():
    model = net()
    lope = LoPE.wrap(model, ["q"], poisoning=False)
    with pytest.raises(ValueError, match="no poisoning expert"):
        lope.stage(1)
    with pytest.raises(ValueError, match="no poisoning expert"):
        lope.mask_poisoning_expert()
    with pytest.raises(ValueError, match="base is a LoPELinear"):
        LoPE.wrap(model, ["q"])
    with pytest.raises(ValueError, match="stage is 3"):
        LoPE.wrap(net(), ["q"]).stage(3)


def test_the_seed_alone_decides_where_adapters_start():
    models = [net() for _ in range(3)]
    state = torch.get_rng_state()
    first, again, other = (LoPE.wrap(m, ["q"], seed=seed) for m, seed in zip(models, (0, np.int64(0), 1), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(first.state_dict(), again.state_dict())
    assert not torch.equal(first.layers["blocks.0.q"].A, other.layers["blocks.0.q"].A)
    assert not torch.equal(first.layers["blocks.0.q"].A, first.layers["blocks.1.q"].A)
    assert not torch.equal(first.layers["blocks.1.q"].A, other.layers["blocks.0.q"].A)


def test_merged_adapters_have_no_stages_left():
    model = net()
    lope = LoPE.wrap(model, ["q"], experts=1, poisoning=False)
    lope.merge()
    for act in (lambda: lope.stage(1), lope.mask_poisoning_expert):
        with pytest.raises(ValueError, match="merged into the model"):
            act()


# ---------------------------------------------------------------- noise

WORDS = [f"{'abcdefghijkl'[k % 12] * (k % 5 + 1)}{k}" for k in range(300)]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 1.0])
def test_discrete_noise_has_exact_shares_and_says_where(share):
    noisy = discrete_noise(WORDS, share, seed=1)
    parts = [noisy.shuffled, noisy.inserted, noisy.deleted]
    chosen = [i for part in parts for i in part]
    assert len(chosen) == len(set(chosen)) == round(share * 300)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [i for i, (a, b) in enumerate(zip(WORDS, noisy.words, strict=True)) if a != b] == sorted(chosen)
    assert all(len(noisy.words[i]) == len(WORDS[i]) + 1 for i in noisy.inserted)
    assert all(len(noisy.words[i]) == len(WORDS[i]) - 1 for i in noisy.deleted)
    assert Counter(noisy.words[i] for i in noisy.shuffled) == Counter(WORDS[i] for i in noisy.shuffled)


def test_discrete_noise_is_seeded_and_leaves_the_words_alone():
    before = list(WORDS)
    assert discrete_noise(WORDS, 0.2, 1) == discrete_noise(WORDS, 0.2, np.int64(1))
    assert discrete_noise(WORDS, 0.2, 1) != discrete_noise(WORDS, 0.2, 2)
    assert before == WORDS


def test_words_that_cannot_be_shortened_or_swapped_are_lengthened():
    short = discrete_noise(["a"] * 9, 1.0)
    assert short.deleted == []
    assert len(short.shuffled) == 3
    assert len(short.inserted) == 6
    assert discrete_noise(["a"], 1.0).inserted == [0]
    assert discrete_noise([], 0.5).words == []


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_short_texts_have_all_kinds_of_noise(count):
    found = Counter()
    for seed in range(3000):
        noisy = discrete_noise(WORDS[:count], 1.0, seed)
        sizes = {"shuffled": len(noisy.shuffled), "inserted": len(noisy.inserted), "deleted": len(noisy.deleted)}
        assert sum(sizes.values()) == count
        assert sizes["shuffled"] != 1
        found.update(sizes)
    shares = [found[kind] / found.total() for kind in ("shuffled", "inserted", "deleted")]
    if count < 4:
        assert shares == pytest.approx([1 / 3] * 3, abs=0.02)
    else:
        assert found == {kind: 3000 * n for kind, n in zip(found, {4: (2, 1, 1), 5: (2, 2, 1)}[count], strict=True)}


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, None])
def test_bad_shares_are_quoted(share):
    with pytest.raises(ValueError, match=f"share is {share}"):
        discrete_noise(WORDS, share)


def test_what_is_no_text_and_no_embedding_is_refused():
    with pytest.raises(ValueError, match="words is 'the film was long'"):
        discrete_noise("the film was long", 0.5)
    with pytest.raises(ValueError, match=r"embeddings are torch\.int64"):
        continuous_noise(torch.zeros(2, 3, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool), 0.1)


def test_continuous_noise_is_uniform_at_valid_tokens_only():
    x = torch.zeros(20, 50, 30)
    valid = torch.arange(50).expand(20, 50) < 40
    noisy = continuous_noise(x, valid, 0.5, torch.Generator().manual_seed(0))
    assert not noisy[:, 40:].any()
    values = noisy[:, :40]
    assert values.abs().max() <= 0.5
    assert values.mean().abs() < 0.01
    assert values.var().item() == pytest.approx(0.5**2 / 3, rel=0.02)
    with torch.device("meta"):
        again = continuous_noise(x, valid, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, again)


def test_continuous_noise_refuses_what_does_not_fit():
    x, valid = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="scale is -1"):
        continuous_noise(x, valid, -1)
    with pytest.raises(ValueError, match=r"shape \(2, 4\)"):
        continuous_noise(x, torch.ones(2, 4, dtype=torch.bool), 0.1)
    with pytest.raises(ValueError, match="float32"):
        continuous_noise(x, valid.float(), 0.1)
