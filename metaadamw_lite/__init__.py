"""MetaAdamW: AdamW with a learning-rate and a weight-decay factor for each parameter group, set by a Transformer Φ.

Read the modules in this order (equations, sections and algorithms are those of the paper, arXiv 2605.04055):

1. ``reference``  the whole method in the paper's notation, Eq. 1 to 13 and both algorithms; the tests compare with it
2. ``optimizer``  the class: a step (Algorithm 1) and a meta-update (Algorithm 2, Eq. 11 and 12), line by line
3. ``groups``     modulation groups: the parameters that share α and β (section 3.2)
4. ``features``   the input of Φ: statistics of each group (section 3.3)
5. ``modulator``  the attention module Φ (section 3.4, Eq. 5 to 9)
6. ``huw``        priority-injected uncertainty weighting (Eq. 13)
7. ``meta``       L_grad (Eq. 10), the hypothetical step and their derivatives by Φ (section 3.5)
8. ``fast``       the update of the tensors (Eq. 1 to 4) by torch's kernels

The other modules of MetaAdamW:

* ``membership`` follows changes of ``param_groups``; ``buckets`` collects the tensors for the kernels.
* ``factors`` computes α and β: by ``folded`` on a CPU, by ``triton_step`` (with ``triton_kernels``) on a GPU.
* ``meta_optimizer`` takes Φ's own steps.
* ``sharding`` adds up over processes.
* ``checks`` and ``state`` refuse arguments and saved states that do not fit.
* ``batches`` and ``surroundings`` restore everything that a meta-update touches, except Φ.

Two methods are independent of MetaAdamW: ``lilaw`` weights samples (arXiv 2509.20786); ``lope`` is an adapter with an
expert for noise (arXiv 2505.23868). ``precision`` keeps their parameters in float32.

These modules depend on PyTorch and NumPy only. ``metaadamw_lite.experiments`` needs more packages.
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
