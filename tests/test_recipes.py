"""The recipes of the page "Using it" run as they stand, and do what the page says."""

import copy
import re
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from conftest import assert_same
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from metaadamw_lite import MetaAdamW

PAGE = (Path(__file__).resolve().parent.parent / "book" / "using.md").read_text(encoding="utf-8")
SECTIONS = [section.split("\n", 1) for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]]
RECIPES = {
    title: found[1]
    for title, text in SECTIONS
    if (found := re.search(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
}


README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
RECIPES["README"] = re.search(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)[1]


SHARED = re.search(r"^  ```python\n(.*?)^  ```", PAGE, flags=re.MULTILINE | re.DOTALL)[1]
"""What the page defines for all recipes."""


def make_model(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)]
    return nn.Sequential(*layers)


def loss_fn(model, batch):
    x, y = batch
    return (model(x) - y).float().square().mean()


@pytest.fixture
def names(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=generator)
    samples = list(zip(x, x.sum(dim=1, keepdim=True), strict=True))
    shared = {}
    exec(compile(dedent(SHARED), "using.md", "exec"), shared)
    return shared | {
        "torch": torch,
        "model": make_model(),
        "other_model": nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)),
        "loader": DataLoader(samples, batch_size=8, shuffle=True, generator=generator),
        "val_loader": DataLoader(samples[:16], batch_size=8),
        "loss_fn": loss_fn,
        "K_meta": 4,
        "device": "cpu",
        "epochs": 1,
        "path": str(tmp_path / "saved"),
        "dataset": samples,
    }


@pytest.mark.parametrize("title", RECIPES)
def test_the_recipe_runs_and_trains(title, names, recwarn, monkeypatch):
    # The backend traces as the default does, without a C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    held_out = next(iter(names["val_loader"]))
    before = loss_fn(make_model(), held_out).item()
    if title == "README":
        names["epochs"] = 20  # 240 steps, with one meta-update
    exec(compile(RECIPES[title], f"using.md, {title}", "exec"), names)
    optimizer = names.get("optimizer")
    if title == "Lightning":
        optimizer = names["trainer"].optimizers[0]
    if title == "Hugging Face Trainer":
        optimizer = names["trainer"].optimizer.optimizer
    assert isinstance(optimizer, MetaAdamW)
    if title == "Save and resume":
        assert_same(optimizer.state_dict(), names["saved"]["optimizer"])
    elif title == "Save Φ alone":
        phi = names["other"].modulator.state_dict()
        assert_same(dict(sorted(phi.items())), dict(sorted(load_file(names["path"]).items())))
    else:
        assert loss_fn(names["model"], held_out).item() < before
        assert (optimizer.alpha != 1).any()
        assert optimizer._t > 1
    if "update_attention" in RECIPES[title]:
        assert optimizer.huw.log_var.any(), "a meta-update was made"


def test_every_recipe_has_its_code():
    """All but those that stand there in words; what they say is in the tests of their subjects."""
    in_words = {"Several processes", "Lightning Fabric", "A frozen, quantised base", "LiLAW and LoPE"}
    assert {title for title, _ in SECTIONS} - set(RECIPES) == in_words


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kernel", [{}, {"fused": True}], ids=str)
def test_a_scaler_skips_steps_that_do_not_count_and_unscales_before_the_statistics(names, kernel, copied):
    model, (batch, *_) = names["model"], names["loader"]
    twin = make_model()
    optimizer, plain = (MetaAdamW(m.named_parameters(), lr=1e-3, **kernel) for m in (model, twin))
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(4):
        scaler.scale(loss_fn(model, batch)).backward()
        if k == 2:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if k != 2:
            loss_fn(twin, batch).backward()
            plain.step()
            plain.zero_grad()
    assert optimizer._t == plain._t == 3
    torch.testing.assert_close(optimizer.alpha, plain.alpha)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kernel", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_a_compiled_training_step_is_the_plain_one(names, kernel):
    models = [make_model(), make_model()]
    optimizers = [MetaAdamW(m.named_parameters(), lr=0.01, **kernel) for m in models]

    def training_step(model, optimizer, batch):
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled = torch.compile(training_step, backend="aot_eager")
    for batch in islice(names["loader"], 4):
        compiled(models[0], optimizers[0], batch)
        training_step(models[1], optimizers[1], batch)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q)
    assert optimizers[0]._t == 4


def test_phi_carries_over_to_another_model_but_embeddings_do_not(names):
    first = MetaAdamW(names["model"].named_parameters())
    other = MetaAdamW(names["other_model"].named_parameters(), seed=5)
    save_file(first.modulator.state_dict(), names["path"])
    other.modulator.load_state_dict(load_file(names["path"]))
    assert len(first.groups) != len(other.groups)
    features = torch.randn(7, 6)
    for a, b in zip(first.modulator(features), other.modulator(features), strict=True):
        assert torch.equal(a, b)
    enhanced = {"feature_version": "enhanced", "attn_heads": 7}
    first = MetaAdamW(names["model"].named_parameters(), **enhanced)
    other = MetaAdamW(names["other_model"].named_parameters(), **enhanced)
    with pytest.raises(RuntimeError, match="embeddings"):
        other.modulator.load_state_dict(first.modulator.state_dict())


@pytest.mark.parametrize("meta_optimizer", ["sgd", "adam"])
def test_a_checkpoint_is_read_without_running_code(tmp_path, meta_optimizer):
    """``weights_only=True`` takes tensors and plain values, and refuses whatever else a state may hold."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    settings = {"feature_version": "enhanced", "attn_heads": 7, "use_feature_gating": True}
    optimizer = MetaAdamW(model.named_parameters(), meta_optimizer=meta_optimizer, **settings)
    x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    loss(model, (x, y)).backward()
    optimizer.step()
    optimizer.update_attention(model, (x, y), (x, y), loss, (x, y))
    torch.save(optimizer.state_dict(), tmp_path / "saved")
    again = MetaAdamW(model.named_parameters(), meta_optimizer=meta_optimizer, **settings)
    again.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
    assert_same(again.state_dict(), optimizer.state_dict())
