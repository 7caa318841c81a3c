"""The registry of variants: the three arms, one for each cell of Table 3, AdamW at other learning rates, arms
with LiLAW, and the tables of the studies that have a file of their own.

``VARIANTS`` has all of them. A variant of the ablation changes exactly one factor. On a task with that value in Table 4
it *is* ``metaadamw``, and has no run.
"""

from dataclasses import dataclass, replace

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments.budget import BUDGETED, budget_variants, searched_as
from metaadamw_lite.experiments.circularity import CIRCULARITY
from metaadamw_lite.experiments.departures import DEPARTED
from metaadamw_lite.experiments.dose import DOSE
from metaadamw_lite.experiments.ladder import LADDER
from metaadamw_lite.experiments.null import NULL
from metaadamw_lite.experiments.peers import PEERS
from metaadamw_lite.experiments.published import RELEASED
from metaadamw_lite.experiments.replay import REPLAY
from metaadamw_lite.experiments.task import Settings
from metaadamw_lite.experiments.transfer import TRANSFER
from metaadamw_lite.experiments.variant import Change, Variant, adamw, arguments, at_rate
from metaadamw_lite.features import FeatureConfig

ARMS = tuple(BUDGETED)
"""AdamW; MetaAdamW; and the control, MetaAdamW whose random Φ is never updated."""

SEEDS = range(5)
"""Seeds of reported runs, unless a study has its own."""

LEARNING_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
"""The grid of the baseline's learning rate; the paper's is 5e-4."""

LITE_LEARNING_RATES = (*LEARNING_RATES[2:], 1.6e-2, 3.2e-2)
"""The grid for the small models of ``lite``, which do best between 1e-3 and 1.6e-2."""

UNEQUAL_PRIORITIES = (3.0, 5.0, 1.0)
"""Priorities for tasks with equal ones in Table 4: those of the released WikiText-2 script, since Table 3 has none."""

OTHER_ATTENTION = {"attn_layers": 16, "attn_hidden_dim": 64}
"""Sizes for tasks with 8 × 16 in Table 4: those of the released log of WikiText-2, since Table 3 has none."""


@dataclass(frozen=True)
class Ablation:
    """A row of Table 3.

    Attributes:
        factor: the row's block.
        value: the row's name, the factor's new value.
        change: from the settings of a task to those of the row.
    """

    factor: str
    value: str
    change: Change


def _features(version: str) -> Change:
    """Change the feature version, with a head for each feature, as everywhere in Table 4 (heads must divide them)."""

    def change(settings: Settings) -> Settings:
        if settings.metaadamw["feature_version"] == version:
            return settings
        width = len(FeatureConfig(version).columns) + (4 if version == "enhanced" else 0)
        return arguments(feature_version=version, attn_heads=width)(settings)

    return change


def _updates(per_epoch: int) -> Change:
    """Change the number of meta-updates an epoch, about."""

    def change(settings: Settings) -> Settings:
        every = max(1, settings.meta_every * settings.meta_per_epoch // per_epoch)
        return replace(settings, meta_every=every, meta_per_epoch=per_epoch)

    return change


def _unequal(settings: Settings) -> Settings:
    equal = len(set(settings.metaadamw["huw_priorities"])) == 1
    return arguments(huw_priorities=UNEQUAL_PRIORITIES)(settings) if equal else settings


def _other_attention(settings: Settings) -> Settings:
    small = (settings.metaadamw["attn_layers"], settings.metaadamw["attn_hidden_dim"]) == (8, 16)
    return arguments(**OTHER_ATTENTION)(settings) if small else settings


ABLATIONS: dict[str, Ablation] = {
    "grouping-original": Ablation("Grouping strategy", "Original", arguments(group_strategy="original")),
    "features-basic": Ablation("Feature version", "Basic", _features("basic")),
    "features-basic_plus": Ablation("Feature version", "Basic plus", _features("basic_plus")),
    "features-enhanced": Ablation("Feature version", "Enhanced", _features("enhanced")),
    "objective-gradient": Ablation("Meta-learning objective", "Gradient", arguments(meta_objective="gradient")),
    "objective-loss_decrease": Ablation(
        "Meta-learning objective", "Loss decrease", arguments(meta_objective="loss_decrease")
    ),
    "objective-gen_gap": Ablation("Meta-learning objective", "Generalization gap", arguments(meta_objective="gen_gap")),
    "huw-none": Ablation("HUW priorities", "No HUW", arguments(huw_priorities=None)),
    "huw-equal": Ablation("HUW priorities", "[1.0, 1.0, 1.0]", arguments(huw_priorities=(1.0, 1.0, 1.0))),
    "huw-unequal": Ablation("HUW priorities", "Not [1.0, 1.0, 1.0]", _unequal),
    "gating-on": Ablation("Feature gating", "Enable", arguments(use_feature_gating=True)),
    "gating-off": Ablation("Feature gating", "Disable", arguments(use_feature_gating=False)),
    "updates-1": Ablation("Meta-update frequency", "Once per epoch", _updates(1)),
    "updates-2": Ablation("Meta-update frequency", "Approx. twice per epoch", _updates(2)),
    "updates-10": Ablation("Meta-update frequency", "Approx. 10 times per epoch", _updates(10)),
    "attention-8x16": Ablation("Attention module", "L=8, D=16", arguments(attn_layers=8, attn_hidden_dim=16)),
    "attention-other": Ablation("Attention module", "Not (L=8, D=16)", _other_attention),
}
"""Table 3: every row but the first two, which are the arms, and those that are "baseline" throughout."""


def at_learning_rate(lr: float) -> str:
    """Name AdamW at a learning rate."""
    return searched_as("adamw", "constant", lr)


LILAW = {"alpha": 10.0, "delta": 6.0, "beta": 2.0, "lr": 0.005, "weight_decay": 1e-4}
"""The settings of LiLAW's paper."""


def _lilaw(lr: float = LILAW["lr"], batch_size: int | None = None) -> Change:
    return lambda s: replace(s, lilaw={**LILAW, "lr": lr}, batch_size=batch_size or s.batch_size)


def _batch(size: int) -> Change:
    return lambda settings: replace(settings, batch_size=size)


WEIGHTED = {
    "adamw-lilaw": Variant(_lilaw(), adamw),
    "metaadamw-lilaw": Variant(_lilaw()),
    "adamw-lilaw-lr0.0005": Variant(_lilaw(lr=0.0005), adamw),
    "adamw-lilaw-lr0.05": Variant(_lilaw(lr=0.05), adamw),
    "adamw-lilaw-lr0.5": Variant(_lilaw(lr=0.5), adamw),
    "adamw-batch16": Variant(_batch(16), adamw),
    "adamw-lilaw-batch16": Variant(_lilaw(batch_size=16), adamw),
    "adamw-batch256": Variant(_batch(256), adamw),
    "adamw-lilaw-batch256": Variant(_lilaw(batch_size=256), adamw),
}
"""The arms with LiLAW, and its sensitivity to its learning rate and to the batch size."""

TUNED = {at_learning_rate(lr): lr for lr in sorted({*LEARNING_RATES, *LITE_LEARNING_RATES}) if lr != Settings.lr}
"""AdamW at the other learning rates of the search."""

VARIANTS = {
    **BUDGETED,
    **{name: Variant(row.change) for name, row in ABLATIONS.items()},
    **{name: Variant(at_rate(lr), adamw) for name, lr in TUNED.items()},
    **WEIGHTED,
    **NULL,
    **LADDER,
    **DOSE,
    **REPLAY,
    **CIRCULARITY,
    **TRANSFER,
    **DEPARTED,
    **RELEASED,
    **budget_variants(sorted({*LEARNING_RATES, *LITE_LEARNING_RATES})),
    **PEERS,
}
"""Every variant, by its name in runs and records. Studies with variants of their own add a table here."""


def learning_rates(profile: str) -> tuple[float, ...]:
    """Return the grid of a profile's learning-rate search."""
    return LITE_LEARNING_RATES if profile == "lite" else LEARNING_RATES


def learning_rate(variant: str) -> float:
    """Return the learning rate of an AdamW variant."""
    return TUNED.get(variant, Settings.lr)


def apply_variant(settings: Settings, variant: str) -> Settings:
    """Return the settings of a variant, from those of its task.

    Raises:
        ValueError: for an unknown variant, or one that equals an arm on this task.
    """
    check_choice("optimizer", variant, VARIANTS)
    if (arm := equal_arm(settings, variant)) not in (None, variant):
        raise ValueError(f"optimizer is {variant!r}, which is what {arm!r} is on this task; use that")
    return replace(VARIANTS[variant].change(settings), scheduled_epochs=None)


def equal_arm(settings: Settings, variant: str) -> str | None:
    """Return the arm that a variant equals on a task, or None."""
    mine = VARIANTS[variant]
    alike = (arm for arm in ARMS if replace(mine, change=VARIANTS[arm].change) == VARIANTS[arm])
    return None if changes_settings(settings, variant) else next(alike, None)


def changes_settings(settings: Settings, variant: str) -> bool:
    """Tell whether a variant changes a task's settings."""
    return VARIANTS[variant].change(settings) != settings
