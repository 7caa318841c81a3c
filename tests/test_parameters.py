"""Chapters as papermill calls them: any value of a parameter, from any folder, with and without records."""

import json
import math
import re
import textwrap
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from papermill.translators import PythonTranslator

from metaadamw_lite.experiments import etth1, notebook, records
from metaadamw_lite.experiments.notebook import SEED, check_parameters, one_of, positive, whole
from metaadamw_lite.experiments.training import shuffled_batches

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KNOWN = {path: papermill.inspect_notebook(path) for path in CHAPTERS}
ODD_NUMBERS = [None, -1, True, "1", "1e-3", "", "zero", [1], {}, math.nan, math.inf, -math.inf, 10**30]
ODD_WORDS = [None, "", 0, 1.5, True, ["lite"], {}, "nonsense", "Lite", "lite ", "cuda:99", "meta"]
ODD = {int: [*ODD_NUMBERS, 1.5, 1.0], float: [*ODD_NUMBERS, 0], str: ODD_WORDS}
FREE = {"show": [None, "", " ", 0, ["holds"]]}
"""Odd values of parameters that take any text."""


class AcceptedError(Exception):
    """The chapter would begin now."""


@pytest.fixture
def begin(monkeypatch):
    """``begin(chapter, name=value)`` runs a chapter up to the check of its parameters, and returns their rules."""

    def run(path, **parameters):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        at = next(i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
        sources = ["".join(cells[at]["source"]), PythonTranslator.codify(parameters)]
        variables, found = {"In": ["", *sources]}, {}

        def check(given, **rules):
            found.update(rules)
            check_parameters(given, variables, **rules)
            raise AcceptedError

        monkeypatch.setattr(notebook, "start", check)
        for source in (*sources, "".join(cells[at + 1]["source"])):
            try:
                exec(source, variables)
            except AcceptedError:
                return found
        raise AssertionError("the cell after the parameters does not check them")

    return run


def documented(path, name):
    """The words that the comment behind a parameter offers."""
    return re.findall(r'"([\w:]+)"', KNOWN[path][name]["help"])


def odd_values():
    for path, known in KNOWN.items():
        for name, parameter in known.items():
            default = json.loads(parameter["default"])
            for value in FREE.get(name, ODD[type(default)]):
                if not (name == "measurement" and value == "cpu"):
                    yield pytest.param(path, name, value, id=f"{path.stem[:2]}-{name}-{value!r}")


@pytest.mark.parametrize(("path", "name", "value"), list(odd_values()))
def test_an_odd_value_is_told_in_one_sentence_with_the_name_and_what_is_allowed(path, name, value, begin):
    with pytest.raises(ValueError) as told:
        begin(path, **{name: value})
    message = str(told.value)
    assert message.startswith(f"{name} is {value!r}")
    assert "it must be " in message
    assert "\n" not in message


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_parameter_of_a_chapter_has_a_rule(path, begin):
    assert set(begin(path)) == set(KNOWN[path])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_takes_what_the_comments_behind_its_parameters_offer(path, begin):
    for name in KNOWN[path]:
        for value in documented(path, name):
            if value == "cuda" and name == "device" and not torch.cuda.is_available():
                with pytest.raises(ValueError, match=r"device is 'cuda'.* it must be "):
                    begin(path, **{name: value})
            else:
                begin(path, **{name: value})


def test_parameters_that_are_words_say_which():
    for path, known in KNOWN.items():
        for name, parameter in known.items():
            if isinstance(json.loads(parameter["default"]), str):
                words = {json.loads(parameter["default"]), *documented(path, name)}
                assert len(words) > 1, f"{path.name}: {name}"


@pytest.mark.parametrize(
    ("rule", "value"),
    [(SEED, 0), (SEED, 2**32 - 1), (whole(2, 5), 2), (whole(2, 5), 5), (positive(1), 1), (positive(1), 1e-9)],
)
def test_the_ends_of_a_range_belong_to_it(rule, value):
    rule("x", value)


@pytest.mark.parametrize(
    ("rule", "value"),
    [(SEED, 2**32), (whole(2, 5), 1), (whole(2, 5), 6), (positive(1), 1.1), (positive(1), 0), (one_of("a"), "A")],
)
def test_what_is_just_outside_does_not(rule, value):
    with pytest.raises(ValueError, match=f"x is {value!r}; it must be "):
        rule("x", value)


# ---------------------------------------------------------------- without records

CELLS = {
    "start": "from metaadamw_lite.experiments.notebook import start\nstart(In)",
    "before": "early = 1\nearly",
    "asks": """
        from metaadamw_lite.experiments.records import NotRecordedError
        kept = [1]
        for early in kept:
            raise NotRecordedError("make it")
        table = [2]""",
    "builds on it": "number = table[0]\n'never shown'",
    "builds on that": "print(number)",
    "reads what the first would have replaced": "early",
    "needs nothing": "other = 3\nother",
    "a figure": "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
    "assigns it": "table = 4",
    "reads it": "table",
    "prints": "print('text')\nNone",
    "of its own": """
        def twice(table):
            return [number for number in table] * 2

        twice([5])""",
    "empty": "",
    "a comment": "# nothing",
}
FAILS = {"a slip": "tabel", "another error": "1 / 0", "a file": "open('nowhere')"}


def outputs(cell):
    return "".join(o.get("text") or o["data"].get("text/markdown") or o["data"]["text/plain"] for o in cell.outputs)


def execute(cells, folder):
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in cells]),
        folder / "in.ipynb",
    )
    made = papermill.execute_notebook(
        folder / "in.ipynb", folder / "out.ipynb", kernel_name="python3", progress_bar=False
    )
    return made.cells


def test_cells_without_their_evidence_name_the_command_that_makes_it_and_the_others_run(tmp_path):
    cells = dict(zip(CELLS, execute(CELLS.values(), tmp_path), strict=True))
    note = "*not recorded yet: made by `make it`*"
    pending = ["asks", "builds on it", "builds on that", "reads what the first would have replaced"]
    assert [name for name, cell in cells.items() if outputs(cell) == note] == pending
    shown = {name: outputs(cells[name]) for name in ("before", "needs nothing", "reads it", "prints", "of its own")}
    assert shown == {
        "before": "1",
        "needs nothing": "3",
        "reads it": "4",
        "prints": "text\n",
        "of its own": "[5, 5]",
    }
    assert "image/png" in cells["a figure"].outputs[0]["data"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILS)
def test_any_other_error_still_fails_a_cell(name, tmp_path):
    with pytest.raises(papermill.exceptions.PapermillExecutionError) as told:
        execute([CELLS["start"], CELLS["asks"], FAILS[name]], tmp_path)
    assert told.value.exec_count == 3
    assert FAILS[name] in str(told.value)


UNRECORDED = {
    "16_costs": {"measurement": "cuda"},
    "17_lilaw": {"profile": "paper"},
    "18_lope": {"profile": "paper"},
    "19_together": {"profile": "paper"},
}
COMMANDS = {
    "16_costs": "bench --device cuda --json data/bench/cuda.json",
    "17_lilaw": "sweep lilaw/paper",
    "18_lope": "sweep lope/paper",
    "19_together": "sweep together/paper",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNRECORDED)
def test_a_choice_without_records_gives_the_whole_chapter_from_any_folder(name, tmp_path, monkeypatch):
    """Where records are made some day, the chapter shows them, and this case has nothing left to see."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the package is at hand; --cwd is not given
    monkeypatch.chdir(tmp_path)
    made = papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        tmp_path / "out.ipynb",
        parameters=UNRECORDED[name],
        kernel_name="python3",
        progress_bar=False,
    )
    texts = [outputs(cell) for cell in made.cells if cell.cell_type == "code"]
    note = f"*not recorded yet: made by `python -m metaadamw_lite.experiments {COMMANDS[name]}`*"
    if note not in texts:
        pytest.skip("there are records now")
    assert texts.count(note) > 3
    if name != "19_together":  # all of which rests on records
        assert any(text and text != note for text in texts), "what needs no records is there"


def test_the_longest_run_of_chapter_2_leaves_a_batch_for_its_last_cell(begin):
    (path,) = (p for p in CHAPTERS if p.stem == "02_groups_and_features")
    settings = etth1.settings("paper")
    train = etth1.load("paper", settings, "synthetic").train
    count = len(shuffled_batches(train, settings.batch_size, seed=0))
    begin(path, steps=count - 1)
    with pytest.raises(ValueError, match=f"steps is {count}"):
        begin(path, steps=count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("01_update_rule", {"steps": 1}),
        ("02_groups_and_features", {"steps": 1}),
        ("03_attention_module", {"seeds": 2, "steps": 3}),
        ("04_uncertainty_weighting", {"meta_lr": 1.0, "meta_updates": 1000}),
        ("15_claims", {"show": "("}),
    ],
)
def test_a_chapter_runs_at_the_ends_of_what_is_allowed(name, parameters, tmp_path):
    papermill.execute_notebook(
        ROOT / "notebooks" / f"{name}.ipynb",
        tmp_path / "out.ipynb",
        parameters=parameters,
        cwd=ROOT / "notebooks",
        kernel_name="python3",
        progress_bar=False,
    )


def test_records_are_found_from_any_folder_by_a_package_in_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert records.repository() == ROOT


def test_a_package_outside_a_checkout_says_how_records_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site-packages/metaadamw_lite/experiments/records.py"))
    with pytest.raises(FileNotFoundError, match="--cwd CHECKOUT/notebooks"):
        records.repository()
    (tmp_path / "data" / "paper").mkdir(parents=True)
    assert records.repository() == tmp_path, "and that of the current folder comes first"
