"""MetaAdamW, rebuilt small: AdamW whose step sizes and decays are set per parameter group by a Transformer.

Read the files in this order (equations, sections and algorithms are those of the paper, arXiv 2605.04055):

1. ``reference``  the whole method in the paper's letters, Eq. 1 to 13 and both algorithms; the others equal it
2. ``optimizer``  the class: a step (Algorithm 1) and a meta-update (Algorithm 2, Eq. 11 and 12), line by line
3. ``groups``     which parameters share a factor (section 3.2)
4. ``features``   what the attention module sees (section 3.3)
5. ``modulator``  the attention module Φ (section 3.4, Eq. 5 to 9)
6. ``huw``        priority-injected uncertainty weighting (Eq. 13)
7. ``meta``       L_grad (Eq. 10), the hypothetical step and their derivatives by Φ (section 3.5)
8. ``fast``       the update of the tensors (Eq. 1 to 4) by torch's kernels

``membership`` follows ``param_groups``, and ``buckets`` collects its tensors. ``factors`` calls Φ for a step, by
``folded`` or by ``triton_step`` (with ``triton_kernels``), which give the same numbers with less work, on a CPU and on
a GPU; ``meta_optimizer`` takes Φ's own steps; ``sharding`` adds up over several processes.
``checks`` and ``state`` refuse arguments and saved states that do not fit. ``batches`` and
``surroundings`` keep a meta-update from disturbing anything. Two relatives stand beside it and know nothing of it:
``lilaw`` (weights for samples, arXiv 2509.20786) and ``lope`` (an adapter with an expert for noise, arXiv 2505.23868);
``precision`` keeps their numbers in float32.

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

__version__ = "0.2.0"

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
