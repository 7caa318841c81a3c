"""Chapters run on Colab: from the set-up cell, which fetches a clone, to the last cell, and Colab's own stays as it is.

Colab is stood in for by an environment without Jupyter Book, a module ``google.colab`` and an empty folder. Two such
environments are made:

* by ``make test``, one that borrows torch and the rest from the environment of the tests, and needs no network.
  Three chapters run in it: one of Part I, one about a task, one about a relative;
* by ``make colab``, and every week, a new one with Colab's Python and the packages of ``colab.txt``, at Colab's
  versions. Every chapter runs in it. ``METAADAMW_COLAB`` names its Python.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import nbformat
import papermill
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
COLABS_PYTHON = os.environ.get("METAADAMW_COLAB")
FEW = ("01_update_rule", "06_etth1", "17_lilaw")
CHAPTERS = [p for p in sorted((ROOT / "notebooks").glob("*.ipynb")) if COLABS_PYTHON or p.stem in FEW]
BROUGHT = ROOT / "tests" / "colab.txt"

pytestmark = pytest.mark.slow


def setup_cell(url):
    spec = spec_from_file_location("address", ROOT / "book" / "address.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.colab_setup(url)


def needed(requirement, found):
    """Add the installed distributions that a requirement brings, by name, to those found."""
    try:
        distribution = metadata.distribution(requirement.name)
    except metadata.PackageNotFoundError:
        return
    if (requirement.name, *requirement.extras) not in found:
        found[requirement.name, *requirement.extras] = distribution
        for line in distribution.requires or []:
            other = Requirement(line)
            if not other.marker or any(other.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                needed(other, found)


def lend(folder):
    """Link what Colab brings, and the extra ``experiments``, from the environment of the tests into a folder."""
    found = {}
    lines = [line for line in BROUGHT.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    for line in lines:
        needed(Requirement(line), found)
    for line in metadata.requires("metaadamw-lite"):
        other = Requirement(line)
        if other.marker is None or other.marker.evaluate({"extra": "experiments"}):
            needed(other, found)
    folder.mkdir()
    for distribution in found.values():
        tops = {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution.locate_file(top)).resolve())


class Colab:
    """An environment as Colab's, a folder in which its notebooks start, and a repository that it can clone."""

    def __init__(self, folder):
        self.python = folder / "env" / "bin" / "python"
        subprocess.run([COLABS_PYTHON or sys.executable, "-m", "venv", folder / "env"], check=True)
        variables = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "METAADAMW_DATA": str(folder / "no data")}
        if COLABS_PYTHON:
            self.run("-m", "pip", "install", "-q", "-r", BROUGHT)
        else:  # pip uninstalls nothing that lies outside of its environment
            self.run("-m", "pip", "uninstall", "-q", "-y", "setuptools")  # that of Python 3.11 is too old to build with
            lend(folder / "lent")
            site = self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            (Path(site) / "lent.pth").write_text(f"{folder / 'lent'}\n", encoding="utf-8")
            variables |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0: without isolation
        stub = folder / "stub"
        (stub / "google" / "colab").mkdir(parents=True)
        (stub / "google" / "colab" / "__init__.py").touch()
        (stub / "sitecustomize.py").write_text("import google.colab\n", encoding="utf-8")
        kernel = folder / "jupyter" / "kernels" / "colab"
        kernel.mkdir(parents=True)
        command = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = {"argv": command, "language": "python", "env": variables | {"PYTHONPATH": str(stub)}}
        (kernel / "kernel.json").write_text(json.dumps(spec | {"display_name": "Colab"}), encoding="utf-8")
        self.kernels = folder / "jupyter"
        self.content = folder / "content"
        self.content.mkdir()
        self.repository = folder / "published" / "metaadamw_lite"
        publish(self.repository)

    def run(self, *arguments):
        """The output of a command of the environment's Python."""
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([self.python, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=alone)
        return done.stdout

    def installed(self):
        """Versions by name."""
        return {p["name"]: p["version"] for p in json.loads(self.run("-m", "pip", "list", "--format", "json"))}

    def execute(self, notebook, output):
        """Run a notebook from top to bottom."""
        nbformat.write(notebook, output)
        papermill.execute_notebook(output, output, kernel_name="colab", cwd=self.content, progress_bar=False)


def publish(folder):
    """Make a repository with what the checkout holds now, committed or not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "--all"], [*who, "commit", "-q", "-m", "As it is"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    if not (ROOT / ".git").exists():
        pytest.skip("Colab clones a repository, and this is none")
    folder = tmp_path_factory.mktemp("colab")
    yield Colab(folder)
    shutil.rmtree(folder)  # pytest would keep the gigabytes of three runs


@pytest.fixture(scope="module")
def brought(colab):
    """Versions of what Colab brings, before any set-up cell has run."""
    return colab.installed()


@pytest.fixture(autouse=True)
def _kernels(colab, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(colab.kernels))


def test_a_repository_that_cannot_be_fetched_is_told_in_one_sentence(colab, tmp_path):
    """Comes first: later the package is installed."""
    cell = nbformat.v4.new_code_cell(setup_cell(f"{colab.repository.as_uri()}-moved"))
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="needs its repository") as error:
        colab.execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "alone.ipynb")
    assert error.value.ename == "ModuleNotFoundError"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_runs_on_colab_from_top_to_bottom_and_replaces_nothing(path, colab, brought, tmp_path):
    assert "torch" in brought
    assert not any(re.match("(?i)jupyter.book|papermill|sphinx", name) for name in brought)
    notebook = nbformat.read(path, as_version=4)
    (setup,) = (cell for cell in notebook.cells if cell["id"] == "colab-setup")
    setup["source"] = setup_cell(colab.repository.as_uri())
    colab.execute(notebook, tmp_path / path.name)
    assert [p.name for p in colab.content.iterdir()] == ["metaadamw_book"], "one clone, and nothing beside it"
    installed = colab.installed()
    assert brought.items() <= installed.items(), "what Colab brings stays as it is"
    assert installed.keys() - brought.keys() >= {"metaadamw-lite"}
