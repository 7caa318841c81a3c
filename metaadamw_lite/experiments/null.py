"""The null test: MetaAdamW with Φ's of its own, untrained and trained.

The spread of results over random Φ's is the yardstick for a single run with a single Φ.
"""

from metaadamw_lite.experiments.variant import Variant, arguments

PHI_SEEDS = range(1000, 1032)
"""Seeds of Φ's random start, apart from the seeds of all runs."""


def frozen_phi(seed: int) -> str:
    """Name MetaAdamW with the untrained Φ of a seed."""
    return f"frozen-phi{seed}"


def trained_phi(seed: int) -> str:
    """Name MetaAdamW with the Φ of a seed, trained as in the paper."""
    return f"trained-phi{seed}"


NULL = {
    **{frozen_phi(seed): Variant(arguments(seed=seed), updates=False) for seed in PHI_SEEDS},
    **{trained_phi(seed): Variant(arguments(seed=seed)) for seed in PHI_SEEDS},
}
"""Weights, batches and dropout follow the run's own seed."""
