"""The step: it is AdamW, it is Eq. 4, and it behaves as torch's optimizers do."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import assert_same, cross_entropy, largest_gap, tiny, train
from torch import nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.reference import adamw_step


@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("lr", [1e-3, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
@pytest.mark.parametrize(("eps", "weight_decay"), [(1e-8, 0.0), (1e-2, 0.3)])
def test_without_ranges_it_is_adamw(batches, kernel, lr, betas, eps, weight_decay):
    ours, theirs = tiny(), tiny()
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **kernel}
    train(ours, MetaAdamW(ours.named_parameters(), alpha_range=0, beta_range=0, **settings), batches)
    train(theirs, torch.optim.AdamW(theirs.parameters(), **settings), batches)
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12


@pytest.mark.parametrize("named", [True, False])
def test_identity_with_parameter_groups_that_differ(batches, named):
    ours, theirs = tiny(), tiny()

    def groups(model):
        def of(module):
            return list(module.named_parameters() if named else module.parameters())

        return [
            {"params": of(model.layers[0]), "lr": 3e-2, "betas": (0.5, 0.9)},
            {"params": of(model.layers[1]), "weight_decay": 0.5},
            {"params": of(model.head), "eps": 1e-3, "lr": 1e-4},
        ]

    train(ours, MetaAdamW(groups(ours), alpha_range=0, beta_range=0), batches)
    train(theirs, torch.optim.AdamW(groups(theirs)), batches)
    assert largest_gap(ours.parameters(), theirs.parameters()) <= 1e-12


def test_a_step_is_equation_4_with_the_reported_factors(batches):
    model = tiny()
    adamw = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    optimizer = MetaAdamW(model.named_parameters(), **adamw, seed=3)
    m = {p: torch.zeros_like(p) for p in model.parameters()}
    v = {p: torch.zeros_like(p) for p in model.parameters()}
    for t, batch in enumerate(batches[:5], start=1):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        before = {p: p.detach().clone() for p in model.parameters()}
        optimizer.step()
        assert optimizer.alpha.min() < 0.99 or optimizer.alpha.max() > 1.01, "the factors must matter for this test"
        for k, group in enumerate(optimizer.groups):
            for p in group.params:
                factors = optimizer.alpha[k], optimizer.beta[k]
                expected, m[p], v[p] = adamw_step(before[p], p.grad, m[p], v[p], t, *factors, **adamw)
                torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-13)


def test_the_factors_are_those_of_the_features_before_the_step(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), total_steps=100)
    train(model, optimizer, batches[:3])
    optimizer.zero_grad()
    cross_entropy(model, batches[3]).backward()
    expected = optimizer.modulator(optimizer.features())
    optimizer.step()
    torch.testing.assert_close(optimizer.alpha, expected.alpha.detach())
    torch.testing.assert_close(optimizer.beta, expected.beta.detach())


def test_parameters_without_gradient_are_neither_moved_nor_decayed(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    model.head.weight.requires_grad_(False)
    train(model, optimizer, batches[:2])
    assert torch.equal(model.head.weight, before["head.weight"])
    assert not torch.equal(model.head.bias, before["head.bias"])


def test_a_step_without_any_gradient_changes_nothing():
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.step()
    assert_same((model.state_dict(), optimizer.state_dict()), before)


def test_closure_runs_first_and_its_loss_is_returned(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model, batches[0])
        loss.backward()
        seen.append(model.head.weight.detach().clone())
        return loss

    loss = optimizer.step(closure)
    assert math.isfinite(loss.item())
    assert not torch.equal(seen[0], model.head.weight)


def test_the_seed_does_not_reach_the_gpus(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    parameters = list(tiny().named_parameters())
    seeded.clear()
    MetaAdamW(parameters, seed=7)
    assert seeded == []


def test_the_seed_decides_phi_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (MetaAdamW(tiny().named_parameters(), seed=s).modulator for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a.output.weight, b.output.weight)
    assert not torch.equal(a.output.weight, c.output.weight)


@pytest.mark.parametrize("meta_optimizer", ["sgd", "adam"])
def test_a_parameter_group_added_later_is_trained_and_keeps_what_phi_knows(batches, meta_optimizer):
    model = tiny()
    backbone = [(n, p) for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = MetaAdamW(backbone, feature_version="enhanced", attn_heads=7, meta_optimizer=meta_optimizer)
    train(model, optimizer, batches[:2])
    optimizer.update_attention(model, batches[4], batches[5], cross_entropy, batches[6])
    weight, embeddings = optimizer.modulator.output.weight.clone(), optimizer.modulator.embeddings.detach().clone()
    names, moment = [g.name for g in optimizer.groups], optimizer.state[model.batch_norm.weight]["exp_avg"].clone()

    optimizer.add_param_group({"params": [(n, p) for n, p in model.named_parameters() if n.startswith("head")]})
    assert "other/deep/weight" in [g.name for g in optimizer.groups]
    assert torch.equal(optimizer.modulator.output.weight, weight)
    assert torch.equal(optimizer.state[model.batch_norm.weight]["exp_avg"], moment)
    for row, group in enumerate(optimizer.groups):
        old = embeddings[names.index(group.name)] if group.name in names else torch.zeros_like(embeddings[0])
        assert torch.equal(optimizer.modulator.embeddings[row], old), group.name

    before = model.head.weight.detach().clone()
    train(model, optimizer, batches[2:4])
    assert not torch.equal(model.head.weight, before)
    optimizer.update_attention(model, batches[4], batches[5], cross_entropy, batches[6])


OUT_OF_RANGE = [
    ({"lr": -1.0}, "lr is -1.0; it must be finite and not negative"),
    ({"lr": math.inf}, "lr is inf"),
    ({"betas": (1.0, 0.9)}, r"betas is \(1.0, 0.9\)"),
    ({"betas": (0.9,)}, r"betas is \(0.9,\)"),
    ({"betas": 0.9}, "betas is 0.9"),
    ({"use_v_norms": "no"}, "use_v_norms is 'no'.*True, False"),
    ({"foreach": "x"}, "foreach is 'x'"),
    ({"model": 3}, "model is 3"),
    ({"huw_priorities": 1.0}, "1.0"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"eps": -1e-8}, "-1e-08"),
    ({"weight_decay": -0.1}, "-0.1"),
    ({"alpha_range": -0.5}, "-0.5"),
    ({"alpha_range": 2.5}, "2.5"),
    ({"alpha_range": math.nan}, "nan"),
    ({"beta_range": 3}, "beta_range is 3"),
    ({"group_strategy": "coarse"}, "'coarse'.*fine_grained"),
    ({"feature_version": "basic+"}, r"'basic\+'.*basic_plus"),
    ({"feature_gating_sparsity": -1.0}, "-1.0"),
    ({"group_embed_dim": 0, "feature_version": "enhanced"}, "group_embed_dim is 0"),
    ({"attn_layers": 0}, "attn_layers is 0"),
    ({"attn_layers": 1.5}, "1.5"),
    ({"attn_hidden_dim": -3}, "-3"),
    ({"attn_heads": 0}, "attn_heads is 0"),
    ({"attn_heads": 4}, "attn_heads is 4.*feature size 6.*1, 2, 3, 6"),
    ({"feature_version": "enhanced"}, "attn_heads is 6.*14"),
    ({"meta_objective": "loss"}, "'loss'.*loss_decrease"),
    ({"huw_priorities": (1.0, 1.0)}, r"\(1.0, 1.0\).*3"),
    ({"huw_priorities": (1.0, 0.0, 1.0)}, "priority is 0.0"),
    ({"huw_priorities": (1.0, math.inf, 1.0)}, "priority is inf"),
    ({"meta_lr": -1e-4}, "-0.0001"),
    ({"meta_weight_decay": math.nan}, "nan"),
    ({"meta_optimizer": "lbfgs"}, "'lbfgs'.*sgd"),
    ({"total_steps": 0}, "total_steps is 0"),
    ({"seed": "0"}, "'0'"),
]


@pytest.mark.parametrize(("argument", "message"), OUT_OF_RANGE, ids=lambda x: str(x)[:40])
def test_arguments_out_of_range_are_quoted(argument, message):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        MetaAdamW(tiny().named_parameters(), **argument)
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_parameter_list():
    with pytest.raises(ValueError, match="empty"):
        MetaAdamW([])


def test_empty_parameter_groups():
    with pytest.raises(ValueError, match="empty"):
        MetaAdamW([{"params": []}])
    ends = []
    for groups in ([[1.0], [3.0]], [[], [1.0], [], [3.0]]):
        params = [[nn.Parameter(torch.tensor([x])) for x in group] for group in groups]
        optimizer = MetaAdamW([{"params": ps} for ps in params], lr=0.1, weight_decay=0.5)
        for _ in range(2):
            sum(p.square().sum() for ps in params for p in ps).backward()
            optimizer.step()
        ends.append([p.item() for ps in params for p in ps])
        assert [len(group.params) for group in optimizer.groups] == [1, 1]
    assert ends[0] == ends[1], "a group of nothing is no token: it must not change the factors of the others"
    model = nn.Linear(2, 1, bias=False)
    for order in (1, -1):  # no biases to go without decay
        groups = [{"params": list(model.parameters())}, {"params": []}][::order]
        assert len(MetaAdamW(groups, model=model).groups) == 1


def test_what_is_no_parameter_group_is_torchs_error():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(TypeError, match="must be a dict"):
        MetaAdamW([{"params": [p]}, [q]])


def test_a_rate_of_another_shape_is_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"lr is tensor\(\[0.0010\]\).*a tensor without dimensions"):
        MetaAdamW(tiny().named_parameters(), lr=torch.tensor([1e-3]))


def test_what_is_switched_on_later_is_refused_too(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    train(model, optimizer, batches[:1])
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match="capturable is True"):
        optimizer.step()
    assert_same(model.state_dict(), before)


def test_the_seed_decides_phi_whatever_the_default_device_is(batches):
    """With the default device "meta" nothing that is made there has values."""
    model, expected = tiny(), MetaAdamW(tiny().named_parameters(), seed=3)
    with torch.device("meta"):
        optimizer = MetaAdamW(model.named_parameters(), seed=3)
    assert_same(optimizer.modulator.state_dict(), expected.modulator.state_dict())
    train(model, optimizer, batches[:1])
    with torch.device("meta"):
        optimizer.step()
        optimizer.update_attention(model, batches[1], batches[2], cross_entropy, batches[3])
    assert optimizer.alpha.device.type == "cpu"


@pytest.mark.parametrize("alpha_range", [torch.tensor(0.4), np.array(0.4)], ids=["a tensor", "an array"])
def test_a_range_may_be_a_number_of_torch_or_numpy(batches, alpha_range):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), alpha_range=alpha_range)
    train(model, optimizer, batches[:2])
    assert ((optimizer.alpha - 1).abs() <= 0.2).all()


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_options_that_are_not_supported_are_refused_and_not_ignored(option):
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{option} is True"):
        MetaAdamW([{"params": [parameter], option: True}])
    optimizer = MetaAdamW([parameter])
    with pytest.raises(ValueError, match=f"{option} is True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], option: True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"betas": (2.0, 0.9)}, r"betas is \(2.0, 0.9\)"),
        ({"decoupled_weight_decay": False}, "decoupled_weight_decay is False"),
        ({"lr": "1e-3"}, "lr is '1e-3'"),
        ({"weight_decay": None}, "weight_decay is None"),
        ({"betas": ("a", 0.9)}, r"betas is \('a', 0.9\)"),
        ({"fused": "no"}, "fused is .no."),
    ],
)
def test_settings_of_a_parameter_group_are_checked_like_those_of_all(setting, message):
    with pytest.raises(ValueError, match=message):
        MetaAdamW([{"params": [nn.Parameter(torch.ones(2))], **setting}])
    optimizer = MetaAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **setting})
    assert len(optimizer.param_groups) == 1


def test_a_model_names_parameters_that_come_without_names():
    model = tiny()
    expected = [(g.name, len(g.params)) for g in MetaAdamW(model.named_parameters()).groups]
    decayed = [{"params": list(model.parameters())[:3], "weight_decay": 0.0}, {"params": list(model.parameters())[3:]}]
    for params in (model.parameters(), list(model.parameters()), list(model.named_parameters())):
        assert [(g.name, len(g.params)) for g in MetaAdamW(params, model=model).groups] == expected
    by_group = MetaAdamW(decayed, model=model)
    assert {g.name for g in by_group.groups} == {name for name, _ in expected}
    assert [group["weight_decay"] for group in by_group.param_groups] == [0.0, 0.01]
    later = MetaAdamW([{"params": model.head.weight}], model=model)
    assert [g.name for g in later.groups] == ["other/deep/weight"]
    later.add_param_group({"params": [model.head.bias]})
    assert [g.name for g in later.groups] == ["other/deep/weight", "other/deep/bias"]
    with pytest.raises(TypeError, match="ordered"):
        MetaAdamW([{"params": set(model.parameters())}], model=model)


def test_parts_of_a_model_keep_their_module_classes():
    model = nn.ModuleDict({"front": nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 1)})
    parts = [{"params": part.named_parameters()} for part in model.values()]
    assert "embedding/shallow/weight" in {g.name for g in MetaAdamW(parts, model=model).groups}


def test_parameters_that_the_model_does_not_have_are_refused():
    model = tiny()
    with pytest.raises(
        ValueError, match=r"1 of \d+ parameters, the first of shape \(2,\), have no name and are not in model"
    ):
        MetaAdamW([*model.parameters(), nn.Parameter(torch.ones(2))], model=model)
    params = (*model.parameters(), nn.Parameter(torch.ones(2)))
    (group,) = MetaAdamW(params, model=model, group_strategy="original").groups
    assert group.params == params, "which needs no names"


def test_integers_of_numpy_are_integers():
    assert MetaAdamW(tiny().named_parameters(), seed=np.int64(3), attn_layers=np.int64(2)).groups


def test_complex_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match=r"spectrum is torch.complex64; only real parameters"):
        MetaAdamW([("spectrum", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])
