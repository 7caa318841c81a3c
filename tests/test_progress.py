"""Progress bars: on stderr in a terminal, in the cell's output in a notebook, and the same there each time."""

import sys
import textwrap
from types import SimpleNamespace

import nbclient
import nbformat
import papermill
import pytest

from metaadamw_lite.experiments.progress import progress_bar

CELLS = {
    "a run": """
        import tempfile
        from pathlib import Path
        from metaadamw_lite.experiments.records import RunKey
        from metaadamw_lite.experiments.training import run
        with tempfile.TemporaryDirectory() as folder:
            record = run(RunKey("etth1", "metaadamw", "paper", "smoke", 0), Path(folder))
        print(record["status"])""",
    "a quiet run": """
        with tempfile.TemporaryDirectory() as folder:
            record = run(RunKey("etth1", "metaadamw", "paper", "smoke", 0), Path(folder), progress=False)""",
    "stages": """
        from metaadamw_lite.experiments.progress import progress_bar
        for stage in "ab":
            for _ in progress_bar(range(3), desc=stage):
                pass""",
    "an error": """
        try:
            for i in progress_bar(range(9), desc="to 9"):
                if i == 4:
                    raise ArithmeticError
        except ArithmeticError:
            pass""",
    "no end": "for _ in progress_bar(iter('abc'), desc='letters'): pass",
    "no name": "for _ in progress_bar(range(3)): pass",
    "messages": """
        with progress_bar(total=7, desc="slow", mininterval=0, miniters=1) as bar:
            bar.update(2)
            bar.write("one failed")
            bar.set_postfix(loss="α = 1–2")
            bar.update(5)
        bar.close()""",
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Outputs of each cell as papermill stores them, and all texts that a reader sees in between."""
    folder, seen = tmp_path_factory.mktemp("notebook"), []
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(code)) for code in CELLS.values()]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "in.ipynb")
    process = nbclient.NotebookClient.process_message

    def watched(self, msg, cell, cell_index):
        if msg["msg_type"] == "update_display_data":
            seen.append(msg["content"]["data"]["text/plain"])
        return process(self, msg, cell, cell_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nbclient.NotebookClient, "process_message", watched)
        made = papermill.execute_notebook(
            folder / "in.ipynb", folder / "out.ipynb", kernel_name="python3", progress_bar=False
        )
    return {name: [shown(o) for o in cell.outputs] for name, cell in zip(CELLS, made.cells, strict=True)}, seen


def shown(output):
    """The stream or the kind of an output, and its text."""
    return (output["name"], output["text"]) if "name" in output else (output["output_type"], output["data"])


def bars(*texts):
    return [("display_data", {"text/plain": text}) for text in texts]


@pytest.mark.parametrize(
    ("cell", "outputs"),
    [
        ("a run", [*bars("etth1 metaadamw paper-smoke-seed0: 8/8"), ("stdout", "finished\n")]),
        ("a quiet run", []),
        ("stages", bars("a: 3/3", "b: 3/3")),
        ("an error", bars("to 9: 4/9")),
        ("no end", bars("letters: 3")),
        ("no name", bars("3/3")),
        ("messages", [*bars("slow: 7/7"), ("stdout", "one failed\n")]),
    ],
)
def test_a_notebook_keeps_of_a_bar_how_far_it_came_and_nothing_on_stderr(executed, cell, outputs):
    assert executed[0][cell] == outputs


def test_a_bar_moves_in_a_notebook_while_its_cell_runs(executed):
    moving = [text for text in executed[1] if text.startswith("slow") and "7/7 [" not in text]
    assert any("2/7" in text and "α = 1–2" in text for text in moving)


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["Python", "IPython in a terminal"])
def test_outside_a_notebook_a_bar_is_on_stderr(shell, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert list(progress_bar(range(3), desc="to 3")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert "to 3: 100%" in err
