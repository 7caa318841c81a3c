"""Resume = continue; a state that does not fit is refused and changes nothing."""

import copy
import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, cross_entropy, tiny, train
from torch.torch_version import TorchVersion

from metaadamw_lite import MetaAdamW

FIRST_LOSS = 1.2795005634866905
"""Of the model in ``saved_at_e8c6e7d.pt`` on its next batch, with dropout by the seed 0."""
SETTINGS = {"lr": 0.01, "meta_lr": 0.1, "use_feature_gating": True, "feature_version": "enhanced", "attn_heads": 7}


def go_on(model, optimizer, batches):
    """Steps and a meta-update, then steps that feel it."""
    train(model, optimizer, batches[:3])
    losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    train(model, optimizer, batches[6:9])
    return losses


@pytest.mark.parametrize("meta_optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_equals_continue_bit_for_bit(batches, meta_optimizer, dtype):
    model = tiny(dtype)
    optimizer = MetaAdamW(model.named_parameters(), meta_optimizer=meta_optimizer, **SETTINGS)
    go_on(model, optimizer, batches)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    expected = go_on(model, optimizer, batches)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = tiny(dtype, seed=7)
    resumed.load_state_dict(saved["model"])
    again = MetaAdamW(resumed.named_parameters(), meta_optimizer=meta_optimizer, seed=9, **SETTINGS)
    untouched = copy.deepcopy(saved["optimizer"])
    again.load_state_dict(saved["optimizer"])
    assert go_on(resumed, again, batches) == expected
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(again.state_dict(), optimizer.state_dict())
    assert_same(saved["optimizer"], untouched)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(batches, how):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), **SETTINGS)
    go_on(model, optimizer, batches)
    twin, twin_optimizer = how((model, optimizer))
    assert go_on(twin, twin_optimizer, batches) == go_on(model, optimizer, batches)
    assert_same(twin.state_dict(), model.state_dict())
    assert_same(twin_optimizer.state_dict(), optimizer.state_dict())


def test_a_copy_steps_its_own_model_when_a_scheduler_is_attached(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), **SETTINGS)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(twin, twin_optimizer, batches[:2])
    assert_same(model.state_dict(), tiny().state_dict())
    assert not torch.equal(twin.head.weight, model.head.weight)
    assert len(pickle.loads(pickle.dumps(optimizer)).groups) == len(optimizer.groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layers": 3}, "encoder.layers.3"),
        ({"use_feature_gating": False}, "gates"),
        ({"group_strategy": "original"}, "param_group_0"),
        ({"huw_priorities": None}, "uncertainty"),
        ({"meta_optimizer": "adam"}, "meta_optimizer is 'sgd'.*'adam'"),
        ({"attn_heads": 2}, "attn_heads is 7.*2"),
        ({"alpha_range": 0.2}, "alpha_range is 1.0.*0.2"),
        ({"beta_range": 0.2}, "beta_range is 1.0.*0.2"),
    ],
)
def test_a_state_of_another_architecture_is_refused_by_name(batches, change, message):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), **SETTINGS)
    train(model, optimizer, batches[:2])
    other = MetaAdamW(tiny().named_parameters(), **{**SETTINGS, **change})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert_same(other.state_dict(), before)


def test_a_state_of_other_features_is_refused(batches):
    """Their number may be the same, and Φ's parameters with it."""
    state = MetaAdamW(tiny().named_parameters(), feature_version="norm_basic").state_dict()
    with pytest.raises(ValueError, match="feature_version is 'norm_basic', this optimizer's 'basic'"):
        MetaAdamW(tiny().named_parameters()).load_state_dict(state)
    other = MetaAdamW(tiny().named_parameters(), use_v_norms=False, attn_heads=5)
    with pytest.raises(ValueError, match="columns is"):
        MetaAdamW(tiny().named_parameters(), include_time_step=False, attn_heads=5).load_state_dict(other.state_dict())


def assert_refused(batches, change, message, **settings):
    """A state that ``change`` has changed is refused before anything of the optimizer is."""
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), **SETTINGS, **settings)
    train(model, optimizer, batches[:2])
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(optimizer.state_dict(), before)


def test_a_state_whose_meta_optimizer_lacks_a_group_is_refused_before_anything_is_changed(batches):
    def change(state):
        del state["meta"]["meta_optimizer_state"]["param_groups"][1]

    assert_refused(batches, change, "meta-optimizer has groups of")


def test_a_state_whose_meta_optimizer_has_no_state_is_refused_before_anything_is_changed(batches):
    """SGD's is empty and may be missing; Adam's moments may not."""

    def change(state):
        del state["meta"]["meta_optimizer_state"]["state"]

    assert_refused(batches, change, "meta_optimizer_state lacks 'state'", meta_optimizer="adam")


@pytest.mark.parametrize(
    ("setting", "value"), [("amsgrad", "yes"), ("capturable", True), ("betas", (2.0, 0.9)), ("lr", -1.0)]
)
def test_a_state_with_settings_that_the_constructor_refuses_is_refused(batches, setting, value):
    assert_refused(batches, lambda state: state["param_groups"][0].update({setting: value}), setting)


def wider(state):
    """The state of a model that is twice as wide: same groups, same Φ."""
    for moments in state["state"].values():
        moments["exp_avg"] = moments["exp_avg"].repeat_interleave(2, 0)


def in_another_order(state):
    for name in ("params", "param_names"):
        state["param_groups"][0][name].reverse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"exp_avg of parameter token_embedding\.weight has shape"),
        (in_another_order, "another order: .* where this optimizer has 'token_embedding.weight'"),
        (lambda state: state["meta"]["huw"].update(log_var=torch.zeros(2)), "uncertainty weighting.*log_var"),
        (lambda state: state["meta"].update(alpha=torch.ones(7)), r"alpha has shape \(7,\)"),
        (lambda state: state["meta"].update(t=-5), "t is -5"),
    ],
    ids=["shapes", "order", "variances", "factors", "steps"],
)
def test_a_state_of_other_parameters_is_refused_before_anything_is_changed(batches, change, message):
    assert_refused(batches, change, message)


def test_a_state_saved_under_a_wrapper_is_loaded_without_it(batches):
    """Its parameters have a prefix."""
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), **SETTINGS)
    train(model, optimizer, batches[:2])
    state = copy.deepcopy(optimizer.state_dict())
    names = state["param_groups"][0]["param_names"]
    names[:] = [f"module.{name}" for name in names]
    again = MetaAdamW(tiny().named_parameters(), seed=9, **SETTINGS)
    again.load_state_dict(state)
    assert_same(again.state_dict()["state"], optimizer.state_dict()["state"])


def test_loading_does_not_run_what_is_hooked_to_saving():
    optimizer = MetaAdamW(tiny().named_parameters())
    state = optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda *args: pytest.fail("a collective here would wait for ever"))
    optimizer.load_state_dict(state)


def test_numbers_of_numpy_do_not_reach_a_checkpoint():
    """``weights_only=True`` reads no types of NumPy's."""
    numbers = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1, "meta_lr": 1e-3, "meta_weight_decay": 1e-4}
    numbers |= {"alpha_range": 0.5, "beta_range": 0.5}
    as_numpy = {name: np.float64(x) for name, x in numbers.items()}
    groups = [
        {"params": tiny().named_parameters(), "lr": np.float64(0.1), "betas": (np.float64(0.9), np.float64(0.99))}
    ]
    optimizer = MetaAdamW(groups, betas=(np.float64(0.9), np.float64(0.99)), **as_numpy)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = MetaAdamW(tiny().named_parameters(), betas=(0.9, 0.99), **numbers)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("part", ["t", "alpha", "modulator", "huw", "meta_optimizer", "meta_optimizer_state"])
def test_a_state_with_a_part_missing_is_refused_by_name(batches, part):
    assert_refused(batches, lambda state: state["meta"].pop(part), f"lacks {part}$")


def test_what_the_constructor_alone_decides_stays_as_it_was_given(batches):
    """So that training can go on with another objective, or for longer."""
    saved = MetaAdamW(tiny().named_parameters(), total_steps=10)
    other = MetaAdamW(tiny().named_parameters(), total_steps=20, huw_priorities=(3.0, 5.0, 1.0))
    other.load_state_dict(saved.state_dict())
    assert other.huw.priorities == (3.0, 5.0, 1.0)
    model = tiny()
    again = MetaAdamW(model.named_parameters(), total_steps=20)
    again.load_state_dict(saved.state_dict())
    train(model, again, batches[:5])
    cross_entropy(model, batches[5]).backward()
    assert again.features()[:, -1].tolist() == [5 / 20] * len(again.groups)


def test_a_state_of_a_later_version_is_refused(batches):
    optimizer = MetaAdamW(tiny().named_parameters(), **SETTINGS)
    state = optimizer.state_dict()
    state["meta"] = {"version": 99, "what that version calls": "its parts"}
    with pytest.raises(ValueError, match="version 99; this code reads 1"):
        optimizer.load_state_dict(state)


def test_a_state_of_adamw_is_refused():
    with pytest.raises(ValueError, match="not saved by MetaAdamW"):
        MetaAdamW(tiny().named_parameters()).load_state_dict(torch.optim.AdamW(tiny().parameters()).state_dict())


def test_a_state_saved_by_the_first_version_goes_on(batches):
    """``saved_at_e8c6e7d.pt`` was written by that revision, with what its own code did next under "afterwards"."""
    saved = torch.load(Path(__file__).with_name("saved_at_e8c6e7d.pt"), weights_only=True)
    model = tiny(seed=7)
    model.load_state_dict(saved["model"])
    torch.manual_seed(0)
    first_loss = cross_entropy(copy.deepcopy(model), batches[6]).item()
    if torch.__version__ < TorchVersion("2.15") and not math.isclose(first_loss, FIRST_LOSS, rel_tol=1e-9):
        pytest.skip("this older torch draws other dropout masks from the same seed than the one that saved the file")
    assert math.isclose(first_loss, FIRST_LOSS, rel_tol=1e-9)
    optimizer = MetaAdamW(model.named_parameters(), lr=0.01, meta_lr=0.1, use_feature_gating=True, attn_layers=1)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, batches[6:9])
    losses = optimizer.update_attention(model, batches[3], batches[4], cross_entropy, batches[5])
    then = {"head": model.head.weight, "alpha": optimizer.alpha, "beta": optimizer.beta, "losses": torch.tensor(losses)}
    # Since then sums are taken in another order, and the step is computed by other kernels.
    torch.testing.assert_close(then, saved["afterwards"], rtol=1e-6, atol=1e-9, check_dtype=False)


def test_a_state_with_moments_and_entries_of_others_is_loaded_again(batches):
    """Moments of an AdamW that has gone further, and what a wrapper keeps beside the parameters'."""
    model, again = tiny(), tiny()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, batches[:3])
    optimizer = MetaAdamW(model.named_parameters())
    optimizer.state.update(adamw.state)
    optimizer.state["of a wrapper"], optimizer.state["count"] = {"step": 1000}, 3
    train(model, optimizer, batches[3:4])
    resumed = MetaAdamW(again.named_parameters(), seed=1)
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, batches[4:6])
    assert_same(again.state_dict(), model.state_dict())
    assert resumed.state["count"] == 3
