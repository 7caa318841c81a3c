"""Each departure of the released code from the paper changes what it says, and nothing else."""

import copy

import pytest
import torch
from torch import nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.departures import DEPARTURES, DepartedMetaAdamW, changes
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.training import run

BASICS = {"lr": 0.01, "weight_decay": 0.1, "attn_layers": 2, "total_steps": 50, "seed": 3}


def model_with(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *extra, nn.Linear(6, 1))


def batch(seed):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(dim=1, keepdim=True).sin()


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def trained(departures, model=None, steps=3, updates=0, **arguments):
    """A model after some steps and meta-updates, with its optimizer and the losses of the last one."""
    model = model_with() if model is None else copy.deepcopy(model)
    arguments = BASICS | arguments
    names = model.named_parameters()
    optimizer = (
        MetaAdamW(names, **arguments) if departures is None else DepartedMetaAdamW(names, departures, **arguments)
    )
    losses = None
    for k in range(steps):
        torch.manual_seed(k)
        optimizer.zero_grad()
        loss_fn(model, batch(k)).backward()
        optimizer.step()
        if k >= steps - updates:
            losses = optimizer.update_attention(model, batch(100 + k), batch(200 + k), loss_fn, batch(300 + k))
    return model, optimizer, losses


def weights(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def test_without_a_departure_it_is_metaadamw_to_the_last_bit():
    (ours, one, _), (plain, other, _) = (trained(d, steps=4, updates=3) for d in ((), None))
    assert torch.equal(weights(ours), weights(plain))
    assert torch.equal(weights(one.modulator), weights(other.modulator))


def test_u1_multiplies_the_decay_by_the_bias_correction_of_the_step_size():
    start = weights(model_with())
    ranges = {"alpha_range": 0.0, "beta_range": 0.0}
    departed, optimizer, _ = trained(["u1"], steps=1, **ranges)
    plain, _, _ = trained(None, steps=1, **ranges)
    torch.testing.assert_close(weights(departed) - weights(plain), -0.01 * 0.1 * (10 - 1) * start)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1, "it is left as it was"


def test_u2_trains_no_output_for_beta():
    arguments = {"meta_objective": "loss_decrease", "huw_priorities": None, "meta_weight_decay": 0.0, "meta_lr": 1.0}
    start = trained(None, steps=3)[1].modulator.output.weight
    departed, plain = (trained(d, updates=1, **arguments)[1].modulator.output.weight for d in (["u2"], None))
    assert torch.equal(departed[1], start[1])
    assert not torch.equal(plain[1], start[1])
    torch.testing.assert_close(departed[0], plain[0])
    assert not torch.equal(departed[0], start[0]), "that for alpha is trained as it was"


def test_u3_leaves_the_gates_where_they_began():
    arguments = {"use_feature_gating": True, "meta_lr": 1.0, "updates": 2}
    departed, plain = (trained(d, **arguments)[1].modulator.gates for d in (["u3"], None))
    assert torch.equal(departed, torch.ones_like(departed))
    assert not torch.equal(plain, torch.ones_like(plain))


@pytest.mark.parametrize("departures", [["u4"], ["u4", "u1"]])
def test_u4_takes_the_step_that_the_moments_lead_to(departures):
    model, optimizer, _ = trained(departures)
    theta = weights(model)
    seen = []

    def looking(model, batch_):
        seen.append(weights(model).clone())
        return loss_fn(model, batch_)

    with torch.no_grad():
        modulation = optimizer.modulator(optimizer.features())  # of the training gradient
    optimizer.update_attention(model, batch(1), batch(2), looking, batch(3))
    number = optimizer._members.number
    rows = []
    for p in model.parameters():
        state, k = optimizer.state[p], number[p]
        u = state["exp_avg"] / (1 - 0.9**3) / ((state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)
        decay = 0.1 * float(modulation.beta[k]) / ((1 - 0.9**3) if "u1" in departures else 1)
        rows.append((p - 0.01 * float(modulation.alpha[k]) * (u + decay * p)).detach().flatten())
    stale = torch.cat(rows)
    assert min(float((x - stale).abs().max()) for x in seen) < 1e-6
    assert float((stale - theta).abs().max()) > 1e-3
    assert torch.equal(weights(model), theta)
    fresh = trained(None)
    seen.clear()
    fresh[1].update_attention(fresh[0], batch(1), batch(2), looking, batch(3))
    assert min(float((x - stale).abs().max()) for x in seen) > 1e-4, "MetaAdamW does not"


def test_u5_gives_phi_the_first_columns_of_enhanced():
    arguments = {"feature_version": "basic_plus", "attn_heads": 11}
    _, departed, _ = trained(["u5"], **arguments)
    shown = []
    departed.modulator.encoder.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    departed.modulator(departed.features())
    (f,) = shown[-1]
    assert f.shape == (4, 11)
    assert not f[:, 7:].any()
    torch.testing.assert_close(f, torch.cat([departed.features()[:, :7], torch.zeros(4, 4)], dim=1))
    enhanced = trained(None, feature_version="enhanced", attn_heads=2, steps=0)[1]
    fresh = trained(["u5"], steps=0, **arguments)[1]
    assert departed.features().shape[1] == len(enhanced._feature_config.columns)
    assert torch.equal(weights(fresh.modulator), weights(trained(None, steps=0, **arguments)[1].modulator))


def test_u6_adds_the_gradient_of_the_gap_to_the_models_own():
    model, optimizer, _ = trained(["u6"])
    before = [p.grad.clone() for p in model.parameters()]
    phi = weights(optimizer.modulator)
    optimizer.update_attention(model, batch(1), batch(2), loss_fn, batch(3))
    gap = (loss_fn(model, batch(1)) - loss_fn(model, batch(3)).detach()).abs()
    expected = torch.autograd.grad(gap, [*model.parameters()])
    for p, old, grad in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.grad, old + 0.5 * grad)
    _, plain, _ = trained(None)
    assert torch.equal(weights(plain.modulator), phi)


def test_u6_changes_no_run(tmp_path):
    records = [
        run(RunKey("etth1", variant, "paper", "smoke", 0), tmp_path, "cpu", progress=False)
        for variant in ("metaadamw", "departure-u6", "departure-u9")
    ]
    metrics = [[epoch["metric"] for epoch in record["epochs"]] for record in records]
    assert metrics[0] == metrics[1]
    phis = [record["meta_updates"][-1]["phi_moved"] for record in records]
    assert phis[0] == phis[1]
    assert phis[0] != phis[2], "another departure does"


def test_u9_pulls_each_matrix_by_a_step_of_the_same_length():
    arguments = {"meta_objective": "gen_gap", "huw_priorities": None, "meta_lr": 0.5, "meta_weight_decay": 0.1}
    start = trained(None)[1].modulator
    departed = trained(["u9"], updates=1, **arguments)[1].modulator
    for (name, before), after in zip(start.named_parameters(), departed.parameters(), strict=True):
        norm = before.norm()
        expected = before - 0.5 * 0.1 * before / norm if norm > 0 else before
        torch.testing.assert_close(after, expected, msg=name)
    plain = trained(None, updates=1, **arguments)[1].modulator
    torch.testing.assert_close(plain.output.weight, start.output.weight * (1 - 0.5 * 0.1))


def test_u13_has_dropout_in_the_loss_decrease():
    arguments = {"lr": 0.0, "meta_objective": "loss_decrease", "huw_priorities": None, "updates": 1}
    noisy = model_with(nn.Dropout(0.5))
    assert trained(["u13"], noisy, **arguments)[2].loss_decrease != 0
    assert trained(None, noisy, **arguments)[2].loss_decrease == 0, "θ′ is θ, and so are the masks"
    assert trained(["u13"], **arguments)[2].loss_decrease == 0, "nothing is dropped"


def test_u13_leaves_the_random_numbers_and_moves_batch_statistics():
    normed = model_with(nn.BatchNorm1d(6), nn.Dropout(0.5))
    tracked = {}
    for departures in ((), ("u13",)):
        model, optimizer, _ = trained(departures, normed)
        torch.manual_seed(7)
        optimizer.update_attention(model, batch(1), batch(2), loss_fn, batch(3))
        drawn = torch.rand(())
        torch.manual_seed(7)
        assert drawn == torch.rand(())
        tracked[departures] = int(model[2].num_batches_tracked)
    assert tracked == {(): 3, ("u13",): 9}


def test_a_departure_is_run_where_it_can_change_something():
    tasks = {name: {d for d in DEPARTURES if changes(d, task.settings("lite"))} for name, task in TASKS.items()}
    everywhere = {"u1", "u2", "u4", "u9", "u13"}
    assert tasks["wikitext2"] == everywhere
    assert tasks["etth1"] == {*everywhere, "u3"}
    assert tasks["imdb"] == {*everywhere, "u3", "u5"}


def test_an_unknown_departure_is_quoted():
    with pytest.raises(ValueError, match="departure is 'u7'; allowed are u1"):
        trained(["u7"])
