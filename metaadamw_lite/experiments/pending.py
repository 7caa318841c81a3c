"""Notes in place of tables and pictures whose evidence is not recorded yet.

A chapter offers choices, such as a profile, and some have no records. The first cell without records raises
``NotRecordedError``, and cells that need its variables cannot run, either. ``PendingCells`` makes these cells show the
command that makes the records, and lets every other cell run.
"""

import ast
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Markdown

from metaadamw_lite.experiments.records import NotRecordedError

_GUARD = "_pending_cells"


class PendingCells(ast.NodeTransformer):
    """Guard every further cell against missing evidence.

    IPython gives each cell to ``visit_Module``, which puts it into a ``with`` block over this object. If the block ends
    in a ``NotRecordedError``, or in a ``NameError`` for a variable of a guarded cell, the cell shows the note and
    counts as done. Any other error goes on.

    Args:
        shell: the IPython shell of the notebook.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self.shown: Any = None  # the output of the running cell
        self._variables: dict[str, Any] = shell.user_ns
        self._assigned: set[str] = set()
        self._notes: dict[str, str] = {}
        before = [t for t in shell.ast_transformers if not isinstance(t, PendingCells)]
        shell.ast_transformers[:] = [*before, self]
        self._variables[_GUARD] = self

    def visit_Module(self, cell: ast.Module) -> ast.Module:
        """Put a cell into the block, and show the value of its last line behind it."""
        self._assigned = set(_assigned(cell))
        guarded = ast.parse(f"with {_GUARD}:\n    {_GUARD}.shown = None\n{_GUARD}.shown")
        block, keep = guarded.body[0], guarded.body[0].body[0]  # type: ignore[attr-defined]
        *body, last = cell.body or [ast.Pass()]
        if isinstance(last, ast.Expr):
            keep.value = last.value
            last = ast.copy_location(keep, last)
        block.body = [*body, last]  # type: ignore[attr-defined]
        return ast.fix_missing_locations(guarded)

    def __enter__(self) -> Self:
        """Begin a cell."""
        self.shown = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        """End a cell; return True if it ended for want of records."""
        note = str(error) if isinstance(error, NotRecordedError) else None
        if isinstance(error, NameError):
            note = self._notes.get(error.name or "")
        if note is None:
            for name in self._assigned:
                self._notes.pop(name, None)
            return False
        for name in self._assigned:  # values of an earlier choice must not pass for this one's
            self._variables.pop(name, None)
            self._notes[name] = note
        self.shown = Markdown(f"*{note}*")  # type: ignore[no-untyped-call]
        return True


def _assigned(node: ast.AST) -> Iterator[str]:
    """Yield the variables that some code assigns, except inside its functions and comprehensions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.Name):
            if isinstance(child.ctx, ast.Store):
                yield child.id
        elif not isinstance(child, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            yield from _assigned(child)
