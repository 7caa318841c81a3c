"""How hard must Φ be trained? One factor at a time around two centres.

The first centre is the published setting, the arm ``metaadamw``: SGD at 1e-4, α in 1 ± ½, K_meta and the combined
objective of Table 4. The second is the rung ``ladder-phi``: Adam at 1e-2, α on a log scale, K_meta = 50, the objective
L_loss. An untrained twin is the same variant without meta-updates. On a log scale the twin is AdamW.
"""

from typing import Any

from metaadamw_lite.experiments.ladder import META_EVERY, PHI, log_phi, meta_update_every, small_phi, with_phi
from metaadamw_lite.experiments.variant import Change, Variant, arguments, at_rate, chain, unchanged


def _adam(meta_lr: float) -> Variant:
    return Variant(arguments(meta_optimizer="adam", meta_lr=meta_lr))


def _small(then: Change = unchanged, **others: Any) -> Change:
    """Return the settings of ``ladder-phi`` with other arguments of ``MetaAdamW``, and then a further change."""
    return chain(chain(small_phi, arguments(**others)), then)


def _log(then: Change = unchanged, **others: Any) -> Variant:
    return Variant(_small(then, **others), with_phi(log_phi))


def _as_in_table_4() -> Variant:
    """Return Φ on a log scale, without gates, with the sizes and features of the task's column in Table 4."""
    kept = {
        k: v for k, v in PHI.items() if k not in ("attn_layers", "attn_hidden_dim", "attn_heads", "feature_version")
    }
    return Variant(chain(arguments(**kept), meta_update_every(META_EVERY)), with_phi(log_phi))


DOSE = {
    "dose-sgd0.01": Variant(arguments(meta_lr=1e-2)),
    "dose-sgd1": Variant(arguments(meta_lr=1.0)),
    "dose-adam0.001": _adam(1e-3),
    "dose-adam0.005": _adam(5e-3),
    "dose-adam0.02": _adam(2e-2),
    "dose-wide": Variant(arguments(alpha_range=2.0)),
    "dose-wide-frozen": Variant(arguments(alpha_range=2.0), updates=False),
    "dose-log-sgd1": _log(meta_optimizer="sgd", meta_lr=1.0),
    "dose-log-adam0.001": _log(meta_lr=1e-3),
    "dose-log-adam0.005": _log(meta_lr=5e-3),
    "dose-log-adam0.02": _log(meta_lr=2e-2),
    "dose-log-k10": _log(meta_update_every(10)),
    "dose-log-kmeta": Variant(arguments(**PHI), with_phi(log_phi)),
    "dose-log-combined": _log(meta_objective="combined", huw_priorities=(1.0, 1.0, 1.0)),
    "dose-log-lr0.000125": _log(at_rate(1.25e-4)),
    "dose-log-lr0.002": _log(at_rate(2e-3)),
    "dose-log-lr0.008": _log(at_rate(8e-3)),
    "dose-log-table4": _as_in_table_4(),
    "dose-bounded": Variant(_small()),
    "dose-bounded-frozen": Variant(_small(), updates=False),
}
"""The first seven are around the published setting. Other studies have further doses on WikiText-2: the ablation's
``updates-10`` (K_meta = 10), ``updates-2`` (50) and ``objective-loss_decrease``, and ``metaadamw-lr0.002`` of equal
budgets."""

_TWINS = {
    "metaadamw-frozen": (
        "metaadamw",
        "dose-sgd0.01",
        "dose-sgd1",
        "dose-adam0.001",
        "dose-adam0.005",
        "dose-adam0.02",
        "updates-10",
        "updates-2",
        "objective-loss_decrease",
    ),
    "dose-wide-frozen": ("dose-wide",),
    "metaadamw-frozen-lr0.002": ("metaadamw-lr0.002",),
    "dose-bounded-frozen": ("dose-bounded",),
    "adamw": (
        "ladder-phi",
        "dose-log-sgd1",
        "dose-log-adam0.001",
        "dose-log-adam0.005",
        "dose-log-adam0.02",
        "dose-log-k10",
        "dose-log-kmeta",
        "dose-log-combined",
        "dose-log-table4",
    ),
    "adamw-lr0.000125": ("dose-log-lr0.000125",),
    "adamw-lr0.002": ("dose-log-lr0.002",),
    "adamw-lr0.008": ("dose-log-lr0.008",),
}
TWINS = {variant: twin for twin, variants in _TWINS.items() for variant in variants}
"""The untrained twin of each variant with a trained Φ."""

EVERYWHERE = ("dose-adam0.005", "ladder-phi", "dose-log-lr0.002")
"""The variants with runs on all five tasks."""
