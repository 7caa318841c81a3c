"""Section 3.4: Eq. 5 to 9."""

import pytest
import torch
from conftest import tiny

from metaadamw_lite import MetaAdamW, Modulator


def make(seed=0, **changes):
    settings = {"layers": 3, "heads": 6, "hidden_dim": 16, "alpha_range": 1.0, "beta_range": 0.5, **changes}
    torch.manual_seed(seed)
    return Modulator(6, 5, **settings)


def test_outputs_are_equations_6_to_9_of_the_encoder():
    phi = make()
    f = torch.randn(5, 6)
    raw = phi.output(phi.encoder(f.unsqueeze(0))[0])
    out = phi(f)
    torch.testing.assert_close(out.alpha, 1 + 1.0 * (torch.sigmoid(raw[:, 0]) - 0.5))
    torch.testing.assert_close(out.beta, 1 + 0.5 * (torch.sigmoid(raw[:, 1]) - 0.5))
    torch.testing.assert_close(out.lambda1, torch.sigmoid(raw[:, 2]))
    torch.testing.assert_close(out.lambda2, torch.sigmoid(raw[:, 3]))


def test_groups_attend_to_each_other_and_their_order_does_not_matter():
    phi = make()
    f = torch.randn(5, 6)
    out = phi(f)
    changed = f.clone()
    changed[4] = torch.randn(6)
    assert not torch.allclose(phi(changed).alpha[:4], out.alpha[:4]), "another group's features must matter"
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(phi(f[order]).alpha, out.alpha[order])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e10, 1e30, float("inf"), float("nan")])
def test_factors_stay_in_range_whatever_the_features_are(scale):
    for seed in range(5):
        phi = make(seed, alpha_range=1.0, beta_range=2.0)
        out = phi(torch.randn(5, 6) * scale)
        assert ((out.alpha >= 0.5) & (out.alpha <= 1.5)).all()
        assert ((out.beta >= 0.0) & (out.beta <= 2.0)).all()
        assert ((out.lambda1 >= 0) & (out.lambda1 <= 1) & (out.lambda2 >= 0) & (out.lambda2 <= 1)).all()


def test_everything_is_differentiable_in_phi():
    phi = Modulator(10, 5, layers=2, heads=7, hidden_dim=8, alpha_range=1, beta_range=1, group_embed_dim=4, gating=True)
    out = phi(torch.randn(5, 10))
    sum(x.sum() for x in out).backward()
    for name, p in phi.named_parameters():
        assert p.grad is not None, name
        if not name.endswith("in_proj_bias"):  # the key bias cancels in a softmax
            assert p.grad.abs().max() > 0, name


def test_gates_start_at_sigmoid_of_one_and_scale_the_columns():
    gated, plain = make(gating=True), make()
    f = torch.randn(5, 6)
    torch.testing.assert_close(gated(f).alpha, plain(f * torch.sigmoid(torch.tensor(1.0))).alpha)
    torch.testing.assert_close(gated.gate_penalty(), 6 * torch.sigmoid(torch.tensor(1.0)))
    assert plain.gate_penalty() is None


def test_group_embeddings_tell_equal_groups_apart():
    phi = Modulator(10, 3, layers=2, heads=7, hidden_dim=8, alpha_range=1, beta_range=1, group_embed_dim=4)
    alpha = phi(torch.ones(3, 10)).alpha
    assert alpha[0] != alpha[1]


def test_precision_follows_the_parameters():
    assert MetaAdamW(tiny(torch.float64).named_parameters()).modulator.output.weight.dtype == torch.float64
    assert MetaAdamW(tiny(torch.float32).named_parameters()).alpha.dtype == torch.float32
    assert MetaAdamW(tiny(torch.bfloat16).named_parameters()).modulator.output.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"heads": 0}, "heads is 0"), ({"layers": 0}, "layers is 0"), ({"alpha_range": 5.0}, "alpha_range is 5.0")],
)
def test_arguments_out_of_range_are_quoted(bad, message):
    with pytest.raises(ValueError, match=message):
        make(**bad)
