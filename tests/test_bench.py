"""The bench: fair turns, honest ratios, clear errors. No test asserts a time."""

import json

import pandas as pd
import pytest
import torch

from metaadamw_lite import bench
from metaadamw_lite.experiments import TASKS, report
from metaadamw_lite.experiments.claims import claims_table

CPU = torch.device("cpu")


def test_contestants_take_turns():
    calls = []
    times = bench.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, 0, least=3)
    assert calls[:4] == ["a", "a", "b", "b"], "two calls of each to warm up"
    rounds = [calls[i : i + 2] for i in range(4, 10, 2)]
    assert all(sorted(turn) == ["a", "b"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) == 2, "in an order that changes"
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_medians_with_the_quartiles_of_single_rounds():
    times = {"base": [1.0, 2.0, 4.0], "ours": [3.0, 4.0, 4.0], "theirs": [10.0, 20.0, 40.0]}
    ours, theirs = bench.compared("step", times, "base", target=1.5)
    assert (ours.who, ours.ratio, ours.target) == ("ours", 2.0, 1.5)
    assert (ours.low, ours.high) == pytest.approx((1.5, 2.5))
    assert (theirs.who, theirs.ratio, theirs.low, theirs.target) == ("theirs", 10.0, 10.0, None)
    table = bench.table([ours, theirs])
    assert table["result"].tolist() == ["missed by 0.50", ""]


def test_all_contestants_have_the_same_weights_and_gradients():
    model = bench.Perceptron(1000)
    bench.give_gradients(model)
    made = bench.optimizers(model, None, attn_layers=2, attn_hidden_dim=4)
    assert list(made) == ["AdamW", "ours"]
    for optimizer in made.values():
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        for p, q in zip(mine, model.parameters(), strict=True):
            assert p is not q
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("name", TASKS)
def test_batches_have_the_shape_of_the_tasks(name):
    task = TASKS[name]
    data = task.load("paper", task.settings("smoke"), "synthetic")
    batch = bench.task_batch(name)
    for mine, real in zip(batch, data.train, strict=True):
        assert mine.dtype == real.dtype
        assert mine.ndim == real.ndim
        assert len(mine) == task.settings("paper").batch_size
        assert name == "cifar10" or mine.shape[1:] == real.shape[1:]


@pytest.mark.parametrize("model", bench.MEMORY_MODELS)
def test_peak_memory_counts_what_is_held(model):
    made = bench.trainer(model, "AdamW", CPU)
    parameters = 4 * sum(p.numel() for p in made.model.parameters())
    peak = bench.peak_memory(made, meta=False)
    assert peak > 3.9 * parameters, "parameters, gradients, two moments"
    assert bench.peak_memory(bench.trainer(model, "ours", CPU), meta=True) > peak


def test_the_parts_of_a_step(monkeypatch):
    monkeypatch.setattr(bench, "STEPS", {"small": (lambda: bench.Perceptron(1000), 2, 4, 1.0)})
    found = {row["part"]: row["seconds"] for row in bench.parts(CPU, 0)}
    assert set(found) == {"statistics", "kernel", "Φ", "AdamW", "ours", "⟨g, m⟩ alone"}


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "STEPS", {"step, small": (lambda: bench.Perceptron(1000), 2, 4, 1.0)})
    monkeypatch.setattr(bench, "TASKS", {"etth1": TASKS["etth1"]})
    monkeypatch.setattr(bench, "DEPTHS", (1, 2))
    monkeypatch.setattr(bench, "SIZES", (1000, 2000))
    path = tmp_path / "bench" / "cpu.json"
    assert bench.main(["--seconds", "0", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    for row in record["rows"]:
        assert row["measure"] in printed
    assert {point["kind"] for point in record["growth"]} == {"step", "meta-update", "step by depth"}
    assert {part["measure"] for part in record["parts"]} == {"step, small"}


def test_a_folder_without_the_released_code_is_named(tmp_path, capsys):
    assert bench.main(["--reference", str(tmp_path / "nowhere"), "--seconds", "0"]) == 1
    assert "nowhere has no experiments/meta_adamw.py" in capsys.readouterr().err


def test_the_committed_record_has_every_row_and_a_clean_revision():
    record = report.bench_record("cpu")
    assert not record["environment"]["revision"].endswith("+")
    rows = [bench.Row(**row) for row in record["rows"]]
    ours = {row.measure for row in rows if row.who == "ours"}
    assert set(bench.STEPS) <= ours
    assert sum(measure.startswith("whole epoch") for measure in ours) == len(TASKS)
    assert all(row.ratio > 0 and row.low <= row.high for row in rows)
    assert json.dumps(record, allow_nan=False)


def test_what_the_bench_measured_is_judged_against_the_papers_range():
    claims = claims_table().set_index("claim")
    memory = claims.loc["Peak memory of a meta-update is 1.5 to 2 times AdamW's"]
    peaks = {
        row["who"]: row["ratio"]
        for row in report.bench_record()["rows"]
        if row["measure"].startswith("peak memory") and "ETTh1" in row["measure"]
    }
    assert f"ours, ETTh1 model: {peaks['ours']:.2f} ×" in memory["ours"]
    assert ("ours, ETTh1 model: holds" in memory["verdict"]) == (1.5 <= peaks["ours"] <= 2)
    longer = claims.loc["Whole trainings take 10 to 30 % longer"]
    totals = report.paper_table(5)["overhead_percent"]
    within = totals.between(10, 30).sum()
    assert f"the paper's Table 5, totals: {totals.min():+.0f} to {totals.max():+.0f} %" in longer["ours"]
    assert f"holds for {within} of 5" in longer["verdict"].split("totals")[1]
    every_100 = claims.loc[[c for c in claims.index if c.startswith("With K_meta = 100")]].iloc[0]
    rows = pd.DataFrame(report.bench_record()["rows"])
    updates = rows[rows["measure"].str.startswith("meta-update / ") & (rows["who"] == "ours")]["ratio"]
    assert f"ours, every 100 steps: {updates.min():+.1f} to {updates.max():+.1f} %" in every_100["ours"]
    assert ("ours, every 100 steps: above the range" in every_100["verdict"]) == (updates.min() > 1.5)
    assert report.bench_record("no such device") is None
