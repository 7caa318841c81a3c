"""Small models and batches that many tests share."""

import os
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

if (
    not torch.cuda.is_available()
):  # before the package imports Triton (through torch's compiler): kernels run on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

from metaadamw_lite import MetaAdamW, reference

torch.set_num_threads(1)


class TinyTransformer(nn.Module):
    """Embedding, two encoder layers with dropout, a batch norm (which has buffers) and a head."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.batch_norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token_embedding(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.batch_norm(h.mean(dim=1)))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, labels = batch
    return F.cross_entropy(model(tokens), labels)


def tiny(dtype: torch.dtype = torch.float64, dropout: float = 0.1, seed: int = 0) -> TinyTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyTransformer(dropout).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, seed: int = 0) -> None:
    """A step on each batch, with dropout masks that depend on ``seed`` only."""
    torch.manual_seed(seed)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()


def groups_of(optimizer: MetaAdamW) -> list[reference.Group]:
    """The groups of an optimizer as ``reference`` takes them, with the gradients in ``.grad``. Nothing is copied."""
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}

    def parameter(p: Tensor) -> reference.Parameter:
        state = optimizer.state.get(p, {})
        m, v = (state.get(name, torch.zeros_like(p)) for name in ("exp_avg", "exp_avg_sq"))
        adamw = {name: settings[p][name] for name in ("lr", "betas", "eps", "weight_decay")}
        return reference.Parameter(p, p.grad, m, v, int(state.get("step", 0)), adamw)

    return [
        reference.Group([parameter(p) for p in group.params], group.depth, group.bias_ratio)
        for group in optimizer.groups
    ]


def phi_of(optimizer: MetaAdamW, dtype: torch.dtype = torch.float64) -> reference.Phi:
    """A copy of an optimizer's Φ as ``reference`` takes it."""
    phi = optimizer.modulator
    weights = {name: w.detach().to(dtype, copy=True) for name, w in phi.named_parameters()}
    return reference.Phi(weights, phi.encoder.layers[0].self_attn.num_heads, phi.alpha_range, phi.beta_range)


def feature_settings(optimizer: MetaAdamW) -> dict[str, object]:
    """The arguments of ``reference.features`` that an optimizer's settings and its number of steps are."""
    config = optimizer._feature_config
    time = reference.progress(optimizer._t, optimizer._total_steps) if config.include_time_step else None
    return {"time": time, "version": config.version, "use_v_norms": config.use_v_norms}


def largest_gap(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> float:
    """The largest difference between any two elements; NaN where there is one, which is no difference that is small."""
    return float(torch.stack([(x - y).detach().abs().max() for x, y in zip(xs, ys, strict=True)]).max())


def assert_same(a: object, b: object) -> None:
    """Nested dictionaries, lists and tensors are equal to the bit."""
    (leaves_a, structure_a), (leaves_b, structure_b) = tree_flatten(a), tree_flatten(b)
    assert structure_a == structure_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if isinstance(x, Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 11, (12, 5), generator=generator),
            torch.randint(0, 3, (12,), generator=generator),
        )
        for _ in range(12)
    ]


@pytest.fixture
def clock_of(monkeypatch):
    """``clock_of(module)`` stops a module's clock; ``takes(owner, name, seconds, then)`` lets a call move it on."""

    def stop(module):
        now = [0.0]
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0]))

        def takes(owner, name, seconds, then=None):
            """The call takes seconds (or what they are for its first argument), and does ``then``, or nothing."""

            def call(*args, **kwargs):
                now[0] += seconds(args[0]) if callable(seconds) else seconds
                return then(*args, **kwargs) if then else None

            monkeypatch.setattr(owner, name, call)

        return takes

    return stop
