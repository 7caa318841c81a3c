"""``param_groups`` is the truth, as in torch: whatever is done to it, the next call of the optimizer follows."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from conftest import assert_same, cross_entropy, largest_gap, tiny, train
from torch import nn

from metaadamw_lite import MetaAdamW

PLAIN = {"alpha_range": 0, "beta_range": 0}


def add_layer(model):
    """Another layer behind the head; its parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model.extra = nn.Linear(3, 3, dtype=torch.float64)
    model.register_forward_hook(lambda model, inputs, output: model.extra(output))
    return list(model.extra.parameters())


def replace_one_in_its_list(model, optimizer):
    model.head.weight = nn.Parameter(0.5 * model.head.weight.detach())
    params = optimizer.param_groups[0]["params"]
    params[-2] = model.head.weight


def replace_all_by_a_new_list(model, optimizer):
    """Every parameter of the model, as a wrapper does that shards them."""
    new = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, new[p])
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]


def replace_in_two_passes(model, optimizer):
    """Placeholders first and the parameters afterwards, as Accelerate does."""
    params = optimizer.param_groups[0]["params"]
    new = [nn.Parameter(p.detach().clone()) for p in params]
    numbers = {p: k for k, p in enumerate(params)}
    for k, p in enumerate(params):
        params[k] = torch.empty(1, dtype=p.dtype)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, new[numbers[p]])
    optimizer.param_groups[0]["params"] = list(new)


def append(model, optimizer):
    optimizer.param_groups[0]["params"].extend(add_layer(model))


def insert_at_the_front(model, optimizer):
    optimizer.param_groups[0]["params"][:0] = add_layer(model)


def remove(model, optimizer):
    del optimizer.param_groups[0]["params"][3:6]


def remove_all_but_the_head(model, optimizer):
    optimizer.param_groups[0]["params"] = list(model.head.parameters())


def reverse(model, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def hold_as_a_tuple(model, optimizer):
    optimizer.param_groups[0]["params"] = (*optimizer.param_groups[0]["params"], *add_layer(model))


def remove_one_and_append_another(model, optimizer):
    """As many as before, but no one has taken another's place."""
    params = optimizer.param_groups[0]["params"]
    weight, _ = add_layer(model)
    optimizer.param_groups[0]["params"] = [*params[:2], *params[3:], weight]


def add_group(model, optimizer):
    optimizer.add_param_group({"params": add_layer(model), "lr": 0.03})


def append_group(model, optimizer):
    optimizer.param_groups.append({**optimizer.defaults, "params": add_layer(model), "lr": 0.03})


def append_copied_group(model, optimizer):
    """With everything of the first one's that is not replaced."""
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": add_layer(model), "weight_decay": 0.3})


def split(model, optimizer):
    """``param_groups`` set anew, with a rate of its own for every second parameter."""
    (group,) = optimizer.param_groups
    halves = group["params"][::2], group["params"][1::2]
    optimizer.param_groups = [
        {**group, "params": half, "lr": lr} for half, lr in zip(halves, (0.01, 0.05), strict=True)
    ]


def move_to_the_other_group(model, optimizer):
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop())


def swap_groups(model, optimizer):
    optimizer.param_groups.reverse()


def take_the_first_away(model, optimizer):
    del optimizer.param_groups[0]


def take_the_last_away(model, optimizer):
    optimizer.param_groups.pop()


def empty(model, optimizer):
    optimizer.param_groups[0]["params"] = []


def fill(model, optimizer):
    optimizer.param_groups[0]["params"] = list(model.parameters())


CHANGES = {
    "one replaced": [replace_one_in_its_list],
    "one replaced twice": [replace_one_in_its_list, replace_one_in_its_list],
    "all replaced": [replace_all_by_a_new_list],
    "all replaced in two passes": [replace_in_two_passes],
    "appended": [append],
    "inserted": [insert_at_the_front],
    "removed": [remove],
    "all but a few removed": [remove_all_but_the_head],
    "reversed": [reverse],
    "a tuple": [hold_as_a_tuple],
    "one removed, another appended": [remove_one_and_append_another],
    "group added": [add_group],
    "group appended": [append_group],
    "copied group appended": [append_copied_group],
    "split": [split],
    "split and moved": [split, move_to_the_other_group],
    "split and swapped": [split, swap_groups],
    "first group taken away": [add_group, take_the_first_away],
    "last group taken away": [add_group, take_the_last_away],
    "split and replaced": [split, replace_all_by_a_new_list],
    "emptied and filled": [empty, fill],
}

WAYS = {
    "named": lambda model: {"params": model.named_parameters()},
    "pairs": lambda model: {"params": list(model.named_parameters())},
    "tensors": lambda model: {"params": model.parameters()},
    "tensors of a model": lambda model: {"params": list(model.parameters()), "model": model},
    "original": lambda model: {"params": model.named_parameters(), "group_strategy": "original"},
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of strategies; a test of its own counts them


def make(way="named", **settings):
    model = tiny(dropout=0.0)
    return model, MetaAdamW(**WAYS[way](model), **{"lr": 0.02, "weight_decay": 0.1, **settings})


def members(optimizer):
    return {group.name: set(group.params) for group in optimizer.groups}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_step_moves_what_adamw_moves(batches, change, way):
    model, optimizer = make(way, **PLAIN)
    twin = tiny(dropout=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1)
    for m, o in ((model, optimizer), (twin, theirs)):
        train(m, o, batches[:2])
        for do in CHANGES[change]:
            do(m, o)
            before = copy.deepcopy(m)
            train(m, o, batches[2:5])
        held = [p for group in o.param_groups for p in group["params"]]
        assert held
        moved = {name for name, p in m.named_parameters() if not torch.equal(p, before.get_parameter(name))}
        assert moved == {name for name, p in m.named_parameters() if any(p is x for x in held)}
    assert largest_gap(model.parameters(), twin.parameters()) <= 1e-12
    assert set(optimizer.state) >= {p for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("kernel", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize("change", ["one replaced", "appended", "split", "first group taken away"])
def test_every_kernel_follows(batches, change, kernel):
    model, optimizer = make(**PLAIN, **kernel)
    twin = tiny(dropout=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1, **kernel)
    for m, o in ((model, optimizer), (twin, theirs)):
        train(m, o, batches[:2])
        for do in CHANGES[change]:
            do(m, o)
            train(m, o, batches[2:5])
    assert largest_gap(model.parameters(), twin.parameters()) <= 1e-12


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_the_gradient_and_the_step_counts(batches, change):
    model, optimizer = make(**PLAIN)
    twin = tiny(dropout=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1)
    for m, o in ((model, optimizer), (twin, theirs)):
        for do in CHANGES[change]:
            cross_entropy(m, batches[0]).backward()
            do(m, o)
            o.step()
            o.zero_grad()
    assert largest_gap(model.parameters(), twin.parameters()) <= 1e-12


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["named", "tensors of a model"])
def test_groups_are_those_of_the_same_parameters_by_name(batches, change, way):
    model, optimizer = make(way)
    for do in CHANGES[change]:
        do(model, optimizer)
        cross_entropy(model, batches[0]).backward()
        optimizer.features()
    names = {p: name for name, p in model.named_parameters()}
    groups = [{"params": [(names[p], p) for p in group["params"]]} for group in optimizer.param_groups]
    expected = MetaAdamW(groups, model=model)
    assert members(optimizer) == members(expected)
    torch.testing.assert_close(sorted(g.depth for g in optimizer.groups), sorted(g.depth for g in expected.groups))


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"emptied and filled", "first group taken away"}))
def test_parameters_keep_their_names_where_no_model_is_known(change):
    """And take over that of the one whose place they take in a list of the same length."""
    model, optimizer = make("pairs")
    for do in CHANGES[change]:
        do(model, optimizer)
        optimizer.features()
    there = {id(p): name for name, p in model.named_parameters() if not name.startswith("extra")}
    held = [[(there[id(p)], p) for p in group["params"] if id(p) in there] for group in optimizer.param_groups]
    expected = MetaAdamW([{"params": named} for named in held if named])
    for group in expected.groups:
        assert set(group.params) <= members(optimizer)[group.name]


@pytest.mark.parametrize("change", CHANGES)
def test_phi_is_kept_and_trained_on(batches, change):
    model, optimizer = make(meta_lr=0.1)
    train(model, optimizer, batches[:2])
    optimizer.update_attention(model, batches[0], batches[1], cross_entropy, batches[2])
    phi, variances = copy.deepcopy((optimizer.modulator.state_dict(), optimizer.huw.state_dict()))
    for do in CHANGES[change]:
        do(model, optimizer)
        train(model, optimizer, batches[2:4])
        assert_same(dict(optimizer.modulator.state_dict()), dict(phi))
    cross_entropy(model, batches[0]).backward()
    assert optimizer.features().shape == (len(optimizer.groups), 6)
    assert optimizer.alpha.shape == optimizer.beta.shape == (len(optimizer.groups),)
    assert (optimizer.alpha != 1).all()
    losses = optimizer.update_attention(model, batches[0], batches[1], cross_entropy, batches[2])
    assert torch.isfinite(torch.tensor(losses)).all()
    assert not torch.equal(optimizer.modulator.output.weight, phi["output.weight"])
    assert not torch.equal(optimizer.huw.log_var, variances["log_var"])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", ["features", "update_attention", "state_dict", "load_state_dict", "deepcopy"])
def test_whatever_comes_first_after_a_change_follows_it(batches, change, first):
    """And the step after it does what it does without it, and on a fresh optimizer of the same groups."""
    model, optimizer = make(meta_lr=0.0)
    twin, plain = make(meta_lr=0.0)
    train(model, optimizer, batches[:2])
    train(twin, plain, batches[:2])
    for do in CHANGES[change]:
        do(model, optimizer)
        do(twin, plain)
        if do is empty:
            continue
        if first == "features":
            cross_entropy(model, batches[0]).backward()
            assert len(optimizer.features()) == len(optimizer.groups)
        elif first == "update_attention":
            optimizer.update_attention(model, batches[0], batches[1], cross_entropy, batches[2])
        elif first == "state_dict":
            assert optimizer.state_dict()["meta"]["groups"] == [group.name for group in optimizer.groups]
        elif first == "load_state_dict":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            model, optimizer = copy.deepcopy((model, optimizer))
        train(model, optimizer, batches[2:4])
        train(twin, plain, batches[2:4])
        assert set().union(*members(optimizer).values()) == {p for g in optimizer.param_groups for p in g["params"]}
    assert_same(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("version", [{}, {"feature_version": "enhanced", "attn_heads": 7}], ids=["basic", "enhanced"])
def test_a_run_that_was_changed_is_resumed_by_an_optimizer_of_the_same_groups(batches, change, version):
    model, optimizer = make(meta_lr=0.1, meta_optimizer="adam", **version)
    train(model, optimizer, batches[:2])
    optimizer.update_attention(model, batches[0], batches[1], cross_entropy, batches[2])
    for do in CHANGES[change]:
        do(model, optimizer)
        train(model, optimizer, batches[2:4])
    optimizer.update_attention(model, batches[0], batches[1], cross_entropy, batches[2])
    saved = copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(model)
    names = {p: name for name, p in again.named_parameters()}
    pairs = dict(zip(model.parameters(), again.parameters(), strict=True))
    groups = [[pairs[p] for p in group["params"]] for group in optimizer.param_groups]
    resumed = MetaAdamW(
        [{"params": [(names[p], p) for p in params]} for params in groups],
        model=again,
        meta_lr=0.1,
        meta_optimizer="adam",
        seed=9,
        **version,
    )
    resumed.load_state_dict(saved)
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, batches[4:6])
        o.update_attention(m, batches[3], batches[4], cross_entropy, batches[5])
        train(m, o, batches[6:8])
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert_same(dict(resumed.modulator.state_dict()), dict(optimizer.modulator.state_dict()))


def test_a_state_from_before_a_change_is_refused_after_it(batches):
    model, optimizer = make()
    train(model, optimizer, batches[:2])
    state = copy.deepcopy(optimizer.state_dict())
    remove_all_but_the_head(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    assert_same(optimizer.state_dict(), before)


def test_embeddings_of_groups_that_stay_are_kept_and_new_ones_start_at_zero(batches):
    model, optimizer = make(feature_version="enhanced", attn_heads=7)
    with torch.no_grad():
        optimizer.modulator.embeddings.normal_()
    before = {
        group.name: row.clone() for group, row in zip(optimizer.groups, optimizer.modulator.embeddings, strict=True)
    }
    layer = model.layers[0].self_attn
    optimizer.param_groups[0]["params"] = [*model.head.parameters(), *layer.parameters()]
    loose = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.param_groups.append({**optimizer.defaults, "params": [loose]})
    cross_entropy(model, batches[0]).backward()
    loose.grad = torch.ones_like(loose)
    optimizer.step()
    rows = optimizer.modulator.embeddings
    names = [group.name for group in optimizer.groups]
    assert len(rows) == len(names) > 3
    assert "param_group_1" in names
    for name, row in zip(names, rows, strict=True):
        assert torch.equal(row, before.get(name, torch.zeros_like(row))), name


def test_moments_of_a_parameter_stay_with_it_wherever_it_is_moved(batches):
    model, optimizer = make()
    train(model, optimizer, batches[:3])
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    split(model, optimizer)
    reverse(model, optimizer)
    optimizer.features()
    assert_same([optimizer.state[p] for p in model.parameters()], [before[p] for p in model.parameters()])


def test_parameters_that_are_cast_after_construction_are_trained_as_by_adamw(batches):
    """``model.to`` changes types (or devices) and leaves the parameters the same objects."""
    models = [tiny(torch.float32, dropout=0.0) for _ in range(2)]
    ours = MetaAdamW(models[0].named_parameters(), lr=0.02, **PLAIN)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.02)
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        model.double()
        train(model, optimizer, batches[:4])
    assert largest_gap(*(model.parameters() for model in models)) <= 1e-12


def test_a_part_that_is_cast_after_construction_is_trained_beside_the_rest(batches):
    model, optimizer = make()
    model.head.float()
    model.batch_norm.register_forward_hook(lambda module, inputs, output: output.float())
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches[:3])
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_frozen_parameters_that_thaw_are_trained(batches):
    model, optimizer = make(**PLAIN)
    twin = tiny(dropout=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1)
    for m, o in ((model, optimizer), (twin, theirs)):
        m.layers.requires_grad_(False)
        train(m, o, batches[:3])
        m.layers.requires_grad_(True)
        train(m, o, batches[3:6])
    assert largest_gap(model.parameters(), twin.parameters()) <= 1e-12


def test_settings_of_a_group_that_took_anothers_place_are_its_own(batches):
    """Only the dictionary is another one; the parameters are the same."""
    model, optimizer = make(**PLAIN)
    twin = tiny(dropout=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1)
    for m, o in ((model, optimizer), (twin, theirs)):
        train(m, o, batches[:2])
        o.param_groups[0] = {**o.param_groups[0], "lr": 0.07, "betas": (0.5, 0.9)}
        train(m, o, batches[2:5])
    assert largest_gap(model.parameters(), twin.parameters()) <= 1e-12


def test_a_scheduler_and_a_scaler_act_on_what_was_changed(batches):
    model, optimizer = make(**PLAIN)
    twin = tiny(dropout=0.0)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1)
    for m, o in ((model, optimizer), (twin, theirs)):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(o, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        replace_all_by_a_new_list(m, o)
        for batch in batches[:4]:
            o.zero_grad()
            scaler.scale(cross_entropy(m, batch)).backward()
            scaler.step(o)
            scaler.update()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0.01
    assert largest_gap(model.parameters(), twin.parameters()) <= 1e-12


# ---------------------------------------------------------------- names that are missing


def test_a_nameless_group_beside_named_ones_forms_a_group_of_its_own(batches):
    model, optimizer = make()
    named = members(optimizer)
    loose = [nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(2, 3, dtype=torch.float64))]
    optimizer.add_param_group({"params": loose, "lr": 0.5})
    assert members(optimizer) == {**named, "param_group_1": set(loose)}
    for p in loose:
        p.grad = torch.ones_like(p)
    cross_entropy(model, batches[0]).backward()
    optimizer.step()
    assert all((p < 0.9).all() for p in loose)


def test_a_nameless_tensor_in_a_named_group_forms_a_group_of_its_own():
    _, optimizer = make()
    named = members(optimizer)
    loose = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.param_groups[0]["params"].insert(0, loose)
    loose.grad = torch.ones_like(loose)
    optimizer.step()
    assert members(optimizer) == {**named, "param_group_0": {loose}}
    assert (loose < 1).all()


def test_a_nameless_group_of_the_model_takes_its_names_from_it():
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": add_layer(model)})
    assert members(optimizer) == members(MetaAdamW(model.named_parameters()))


def warned(act):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        act()
    return [w for w in said if w.category is UserWarning]


def test_missing_names_are_warned_of_once(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())

    def act():
        for k in range(3):
            loose = nn.Parameter(torch.ones(3, dtype=torch.float64))
            loose.grad = torch.ones_like(loose)
            if k == 1:
                optimizer.param_groups[0]["params"].append(loose)
            else:
                optimizer.add_param_group({"params": [loose]})
            train(model, optimizer, batches[:2])
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    (warning,) = warned(act)
    assert "named_from" in str(warning.message)


def test_a_fallback_to_original_is_warned_of_once(batches):
    model = tiny()

    def act():
        optimizer = MetaAdamW([{"params": list(model.layers.parameters())}, {"params": list(model.head.parameters())}])
        assert set(members(optimizer)) == {"param_group_0", "param_group_1"}
        train(model, optimizer, batches[:2])

    (warning,) = warned(act)
    assert "named_from" in str(warning.message)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: MetaAdamW(model.named_parameters()),
        lambda model: MetaAdamW(model.parameters(), model=model),
        lambda model: MetaAdamW(list(model.named_parameters())),
        lambda model: MetaAdamW([{"params": list(model.head.parameters())}], model=model),
        lambda model: MetaAdamW(model.parameters(), group_strategy="original"),
        lambda model: MetaAdamW(model.parameters(), model=model, group_strategy="original"),
    ],
    ids=["named", "model", "pairs", "groups", "original", "original of a model"],
)
def test_whoever_has_what_was_asked_for_is_not_warned(batches, make):
    model = tiny()

    def act():
        optimizer = make(model)
        train(model, optimizer, batches[:2])
        replace_all_by_a_new_list(model, optimizer)
        train(model, optimizer, batches[:2])
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())

    assert not warned(act)


@pytest.mark.parametrize("wrong", [3, "model", nn.Parameter(torch.ones(2)), {"head": None}], ids=str)
def test_a_model_that_is_no_module_is_refused(wrong):
    with pytest.raises(ValueError, match="model is"):
        MetaAdamW(tiny().parameters(), model=wrong)


# ---------------------------------------------------------------- bad groups, and time


def unsupported(model, optimizer):
    optimizer.param_groups.append({**optimizer.defaults, "params": add_layer(model), "capturable": True})


def complex_parameter(model, optimizer):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, dtype=torch.complex64)))


@pytest.mark.parametrize("change", [unsupported, complex_parameter], ids=lambda f: f.__name__)
def test_what_the_constructor_refuses_is_refused_by_the_next_step_and_nothing_moves(batches, change):
    model, optimizer = make()
    train(model, optimizer, batches[:2])
    change(model, optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"capturable|complex"):
        optimizer.step()
    assert_same(dict(model.state_dict()), dict(before))


def test_parameters_that_were_taken_away_are_let_go(batches):
    model, optimizer = make(attn_layers=1)
    old = []
    for k in range(5):
        replace_all_by_a_new_list(model, optimizer)
        train(model, optimizer, batches[k : k + 1])
        for p in list(optimizer.state):
            if not any(p is q for q in model.parameters()):
                del optimizer.state[p]  # as with AdamW, moments are the caller's to drop
        old.append([weakref.ref(p) for p in model.parameters()])
    gc.collect()
    assert not [r for refs in old[:-1] for r in refs if r() is not None]
