"""The beginning of every chapter: its parameters are checked, tables and figures get their style."""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import matplotlib_inline.backend_inline as inline
import pandas as pd
import torch
from IPython.core.getipython import get_ipython
from IPython.display import Image, Markdown

from metaadamw_lite.experiments.figures import use_style
from metaadamw_lite.experiments.pending import PendingCells
from metaadamw_lite.experiments.records import repository


def findings() -> tuple[Markdown, Image, Markdown]:
    """The answers, the picture and the table of the front page, to be displayed: ``display(*findings())``.

    Raises:
        FileNotFoundError: outside a checkout.
    """
    text = (repository() / "README.md").read_text(encoding="utf-8")
    block = text.partition("<!-- findings")[2].partition("<!-- end of findings")[0].partition("-->\n")[2]
    answers, _, rest = block.partition("<!-- picture -->")
    picture = repository() / "book" / "_static" / "tasks.png"
    table = rest.partition("<!-- end of picture -->")[2]
    return Markdown(answers), Image(picture), Markdown(table)  # type: ignore[no-untyped-call]


PAPERMILLS_OWN = {"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}
"""Parameters that papermill adds with ``--inject-paths``, ``--inject-output-path`` and ``--inject-input-path``."""

Rule = Callable[[str, Any], None]
"""Called with the name of a parameter and its value, raises a ValueError that says what is allowed."""


def start(cells: Sequence[str], **rules: Rule) -> None:
    """Prepare a notebook: check its parameters, show whole texts in tables, set the figure style and one CPU thread.

    With one thread figures repeat exactly. From now on a cell whose evidence is not recorded says so (``pending``).

    Args:
        cells: IPython's ``In``.
        rules: for each parameter of the notebook, what it may be.

    Raises:
        ValueError: for the first parameter with a value that is not allowed, or if papermill was given a parameter
            that the notebook does not have.
    """
    shell = get_ipython()
    assert shell is not None, "it prepares a notebook"
    check_parameters(cells, shell.user_ns, **rules)
    PendingCells(shell)
    use_style()
    pd.set_option("display.max_colwidth", None)
    inline.set_matplotlib_formats("retina")  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)


def check_parameters(cells: Sequence[str], values: Mapping[str, Any] | None = None, **rules: Rule) -> None:
    """Raise a ValueError for a parameter that the notebook does not know, or with a value that is not allowed.

    papermill puts the values it was given into a cell that begins with "# Parameters", behind the notebook's own cell
    of defaults; a name that is misspelt there would change nothing and go unnoticed.

    Args:
        cells: IPython's ``In``.
        values: the notebook's variables.
        rules: what each of its parameters may be.
    """
    for before, cell in pairwise(cells):
        if cell.startswith("# Parameters"):
            known, given = _assigned(before), _assigned(cell)
            unknown = [name for name in given if name not in {*known, *PAPERMILLS_OWN}]
            if unknown:
                raise ValueError(f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(known)}")
    for name, rule in rules.items():
        rule(name, (values or {})[name])


def _must_be(allowed: str, fits: Callable[[Any], bool]) -> Rule:
    def check(name: str, value: Any) -> None:
        if not fits(value):
            raise ValueError(f"{name} is {value!r}; it must be {allowed}")

    return check


def one_of(*values: str) -> Rule:
    """One of some words."""
    words = list(dict.fromkeys(values))
    return _must_be(" or ".join(f'"{word}"' for word in words), lambda value: isinstance(value, str) and value in words)


def whole(least: int, most: int) -> Rule:
    """A whole number from ``least`` to ``most``."""
    return _must_be(f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most)


def positive(most: float) -> Rule:
    """A number above 0, and not above ``most``."""

    def fits(value: Any) -> bool:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and math.isfinite(value) and 0 < value <= most

    return _must_be(f"a number above 0, at most {most:g}", fits)


TEXT = _must_be("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
SEED = whole(0, 2**32 - 1)
"""A seed that the generators of torch, NumPy and Python all take."""


def usable_device(name: str, value: Any) -> None:
    """A device that this machine has, as torch names it, or "auto"."""
    from metaadamw_lite.experiments.training import pick_device  # which chapters without a device do not need

    allowed = 'it must be "auto", "cpu", or "cuda" on a machine with a GPU'
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; {allowed}")
    try:
        pick_device(value)
    except ValueError as error:
        raise ValueError(f"{error}; {allowed}") from error


def _assigned(source: str) -> list[str]:
    return [
        target.id
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]
