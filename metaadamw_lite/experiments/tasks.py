"""The five tasks of the paper on MetaAdamW."""

from metaadamw_lite.experiments.cifar10 import CIFAR10
from metaadamw_lite.experiments.etth1 import ETTH1
from metaadamw_lite.experiments.imdb import IMDB
from metaadamw_lite.experiments.multi30k import MULTI30K
from metaadamw_lite.experiments.task import Task
from metaadamw_lite.experiments.wikitext2 import WIKITEXT2

TASKS: dict[str, Task] = {task.name: task for task in (ETTH1, WIKITEXT2, MULTI30K, CIFAR10, IMDB)}
"""The tasks by name, in the order of the paper."""
