"""The records of a folder, read once, and records at hand in their place."""

import pytest

from metaadamw_lite.experiments import records
from metaadamw_lite.experiments.records import Records, RunKey, write_record

CONTENT = {"settings": {}, "status": "finished", "epochs": [], "best": None, "test": None, "environment": {}}


def written(folder, seed, data="ETTh1.csv", profile="lite"):
    """The key of a run of ETTh1 whose record is now in the folder."""
    key = RunKey("etth1", "adamw", "paper", profile, seed)
    write_record({**CONTENT, "data": data}, key, folder)
    return key


@pytest.fixture
def reads(monkeypatch):
    """The files that have been read."""
    read, paths = records.read_record, []
    monkeypatch.setattr(records, "read_record", lambda path: paths.append(path) or read(path))
    return paths


def test_each_record_is_read_once_and_not_before_it_is_asked_for(tmp_path, reads):
    keys = [written(tmp_path, seed) for seed in range(3)]
    all_of_them = Records(tmp_path)
    assert not reads
    assert all_of_them.of("etth1") is all_of_them.of("etth1")
    assert [all_of_them.get(key)["run"]["seed"] for key in keys] == [0, 1, 2]
    assert len(reads) == 3


def test_a_single_record_is_read_without_the_others(tmp_path, reads):
    key = [written(tmp_path, seed) for seed in range(3)][1]
    some = Records(tmp_path)
    assert some.get(key) is some.get(key)
    assert reads == [key.path(tmp_path)]
    assert some.get(RunKey("etth1", "metaadamw", "paper", "lite", 0)) is None


def test_what_is_written_later_is_seen_by_new_records_only(tmp_path):
    before = Records(tmp_path)
    key = RunKey("etth1", "adamw", "paper", "lite", 0)
    assert before.of("etth1") == []
    assert before.get(key) is None
    assert written(tmp_path, 0) == key
    assert before.of("etth1") == []
    assert before.get(key) is None
    assert len(Records(tmp_path).of("etth1")) == 1


def test_runs_on_made_up_data_are_found_by_their_key_but_are_no_evidence(tmp_path):
    key = written(tmp_path, 0, "synthetic", "smoke")
    assert Records(tmp_path).of("etth1") == []
    assert Records(tmp_path).get(key)["data"] == "synthetic"


def test_records_at_hand_are_those_of_their_task_and_no_folder_is_looked_at(reads):
    keys = [RunKey(task, "adamw", "paper", "lite", 0) for task in ("etth1", "imdb")]
    at_hand = [{**CONTENT, "data": "made", "run": vars(key)} for key in keys]
    held = Records.holding(at_hand)
    assert held.of("imdb") == at_hand[1:]
    assert held.get(keys[0]) == at_hand[0]
    assert held.of("wikitext2") == []
    assert held.get(RunKey("wikitext2", "adamw", "paper", "lite", 0)) is None
    assert not reads
    with pytest.raises(ValueError, match="task is 'ett'; allowed are etth1"):
        held.of("ett")
