"""The findings on the front page: made from the records, one sentence for each verdict."""

import functools
import itertools
import math
import re

import pandas as pd
import pytest
from made_records import made
from PIL import Image
from test_book import script

from metaadamw_lite.experiments import TASKS, paired
from metaadamw_lite.experiments.null import PHI_SEEDS, frozen_phi
from metaadamw_lite.experiments.records import Records

findings = script("findings")
LOG = findings.logged_runs()
COMMITTED = Records()

DIFFERENCES = {
    "better": [6.0, 6.1, 6.2, 5.8, 5.9],
    "worse": [-6.0, -6.1, -6.2, -5.8, -5.9],
    "equivalent": [0.1, -0.1, 0.2, 0.0, -0.2],
    "open": [9.0, -8.0, 7.0, -6.0, 1.0],
    "untested": [1.0, 2.0],
}
"""In five pairs, by the verdict on them."""


@functools.cache
def difference(kind, size=1.0):
    return paired.paired_difference(size * pd.Series(DIFFERENCES[kind]), "%")


def compared(*kinds, task=None, size=1.0):
    """Rows as ``comparisons`` makes them, from the verdicts on gain and trained Φ; ``size`` multiplies gains."""
    rows = [
        {
            "task": task or [*TASKS][k],
            "profile": "paper",
            "how": "as published",
            "planned": 5,
            "gain": difference(gain, size),
            "gain_is": gain,
            "trained": difference(trained),
            "trained_is": trained,
            "power": 0.3,
            "improvements": size * pd.Series(DIFFERENCES[gain]),
        }
        for k, (gain, trained) in enumerate(kinds)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def other_evidence(monkeypatch):
    """What answers 3 and 4 rest on, to be set by a test."""
    evidence = {"gains_with_alpha": None, "random_phis": None, "logged_runs": LOG}
    for name in evidence:
        monkeypatch.setattr(findings, name, lambda *_, name=name: evidence[name])
    return evidence


def answers(rows):
    """The five answers, without their questions."""
    text = findings.rendered(findings.facts(COMMITTED, rows))
    found = re.findall(r"^\d\. \*\*.*?\?\*\* (.*)$", text, flags=re.MULTILINE)
    assert len(found) == 5
    return found


def test_the_front_page_and_its_picture_are_those_of_the_records():
    rows = findings.comparisons(COMMITTED)
    readme = findings.README.read_text(encoding="utf-8")
    assert readme == findings.updated(readme, findings.rendered(findings.facts(COMMITTED, rows))), "run `make findings`"
    for path in findings.PICTURES.values():
        with Image.open(path) as picture:
            numbers = findings.drawn(findings.rows_of_picture(COMMITTED, rows))
            assert picture.text["Description"] == numbers, "run `make findings`"


ALPHA = [(0, 10), (5, 10), (10, 10)]
NULL = [(x, y) for x in (0.2, 0.5, 0.9) for y in (1.0, 4.1, 30.0)]


def is_one_short_sentence(answer):
    return (
        len(re.findall(r"\S*\w\S*", answer)) <= 25
        and answer.endswith(".")
        and not re.search(r"[a-z)]\. |nan|None", answer)
    )


@pytest.mark.parametrize("kinds", [*itertools.product(DIFFERENCES, repeat=2)])
def test_every_answer_is_one_short_sentence_whatever_the_verdicts_are(kinds, other_evidence):
    for answer in answers(compared(kinds, kinds[::-1], task="wikitext2")):
        assert is_one_short_sentence(answer), answer


@pytest.mark.parametrize("alpha", [None, *ALPHA])
@pytest.mark.parametrize("null", [None, *NULL])
def test_every_answer_is_one_short_sentence_whatever_the_other_studies_say(alpha, null, other_evidence):
    if alpha:
        share = findings.exact_share(*alpha)
        other_evidence["gains_with_alpha"] = {
            "how": "as published",
            "count": alpha[0],
            "pairs": alpha[1],
            "share": share,
        }
    if null:
        share, best = (paired.Estimate(x, x - apart, x + apart) for x, apart in zip(null, (0.1, 1), strict=True))
        other_evidence["random_phis"] = {"phis": 32, "draws": 46, "share": share, "best": best}
    for answer in answers(compared(("open", "open"))):
        assert is_one_short_sentence(answer), answer


@pytest.mark.parametrize("side", [0, 1])
def test_another_verdict_is_another_sentence(side, other_evidence):
    cases = {
        ("better", "open"),
        ("worse", "open"),
        ("equivalent", "equivalent"),
        ("open", "open"),
        ("untested", "untested"),
        [("better", "worse"), ("equivalent", "open")][side],
    }
    said = {}
    for case in cases:
        rows = compared(*((kind, "open") if side == 0 else ("open", kind) for kind in case))
        said[case] = answers(rows)[side].partition(": ")[0]
    assert len({*said.values()}) == len(cases), said


def test_verdicts_are_those_after_the_correction_over_the_tasks():
    assert findings.judged(pd.Series([difference(kind) for kind in DIFFERENCES], dtype=object)) == [*DIFFERENCES]
    several = pd.Series([paired.paired_difference(pd.Series([1.0, 1.5, 2.5, 0.5]), "%")] * 5, dtype=object)
    assert findings.judged(several[:1]) == ["better"]
    assert findings.judged(several) == ["open"] * 5
    lost = pd.Series([paired.paired_difference(pd.Series([*DIFFERENCES["better"], math.nan]), "%")], dtype=object)
    assert findings.judged(lost) == ["open"]


def test_what_would_change_the_answer_is_seen_when_it_comes(other_evidence):
    def last(*kinds, **more):
        rows = compared(*kinds, **more)
        return findings.facts(COMMITTED, rows)["refuted"], answers(rows)[4]

    refuted, before = last(("open", "open"), ("open", "equivalent"))
    assert refuted == {"trained": 0, "as_large": 0}
    refuted, after = last(("open", "better"), ("open", "equivalent"))
    assert refuted == {"trained": 1, "as_large": 0}
    assert after != before
    large = [("better", "open")] * 4
    assert last(*large)[0] == {"trained": 0, "as_large": 4}
    assert last(*large, size=0.5)[0]["as_large"] == 2, "better on all, but on two by less than in the paper"
    assert last(*[("open", "better")] * 2, task="imdb")[0]["trained"] == 1, "a task counts once, however it was tested"


def test_random_phis_are_described_once_ten_of_them_have_all_their_runs():
    records = [made("adamw", seed, [100.0 + seed], "wikitext2", "lite") for seed in (0, 1)]
    records += [
        made(frozen_phi(phi), seed, [(100.0 + seed) * (1 - k / 100)], "wikitext2", "lite")
        for k, phi in enumerate(PHI_SEEDS[:12])
        for seed in (0, 1)
    ]
    assert findings.random_phis(Records.holding(records))["phis"] == 12
    assert findings.random_phis(Records.holding(records))["share"].value == pytest.approx(1)
    records[-1] = records[-1] | {"status": "failed"}
    assert findings.random_phis(Records.holding(records))["phis"] == 11
    del records[-6:]
    assert findings.random_phis(Records.holding(records)) is None, "fewer than ten say little of how Φ's vary"
    del records[2:]
    assert findings.random_phis(Records.holding(records)) is None


def test_logged_runs_that_do_not_reach_the_published_adamw_are_counted_in_the_direction_of_the_metric():
    log = findings.logged_runs()
    assert log["main"] == (6, 46)
    assert log["mostly"] == {"Multi30k": (7, 9), "CIFAR-10": (8, 10)}


def test_only_what_stands_between_the_markers_is_written():
    page = "# a\n<!-- findings: b -->\nold\n\n1. x\n<!-- end of findings -->\nrest \\1\n"
    assert findings.updated(page, "new \\1\n\n") == page.replace("old\n\n1. x\n", "new \\1\n")
    with pytest.raises(AssertionError, match="place for the findings"):
        findings.updated("# a\n", "new")
