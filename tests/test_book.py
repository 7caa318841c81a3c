"""The book: one skeleton, one address, parameters that exist."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from click.testing import CliRunner
from papermill.cli import papermill as papermill_command

from metaadamw_lite.experiments.notebook import check_parameters

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_the_address_stands_in_one_place():
    for path, text in script("address").addressed().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make address`"


def test_a_new_address_reaches_badges_cells_and_buttons(monkeypatch):
    address = script("address")
    monkeypatch.setattr(address, "address", lambda: "https://github.com/someone/elsewhere")
    texts = address.addressed()
    for path, text in texts.items():
        assert "OWNER" not in text, path.name
        assert "someone/elsewhere" in text, path.name
    assert {p.name for p in texts} == {*(p.name for p in NOTEBOOKS), "_config.yml", "CITATION.cff"}
    assert links_of_pages(texts) == [True, True, True]


def links_of_pages(texts):
    """Whether the pages have a button to the repository, one to its issues, and one to Colab."""
    config = yaml.safe_load(texts[ROOT / "_config.yml"])
    html = config["html"]
    return [html["use_repository_button"], html["use_issues_button"], bool(config["launch_buttons"]["colab_url"])]


def test_while_the_address_is_not_settled_nothing_leads_to_a_page_that_does_not_exist(monkeypatch):
    address, url = script("address"), "https://github.com/OWNER/metaadamw_lite"
    monkeypatch.setattr(address, "address", lambda: url)
    assert links_of_pages(address.addressed()) == [False, False, False]
    assert "http" not in address.colab_badge(url, "01_update_rule.ipynb")
    assert "http" not in address.colab_setup(url)
    settled = url.replace("OWNER", "someone")
    assert settled.removeprefix("https://github.com/") in address.colab_badge(settled, "01_update_rule.ipynb")
    assert f'url = "{settled}"' in address.colab_setup(settled)


@pytest.mark.parametrize("settled", [True, False])
def test_a_notebook_without_its_repository_says_what_to_do(settled, tmp_path):
    url = f"https://github.com/{'someone' if settled else 'OWNER'}/metaadamw_lite"
    source = script("address").colab_setup(url)
    plain = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("!", "%")))
    alone = [sys.executable, "-S", "-c", plain]  # without site-packages, which have the package
    done = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True, check=False, env={})
    assert done.returncode == 1
    assert "needs its repository" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_has_the_skeleton(path):
    content = cells(path)
    prose = "\n".join("".join(c["source"]) for c in content if c["cell_type"] == "markdown")
    assert prose.startswith("# ")
    for part in ("**What you will learn.**", "## Summary", "## Exercises", "You need:"):
        assert part in prose
    tags = [tag for c in content for tag in c["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1
    assert "nbval-check-output" in tags
    ids = [c["id"] for c in content]
    assert ids[1:3] == ["colab-badge", "colab-setup"]
    assert any(re.search(r"\bstart\(\s*In\b", "".join(c["source"])) for c in content)


def prose(path):
    return "\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")


def test_the_chapters_of_the_tasks_have_one_order_of_sections():
    chapters = [path for path in NOTEBOOKS if "06" <= path.stem[:2] <= "10"]
    found = [re.findall(r"^##+ (.*?)(?:: .*)?$", prose(path), flags=re.MULTILINE) for path in chapters]
    assert len(found) == 5
    assert found[0][0] == "The answer"
    assert "This task's own question" in found[0]
    assert all(headings == found[0] for headings in found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_reader_is_told_to_try_parameters_that_exist(path):
    if path.stem[:2] in ("06", "07", "08", "09", "10", "11", "16", "17", "18", "19"):
        last = re.split(r"^## ", prose(path), flags=re.MULTILINE)[-1]
        assert last.startswith("What to try next")
        named = dict(re.findall(r"`(\w+) = (.+?)`", last))
        known = papermill.inspect_notebook(path)
        assert named
        assert named.keys() <= known.keys()
        assert all(known[name]["default"] != value for name, value in named.items()), "that is the default"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_pages_lead_somewhere(path):
    for cell in cells(path):
        if cell["cell_type"] == "markdown" and cell["id"] != "colab-badge":
            for target in re.findall(r"\]\(([^)#:]+\.(?:ipynb|md))\)", "".join(cell["source"])):
                assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_those_that_are_compared(path):
    for cell in cells(path):
        if cell["cell_type"] == "code":
            checked = "nbval-check-output" in cell["metadata"].get("tags", [])
            assert bool(cell["outputs"]) == checked, "run `make notebooks`"


def test_unknown_parameters_are_an_error():
    with pytest.raises(ValueError, match="unknown parameter sede; this notebook has seed, steps"):
        check_parameters(["", "seed = 0\nsteps = 40", "# Parameters\nsede = 1\n", "start(In)"])
    check_parameters(["", "seed = 0\nsteps = 40", "# Parameters\nseed = 1\n", "start(In)"])
    check_parameters(["", "seed = 0", "start(In)"])
    check_parameters(["", '# Parameters\nPAPERMILL_OUTPUT_PATH = "a.ipynb"\n', "start(In)"])
    with pytest.raises(ValueError, match="unknown parameter sede; this notebook has seed"):
        check_parameters(["", "seed = 0", '# Parameters\nsede = 1\nPAPERMILL_INPUT_PATH = "a.ipynb"\n', "start(In)"])


@pytest.mark.parametrize("option", ["--inject-paths", "--inject-output-path", "--inject-input-path"])
def test_what_papermill_injects_itself_is_no_unknown_parameter(option, tmp_path):
    check = "from metaadamw_lite.experiments.notebook import check_parameters\ncheck_parameters(In)"
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(check),
        ]
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    arguments = [
        str(tmp_path / "in.ipynb"),
        str(tmp_path / "out.ipynb"),
        "--kernel",
        "python3",
        "--language",
        "python",
        option,
    ]
    result = CliRunner().invoke(papermill_command, arguments)
    assert result.exit_code == 0, result.exception
    assert "PAPERMILL_" in (tmp_path / "out.ipynb").read_text(encoding="utf-8")


def test_papermill_with_an_unknown_parameter_fails(tmp_path):
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="unknown parameter sede"):
        papermill.execute_notebook(
            ROOT / "notebooks" / "04_uncertainty_weighting.ipynb",
            tmp_path / "out.ipynb",
            parameters={"sede": 1},
            cwd=ROOT / "notebooks",
            kernel_name="python3",
            progress_bar=False,
        )


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_papermill_with_parameters_reaches_the_run(tmp_path, protocol):
    path = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        ROOT / "notebooks" / "06_etth1.ipynb",
        path,
        parameters={"protocol": protocol, "seed": 1},
        cwd=ROOT / "notebooks",
        kernel_name="python3",
        progress_bar=False,
    )
    text = path.read_text(encoding="utf-8")
    assert f"profile: smoke, protocol: {protocol}, data: synthetic" in text


def test_a_chapter_that_trains_a_task_does_so_on_a_gpu_where_there_is_one():
    trains = re.compile(r"\b(run|live|in_turns)\(|\bmake_optimizer\(\"")
    found = {}
    for notebook in NOTEBOOKS:
        code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
        if trains.search("\n".join(code)):
            found[notebook.name[:2]] = papermill.inspect_notebook(notebook).get("device", {}).get("default")
    assert found == dict.fromkeys(["02", "03", "06", "07", "08", "09", "10", "16"], '"auto"')


def test_building_with_a_parameter_that_no_notebook_has_fails(capsys):
    assert script("build").main(["--parameters", "profil=smoke"]) == 1
    error = capsys.readouterr().err
    assert "profil" in error
    assert "profile" in error


def test_every_promise_names_a_test_that_exists_and_counts_its_cases():
    page = (ROOT / "book" / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)` \| ([^|]+) \|", page)
    assert len(named) > 20
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", str(ROOT / "tests")]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cases = Counter(re.findall(r"^tests/(test_\w+\.py)::(test_\w+)", collected, flags=re.MULTILINE))
    for file, test, count in named:
        assert cases[file, test] > 0, f"{file}::{test}"
        if count.isdigit():
            assert cases[file, test] == int(count), f"{file}::{test}"


def test_the_page_of_promises_counts_the_generated_cases():
    import test_properties
    import test_reference

    page = (ROOT / "book" / "promises.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"`test_\w+\.py::(test_\w+)` \| (\d+) generated \|", page))
    tests = vars(test_properties) | vars(test_reference)
    made = {name: test.cases for name, test in tests.items() if hasattr(test, "cases")}
    assert {name: int(count) for name, count in named.items()} == made
    assert sum(made.values()) >= 2000


def test_a_link_between_chapters_names_the_chapter_wherever_a_notebook_is_opened():
    """JupyterLab and Colab show nothing for a link without a text; only the book fills it with the title."""
    for path in NOTEBOOKS:
        text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
        assert "[](" not in text, path.name
        for number, target in re.findall(r"\[[^\]]*?chapter (\d+)[^\]]*\]\((\d\d)_\w+\.ipynb", text, re.I):
            assert int(number) == int(target), f"{path.name}: chapter {number} links to {target}"
