"""The bench: fair turns, honest ratios, clear errors. No test asserts a time."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from metaadamw_lite import MetaAdamW, factors, optimizer
from metaadamw_lite.experiments import TASKS, bench
from metaadamw_lite.experiments.__main__ import main
from metaadamw_lite.experiments.claims import claims_table
from metaadamw_lite.experiments.records import Records, paper_table
from metaadamw_lite.folded import FoldedModulator

CPU = torch.device("cpu")


@pytest.fixture
def takes(clock_of):
    return clock_of(bench)


@pytest.fixture
def training_takes(takes):
    """A training step takes 11 s with AdamW and 13 s with MetaAdamW, whose meta-update takes 90 s."""
    takes(bench.Trainer, "forward", 4)
    takes(bench.Trainer, "gradients", 10)
    takes(torch.optim.AdamW, "step", 1)
    takes(MetaAdamW, "step", 3)
    takes(MetaAdamW, "update_attention", 90)


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
    for made_one in made.values():
        mine = [p for group in made_one.param_groups for p in group["params"]]
        for p, q in zip(mine, model.parameters(), strict=True):
            assert p is not q
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("name", TASKS)
def test_batches_have_the_shape_of_the_tasks(name):
    task = TASKS[name]
    small = task.settings("smoke")
    whole = {key: value for key, value in small.data.items() if key not in ("window", "block")}  # the paper's lengths
    data = task.load("paper", replace(small, data=whole), "synthetic")
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


@pytest.mark.usefixtures("training_takes")
def test_a_meta_update_is_compared_with_a_training_step_of_adamw(monkeypatch):
    def peak(made, meta):
        return 3 if meta and isinstance(made.optimizer, MetaAdamW) else 2

    monkeypatch.setattr(bench, "peak_memory", peak)
    update, forward, *memory = bench.measure_meta_updates(CPU, None, 0)
    assert update.measure.startswith("meta-update / training step")
    assert [update.ratio, update.low, update.high] == pytest.approx([90 / 11] * 3)
    assert forward.measure.startswith("forward / training step")
    assert forward.ratio == pytest.approx(4 / 11)
    assert [row.ratio for row in memory] == [1.5, 1.5]


@pytest.mark.usefixtures("training_takes")
def test_an_epoch_has_a_meta_update_in_every_k_meta_steps(monkeypatch):
    monkeypatch.setattr(bench, "TASKS", {"etth1": TASKS["etth1"]})
    every = TASKS["etth1"].settings("paper").meta_every
    update, epoch = bench.measure_epochs(CPU, 0)
    assert update.measure.startswith("meta-update / training step")
    assert [update.ratio, update.low, update.high] == pytest.approx([90 / 11] * 3)
    assert epoch.measure.endswith(f"(K_meta = {every})")
    assert [epoch.ratio, epoch.low, epoch.high] == pytest.approx([(10 + 3 + 90 / every) / 11] * 3)


def test_growth_has_the_time_of_each_depth(takes, monkeypatch):
    def depth(optimizer):
        return len(optimizer.modulator.encoder.layers)

    monkeypatch.setattr(bench, "DEPTHS", (1, 2))
    monkeypatch.setattr(bench, "SIZES", (1000,))
    takes(bench.Trainer, "gradients", 10)
    takes(torch.optim.AdamW, "step", 0.5)
    takes(MetaAdamW, "step", depth)
    takes(MetaAdamW, "update_attention", lambda optimizer: 90 * depth(optimizer))
    points = {(p["kind"], p["who"], p.get("layers")): p["seconds"] for p in bench.measure_growth(CPU, 0)}
    assert points == pytest.approx(
        {
            ("step", "AdamW", None): 0.5,
            ("step", "ours", None): 8,
            ("meta-update", "ours", 1): 90,
            ("meta-update", "ours", 2): 180,
            ("step by depth", "AdamW", 1): 0.5,
            ("step by depth", "AdamW", 2): 0.5,
            ("step by depth", "ours", 1): 1,
            ("step by depth", "ours", 2): 2,
        }
    )


def test_the_parts_of_a_step_have_their_own_times(takes, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", {"small": (lambda: bench.Perceptron(1000), 2, 4, 1.0)})
    takes(factors, "measure", 2, then=factors.measure)
    takes(FoldedModulator, "__call__", 7, then=FoldedModulator.__call__)
    takes(optimizer, "move", 5, then=optimizer.move)
    takes(torch.optim.AdamW, "step", 3)
    takes(bench, "read_once", 1)
    patched = factors.measure, optimizer.move
    found = {row["part"]: row["seconds"] for row in bench.measure_parts(CPU, 0)}
    kernel = 5 * len(MetaAdamW(bench.Perceptron(1000).named_parameters()).groups)
    assert kernel > 5
    assert found == {
        "statistics": 2,
        "Φ": 7,
        "kernel": kernel,
        "ours": 2 + 7 + kernel,
        "AdamW": 3,
        "⟨g, m⟩ alone": 1,
    }
    assert (factors.measure, optimizer.move) == patched, "no clock is left in the optimizer"


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "STEPS", {"step, small": (lambda: bench.Perceptron(1000), 2, 4, 1.0)})
    monkeypatch.setattr(bench, "TASKS", {"etth1": TASKS["etth1"]})
    monkeypatch.setattr(bench, "DEPTHS", (1, 2))
    monkeypatch.setattr(bench, "SIZES", (1000, 2000))
    path = tmp_path / "bench" / "cpu.json"
    assert main(["bench", "--seconds", "0", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    for row in record["rows"]:
        assert row["measure"] in printed
    assert {point["kind"] for point in record["growth"]} == {"step", "meta-update", "step by depth"}
    assert {part["measure"] for part in record["parts"]} == {"step, small"}


def test_a_folder_without_the_released_code_is_named(tmp_path, capsys):
    assert main(["bench", "--reference", str(tmp_path / "nowhere"), "--seconds", "0"]) == 2
    assert "nowhere has no experiments/meta_adamw.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", bench.bench_records())
def test_a_committed_record_has_every_row_and_a_clean_revision(name):
    record = bench.bench_record(name)
    assert not record["environment"]["revision"].endswith("+")
    rows = [bench.Row(**row) for row in record["rows"]]
    ours = {row.measure for row in rows if row.who == "ours"}
    assert set(bench.STEPS) <= ours
    assert sum(measure.startswith("whole epoch") for measure in ours) == len(TASKS)
    assert all(row.ratio > 0 and row.low <= row.high for row in rows)
    assert json.dumps(record, allow_nan=False)


def test_each_record_is_a_column_and_older_ones_say_so(tmp_path, monkeypatch):
    def put(name, device, ratios):
        row = {"who": "ours", "low": 1.0, "high": 9.0, "seconds": 2.0, "baseline_seconds": 1.0}
        rows = [row | {"measure": measure, "ratio": ratio} for measure, ratio in ratios.items()]
        theirs = rows[0] | {"who": "released code", "ratio": 99.0}
        content = {"environment": {"device": device, "revision": name[-3:]}, "rows": [*rows, theirs]}
        (tmp_path / "data" / "bench" / f"{name}.json").write_text(json.dumps(content))

    monkeypatch.setattr(bench, "repository", lambda: tmp_path)
    (tmp_path / "data" / "bench").mkdir(parents=True)
    put("cpu", "EPYC", {"step": 3.5, "epoch": 1.04})
    put("h200-abc", "H200", {"epoch": 5.17, "step": 68.0})
    table = bench.side_by_side(bench.bench_records())
    assert list(table) == ["EPYC (cpu)", "H200 (before: abc)"]
    assert table.index.tolist() == ["step", "epoch"]
    assert table["H200 (before: abc)"].tolist() == ["68 (1 to 9)", "5.17 (1 to 9)"]
    put("cuda", "H200", {"step": 1.9})
    table = bench.side_by_side(bench.bench_records())
    assert list(table) == ["EPYC (cpu)", "H200 (uda)", "H200 (before: abc)"]
    assert table["H200 (uda)"].tolist() == ["1.9 (1 to 9)", "–"]


def test_what_the_bench_measured_is_judged_against_the_papers_range():
    claims = claims_table(Records()).set_index("claim").astype({"verdict": str})
    memory = claims.loc["Peak memory of a meta-update is 1.5 to 2 times AdamW's"]
    peaks = {
        row["who"]: row["ratio"]
        for row in bench.bench_record()["rows"]
        if row["measure"].startswith("peak memory") and "ETTh1" in row["measure"]
    }
    assert f"ours, ETTh1 model: {peaks['ours']:.2f} ×" in memory["ours"]
    assert ("ours, ETTh1 model: holds" in memory["verdict"]) == (1.5 <= peaks["ours"] <= 2)
    longer = claims.loc["Whole trainings take 10 to 30 % longer"]
    totals = paper_table(5)["overhead_percent"]
    within = totals.between(10, 30).sum()
    assert f"the paper's Table 5, totals: {totals.min():+.0f} to {totals.max():+.0f} %" in longer["ours"]
    assert f"holds for {within} of 5" in longer["verdict"].split("totals")[1]
    every_100 = claims.loc[[c for c in claims.index if c.startswith("With K_meta = 100")]].iloc[0]
    rows = pd.DataFrame(bench.bench_record()["rows"])
    updates = rows[rows["measure"].str.startswith("meta-update / ") & (rows["who"] == "ours")]["ratio"]
    assert f"ours, every 100 steps: {updates.min():+.1f} to {updates.max():+.1f} %" in every_100["ours"]
    assert ("ours, every 100 steps: above the range" in every_100["verdict"]) == (updates.min() > 1.5)
    assert bench.bench_record("no such device") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "device is 'cuda:99', which cannot be used here"),
        (["--seconds", "-1"], "seconds is -1.0"),
        (["--seconds", "nan"], "seconds is nan"),
        (["--json", "/dev/null/cpu.json"], "/dev/null"),
        (["--json", "/tmp"], "/tmp is a folder"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_before_measuring(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench, "measure_all", lambda *_: pytest.fail("it measures for minutes"))
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
