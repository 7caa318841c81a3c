"""MetaAdamW, rebuilt small: AdamW whose step sizes and decays are set per parameter group by a Transformer.

Read the files in this order; each is one section of the paper (arXiv 2605.04055):

1. ``optimizer``  the update rule and the loop around it (Eq. 1 to 4, Algorithm 1)
2. ``groups``     which parameters share a factor (section 3.2)
3. ``features``   what the attention module sees (section 3.3)
4. ``modulator``  the attention module Φ (section 3.4, Eq. 5 to 9)
5. ``huw``        priority-injected uncertainty weighting (Eq. 13)
6. ``meta``       how Φ is trained (section 3.5, Algorithm 2)

``fast`` and ``sharding`` are the same numbers with less work and on several processes;
``checks`` and ``state`` refuse arguments and saved states that do not fit; ``surroundings`` puts back what a
meta-update's forward passes touch, and ``batches`` sees to it that each gets the same batch. Two relatives stand beside
it and know nothing of it: ``lilaw`` (weights for samples, arXiv 2509.20786) and ``lope`` (an adapter with an expert for
noise, arXiv 2505.23868).

PyTorch and NumPy are the only dependencies of these files. ``metaadamw_lite.experiments`` has more; ``bench`` there
measures the cost.
"""

from metaadamw_lite.features import FeatureConfig
from metaadamw_lite.groups import ModulationGroup, fine_grained_groups
from metaadamw_lite.huw import PriorityHUW
from metaadamw_lite.lilaw import LiLAW
from metaadamw_lite.lope import LoPE, LoPELinear
from metaadamw_lite.meta import MetaLosses
from metaadamw_lite.modulator import Modulation, Modulator
from metaadamw_lite.optimizer import MetaAdamW

__version__ = "0.1.0"

__all__ = [
    "FeatureConfig",
    "LiLAW",
    "LoPE",
    "LoPELinear",
    "MetaAdamW",
    "MetaLosses",
    "Modulation",
    "ModulationGroup",
    "Modulator",
    "PriorityHUW",
    "fine_grained_groups",
]
