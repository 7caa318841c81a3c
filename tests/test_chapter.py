"""The chapters about single tasks."""

import pandas as pd
import pytest
from made_records import COMMITTED, made, runs_of

from metaadamw_lite.experiments import TASKS, bench, chapter, frames, main_report, paired
from metaadamw_lite.experiments.chapter import Evidence
from metaadamw_lite.experiments.records import NotRecordedError, Records
from metaadamw_lite.experiments.variants import ARMS
from metaadamw_lite.experiments.verdict import judge


def test_whole_runs_that_are_too_few_to_judge_by_are_shown_all_the_same():
    records = [r | {"settings": {"epochs": 2, "batch_size": 8}, "samples": {"train": 8}} for r in runs_of("lite", 5)]
    given = Records.holding(records + runs_of("paper", 1))
    says = Evidence(given, TASKS["etth1"]).conclusion()
    assert "Runs as published under `paper`, too few to judge by: seed 0: AdamW 2, MetaAdamW 1.8 (+10.0 %)." in says
    given = Records.holding(records)
    assert "too few to judge by" not in Evidence(given, TASKS["etth1"]).conclusion()


def test_whole_runs_that_were_still_getting_better_are_named(monkeypatch):
    falling, flat = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 2.0, 1.0], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 2.0, 2.5]
    runs = [("adamw", 0, flat), ("adamw", 1, falling[:-1]), ("metaadamw", 0, flat), ("metaadamw", 1, falling)]
    records = [
        made(arm, seed, metric) | {"status": "finished" if len(metric) == 8 else "stopped early"}
        for arm, seed, metric in runs
    ]
    others = [made(arm, seed, falling, profile="lite") for arm, seed, _ in runs]
    others.append(made("metaadamw", 2, falling))  # which stopped early in the last epoch: nothing cut it off
    given = Records.holding(records * 3 + others)
    monkeypatch.setattr(main_report, "best_evidence", lambda runs, protocol: "paper")
    says = Evidence(given, TASKS["etth1"]).cut_off().split("\n")
    assert says[0].startswith("Whole runs that the limit of 8 epochs ended")
    assert says[2] == "* `paper`, AdamW: none."
    assert says[3].startswith("* `paper`, MetaAdamW: seed 1 (50.0 %)"), "the last epoch halved it"
    monkeypatch.setattr(main_report, "best_evidence", lambda runs, protocol: "lite")
    assert Evidence(given, TASKS["etth1"]).cut_off() == "", "when a shortened run ends says nothing"


def test_a_page_says_how_long_its_live_run_takes_on_each_recorded_device(monkeypatch):
    def ran(arm, seed, seconds, device, status="finished"):
        record = made(arm, seed, [3.0, 2.0])
        epochs = [epoch | {"seconds": seconds} for epoch in record["epochs"]]
        where = record["environment"] | {"device": device, "threads": 1}
        return record | {"environment": where, "epochs": epochs, "status": status}

    measure = f"whole epoch, {TASKS['etth1'].title} (K_meta = {TASKS['etth1'].settings('paper').meta_every})"
    row = {"measure": measure, "who": "ours", "baseline_seconds": 1 / 217, "seconds": 4 / 217}
    gpu = {"environment": {"device": "H200", "device_type": "cuda", "revision": "abc"}, "rows": [row]}
    runs = [ran("adamw", 0, 60, "EPYC"), ran("metaadamw", 0, 90, "EPYC"), ran("metaadamw", 1, 9, "EPYC", "failed")]
    given = Records.holding(runs)
    monkeypatch.setattr(bench, "bench_records", lambda: {"cpu": {"environment": {"device_type": "cpu"}}})
    _, *lines = Evidence(given, TASKS["etth1"]).running_times().split("\n\n")[1].split("* ")
    assert len(lines) == 1
    assert "`paper`, on EPYC" in lines[0]
    assert "2.0 to 3.0 minutes" in lines[0]
    given = Records.holding([*runs, ran("adamw", 1, 6, "H100")])
    monkeypatch.setattr(bench, "bench_records", lambda: {"h200-abc": gpu})
    _, *lines = Evidence(given, TASKS["etth1"]).running_times().split("\n\n")[1].split("* ")
    assert len(lines) == 3
    assert "on H100" in lines[1]
    assert "0.2 to 0.2 minutes" in lines[1]
    assert "on H200 with the older code of abc" in lines[2]
    assert "1 s for an epoch's training with AdamW, 4 s with MetaAdamW" in lines[2]


@pytest.mark.parametrize(("place", "kind"), [("cpu", "CPU"), ("cuda", "GPU")])
def test_a_page_says_which_device_its_live_run_takes_and_whether_its_time_is_recorded(place, kind, monkeypatch):
    monkeypatch.setattr(bench, "bench_records", dict)
    monkeypatch.setattr(chapter, "pick_device", lambda name: place)
    monkeypatch.setattr(chapter, "environment", lambda device: {"device": f"a {device.type} of 2026"})
    records = [made("adamw", 0, [3.0]), made("adamw", 1, [3.0])]
    records = [r | {"epochs": [epoch | {"seconds": 9} for epoch in r["epochs"]]} for r in records]
    for device, recorded in {"another": False, f"a {place} of 2026": True}.items():
        where = {**records[0]["environment"], "device": device, "threads": 1}
        given = Records.holding([r | {"environment": where} for r in records])
        head = Evidence(given, TASKS["etth1"]).running_times().partition("* ")[0]
        assert f"{kind} of this machine, a {place} of 2026" in head
        assert ("none is recorded" in head) != recorded


PARTS = {
    "one run of AdamW": [made("adamw", 0, [2.0, 1.0])],
    "one run of MetaAdamW": [made("metaadamw", 0, [2.0, 1.0])],
    "the control alone": runs_of("lite", 3, ["metaadamw-frozen"]),
    "no control": runs_of("lite", 3, ARMS[:2]),
    "no AdamW": runs_of("paper", 3, ARMS[1:]),
    "one protocol": [r for r in runs_of("paper", 5) if r["run"]["protocol"] == "clean"],
    "one pair": runs_of("paper", 1),
    "two pairs": runs_of("lite", 2),
    "all runs failed": [r | {"status": "failed", "best": None, "epochs": []} for r in runs_of("paper", 3)],
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "shown",
    [
        "answer",
        "verdict",
        "label",
        "summary",
        "curves",
        "pairs",
        "spread",
        "comparisons",
        "other_tests",
        "last_epoch",
        "time_to_best",
        "movement",
        "factors",
        "by_seed",
        "cut_off",
        "conclusion",
    ],
)
def test_what_lacks_its_runs_says_which_command_makes_them(shown, part):
    try:
        text = str(getattr(Evidence(Records.holding(PARTS[part]), TASKS["etth1"]), shown)())
    except NotRecordedError as error:
        text = str(error)
        assert "sweep main/lite --task etth1" in text
    assert "nan" not in text


def test_a_task_without_a_record_names_the_command():
    with pytest.raises(NotRecordedError, match="sweep main/lite --task cifar10"):
        Evidence(Records.holding(PARTS["two pairs"]), TASKS["cifar10"])


def test_the_answer_gives_the_verdicts_on_the_optimizer_and_on_training_for_each_protocol():
    page = Evidence(Records.holding(runs_of("paper", 5)), TASKS["etth1"])
    for line, baseline in zip(page.answer().splitlines(), ("adamw", "metaadamw-frozen"), strict=True):
        d = main_report.compare(page.runs, "paper", "metaadamw", baseline, lower_is_better=True)
        assert line.endswith(f"{judge(d).label} under `paper`; not decided under `clean`."), "no test part in these"
        assert f"{d.mean_text} % {d.t_interval}; 5 pairs" in page.verdict().loc["paper"].tolist()
    again = Records.holding([r for r in runs_of("paper", 5) if r["run"]["protocol"] == "paper"])
    assert "not yet tested under `clean`" in Evidence(again, TASKS["etth1"]).answer()
    assert paired.signed(10.0) in page.comparisons().iloc[0]["gain (%)"]


def test_a_mean_alpha_counts_a_group_by_its_parameters():
    groups = [{"name": "a", "parameters": 90}, {"name": "b", "parameters": 10}]
    trace = [{"step": k, "alpha": [0.5, 1.5 - k / 10], "beta": [1.0, 0.6]} for k in (1, 2)]
    records = [r | {"groups": groups, "trace": trace} for r in runs_of("paper", 3)]
    moved = {"log_var": [], "phi_moved": 0.0, "alpha_moved": 0.0, "beta_moved": 0.0}
    records = [r | {"meta_updates": [moved]} for r in records]
    given = Records.holding(records)
    factors = Evidence(given, TASKS["etth1"]).factors()
    assert set(factors["α"]) == {"0.50 to 1.40"}
    assert set(factors["β"]) == {"0.60 to 1.00"}
    assert (Evidence(given, TASKS["etth1"]).by_seed()["mean α"] == "0.58").all()


def test_every_pair_is_shown_with_its_gain(monkeypatch):
    records = runs_of("paper", 3, ARMS[:2]) + runs_of("paper", 1, ARMS[2:])
    factors = pd.DataFrame(
        {"α (mean)": [1.25]}, index=pd.MultiIndex.from_tuples([("paper", 0)], names=["protocol", "seed"])
    )
    given = Records.holding(records)
    monkeypatch.setattr(Evidence, "_factors", lambda evidence: factors)
    monkeypatch.setattr(frames, "factors_frame", lambda records: factors)
    table = Evidence(given, TASKS["etth1"]).by_seed()
    assert table.loc[("paper", 0)].tolist() == ["2", "1.8", "2", "+10.0", "1.25"]
    assert table.loc[("paper", 2)].tolist() == ["2.002", "1.802", "–", "+10.0", "–"]


def test_a_page_with_runs_as_published_under_one_protocol_says_what_rests_on_small_ones():
    recorded = [r for r in COMMITTED.of("imdb") if r["run"]["profile"] == "paper"]
    whole = [r for r in recorded if r["run"]["protocol"] == "paper"]
    small = [r | {"run": r["run"] | {"profile": "lite"}} for r in recorded if r["run"]["protocol"] == "clean"]
    given = Records.holding(small + whole)
    evidence = Evidence(given, TASKS["imdb"])
    assert evidence.profiles == {"paper": "paper", "clean": "lite"}
    assert set(evidence.runs.groupby("protocol")["profile"].unique().map(list).map(tuple)) == {("paper",), ("lite",)}
    assert "What is under protocol `clean` comes from small whole runs" in evidence.label()
    says = evidence.verdict()["MetaAdamW improves on AdamW"].map(str)
    assert "lite runs" in says["clean (lite runs)"]
    assert "lite runs" not in says["paper (paper runs)"]
    assert "nan" not in evidence.conclusion() + evidence.answer()
    assert evidence.curves().get_suptitle() == "IMDB sentiment, profile: paper (protocol paper), lite (protocol clean)"
    both = small + [r | {"run": r["run"] | {"profile": "lite"}} for r in whole]
    given = Records.holding(both)
    assert "Everything recorded on this page comes from small whole runs" in Evidence(given, TASKS["imdb"]).label()
