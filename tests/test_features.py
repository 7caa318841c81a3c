"""Section 3.3: every feature against a computation in plain Python."""

import math
import statistics

import pytest
import torch
from conftest import cross_entropy, tiny, train

from metaadamw_lite import FeatureConfig, MetaAdamW


def norm(x):
    return math.sqrt(sum(a * a for a in x))


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / (norm(x) * norm(y)) if norm(x) and norm(y) else 0.0


def plain_features(optimizer, version, use_v, include_time, time):
    """The feature matrix as lists of Python floats, read off section 3.3."""
    rows = []
    for group in optimizer.groups:
        tensors = []
        for p in group.params:
            state = optimizer.state[p]
            tensors.append([x.flatten().tolist() for x in (p.grad, state["exp_avg"], p.detach(), state["exp_avg_sq"])])
        g, m, theta, v = ([norm(t[i]) for t in tensors] for i in range(4))
        cos = [cosine(t[0], t[1]) for t in tensors]
        mean, std, var = statistics.fmean, statistics.pstdev, statistics.pvariance
        if version == "enhanced":
            row = [mean(g), var(g), mean(m), var(m)]
            row += [mean([t[i].count(0.0) / len(t[i]) for t in tensors]) for i in (0, 1)]
            row += [math.log(1 + sum(len(t[0]) for t in tensors)), group.bias_ratio, group.depth]
        else:
            row = [mean(x) for x in (g, m, theta, cos)]
            if "plus" in version:
                row += [std(x) for x in (g, m, theta, cos)]
                row += [mean(v), std(v)] if use_v else []
            else:
                row += [mean(v)] if use_v else []
        rows.append(row)
    if version.startswith("norm"):
        columns = list(zip(*rows, strict=True))
        rows = [
            [
                (x - statistics.fmean(column)) / (statistics.pstdev(column) or 1.0)
                for x, column in zip(row, columns, strict=True)
            ]
            for row in rows
        ]
    return [row + [time] * include_time for row in rows]


@pytest.mark.parametrize("version", ["basic", "basic_plus", "enhanced", "norm_basic", "norm_basic_plus"])
@pytest.mark.parametrize("use_v", [True, False])
@pytest.mark.parametrize("include_time", [True, False])
def test_against_plain_python(batches, version, use_v, include_time):
    config = FeatureConfig(version, use_v, include_time)
    width = len(config.columns) + (4 if version == "enhanced" else 0)
    model = tiny()
    optimizer = MetaAdamW(
        model.named_parameters(),
        lr=0.02,
        feature_version=version,
        use_v_norms=use_v,
        include_time_step=include_time,
        attn_heads=width,
        total_steps=40,
    )
    train(model, optimizer, batches[:4])
    expected = torch.tensor(plain_features(optimizer, version, use_v, include_time, 4 / 40), dtype=torch.float64)
    actual = optimizer.features()
    assert actual.shape == (len(optimizer.groups), len(config.columns))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_standardised_columns_have_unit_spread_whatever_the_scale_of_the_loss(batches, scale):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), feature_version="norm_basic")
    for batch in batches[:2]:
        optimizer.zero_grad()
        (scale * cross_entropy(model, batch)).backward()
        optimizer.step()
    spread = optimizer.features()[:, :5].std(dim=0, correction=0)
    torch.testing.assert_close(spread, torch.ones(5, dtype=torch.float64))


def test_a_single_group_has_nothing_to_be_standardised_against(batches):
    model = tiny()
    optimizer = MetaAdamW(model.parameters(), feature_version="norm_basic")
    train(model, optimizer, batches[:2])
    assert torch.equal(optimizer.features()[0, :5], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("version", "use_v", "width"),
    [
        ("basic", True, 6),
        ("basic", False, 5),
        ("basic_plus", True, 11),
        ("basic_plus", False, 9),
        ("enhanced", True, 10),
    ],
)
def test_widths_of_table_4(version, use_v, width):
    assert len(FeatureConfig(version, use_v).columns) == width


def test_time_without_a_known_length_rises_from_0_towards_1(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    assert optimizer.features()[0, -1] == 0
    train(model, optimizer, batches[:7])
    assert optimizer.features()[0, -1].item() == pytest.approx(2 / (1 + math.exp(-7 / 1000)) - 1)


@pytest.mark.parametrize("version", ["basic", "basic_plus", "norm_basic", "norm_basic_plus"])
def test_without_any_gradient_all_features_are_zero(version):
    optimizer = MetaAdamW(tiny().named_parameters(), feature_version=version, attn_heads=1)
    assert not optimizer.features().any()


def test_before_the_first_step_there_is_no_momentum(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    assert torch.equal(optimizer.features(), torch.zeros(len(optimizer.groups), 6, dtype=torch.float64))
    sum(p.sum() for p in model.parameters()).backward()
    features = optimizer.features()
    assert (features[:, 0] > 0).all(), "gradient norms"
    assert (features[:, [1, 3, 4]] == 0).all(), "momentum norm, cosine, second moment"


def test_tensors_without_a_gradient_take_no_part(batches):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters())
    train(model, optimizer, batches[:2])
    group = next(g for g in optimizer.groups if g.name == "feed-forward/shallow/weight")
    k = optimizer.groups.index(group)
    group.params[0].grad = None
    kept = group.params[1]
    assert optimizer.features()[k, 0].item() == pytest.approx(kept.grad.norm().item())
    assert optimizer.features()[k, 2].item() == pytest.approx(kept.norm().item())
    kept.grad = None
    assert torch.equal(optimizer.features()[k, :5], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("version", ["norm_basic", "norm_basic_plus"])
def test_a_group_without_a_gradient_takes_no_part_in_the_standardisation(batches, version):
    model = tiny()
    optimizer = MetaAdamW(model.named_parameters(), feature_version=version, attn_heads=1)
    train(model, optimizer, batches[:2])
    k = next(k for k, group in enumerate(optimizer.groups) if group.name.startswith("embedding"))
    for p in optimizer.groups[k].params:
        p.grad = None
    features = optimizer.features()[:, :-1]  # without the time
    assert torch.equal(features[k], torch.zeros_like(features[k]))
    others = features[[row for row in range(len(features)) if row != k]]
    varies = others.abs().amax(dim=0) > 0
    torch.testing.assert_close(others.mean(dim=0), torch.zeros_like(others[0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(others.std(dim=0, correction=0)[varies], torch.ones_like(others[0])[varies])


def test_low_precision_parameters_have_float32_statistics(batches):
    model = tiny(torch.bfloat16)
    optimizer = MetaAdamW(model.named_parameters())
    train(model, optimizer, batches[:2])
    features = optimizer.features()
    assert features.dtype == torch.float32
    p = model.head.weight
    k = next(i for i, g in enumerate(optimizer.groups) if g.name == "other/deep/weight")
    assert features[k, 2].item() == pytest.approx(p.float().norm().item(), rel=1e-6)
