"""The weekly run of every chapter with each choice of its parameters, and the page of its status."""

import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def reexecute(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book"))
    return importlib.import_module("reexecute")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_choice_of_a_chapter_is_run_but_for_hours_and_other_devices(path, reexecute):
    runs = list(reexecute.matrix(path))
    assert runs[0] == {}
    for name, parameter in papermill.inspect_notebook(path).items():
        words = set(re.findall(r'"([\w:]+)"', parameter["help"])) - {json.loads(parameter["default"])}
        left_out = words - {run[name] for run in runs if name in run}
        assert left_out <= ({"paper"} if "lite" in words and "paper" in words else set()) | (
            {"cuda"} if name == "device" else set()
        )
    assert all(sum(run == other for other in runs) == 1 for run in runs)


def test_the_page_tells_of_runs_that_passed_wait_and_failed(reexecute, monkeypatch, tmp_path):
    outcomes = {"17_lilaw": "*not recorded yet: made by `x`*", "19_together": ""}

    def execute(notebook, output, parameters):
        if notebook.stem not in outcomes:
            raise papermill.exceptions.PapermillExecutionError(3, 3, "1 / 0", "ZeroDivisionError", "<b>|</b>", [])
        cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text=outcomes[notebook.stem])])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), output)

    monkeypatch.setattr(reexecute, "execute", execute)
    assert reexecute.main(["--chapters", "17", "19", "--out", str(tmp_path)]) == 0
    assert reexecute.main(["--chapters", "16", "17", "19", "--out", str(tmp_path)]) == 1
    page, status = ((tmp_path / name).read_text(encoding="utf-8") for name in ("index.html", "status.md"))
    rows = [line for line in status.splitlines() if line.startswith("|")][2:]
    for chapter, outcome in {"17": "wait for records", "16": "ZeroDivisionError", "19": "passed"}.items():
        assert all(outcome in row for row in rows if row.startswith(f"| {chapter}_"))
    assert f"{sum('failed' not in row for row in rows)} of {len(rows)} runs passed" in status
    assert "<b>" not in page
    links = [unquote(link) for link in re.findall(r'<a href="(.*?)">', page)]
    assert len(links) == len(rows)
    for link in links:
        assert (tmp_path / link).exists() == ("16_" not in link)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("target", ["help", "-n book", "-n test", "-n check", "-n reexecute"])
def test_make_works_in_a_path_with_spaces_and_letters_that_are_not_ascii(target, tmp_path):
    folder = tmp_path / "Größe und Mühe 語"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *target.split()], cwd=folder, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    assert str(folder) not in done.stdout, "no path that a shell would split"
    if target == "help":
        listed = set(re.findall(r"^make (\w+)", done.stdout, flags=re.MULTILINE))
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert listed == set(targets)


@pytest.mark.parametrize("name", ["book", "reexecute", "test"])
def test_the_steps_of_a_workflow_are_commands_of_the_repository(name):
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    for command in re.findall(r"run: (.*)", text):
        script = command.split()[0]
        assert command in ("make book", "make colab") or (ROOT / script).stat().st_mode & 0o100, command
    assert "secrets." not in text
    assert text.count("timeout-minutes") == text.count("runs-on")
