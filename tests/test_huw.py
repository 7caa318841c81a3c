"""Eq. 13 and its optimum."""

import math

import pytest
import torch

from metaadamw_lite import PriorityHUW


def test_equation_13_in_both_forms():
    huw = PriorityHUW(["regression", "classification", "regression"], [1.0, 2.0, 5.0])
    with torch.no_grad():
        huw.log_var.copy_(torch.tensor([0.3, -0.7, 1.1]))
    losses = [0.4, 2.0, -1.5]
    expected = (
        0.5 * math.exp(-0.3) * 0.4
        + 0.5 * 1.0 * 0.3
        + math.exp(0.7) * 2.0
        + 2.0 * -0.7
        + 0.5 * math.exp(-1.1) * -1.5
        + 0.5 * 5.0 * 1.1
    )
    assert huw(torch.tensor(losses)).item() == pytest.approx(expected, rel=1e-6)
    assert huw([torch.tensor(x) for x in losses]).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("loss", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("priority", [0.5, 1.0, 5.0])
def test_the_optimum_is_loss_over_priority(kind, loss, priority):
    huw = PriorityHUW([kind], [priority]).double()
    optimizer = torch.optim.LBFGS(
        huw.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-18
    )

    def closure():
        optimizer.zero_grad()
        value = huw([torch.tensor(loss, dtype=torch.float64)])
        value.backward()
        return value

    optimizer.step(closure)
    assert math.exp(huw.log_var.item()) == pytest.approx(loss / priority, rel=1e-5)


def test_a_negative_loss_has_no_optimum():
    huw = PriorityHUW(["regression"], [1.0])
    values = []
    for s in (0.0, -2.0, -4.0, -8.0):
        with torch.no_grad():
            huw.log_var.fill_(s)
        values.append(huw([torch.tensor(-0.1)]).item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < -100


def test_gradients_reach_losses_and_variances():
    huw = PriorityHUW(["regression"], [2.0], init_log_var=0.5)
    loss = torch.tensor(3.0, requires_grad=True)
    huw([loss]).backward()
    assert loss.grad.item() == pytest.approx(0.5 * math.exp(-0.5))
    assert huw.log_var.grad.item() == pytest.approx(-0.5 * math.exp(-0.5) * 3 + 0.5 * 2)


@pytest.mark.parametrize(
    ("kinds", "priorities", "start", "message"),
    [
        (["ranking"], [1.0], 0.0, "'ranking'.*regression, classification"),
        (["regression"], [1.0, 2.0], 0.0, "2 entries; 1"),
        (["regression"], [-1.0], 0.0, "-1.0"),
        (["regression"], [math.nan], 0.0, "nan"),
        ([], [], 0.0, "empty"),
        (["regression"], [1.0], math.inf, "inf"),
    ],
)
def test_bad_arguments(kinds, priorities, start, message):
    with pytest.raises(ValueError, match=message):
        PriorityHUW(kinds, priorities, start)


def test_wrong_number_of_losses():
    with pytest.raises(ValueError, match=r"3 losses.*for 1"):
        PriorityHUW(["regression"], [1.0])(torch.ones(3))
