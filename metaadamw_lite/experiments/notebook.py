"""What every notebook of the book does first."""

import ast
from collections.abc import Sequence
from itertools import pairwise

import matplotlib_inline.backend_inline as inline
import pandas as pd
import torch

from metaadamw_lite.experiments.figures import use_style

PAPERMILLS_OWN = {"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}
"""Parameters that papermill adds with ``--inject-paths``, ``--inject-output-path`` and ``--inject-input-path``."""


def start(cells: Sequence[str]) -> None:
    """Prepare a notebook: check its parameters, show whole texts in tables, set the figure style and one CPU thread.

    With one thread figures repeat exactly.

    Args:
        cells: IPython's ``In``.

    Raises:
        ValueError: if papermill was given a parameter that the notebook does not have.
    """
    check_parameters(cells)
    use_style()
    pd.set_option("display.max_colwidth", None)
    inline.set_matplotlib_formats("retina")  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)


def check_parameters(cells: Sequence[str]) -> None:
    """Raise a ValueError for a parameter that papermill injected but the notebook does not know.

    papermill puts the values it was given into a cell that begins with "# Parameters", behind the notebook's own cell
    of defaults; a name that is misspelt there would change nothing and go unnoticed.
    """
    for before, cell in pairwise(cells):
        if cell.startswith("# Parameters"):
            known, given = _assigned(before), _assigned(cell)
            unknown = [name for name in given if name not in {*known, *PAPERMILLS_OWN}]
            if unknown:
                raise ValueError(f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(known)}")


def _assigned(source: str) -> list[str]:
    return [
        target.id
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]
