"""The page "Your own task, your own variant" runs as it stands, and its runs are what it says."""

import re
from pathlib import Path

import pytest

from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.records import read_records
from metaadamw_lite.experiments.variants import VARIANTS

PAGE = (Path(__file__).resolve().parent.parent / "book" / "own.md").read_text(encoding="utf-8")
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def registries():
    """Tasks and variants, which are afterwards as they were."""
    before = [(registry, dict(registry)) for registry in (TASKS, VARIANTS)]
    yield
    for registry, content in before:
        registry.clear()
        registry.update(content)


def test_the_page_makes_records_of_a_task_and_a_variant_of_its_own(registries, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(CODE, "own.md", "exec"), names)
    records = read_records(tmp_path / "my-results", "digits")
    assert len(records) == 4 * 3
    assert {record["status"] for record in records} <= {"finished", "stopped early"}
    of = {(r["run"]["variant"], r["run"]["seed"]): r for r in records}
    assert of["adamw", 0]["best"]["metric"] > 0.5, "far from one in ten"
    assert of["metaadamw-wide", 0]["settings"]["metaadamw"] == {"alpha_range": 2.0}
    assert len(of["metaadamw", 0]["meta_updates"]) > 0 == len(of["metaadamw-frozen", 0]["meta_updates"])
    for seed in range(3):
        first = [of[variant, seed]["epochs"][0]["val_loss"] for variant in ("metaadamw-wide", "metaadamw")]
        assert first[0] != first[1]
    difference = names["improvement"](names["wide"], names["adamw"], lower_is_better=False)
    assert difference.seeds == 3
    assert str(difference) in capsys.readouterr().out
