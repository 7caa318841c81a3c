"""What the released logs say: which run is behind a number of Table 3, and which pairs differ in one setting."""

import pandas as pd
import pytest

from metaadamw_lite.experiments import TASKS, released
from metaadamw_lite.experiments.records import paper_table


def test_every_number_of_table_3_is_traced_to_a_logged_run():
    traced = released.behind_table3().set_index(["task", "row"])
    cells = paper_table(3).drop(index="MetaAdamW", level="factor")[list(TASKS)]
    assert len(traced) == (cells.notna() & (cells != "baseline")).sum().sum()
    assert (traced["settings"] >= 1).all(), "none is the best run itself"
    shared = traced[traced["number"] == "116.13"]
    assert len(shared) == 4
    assert len(set(shared["which"])) == 1, "four rows share one run"
    assert "groups: original" in shared["which"].iloc[0]
    assert "objective: gradient" in shared["which"].iloc[0]
    frequency = traced.loc[(TASKS["cifar10"].title, "Meta-update frequency: Once per epoch")]
    assert (frequency["settings"], frequency["which"]) == (1, "meta-update every (steps): 391")


def test_a_number_without_a_logged_run_is_kept_and_says_so(monkeypatch):
    log = released.released_log
    monkeypatch.setattr(released, "released_log", lambda task: log(task).query("value != '0.8776'"))
    missing = released.behind_table3().query("number == '0.8776'")
    assert len(missing) == 1
    assert missing["settings"].isna().all()


@pytest.mark.parametrize(("task", "best"), list(paper_table(2)["metaadamw"].items()))
def test_the_log_has_the_papers_best_run_once_and_nothing_better(task, best):
    values = released.released_log(task)["value"].astype(float)
    assert (values == best).sum() == 1
    assert best == (values.min() if TASKS[task].lower_is_better else values.max())


def test_pairs_differ_in_one_setting_and_worse_is_negative():
    pairs = released.one_setting_apart()
    weighting = pairs[pairs["second"] == "combined, HUW 1.0 1.0 1.0"]
    plain = weighting[weighting["first"] == "combined, plain sum 1.0 1.0 1.0"].iloc[0]
    assert (plain["value_first"], plain["value_second"]) == ("116.57", "116.78")
    assert plain["change"] == pytest.approx(100 * (1 - 116.78 / 116.57))
    assert plain["of_gain"] == pytest.approx(abs(plain["change"]) / 4.12)
    accuracy = pairs[(pairs["setting"] == "limit of epochs") & (pairs["value_second"] == "0.8279")].iloc[0]
    assert accuracy["change"] == pytest.approx(100 * (0.8279 / 0.8183 - 1)), "more is better here"


def test_a_change_to_a_value_is_counted_whichever_run_of_a_pair_has_it():
    names = ["setting", "first", "second", "change"]
    rows = [
        ("groups", "original", "fine_grained", 2.0),
        ("groups", "fine_grained", "original", -1.0),
        ("groups", "fine_grained", "original", 0.5),
        ("groups", "original", "none", 4.0),
        ("objective", "fine_grained", "original", 8.0),
    ]
    pairs = pd.DataFrame(rows, columns=names)
    assert released.changes_to(pairs, "groups", "fine_grained").tolist() == [2.0, 1.0, -0.5]
