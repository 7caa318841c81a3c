"""The paper's experiments, run again: tasks, training, studies and reports.

* ``task``      the dataclasses of tasks, settings and data
* ``tasks``     the five of the paper
* ``etth1``, ``wikitext2``, ``multi30k``, ``cifar10``, ``imdb``
                the tasks, one file each: data, model, loss, metric, configuration
* ``text``      helpers of the text tasks
* ``noisy``     CIFAR-10 and IMDB with wrong labels; ``noise`` makes them wrong, ``mislabels`` finds them again
* ``lope_study``  LoPE: a small GPT that adapts to noisy text
* ``relatives``  verdicts of the studies of LiLAW and LoPE
* ``lilaw_report``, ``lope_report``  their tables and figures
* ``datasets``  data files: download, check, cache
* ``training``  one run, from the seed to the record; ``progress`` has its bar
* ``records``   the JSON file of each run
* ``variant``   a change to a task's settings, and an optimizer; ``variants`` registers all variants
* ``null``, ``ladder``, ``dose``, ``replay``, ``circularity``, ``transfer``
                the variants of the studies of random, constant and learned factors
* ``studies``   the runs of each study, and a sweep over the missing ones
* ``paired``    differences of paired runs and their tests; ``verdict`` judges claims by them
* ``frames``    records as frames, from which ``main_report``, ``ablation_report`` and ``tuning_report`` make tables;
                ``claims`` judges the paper's claims by them
* ``departures``, ``published``, ``budget``, ``peers``
                variants of the studies "published" and "budget"; ``rivals_report`` has their tables
* ``phi_report``, ``phi_figures``  tables and figures of the studies of random, constant and learned factors
* ``released``  the logs that come with the released code
* ``figures``   the book's figures
* ``chapter``   tables, figures and sentences of the chapters about single tasks
* ``bench``     the cost of MetaAdamW
* ``command``   output and exit codes of the commands; ``extra`` names the extra that brings a missing package
* ``notebook``  the first call of every notebook; ``pending`` shows a note in place of missing evidence

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
    """Import the tasks on first use: a figure style needs neither them nor torchvision."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
