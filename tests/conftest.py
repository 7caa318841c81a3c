"""Small models and batches that many tests share."""

import os
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

torch.set_num_threads(1)
if (
    not torch.cuda.is_available()
):  # before anything imports Triton, as torch's compiler does: its kernels run on the CPU
    os.environ["TRITON_INTERPRET"] = "1"


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
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

        def takes(owner, name, seconds, then=None):
            """The call takes seconds (or what they are for its first argument), and does ``then``, or nothing."""

            def call(*args, **kwargs):
                now[0] += seconds(args[0]) if callable(seconds) else seconds
                return then(*args, **kwargs) if then else None

            monkeypatch.setattr(owner, name, call)

        return takes

    return stop
