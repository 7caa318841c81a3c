"""Progress bars: a line on stderr in a terminal, one output of the cell in a notebook."""

import io
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """Make a bar as ``tqdm(iterable, **options)`` does, for a terminal or a notebook."""
    return (_CellBar if _in_kernel() else tqdm)(iterable, **options)


def _in_kernel() -> bool:
    """Tell whether a Jupyter kernel runs this (a notebook, Colab, papermill); IPython in a terminal has none."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class _CellBar(tqdm):  # type: ignore[misc]
    """A bar that is one output of its cell and changes in place.

    ``tqdm.auto`` needs widgets, or writes to stderr, which fails the book. A closed bar shows only its count, since
    times would change the notebook with each execution.
    """

    def __init__(self, iterable: Iterable[Any] | None, **options: Any) -> None:
        self._output: Any = None
        super().__init__(iterable, **options, file=io.StringIO(), ascii=False)  # the file takes the line breaks

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show a text, by default the bar, in place of the last one."""
        from IPython.display import display

        text = {"text/plain": str(self) if msg is None else msg}
        if self._output is None:
            self._output = display(text, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._output.update(text, raw=True)
        return True

    def close(self) -> None:
        """End the bar; later calls do nothing."""
        if not self.disable:
            super().close()
            done = f"{self.n}" if self.total is None else f"{self.n}/{self.total}"
            self.display(": ".join(filter(None, (self.desc.removesuffix(": "), done))))
