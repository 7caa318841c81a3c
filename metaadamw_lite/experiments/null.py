"""The null test: MetaAdamW with Φ's that no other run has, never trained, and trained.

How results spread over random Φ's is what a single run with a single Φ has to be set against.
"""

from metaadamw_lite.experiments.variant import Variant, arguments

PHI_SEEDS = range(1000, 1032)
"""Of Φ's random start; no run has one of them."""


def frozen_phi(seed: int) -> str:
    """The name of MetaAdamW with the Φ of a seed, which is never updated."""
    return f"frozen-phi{seed}"


def trained_phi(seed: int) -> str:
    """The name of MetaAdamW with the Φ of a seed, trained as in the paper."""
    return f"trained-phi{seed}"


NULL = {
    **{frozen_phi(seed): Variant(arguments(seed=seed), updates=False) for seed in PHI_SEEDS},
    **{trained_phi(seed): Variant(arguments(seed=seed)) for seed in PHI_SEEDS},
}
"""Weights, batches and dropout keep the run's own seed."""
