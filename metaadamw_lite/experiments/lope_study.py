"""LoPE put to the test: a small GPT, pretrained on Wikipedia, adapts to film reviews with noisy words.

Pretraining on WikiText-2 (once, kept on disk) → adapters on IMDB reviews with a share of noisy words → clean test
reviews. A review is its first words, then "it was good" or "it was bad". Its perplexity measures language modelling,
the choice of its last word sentiment. All arms have equally many trainable parameters and steps. Arms of a seed share
their batches.
"""

import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments import imdb, wikitext2
from metaadamw_lite.experiments.datasets import cache, read_table
from metaadamw_lite.experiments.progress import progress_bar
from metaadamw_lite.experiments.records import (
    RunKey,
    environment,
    is_the_machines_fault,
    peak_memory_mib,
    reset_peak_memory,
)
from metaadamw_lite.experiments.task import PROFILES, perplexity
from metaadamw_lite.experiments.text import PAD, encode, padded, vocabulary
from metaadamw_lite.lope import LoPE, continuous_noise, discrete_noise

NOISE = {"lope-noise0": 0.0, "lope-noise5": 0.05, "lope-noise20": 0.2}
"""The share of noisy words in the adaptation data, by task."""

Review = tuple[list[str], int]
"""Words, and a label (0 bad, 1 good)."""

LABEL_WORDS = ("bad", "good")
ENDING = ("it", "was")
TARGETS = ("query", "key", "value", "out")
ROUTED_SHARE = 0.3
"""Share of noisy words in the test reviews that show the router's use of each expert."""


@dataclass(frozen=True)
class Arm:
    """A way to adapt the model.

    Attributes:
        poisoning: with a poisoning expert, trained in two stages.
        experts: number of clean experts; 0 for peft's LoRA.
        discrete, continuous: the parts of the hybrid noise in the first stage.
        compensate: apply DyCompEnSate after masking the poisoning expert.
        first: share of the steps in the first stage. LoPE's description does not give it.
    """

    poisoning: bool
    experts: int
    discrete: bool = False
    continuous: bool = False
    compensate: bool = False
    first: float = 0.5


ARMS = {
    "lora": Arm(poisoning=False, experts=0),
    "asymmetric-lora": Arm(poisoning=False, experts=4),
    "lope": Arm(True, 3, discrete=True, continuous=True, compensate=True),
    "lope-without-noise": Arm(True, 3, compensate=True),
    "lope-discrete": Arm(True, 3, discrete=True, compensate=True),
    "lope-continuous": Arm(True, 3, continuous=True, compensate=True),
    "lope-without-compensation": Arm(True, 3, discrete=True, continuous=True),
    "lope-brief": Arm(True, 3, discrete=True, continuous=True, compensate=True, first=0.1),
}


@dataclass(frozen=True)
class LoPESettings:
    """The definition of a run, apart from noise, arm and seed.

    Attributes:
        width, heads, layers: sizes of the GPT.
        length: words of a block, or of a review with its ending.
        words: size of the vocabulary.
        pretrain_steps, pretrain_lr: steps and learning rate of pretraining, in batches of ``batch_size`` blocks.
        reviews, test: numbers of reviews for adaptation and for the test.
        batch_size: blocks or reviews a step.
        steps: half of a run's steps. Arms without stages take all of them on the reviews without added noise.
        lr: learning rate of the adapters.
        rank: rank of A in the arms with experts; even. A LoRA with as many parameters has a rank of 5/2 · rank + 2.
        scale: of every adapter.
        share: share of words that the discrete part of the hybrid noise changes.
        embedding_noise: a; the continuous part of the hybrid noise is uniform within ±a/√(length · width).

    Raises:
        ValueError: for an odd rank.
    """

    width: int = 128
    heads: int = 4
    layers: int = 4
    length: int = 64
    words: int = 10_000
    pretrain_steps: int = 1_500
    pretrain_lr: float = 1e-3
    reviews: int = 2_000
    test: int = 1_000
    batch_size: int = 32
    steps: int = 120
    lr: float = 2e-3
    rank: int = 4
    scale: float = 2.0
    share: float = 0.05
    embedding_noise: float = 5.0

    def __post_init__(self) -> None:
        if self.rank % 2:
            raise ValueError(f"rank is {self.rank}; it must be even, so that a LoRA with as many parameters exists")


def settings(profile: str) -> LoPESettings:
    """Return the settings of a profile.

    ``paper``: a larger GPT for a GPU (LoPE's paper has LLaMA2-7B). ``smoke``: a tiny one on made-up words.

    Raises:
        ValueError: for an unknown profile.
    """
    check_choice("profile", profile, PROFILES)
    return {
        "paper": LoPESettings(
            width=512, heads=8, layers=8, length=128, pretrain_steps=20_000, reviews=20_000, test=5_000, steps=1_000
        ),
        "lite": LoPESettings(),
        "smoke": LoPESettings(
            width=8,
            heads=2,
            layers=1,
            length=16,
            words=80,
            pretrain_steps=3,
            reviews=24,
            test=16,
            batch_size=8,
            steps=3,
            share=0.5,
        ),
    }[profile]


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Texts:
    """Words of the pretraining lines and the reviews, and the vocabulary.

    Attributes:
        lines: for pretraining.
        train, test: reviews, each a list of words and a label (0 bad, 1 good).
        vocabulary: words in the order of their numbers.
        name: of the data, for records.
    """

    lines: list[list[str]]
    train: list[Review]
    test: list[Review]
    vocabulary: list[str]
    name: str


def texts(s: LoPESettings, source: str) -> Texts:
    """Load the texts of a run, in lower case; all arms and seeds have the same reviews."""
    if source == "real":
        frames = [read_table(table) for table in (wikitext2.TRAIN, imdb.TRAIN, imdb.TEST)]
    else:
        frames = [wikitext2.synthetic_lines(20, 1), imdb.synthetic_reviews(60, 1), imdb.synthetic_reviews(60, 2)]
    lines = [line.lower().split() for line in frames[0]["text"]]
    words = vocabulary(lines, ("<pad>", "<unk>", *ENDING, *LABEL_WORDS), s.words)
    train, test = (
        _reviews(frame, count, s.length) for frame, count in zip(frames[1:], (s.reviews, s.test), strict=True)
    )
    return Texts(lines, train, test, words, "WikiText-2 and IMDB" if source == "real" else "synthetic")


def _reviews(frame: pd.DataFrame, count: int, length: int) -> list[Review]:
    chosen = frame.sample(min(count, len(frame)), random_state=0)
    room = length - len(ENDING) - 1
    return [(imdb.tokens(t)[:room], int(y)) for t, y in zip(chosen["text"], chosen["label"], strict=True)]


def with_noise(reviews: Sequence[Review], share: float, seed: int) -> list[Review]:
    """Make a share of the words of reviews noisy."""
    return [(discrete_noise(text, share, seed + i).words, label) for i, (text, label) in enumerate(reviews)]


def rows_of(reviews: Sequence[Review], words: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Encode reviews with their endings, (N, length), and return them with the positions of their last words, (N,)."""
    texts = [[*text, *ENDING, LABEL_WORDS[label]] for text, label in reviews]
    ends = torch.tensor([len(text) - 1 for text in texts])
    return torch.from_numpy(padded(encode(texts, words), length)).long(), ends


# ---------------------------------------------------------------- model


class Block(nn.Module):
    """A pre-norm Transformer layer whose projections are plain linear layers, which adapters can stand beside."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, d) to (N, T, d), each position from those up to it."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class SmallGPT(nn.Module):
    """Word and position embeddings, blocks, a norm, and an output layer tied to the word embeddings."""

    def __init__(self, words: int, s: LoPESettings) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(words, s.width)
        self.position_embedding = nn.Embedding(s.length, s.width)
        self.blocks = nn.ModuleList(Block(s.width, s.heads) for _ in range(s.layers))
        self.final_norm = nn.LayerNorm(s.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, words: Tensor, noise: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Scores (N, T, words) for the word after each of (N, T); ``noise`` takes embeddings and which are valid."""
        h = self.token_embedding(words)
        if noise is not None:
            h = noise(h, words != PAD)
        h = h + self.position_embedding.weight[: words.shape[1]]
        for block in self.blocks:
            h = block(h)
        return F.linear(self.final_norm(h), self.token_embedding.weight)


def loss_of(model: nn.Module, rows: Tensor, noise: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Mean cross-entropy in nats of all words but the first, padding left out."""
    scores = model(rows[:, :-1], noise) if noise is not None else model(rows[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=PAD)


def pretrained(s: LoPESettings, data: Texts, device: torch.device, progress: bool) -> SmallGPT:
    """Return the pretrained GPT, which is trained once and kept in the cache."""
    torch.manual_seed(0)
    model = SmallGPT(len(data.vocabulary), s).to(device)
    code = [inspect.getsource(part) for part in (Block, SmallGPT, loss_of, _pretrain)]
    sizes = [s.width, s.heads, s.layers, s.length, s.words, s.batch_size, s.pretrain_steps, s.pretrain_lr]
    what = json.dumps([sizes, code, data.name, data.vocabulary, torch.__version__])
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    path = cache() / "prepared" / f"lope-{digest}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _pretrain(model, s, data, device, progress)
            torch.save(model.state_dict(), part := path.with_suffix(".part"))
            part.replace(path)
    model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return model


def _pretrain(model: SmallGPT, s: LoPESettings, data: Texts, device: torch.device, progress: bool) -> None:
    stream = np.array([n for row in encode(data.lines, data.vocabulary) for n in row], dtype=np.int64)
    rows = torch.from_numpy(stream[: len(stream) // s.length * s.length].reshape(-1, s.length)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.pretrain_lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.pretrain_lr, total_steps=s.pretrain_steps)
    generator = torch.Generator().manual_seed(0)
    bar = progress_bar(range(s.pretrain_steps), desc="pretraining", disable=not progress)
    for _ in bar:
        batch = rows[torch.randint(0, len(rows), (s.batch_size,), generator=generator).to(device)]
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if bar.n % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


# ---------------------------------------------------------------- a run


def check(key: RunKey) -> None:
    """Raise a ValueError for an unknown arm, or a protocol other than "clean"."""
    check_choice("optimizer (of an adaptation: the arm)", key.variant, tuple(ARMS))
    check_choice("protocol (of an adaptation)", key.protocol, ("clean",))


def make(key: RunKey, s: LoPESettings, device: torch.device, progress: bool) -> dict[str, Any]:
    """Make one adaptation, of a key that ``check`` accepts, and return its record."""
    arm, share = ARMS[key.variant], NOISE[key.task]
    where = environment(device)  # before training, since the source may change meanwhile
    reset_peak_memory(device)
    data = texts(s, key.source)
    start: nn.Module = pretrained(s, data, device, progress)
    seeds = np.random.SeedSequence([key.seed, 7]).generate_state(4)
    before, ends = (x.to(device) for x in rows_of(data.test, data.vocabulary, s.length))
    reviews = with_noise(data.train, share, int(seeds[0]))
    train, _ = rows_of(reviews, data.vocabulary, s.length)
    poison = train
    if arm.discrete:  # on top of the noise in the data
        poison, _ = rows_of(with_noise(reviews, s.share, int(seeds[1])), data.vocabulary, s.length)

    entries: list[dict[str, Any]] = []

    def adapt() -> dict[str, Any]:
        """Train both stages, mask, and return the end of the record."""
        entries.append({"epoch": 0, "stage": "pretrained", **_test(start, before, ends, data)})
        model, lope = _add_adapters(start, arm, s, key.seed)
        trainable = sum(p.numel() for p in _parameters(model, lope))
        optimizer = torch.optim.AdamW(_parameters(model, lope), lr=s.lr, weight_decay=0.0)
        order, hiss = (torch.Generator().manual_seed(int(seed)) for seed in seeds[2:])
        scale = s.embedding_noise / math.sqrt(s.length * s.width)
        continuous = partial(continuous_noise, scale=scale, generator=hiss)
        first = max(1, round(arm.first * 2 * s.steps))
        for stage, steps in ((1, first), (2, 2 * s.steps - first)):
            if arm.poisoning and lope is not None:
                lope.stage(stage)
            rows = (poison if stage == 1 else train).to(device)
            noise = continuous if arm.continuous and stage == 1 else None
            batches = (
                rows[torch.randint(0, len(rows), (s.batch_size,), generator=order).to(device)]
                for _ in progress_bar(range(steps), desc=f"{key} stage {stage}", disable=not progress)
            )
            trained = _train(model, optimizer, batches, noise)
            entries.append({"epoch": stage, "stage": str(stage)} | trained | _test(model, before, ends, data))
        use = None
        if lope is not None:
            use = _router_use(model, lope, data, s, device)
            if arm.poisoning:
                lope.mask_poisoning_expert(compensate=arm.compensate)
                entries.append({"epoch": 2, "stage": "masked", **_test(model, before, ends, data)})
        final = entries[-1]
        finite = math.isfinite(final["perplexity"])
        return {
            "status": "finished" if finite else "diverged",
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable": trainable,
            "best": {"epoch": 2, "metric": final["perplexity"]} if finite else None,
            "test": {"metric": final["perplexity"], "accuracy": final["accuracy"]},
            "router": use,
        }

    try:
        ended = adapt()
    except Exception as error:
        if is_the_machines_fault(error):
            raise
        ended = {"status": "failed", "error": f"{type(error).__name__}: {error}", "best": None, "test": None}
    return ended | {
        "metric": "perplexity",
        "data": data.name,
        "samples": {"train": len(data.train), "val": 0, "test": len(data.test)},
        "settings": asdict(s) | circumstances(key),
        "epochs": entries,
        "peak_memory_mib": peak_memory_mib(device),
        "environment": where,
    }


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    noise: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, float]:
    """Train on some batches, and return the mean loss and the seconds."""
    started, losses = time.perf_counter(), []
    model.train()
    for batch in batches:
        loss = loss_of(model, batch, noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    mean = float(torch.stack(losses).mean())
    return {"train_loss": mean, "seconds": round(time.perf_counter() - started, 3)}


def circumstances(key: RunKey) -> dict[str, Any]:
    """Return the settings in a record that ``LoPESettings`` lacks: the task's share of noise, and the arm."""
    return {"noise": NOISE[key.task], "arm": asdict(ARMS[key.variant])}


def _add_adapters(model: nn.Module, arm: Arm, s: LoPESettings, seed: int) -> tuple[nn.Module, LoPE | None]:
    """Add an arm's adapters, and return the model with its ``LoPE``, or with None for peft's LoRA."""
    if arm.experts:
        return model, LoPE.wrap(model, TARGETS, s.rank, arm.experts, s.scale, arm.poisoning, seed)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    # As many parameters as four experts over one A and a router, on d × d matrices: 2·rank·d = (r + 4·r)·d + 4·d.
    rank = (5 * s.rank + 4) // 2
    config = LoraConfig(r=rank, lora_alpha=round(s.scale * rank), target_modules=list(TARGETS))
    return get_peft_model(model, config), None


def _parameters(model: nn.Module, lope: LoPE | None) -> list[nn.Parameter]:
    return list(lope.parameters()) if lope is not None else [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def _test(model: nn.Module, rows: Tensor, ends: Tensor, data: Texts) -> dict[str, Any]:
    """Return the perplexity of clean test reviews, and the share whose right last word is the likelier of the two."""
    model.eval()
    bad, good = (data.vocabulary.index(word) for word in LABEL_WORDS)
    total = torch.zeros((), dtype=torch.float64)
    count, right = 0, 0
    for batch, end in zip(torch.split(rows, 100), torch.split(ends, 100), strict=True):
        scores = model(batch[:, :-1])
        losses = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=PAD, reduction="sum")
        total += losses.double().cpu()
        count += int((batch[:, 1:] != PAD).sum())
        row = torch.arange(len(batch), device=batch.device)
        choice = scores[row, end - 1]
        right += int(((choice[:, good] > choice[:, bad]) == (batch[row, end] == good)).sum())
    mean = float(total) / count
    return {"perplexity": perplexity(mean, 0.0), "accuracy": right / len(rows)}


@torch.no_grad()
def _router_use(
    model: nn.Module, lope: LoPE, data: Texts, s: LoPESettings, device: torch.device
) -> dict[str, list[float]]:
    """Return the router's mean weight of each expert, poisoning last, for clean words and each kind of noise."""
    kinds: dict[str, list[tuple[int, int]]] = {"clean": [], "shuffled": [], "inserted": [], "deleted": []}
    rows = []
    for i, (text, label) in enumerate(data.test[:200]):
        noisy = discrete_noise(text, ROUTED_SHARE, i)
        rows.append((noisy.words, label))
        changed = {"shuffled": noisy.shuffled, "inserted": noisy.inserted, "deleted": noisy.deleted}
        touched = {k for numbers in changed.values() for k in numbers}
        changed["clean"] = [k for k in range(len(text)) if k not in touched]
        for kind, numbers in changed.items():
            kinds[kind] += [(i, k) for k in numbers]
    words = rows_of(rows, data.vocabulary, s.length)[0].to(device)
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, inputs: seen.append(F.linear(inputs[0], layer.router).softmax(dim=-1))
        )
        for layer in lope.layers.values()
    ]
    model.eval()
    model(words)
    for hook in hooks:
        hook.remove()
    weights = torch.stack(seen).mean(dim=0)  # over the layers
    use = {}
    for kind, places in kinds.items():
        if places:
            i, k = torch.tensor(places, device=device).T
            use[kind] = [round(x, 5) for x in weights[i, k].mean(dim=0).tolist()]
    return use
