"""CONTRIBUTING.md is true to the code: what it says how to add can be run then."""

import re
from pathlib import Path

import pytest

from metaadamw_lite.experiments import TASKS, training
from metaadamw_lite.experiments.__main__ import main
from metaadamw_lite.experiments.records import RunKey, read_record
from metaadamw_lite.experiments.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def added():
    """The Python on the page has been run."""
    tasks, variants = dict(TASKS), dict(VARIANTS)
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)), {})
    yield
    for table, before in ((TASKS, tasks), (VARIANTS, variants)):
        table.clear()
        table.update(before)


@pytest.mark.parametrize(
    ("task", "variant"), [("etth1", "metaadamw-wide"), ("etth1", "rmsprop"), ("etth1-hourly", "adamw")]
)
def test_what_the_page_adds_can_be_run(task, variant, added, tmp_path):
    assert f"run {task} --optimizer {variant}" in PAGE or variant == "rmsprop"
    key = RunKey(task, variant, "paper", "smoke", 0)
    training.run(key, tmp_path, progress=False)
    assert read_record(key.path(tmp_path))["status"] in ("finished", "stopped early")


def test_the_command_on_the_page_leaves_the_record_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"metaadamw_lite\.experiments (run .*)", PAGE)
    assert main(command.split()) == 0
    assert (tmp_path / re.search(r"`(my-results/[^`]*\.json)`", PAGE)[1]).is_file()


def test_files_and_names_on_the_page_exist():
    for name in re.findall(r"`(?:\w+/)*(\w+\.(?:py|md|yml))`", PAGE):
        if name != "test_NAME.py":
            assert [path for depth in ("", "*/", "*/*/") for path in ROOT.glob(depth + name)], name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`", PAGE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
