"""The paper's experiments, run again: tasks, training, studies and reports.

* ``task``      what a task is and which settings a run has
* ``etth1``     the tasks, one file each: data, model, loss, metric, configuration
* ``datasets``  where data files come from, and how they are checked
* ``training``  one run, from the seed to the record
* ``records``   what a run leaves behind
* ``studies``   which runs belong together, and running all that are missing
* ``report``    tables and statistics made from records
* ``figures``   the book's figures
* ``notebook``  what every notebook does first

``python -m metaadamw_lite.experiments --help`` lists the commands.
"""

from metaadamw_lite.experiments.etth1 import ETTH1
from metaadamw_lite.experiments.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (ETTH1,)}
