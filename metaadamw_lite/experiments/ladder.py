"""Is the Transformer needed? Four rungs that learn learning-rate factors by the same meta-gradient.

The rungs from the lowest: one log α for the whole model; one for each group; a small network on each group's features;
and Φ, whose attention connects the groups. On every rung α = exp(raw), with raw = 0 at the start, and β = 1, so that
each begins as AdamW. Adam descends L_loss (Eq. 11).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from metaadamw_lite import MetaAdamW
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.variant import Change, Maker, Variant, arguments, chain, metaadamw
from metaadamw_lite.features import FeatureConfig
from metaadamw_lite.folded import in_one_buffer
from metaadamw_lite.modulator import DrawFrom, Modulation, Modulator

LARGEST_LOG = 12.0
"""The largest |log α|, so that nothing overflows."""

PHI = {
    "attn_layers": 2,
    "attn_hidden_dim": 16,
    "attn_heads": 2,
    "feature_version": "basic",
    "use_feature_gating": False,
    "huw_priorities": None,
    "meta_objective": "loss_decrease",
    "meta_optimizer": "adam",
    "meta_lr": 1e-2,
    "meta_weight_decay": 0.0,
}
"""Arguments of ``MetaAdamW`` with a small Φ, the same on all tasks."""

META_EVERY = 50
"""K_meta on every rung."""


def alpha_of(raw: Tensor) -> Tensor:
    """Return α = exp(raw), with raw clamped so that it cannot overflow."""
    return raw.clamp(-LARGEST_LOG, LARGEST_LOG).exp()


def standardise_features(features: Tensor) -> Tensor:
    """Put features (G, D) on a logarithmic scale, each column with mean 0 and standard deviation 1 over the groups.

    NaN and columns that are the same for all groups become zero.
    """
    f = torch.nan_to_num(features, nan=0.0)
    f = f.sign() * (1e3 * f.abs()).log1p()
    return (f - f.mean(dim=0)) / (f.std(dim=0, correction=0) + 1e-3)


class LogModulator(Modulator):
    """Φ with α on a log scale: α = exp(raw) and β = 1, from standardised features; the output starts at zero."""

    def zero_output(self) -> "LogModulator":
        """Set the output layer to zero, and return the module."""
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        return self

    def _modulate(self, features: Tensor) -> Modulation:
        z = self.encoder(standardise_features(features).unsqueeze(0)).squeeze(0)
        alpha_raw, _, lambda1_raw, lambda2_raw = self.output(z).unbind(dim=1)
        alpha = alpha_of(alpha_raw)
        return Modulation(alpha, torch.ones_like(alpha), torch.sigmoid(lambda1_raw), torch.sigmoid(lambda2_raw))


class Rung(nn.Module):
    """A learner of log α in place of Φ, with the attributes that MetaAdamW asks Φ for.

    Subclasses have a module ``output`` with a weight, and ``raw``, from features (G, D) to log α (G,).
    """

    embeddings = None

    def raw(self, features: Tensor) -> Tensor:
        """Return log α of each group, (G,)."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Modulation:
        """Return the factors of the G groups. λ₁ and λ₂ are ½, and no objective of the ladder uses them."""
        alpha = alpha_of(self.raw(features))
        half = torch.full_like(alpha, 0.5)
        return Modulation(alpha, torch.ones_like(alpha), half, half)

    def gate_penalty(self) -> None:
        """Return None: a rung has no gates."""


class Numbers(Rung):
    """One log α for each of ``count`` groups, or one for all groups with ``count`` 1; features are not used."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.output = nn.Embedding(count, 1)
        nn.init.zeros_(self.output.weight)

    def raw(self, features: Tensor) -> Tensor:
        """Return log α of each group, (G,)."""
        return self.output.weight[:, 0].expand(len(features))


class GroupMLP(Rung):
    """Φ without its attention: the feed-forward halves of its layers on each group's standardised features."""

    def __init__(self, width: int, layers: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        with DrawFrom(generator):
            self.layers = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
                for _ in range(layers)
            )
            self.output = nn.Linear(width, 1)
            for p in self.parameters():
                if p.ndim > 1:
                    nn.init.xavier_uniform_(p)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def raw(self, features: Tensor) -> Tensor:
        """Return log α of each group, (G,)."""
        z = standardise_features(features)
        for layer in self.layers:
            z = z + layer(z)
        raw: Tensor = self.output(z)
        return raw[:, 0]


def with_phi(phi_of: Callable[[MetaAdamW, Settings, torch.Generator], nn.Module]) -> Maker:
    """Return the maker of MetaAdamW with another module in place of Φ.

    Args:
        phi_of: makes the module from the optimizer, the settings, and the generator of Φ's random start.
    """

    def make(model: nn.Module, settings: Settings, total_steps: int, seed: int) -> MetaAdamW:
        optimizer = metaadamw(model, settings, total_steps, seed)
        generator = torch.Generator().manual_seed(settings.metaadamw.get("seed", seed))
        phi = phi_of(optimizer, settings, generator).to(optimizer.modulator.output.weight)
        in_one_buffer(phi)  # as MetaAdamW does with its own, so that a resumed run rounds as the first one
        optimizer.modulator = phi  # type: ignore[assignment]
        return optimizer

    return make


def _width(settings: Settings) -> int:
    return len(FeatureConfig(settings.metaadamw["feature_version"]).columns)


def log_phi(optimizer: MetaAdamW, settings: Settings, generator: torch.Generator) -> LogModulator:
    """Make a Φ of the sizes in the settings, with α on a log scale."""
    phi = LogModulator(
        _width(settings),
        len(optimizer.groups),
        layers=settings.metaadamw["attn_layers"],
        heads=settings.metaadamw["attn_heads"],
        hidden_dim=settings.metaadamw["attn_hidden_dim"],
        alpha_range=0.0,  # a log scale has no range
        beta_range=0.0,
        generator=generator,
    )
    return phi.zero_output()


def _mlp(optimizer: MetaAdamW, settings: Settings, generator: torch.Generator) -> GroupMLP:
    sizes = settings.metaadamw["attn_layers"], settings.metaadamw["attn_hidden_dim"]
    return GroupMLP(_width(settings), *sizes, generator)


def meta_update_every(steps: int) -> Change:
    """Set K_meta, unless a run has fewer than ten times as many steps; then it keeps the task's own."""

    def change(settings: Settings) -> Settings:
        per_epoch = settings.meta_every * settings.meta_per_epoch  # about as many steps
        if settings.epochs * per_epoch < 10 * steps:
            return settings
        return replace(settings, meta_every=steps, meta_per_epoch=max(1, round(per_epoch / steps)))

    return change


small_phi = chain(arguments(**PHI), meta_update_every(META_EVERY))
"""The settings of ``ladder-phi``."""


def _rung(phi: Callable[[MetaAdamW, Settings, torch.Generator], nn.Module], meta_lr: float) -> Variant:
    change = chain(small_phi, arguments(meta_lr=meta_lr))
    return Variant(change, with_phi(phi), keeps_phi=phi is log_phi)


LADDER = {
    "ladder-one": _rung(lambda *_: Numbers(1), meta_lr=0.2),
    "ladder-groups": _rung(lambda optimizer, *_: Numbers(len(optimizer.groups)), meta_lr=0.2),
    "ladder-mlp": _rung(_mlp, meta_lr=1e-2),
    "ladder-phi": _rung(log_phi, meta_lr=1e-2),
}
"""From the lowest rung to Φ. Adam moves each number by the meta-learning rate, whatever its gradient. The lower rungs
have twenty times Φ's rate, since one number there must carry the work of several hundred in Φ."""
