"""The paper's experiments, run again: tasks, training, studies and reports.

* ``task``      what a task is and which settings a run has
* ``tasks``     the five of the paper
* ``etth1``, ``wikitext2``, ``multi30k``, ``cifar10``, ``imdb``
                the tasks, one file each: data, model, loss, metric, configuration
* ``text``      what the text tasks share
* ``noisy``     CIFAR-10 and IMDB with wrong labels; ``noise`` makes them wrong, ``mislabels`` finds them again
* ``lope_study``  LoPE: a small GPT that adapts to noisy text
* ``relatives``  how the studies of these two are judged
* ``lilaw_report``, ``lope_report``  their tables and figures
* ``datasets``  where data files come from, how they are checked and kept
* ``training``  one run, from the seed to the record; ``progress`` shows how far it is
* ``records``   what a run leaves behind
* ``variant``   what a variant is: a change to a task's settings, and an optimizer; ``variants`` has all of them
* ``null``, ``ladder``, ``dose``, ``replay``, ``circularity``, ``transfer``
                the variants of the studies of random, constant and learned factors
* ``studies``   which runs belong together, and running all that are missing
* ``paired``    differences of paired runs and their tests; ``verdict`` what they say about a claim
* ``frames``    records as frames, from which ``main_report``, ``ablation_report`` and ``tuning_report`` make tables;
                ``claims`` judges the paper's claims by them
* ``departures``, ``published``, ``budget``, ``peers``
                variants of the studies "published" and "budget"; ``rivals_report`` has their tables
* ``phi_report``, ``phi_figures``  tables and figures of the studies of random, constant and learned factors
* ``released``  the logs that come with the released code
* ``figures``   the book's figures
* ``chapter``   what the chapters about single tasks have in common
* ``bench``     what MetaAdamW costs; ``command`` has what the commands share, ``extra`` which packages they lack
* ``notebook``  what every notebook does first; ``pending`` shows a note in the place of what is not recorded yet

``python -m metaadamw_lite.experiments --help`` lists the commands.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaadamw_lite.experiments.task import Task

__all__ = ["NOISY", "TASKS"]

TASKS: dict[str, "Task"]
"""The five tasks of the paper on MetaAdamW, by name."""
NOISY: dict[str, "Task"]
"""Tasks with wrong labels, by name."""

_MODULES = {"TASKS": "tasks", "NOISY": "noisy"}


def __getattr__(name: str) -> Any:
    """Import the tasks when they are asked for: setting a figure style needs neither them nor torchvision."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
