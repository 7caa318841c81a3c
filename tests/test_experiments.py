"""Data, runs, records and the command line."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same
from filelock import FileLock

from metaadamw_lite.experiments import NOISY, TASKS, datasets, etth1, lope_study, records, studies, training
from metaadamw_lite.experiments.__main__ import main, parser
from metaadamw_lite.experiments.datasets import DataError, DataFile, fetch
from metaadamw_lite.experiments.lope_study import NOISE
from metaadamw_lite.experiments.peers import PEERS
from metaadamw_lite.experiments.records import (
    RecordError,
    RunKey,
    default_results,
    read_record,
    read_records,
    repository,
    write_record,
)
from metaadamw_lite.experiments.studies import missing, study_runs, sweep
from metaadamw_lite.experiments.training import RunInProgressError, run, run_settings
from metaadamw_lite.experiments.variants import ARMS, VARIANTS

EMPTY = {
    "settings": {},
    "status": "finished",
    "data": "made",
    "epochs": [],
    "best": None,
    "test": None,
    "environment": {},
}
COMMAND = [sys.executable, "-m", "metaadamw_lite.experiments"]


def results_of(record):
    """What must not depend on when, where and in how many attempts a run was made."""
    clocks = ("seconds", "train_seconds", "cpu_seconds", "step_seconds", "meta_seconds")
    kept = {k: v for k, v in record.items() if k not in ("environment", "peak_memory_mib", "digest")}
    kept["epochs"] = [{k: v for k, v in e.items() if k not in clocks} for e in record["epochs"]]
    return kept


# ---------------------------------------------------------------- data


def test_etth1_windows_of_the_paper_protocol():
    data = etth1.load("paper", etth1.settings("paper"), "synthetic")
    assert [tuple(x.shape) for x in (*data.train, *data.val)] == [(13859, 96), (13859, 1), (3465, 96), (3465, 1)]
    assert data.test is None
    assert data.source == "synthetic"
    x = torch.cat([data.train[0], data.val[0]])
    y = torch.cat([data.train[1], data.val[1]])
    assert torch.equal(x[1:, -1], y[:-1, 0]), "the target of a window is the newest hour of the next"
    assert torch.equal(x[1:, :-1], x[:-1, 1:])
    series = torch.cat([x[0], y[:, 0]])
    assert abs(series.mean().item()) < 1e-5
    assert series.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_etth1_clean_protocol_keeps_the_test_part_apart():
    settings = etth1.settings("paper")
    paper, clean = (etth1.load(p, settings, "synthetic") for p in ("paper", "clean"))
    assert [len(part[0]) for part in (clean.train, clean.val, clean.test)] == [12127, 1732, 3465]
    # The same hours are held out, on another scale: that of the hours which training may see.
    raw = etth1.synthetic_series()["OT"].to_numpy()
    seen = raw[: 12127 + 96]
    expected = (raw[-3465:] - seen.mean()) / seen.std()
    torch.testing.assert_close(clean.test[1][:, 0], torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-4)
    ratio = (paper.val[1] - paper.val[1].mean()) / (clean.test[1] - clean.test[1].mean())
    assert ratio.std() < 1e-3


def test_the_short_cut_through_the_last_layer_is_the_whole_encoder():
    model = etth1.TimeSeriesTransformer(**etth1.settings("paper").model).double().eval()
    x = torch.randn(5, 96, dtype=torch.float64)
    h = model.input_projection(x.unsqueeze(-1)) + model.positions
    for layer in model.layers:
        h = layer(h)
    torch.testing.assert_close(model(x), model.output_projection(h[:, -1]), rtol=1e-10, atol=1e-12)


def test_the_short_cut_drops_out_in_all_four_places():
    """With a dropout of 1 nothing passes but the residual stream."""
    model = etth1.TimeSeriesTransformer(**etth1.settings("paper").model).train()
    layer = model.layers[-1]
    h = torch.randn(3, 96, 128)
    for dropped in ("dropout1", "dropout2"):
        getattr(layer, dropped).p = 1.0
    torch.testing.assert_close(etth1.last_position(layer, h), h[:, -1])
    layer.dropout1.p = layer.dropout2.p = 0.0
    layer.dropout.p = layer.self_attn.dropout = 1.0
    expected = h[:, -1] + layer.self_attn.out_proj.bias
    expected = expected + layer.linear2.bias
    torch.testing.assert_close(etth1.last_position(layer, h), expected)


def test_missing_data_names_the_file_and_both_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path))
    file = DataFile("etth1/ETTh1.csv", (tmp_path / "nowhere.csv").as_uri(), 10, "0" * 64)
    with pytest.raises(DataError) as error:
        fetch(file)
    for part in (str(tmp_path / "etth1" / "ETTh1.csv"), "METAADAMW_DATA", file.url, "--data synthetic"):
        assert part in str(error.value)
    assert not (tmp_path / "etth1" / "ETTh1.csv").exists()


def test_download_into_the_same_layout(tmp_path, monkeypatch):
    source = tmp_path / "source.csv"
    source.write_bytes(b"date,OT\n")
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path / "cache"))
    digest = hashlib.sha256(b"date,OT\n").hexdigest()
    path = fetch(DataFile("etth1/ETTh1.csv", source.as_uri(), 8, digest))
    assert path == tmp_path / "cache" / "etth1" / "ETTh1.csv"
    assert path.read_bytes() == b"date,OT\n"
    with pytest.raises(DataError, match="SHA-256"):
        fetch(DataFile("other/x.csv", source.as_uri(), 8, "0" * 64))
    assert not (tmp_path / "cache" / "other" / "x.csv").exists(), "a wrong download is not kept"


def test_a_wrong_download_tells_where_the_file_belongs(tmp_path, monkeypatch):
    source = tmp_path / "login.html"
    source.write_bytes(b"<html>please log in</html>")
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path / "cache"))
    with pytest.raises(DataError) as error:
        fetch(DataFile("etth1/ETTh1.csv", source.as_uri(), 8, "0" * 64))
    for part in ("26 bytes, expected 8", str(tmp_path / "cache" / "etth1" / "ETTh1.csv"), "METAADAMW_DATA"):
        assert part in str(error.value)


def test_truncated_data_is_named_with_its_expected_size(tmp_path, monkeypatch):
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path))
    path = tmp_path / "etth1" / "ETTh1.csv"
    path.parent.mkdir()
    path.write_bytes(b"date,HUFL")
    with pytest.raises(DataError, match=r"ETTh1.csv has 9 bytes, expected 2,589,657"):
        etth1.load("paper", etth1.settings("paper"), "real")
    path.write_bytes(b"x" * 2_589_657)
    with pytest.raises(DataError, match=r"ETTh1.csv .*SHA-256"):
        etth1.load("paper", etth1.settings("paper"), "real")


def test_rows_that_do_not_hold_what_they_should_are_named(tmp_path, monkeypatch):
    (tmp_path / "imdb").mkdir()
    for split in ("train", "test"):
        texts = ["fine"] * 24_999 + [None]
        pd.DataFrame({"text": texts, "label": [0, 1] * 12_500}).to_parquet(tmp_path / "imdb" / f"{split}.parquet")
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"train\.parquet.*not all rows hold what they should"):
        TASKS["imdb"].load("paper", TASKS["imdb"].settings("lite"), "real")


def test_a_file_that_is_made_from_a_download_is_not_said_to_be_one(tmp_path):
    table, url = "cifar10/train-00000-of-00003.parquet", "https://example.org/cifar-10-python.tar.gz"
    assert datasets._by_hand(table, url, tmp_path / "x").startswith("run the same command once where it can reach")
    assert datasets._by_hand("a/x.csv", "https://example.org/x.csv", tmp_path / "x.csv").startswith("download https")


def test_notebooks_and_commands_find_the_same_data(monkeypatch, tmp_path):
    monkeypatch.delenv("METAADAMW_DATA", raising=False)
    (tmp_path / "checkout" / "data" / "paper").mkdir(parents=True)
    (tmp_path / "checkout" / "notebooks").mkdir()
    for folder in ("checkout", "checkout/notebooks"):
        monkeypatch.chdir(tmp_path / folder)
        assert datasets.data_folder() == tmp_path / "checkout" / "data" / "cache"
    monkeypatch.chdir(tmp_path)
    assert datasets.data_folder().resolve() == tmp_path / "data" / "cache", "outside a checkout"


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke study, made once."""
    results = tmp_path_factory.mktemp("results")
    assert sweep("smoke", results, jobs=2, progress=False) == []
    return results


@pytest.mark.slow
@pytest.mark.parametrize("key", study_runs("smoke", Path(), [*TASKS, *NOISY]), ids=str)
def test_every_run_of_every_task_leaves_a_whole_record(smoke, key):
    record = read_record(key.path(smoke))
    assert record["data"] == "synthetic"
    assert record["status"] == "finished"
    assert len(record["epochs"]) == record["settings"]["epochs"]
    better = min if (TASKS | NOISY)[key.task].lower_is_better else max
    assert record["best"]["metric"] == better(e["metric"] for e in record["epochs"])
    assert (record["test"] is None) == (key.protocol == "paper")
    assert record["samples"]["train"] > record["samples"]["val"] > 0
    for name in ("device", "torch", "python", "revision", "threads"):
        assert name in record["environment"]
    assert record["peak_memory_mib"] > 10
    if key.variant.startswith("adamw") or key.variant in PEERS:
        return
    assert len(record["trace"][0]["alpha"]) == len(record["groups"]) >= 1
    if not VARIANTS[key.variant].updates:
        assert record["meta_updates"] == []
    elif not key.variant.startswith(("updates-", "objective-gen_gap")):  # may be none in so few steps; has no gradient
        moved = record["meta_updates"][-1]["phi_moved"]
        if key.variant in ("ladder-one", "ladder-groups"):
            assert moved is None, "they start at zero, so nothing can be relative to it"
        elif key.variant == "circularity-constants":
            assert moved == 0, "in single precision a decay by 1e-8 is none"
        else:
            assert moved > 0
            assert moved < 1 or key.variant.startswith("dose-"), "only larger doses move Φ by more than its own size"


@pytest.mark.slow
@pytest.mark.parametrize("key", study_runs("smoke", Path(), [*NOISE]), ids=str)
def test_every_adaptation_leaves_a_whole_record(smoke, key):
    record = read_record(key.path(smoke))
    assert (record["data"], record["status"]) == ("synthetic", "finished")
    assert record["test"]["metric"] == record["epochs"][-1]["perplexity"] > 1
    assert record["settings"]["noise"] == NOISE[key.task]


def test_translations_are_scored_where_english_has_a_vocabulary(smoke):
    for arm in ARMS:
        test = read_record(RunKey("multi30k", arm, "clean", "smoke", 0).path(smoke))["test"]
        assert 0 <= test["bleu"] <= 100


def test_arms_are_paired(smoke):
    """Until the first meta-update the frozen and the trained arm are one; all arms see the same first batch."""
    trained, frozen, adamw = (
        read_record(RunKey("etth1", v, "paper", "smoke", 0).path(smoke))
        for v in ("metaadamw", "metaadamw-frozen", "adamw")
    )
    assert trained["epochs"][0]["val_loss"] == frozen["epochs"][0]["val_loss"]
    assert trained["epochs"][1]["val_loss"] != frozen["epochs"][1]["val_loss"]
    assert adamw["epochs"][0]["val_loss"] != frozen["epochs"][0]["val_loss"]


def test_with_zero_ranges_the_whole_run_is_that_of_adamw(smoke, tmp_path):
    """Meta-updates included: they must not disturb the batches, the dropout masks or the moments."""
    settings = etth1.settings("smoke")
    settings = dataclasses.replace(settings, metaadamw={**settings.metaadamw, "alpha_range": 0, "beta_range": 0})
    key = RunKey("etth1", "metaadamw", "paper", "smoke", 0)
    ours = run(key, tmp_path, progress=False, settings=settings)
    theirs = read_record(RunKey("etth1", "adamw", "paper", "smoke", 0).path(smoke))
    assert ours["meta_updates"]
    for a, b in zip(ours["epochs"], theirs["epochs"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)


def test_seeds_differ(smoke, tmp_path):
    first = read_record(RunKey("etth1", "adamw", "paper", "smoke", 0).path(smoke))
    second = run(RunKey("etth1", "adamw", "paper", "smoke", 1), tmp_path, progress=False)
    assert first["epochs"][0]["train_loss"] != second["epochs"][0]["train_loss"]


def test_a_run_with_a_record_is_done(smoke):
    path = RunKey("etth1", "adamw", "paper", "smoke", 0).path(smoke)
    before = path.stat().st_mtime_ns
    run(RunKey("etth1", "adamw", "paper", "smoke", 0), smoke, progress=False)
    assert path.stat().st_mtime_ns == before
    assert missing(study_runs("smoke", smoke), smoke) == []


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_result(smoke, tmp_path):
    key = RunKey("etth1", "metaadamw", "clean", "smoke", 0)
    arguments = ["run", "etth1", "--optimizer", "metaadamw", "--protocol", "clean", "--profile", "smoke"]
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--results", tmp_path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not key.path(tmp_path, ".ckpt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not key.path(tmp_path).exists(), "killed too late for this test to mean anything"

    again = run(key, tmp_path, progress=False)
    undisturbed = read_record(key.path(smoke))
    assert [e["val_loss"] for e in again["epochs"]] == [e["val_loss"] for e in undisturbed["epochs"]]
    assert sorted(p.name for p in key.path(tmp_path).parent.iterdir()) == [key.path(tmp_path).name]


def interrupt_before_the_second_epoch(key, results, monkeypatch):
    """Leaves the run with the checkpoint of its first epoch."""
    whole = training._Run._epoch

    def interrupted(self, epoch, bar):
        if epoch == 2:
            raise KeyboardInterrupt
        whole(self, epoch, bar)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(key, results, progress=False)


@pytest.mark.parametrize(("task", "variant"), [("etth1", "metaadamw"), ("cifar10-symmetric40", "metaadamw-lilaw")])
def test_going_on_from_a_checkpoint_is_exact(tmp_path, monkeypatch, task, variant):
    key = RunKey(task, variant, "clean", "smoke", 3)
    expected = run(key, tmp_path / "a", progress=False)
    interrupt_before_the_second_epoch(key, tmp_path / "b", monkeypatch)
    assert_same(results_of(run(key, tmp_path / "b", progress=False)), results_of(expected))


@pytest.mark.parametrize("other", [{"seed": 1}, {"protocol": "clean"}, {"variant": "metaadamw-frozen"}], ids=str)
def test_a_checkpoint_of_another_run_is_not_used(tmp_path, monkeypatch, other):
    """Their settings are the same, so a copy in the wrong place would go on to a record that is neither."""
    key = RunKey("etth1", "metaadamw", "paper", "smoke", 0)
    interrupt_before_the_second_epoch(key, tmp_path, monkeypatch)
    wrong = dataclasses.replace(key, **other)
    wrong.path(tmp_path).parent.mkdir(parents=True, exist_ok=True)
    wrong.path(tmp_path, ".ckpt").write_bytes(key.path(tmp_path, ".ckpt").read_bytes())
    with pytest.raises(ValueError, match=f"is of the run {key}; delete it"):
        run(wrong, tmp_path, progress=False)
    assert not wrong.path(tmp_path).exists()


@pytest.mark.parametrize("content", [b"", b"PK half a file", b"101"], ids=["empty", "half", "no file of torch"])
def test_a_broken_checkpoint_is_named(tmp_path, content, capsys):
    key = RunKey("etth1", "adamw", "paper", "smoke", 0)
    path = key.path(tmp_path, ".ckpt")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    command = ["run", "etth1", "--optimizer", "adamw", "--profile", "smoke", "--results", str(tmp_path)]
    assert main(command) == 2
    assert f"error: {path} is not a checkpoint" in capsys.readouterr().err
    assert path.read_bytes() == content
    path.unlink()
    assert main(command) == 0


def test_a_checkpoint_of_other_settings_is_not_used(tmp_path):
    key = RunKey("etth1", "adamw", "paper", "smoke", 0)
    key.path(tmp_path).parent.mkdir(parents=True)
    torch.save({"run": dataclasses.asdict(key), "settings": {"epochs": 99}}, key.path(tmp_path, ".ckpt"))
    with pytest.raises(ValueError, match="other settings; delete it"):
        run(key, tmp_path, progress=False, settings=dataclasses.replace(etth1.settings("smoke"), epochs=1))


def test_two_processes_do_not_make_the_same_run(tmp_path):
    key = RunKey("etth1", "adamw", "paper", "smoke", 0)
    key.path(tmp_path).parent.mkdir(parents=True)
    with FileLock(key.path(tmp_path, ".lock")), pytest.raises(RunInProgressError, match="etth1 adamw"):
        run(key, tmp_path, progress=False)
    assert not key.path(tmp_path).exists()


def test_a_run_that_diverges_is_recorded_as_such(tmp_path):
    settings = dataclasses.replace(etth1.settings("smoke"), lr=1e30)
    record = run(RunKey("etth1", "metaadamw", "clean", "smoke", 0), tmp_path, progress=False, settings=settings)
    assert record["status"] == "diverged"
    assert record["epochs"][-1]["val_loss"] is None
    assert record["best"] is None


def test_early_stopping_waits_for_patience(tmp_path):
    settings = dataclasses.replace(etth1.settings("smoke"), epochs=6, min_delta=1e9, patience=2)
    record = run(RunKey("etth1", "adamw", "paper", "smoke", 0), tmp_path, progress=False, settings=settings)
    assert record["status"] == "stopped early"
    assert len(record["epochs"]) == 3, "the first epoch improves on nothing, the next two do not"


# ---------------------------------------------------------------- records


def test_records_hold_json_and_nothing_half_written(tmp_path):
    key = RunKey("etth1", "adamw", "paper", "lite", 4)
    record = {**EMPTY, "epochs": [{"val_loss": float("nan")}]}
    path = write_record(record, key, tmp_path)
    assert path == tmp_path / "etth1" / "adamw" / "paper-lite-seed4.json"
    assert json.loads(path.read_text())["epochs"] == [{"val_loss": None}]
    assert list(path.parent.iterdir()) == [path]
    assert [r["run"]["seed"] for r in read_records(tmp_path, "etth1")] == [4]
    with pytest.raises(TypeError):
        write_record({**record, "bad": object()}, RunKey("etth1", "adamw", "paper", "lite", 5), tmp_path)
    assert list(path.parent.iterdir()) == [path]


def test_synthetic_runs_show_it_in_their_name():
    assert RunKey("etth1", "adamw", "paper", "lite", 0, "synthetic").stem == "paper-lite-synthetic-seed0"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"status"', '"state"'),
        lambda text: "[]",
        lambda text: re.sub(r'"lr": [0-9.e-]+', '"lr": 9.0', text, count=1),
    ],
    ids=["truncated", "another run", "a part missing", "no object", "another number"],
)
def test_a_record_edited_by_hand_is_named(smoke, tmp_path, spoil):
    key = RunKey("etth1", "adamw", "paper", "smoke", 0)
    path = key.path(tmp_path)
    path.parent.mkdir(parents=True)
    whole = key.path(smoke).read_text()
    path.write_text(spoil(whole))
    before = path.read_text()
    assert before != whole
    with pytest.raises(RecordError, match=str(path)):
        read_record(path)
    with pytest.raises(RecordError, match=str(path)):
        missing([key], tmp_path)
    assert path.read_text() == before


def test_a_record_that_cannot_be_read_is_not_said_to_be_none(smoke, monkeypatch):
    def cannot(path, encoding):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(Path, "read_text", cannot)
    with pytest.raises(OSError, match=r"Too many open files.*seed0\.json"):
        read_record(RunKey("etth1", "adamw", "paper", "smoke", 0).path(smoke))


# ---------------------------------------------------------------- the command line


def test_run_prints_the_record_and_the_result(tmp_path, capsys):
    arguments = ["run", "etth1", "--optimizer", "adamw", "--profile", "smoke", "--results", str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "paper-smoke-seed0.json" in out
    assert "data: synthetic" in out


COMMANDS = sys.modules[main.__module__]


def test_what_a_command_is_asked_for_reaches_the_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(COMMANDS, "run", lambda *a: asked.append(a) or {**EMPTY, "metric": "MSE"})
    monkeypatch.setattr(COMMANDS, "sweep", lambda *a: asked.append(a) or [])
    words = "--optimizer metaadamw --seed 3 --profile smoke --protocol clean --data synthetic --device cuda:1"
    assert main(["run", "imdb", *words.split(), "--results", str(tmp_path)]) == 0
    key = RunKey("imdb", "metaadamw", "clean", "smoke", 3, "synthetic")
    assert asked.pop() == (key, tmp_path, "cuda:1")
    words = "--task imdb --task etth1 --jobs 3 --scheduler tcp://a:1 --device cuda:1"
    assert main(["sweep", "main/lite", *words.split(), "--results", str(tmp_path)]) == 0
    assert asked.pop() == ("main/lite", tmp_path, ["imdb", "etth1"], 3, "tcp://a:1", "cuda:1")


@pytest.mark.parametrize(
    ("outcome", "code", "says"),
    [
        ([RunKey("etth1", "adamw", "paper", "smoke", 0)], 1, ""),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: CUDA out of memory"),
        (MemoryError(), 2, "error: MemoryError"),
        (RuntimeError("CUDA error: an illegal address"), 2, "error: CUDA error"),
    ],
)
def test_exit_codes(outcome, code, says, tmp_path, monkeypatch, capsys):
    def ends(*_):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(COMMANDS, "sweep", ends)
    assert main(["sweep", "smoke", "--results", str(tmp_path)]) == code
    assert capsys.readouterr().err.startswith(says)


def test_a_mistake_in_the_code_is_no_one_line_message(tmp_path, monkeypatch):
    monkeypatch.setattr(COMMANDS, "sweep", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["sweep", "smoke", "--results", str(tmp_path)])


def test_records_lie_in_the_checkout_wherever_a_command_is_given(tmp_path, monkeypatch):
    (tmp_path / "data" / "paper").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert default_results() == tmp_path / "data" / "results"
    monkeypatch.chdir(tmp_path)
    assert default_results() == Path("data/results"), "short, for messages"
    (tmp_path / "data" / "paper").rmdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert default_results() == Path("data/results"), "outside a checkout it is below the current directory"


@pytest.mark.parametrize(("free", "runs"), [(20, 3), (1, 1), (1000, 4)])
def test_as_many_runs_share_a_gpu_as_its_memory_holds(free, runs, monkeypatch):
    monkeypatch.setattr(studies.joblib, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 80 * 2**30))
    assert studies.runs_at_a_time("cuda") == runs
    assert studies.runs_at_a_time("cpu") == 4


def test_status_tells_what_is_missing(tmp_path, capsys):
    key = RunKey("etth1", "adamw", "paper", "paper", 1)
    write_record({**EMPTY, "settings": dataclasses.asdict(run_settings(key))}, key, tmp_path)
    assert main(["status", "--results", str(tmp_path)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == list(TASKS)
    assert ["main/paper", "1/30", "0/30", "0/30", "0/30", "0/30"] in table
    assert main(["status", "main/paper", "--results", str(tmp_path)]) == 0
    line = next(
        x for x in capsys.readouterr().out.splitlines() if x.split()[:4] == ["etth1", "paper", "paper", "adamw"]
    )
    assert "1/5" in line
    assert "missing seeds 0, 2, 3, 4" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "mnist", "--optimizer", "adamw"], "mnist"),
        (["run", "etth1", "--optimizer", "sgd"], "sgd"),
        (["run", "etth1", "--optimizer", "adamw", "--profile", "full"], "full"),
        (["run", "etth1", "--optimizer", "adamw", "--protocol", "dirty"], "dirty"),
        (["run", "etth1", "--optimizer", "adamw", "--seed", "-1"], "seed is -1"),
        (["sweep", "everything"], "everything"),
        (["sweep", "main/full"], "main/full"),
        (["sweep", "smoke", "--jobs", "0"], "jobs is 0"),
        (["sweep", "smoke", "--task", "mnist"], "mnist"),
        (["status", "everything"], "everything"),
        (["run", "imdb", "--optimizer", "updates-10", "--profile", "smoke"], "updates-10"),
    ],
)
def test_bad_arguments_are_quoted(arguments, message, capsys, tmp_path):
    try:
        code = main([*arguments, "--results", str(tmp_path)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_one_line_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr(etth1, "FILE", DataFile("etth1/ETTh1.csv", (tmp_path / "no").as_uri(), 1, "0"))
    assert main(["run", "etth1", "--optimizer", "adamw", "--results", str(tmp_path)]) == 2
    assert "etth1/ETTh1.csv" in capsys.readouterr().err


def killed_after(command, seconds):
    """Start a command in a process group of its own and kill all of it after some time."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_with_the_same_records(smoke, tmp_path):
    command = [*COMMAND, "sweep", "smoke", "--task", "imdb", "--jobs", "2", "--results", tmp_path]
    rng = random.Random(0)
    for _ in range(5):
        killed_after(command, rng.uniform(3, 12))
        read_records(tmp_path)  # whatever lies there is whole
    assert main(["sweep", "smoke", "--task", "imdb", "--jobs", "2", "--results", str(tmp_path)]) == 0
    assert_same_results(tmp_path, smoke, "imdb")
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json"}, "nothing half-written is left"


def assert_same_results(ours, theirs, task):
    for key in study_runs("smoke", ours, [task]):
        mine, other = (read_record(key.path(folder)) for folder in (ours, theirs))
        assert mine["status"] == other["status"]
        assert [e["val_loss"] for e in mine["epochs"]] == [e["val_loss"] for e in other["epochs"]]


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_work(smoke, tmp_path, tmp_path_factory):
    command = [*COMMAND, "sweep", "smoke", "--task", "imdb", "--jobs", "2", "--results", tmp_path]
    errors = [tmp_path_factory.mktemp("errors") / "stderr" for _ in range(2)]
    both = []
    for path in errors:
        with path.open("w") as file:
            both.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file))
    files: dict[Path, set[int]] = {}
    while any(process.poll() is None for process in both):
        for path in tmp_path.rglob("*.json"):
            files.setdefault(path, set()).add(path.stat().st_ino)
        time.sleep(0.02)
    assert all(len(numbers) == 1 for numbers in files.values()), "a run that is made twice is written twice"
    assert [process.returncode for process in both] == [0, 0], [path.read_text() for path in errors]
    assert_same_results(tmp_path, smoke, "imdb")


@pytest.mark.slow
def test_a_sweep_through_dask_gives_the_same_records(smoke, tmp_path):
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        assert sweep("smoke", tmp_path, ["etth1"], scheduler=cluster.scheduler_address, progress=False) == []
    assert_same_results(tmp_path, smoke, "etth1")


@pytest.mark.slow
def test_a_cluster_makes_the_runs_as_many_at_a_time_as_asked_for_and_gives_up_those_that_kill_it(tmp_path):
    import dask
    from dask.distributed import LocalCluster

    runs = [RunKey("etth1", "adamw", "paper", "smoke", seed) for seed in range(4)]

    def outcomes(jobs, cluster):
        with studies._workers(cluster.scheduler_address, jobs, "cpu") as made:
            return dict(made(runs, tmp_path, False))

    def where(key, results, device, wait):
        begun = time.time()
        time.sleep(0.5)
        return key, f"{os.getpid()} {begun} {time.time()}"

    def fatal(key, results, device, wait):
        if key.seed == 1:
            os._exit(1)
        return key, None

    settings = {"distributed.scheduler.allowed-failures": 0}
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(studies, "_run_one", where)
        spans = [said.split() for said in outcomes(1, cluster).values()]
        assert os.getpid() not in {int(pid) for pid, _, _ in spans}, "not in the process that asks"
        spans = sorted((float(begun), float(ended)) for _, begun, ended in spans)
        assert all(first[1] <= second[0] for first, second in pairwise(spans)), "one at a time"
        patch.setattr(studies, "_run_one", fatal)
        said = outcomes(None, cluster)
        assert said[runs[1]].startswith("a worker was killed")
        assert len(said) == 4


@pytest.mark.slow
def test_workers_end_with_the_sweep_that_began_them(tmp_path):
    command = [*COMMAND, "sweep", "smoke", "--task", "multi30k", "--jobs", "2", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.lock")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)  # the parent alone
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)  # idle ones would stay for five minutes
    assert workers
    assert not alive, "they go on without their sweep"


def test_locks_of_earlier_sweeps_do_not_count_as_killed(tmp_path, monkeypatch):
    runs = [RunKey("etth1", "adamw", "paper", "smoke", seed) for seed in range(4)]
    runs[0].path(tmp_path).parent.mkdir(parents=True)
    for key in runs[1:]:
        key.path(tmp_path, ".lock").touch()

    def killed(key, results, device, wait):
        if key == runs[0]:
            with FileLock(key.path(results, ".lock")):
                os.kill(os.getpid(), signal.SIGKILL)
        run(key, results, device, progress=False)
        return key, None

    monkeypatch.setattr(studies, "study_runs", lambda *_: runs)
    monkeypatch.setattr(studies, "_run_one", killed)
    failed = sweep("smoke", tmp_path, jobs=2, progress=False)
    assert runs[0] in failed
    assert runs[3] not in failed, "it was waiting, and has a lock from before"
    assert runs[3].path(tmp_path).exists()


def test_a_worker_that_leaves_no_record_is_not_asked_for_ever(tmp_path, monkeypatch, capsys):
    runs = [RunKey("etth1", "adamw", "paper", "smoke", seed) for seed in range(2)]

    @contextlib.contextmanager
    def elsewhere(*_):
        yield lambda todo, results, wait: ((key, None) for key in todo)

    monkeypatch.setattr(studies, "study_runs", lambda *_: runs)
    monkeypatch.setattr(studies, "_workers", elsewhere)
    assert sweep("smoke", tmp_path, progress=False) == runs
    assert f"its worker left no record in {tmp_path}" in capsys.readouterr().out


def test_a_package_that_is_missing_leaves_no_record(tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'cleanlab'")

    monkeypatch.setattr(training._Run, "_status", missing)
    assert main(["run", "etth1", "--optimizer", "adamw", "--profile", "smoke", "--results", str(tmp_path)]) == 2
    assert "No module named 'cleanlab'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_an_error_takes_its_lock_away(tmp_path, monkeypatch):
    monkeypatch.setattr(training._Run, "make", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        run(RunKey("etth1", "adamw", "paper", "smoke", 0), tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_sweep_tells_how_its_runs_ended(tmp_path, monkeypatch, capsys):
    keys = [RunKey("etth1", "adamw", "paper", "smoke", seed) for seed in range(3)]
    for key, status in zip(keys, ("finished", "finished", "diverged"), strict=True):
        write_record({**EMPTY, "settings": dataclasses.asdict(run_settings(key)), "status": status}, key, tmp_path)
    for module in (studies, sys.modules[main.__module__]):
        monkeypatch.setattr(module, "study_runs", lambda *_: keys)
    assert main(["sweep", "smoke", "--results", str(tmp_path)]) == 0
    assert "smoke: 2 finished, 1 diverged" in capsys.readouterr().out
    assert "3/3  complete; 1 diverged" in studies.status_lines("smoke", tmp_path)


def test_a_results_folder_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "results").write_text("")
    command = ["run", "etth1", "--optimizer", "adamw", "--profile", "smoke", "--results", str(tmp_path / "results")]
    assert main(command) == 2
    assert "results" in capsys.readouterr().err.splitlines()[0]


def test_a_run_that_fails_in_its_test_part_is_recorded(tmp_path, monkeypatch):
    def fails(model, data):
        raise IndexError("no such word")

    monkeypatch.setitem(TASKS, "etth1", dataclasses.replace(TASKS["etth1"], translate=fails))
    record = run(RunKey("etth1", "adamw", "clean", "smoke", 0), tmp_path, progress=False)
    assert (record["status"], record["error"]) == ("failed", "IndexError: no such word")
    assert record["best"] is not None


def test_a_run_whose_training_fails_is_recorded_as_such(tmp_path, monkeypatch):
    def fails(model, batch):
        raise RuntimeError("the matrix is singular")

    monkeypatch.setitem(TASKS, "etth1", dataclasses.replace(TASKS["etth1"], score=fails))
    key = RunKey("etth1", "adamw", "clean", "smoke", 0)
    record = run(key, tmp_path, progress=False)
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: the matrix is singular")
    assert record["best"] is None
    assert record["test"] is None


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_fault_of_the_machine_leaves_no_record(tmp_path, monkeypatch, fault):
    def fails(model, batch):
        raise fault

    monkeypatch.setitem(TASKS, "etth1", dataclasses.replace(TASKS["etth1"], score=fails))
    key = RunKey("etth1", "adamw", "paper", "smoke", 0)
    with pytest.raises(type(fault)):
        run(key, tmp_path, progress=False)
    assert not key.path(tmp_path).exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:77", "meta"])
def test_a_device_that_cannot_be_used_is_named(tmp_path, device, capsys):
    with pytest.raises(ValueError, match=f"device is '{device}'"):
        run(RunKey("etth1", "adamw", "paper", "smoke", 0), tmp_path, device, progress=False)
    command = ["run", "etth1", "--optimizer", "adamw", "--profile", "smoke", "--device", device, "--results", tmp_path]
    assert main([str(word) for word in command]) == 2
    assert capsys.readouterr().err.startswith(f"error: device is '{device}'")
    assert list(tmp_path.iterdir()) == []
    recorded = run(RunKey("etth1", "adamw", "paper", "smoke", 0), tmp_path, progress=False)
    again = run(RunKey("etth1", "adamw", "paper", "smoke", 0), tmp_path, device, progress=False)
    assert again["epochs"] == recorded["epochs"], "what is recorded needs no device"


def test_settings_of_another_kind_of_task_are_refused(tmp_path):
    adaptation, task = RunKey("lope-noise5", "lora", "clean", "smoke", 0), RunKey("etth1", "adamw", "clean", "smoke", 0)
    with pytest.raises(ValueError, match="settings are Settings; lope-noise5 needs LoPESettings"):
        run(adaptation, tmp_path, progress=False, settings=etth1.settings("smoke"))
    with pytest.raises(ValueError, match="settings are LoPESettings; etth1 needs Settings"):
        run(task, tmp_path, progress=False, settings=lope_study.settings("smoke"))
    changed = dataclasses.replace(lope_study.settings("smoke"), steps=1)
    assert run(adaptation, tmp_path, progress=False, settings=changed)["settings"]["steps"] == 1


def test_the_loss_is_the_mean_squared_error():
    model = etth1.TimeSeriesTransformer(**etth1.settings("smoke").model).eval()
    batch = (torch.randn(4, 96), torch.randn(4, 1))
    torch.testing.assert_close(TASKS["etth1"].loss(model, batch), F.mse_loss(model(batch[0]), batch[1]))


def test_a_run_computes_on_one_thread_whatever_the_process_has(tmp_path):
    alone = run(RunKey("cifar10", "metaadamw", "paper", "smoke", 0), tmp_path / "a", progress=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = run(RunKey("cifar10", "metaadamw", "paper", "smoke", 0), tmp_path / "b", progress=False)
        assert torch.get_num_threads() == 2, "it is the caller's"
    finally:
        torch.set_num_threads(before)
    assert again["environment"]["threads"] == 1
    assert [e["val_loss"] for e in again["epochs"]] == [e["val_loss"] for e in alone["epochs"]]


def test_runs_in_threads_of_one_process_do_not_disturb_each_other(smoke, tmp_path):
    keys = [RunKey("etth1", arm, "paper", "smoke", 0) for arm in ("adamw", "metaadamw", "metaadamw-frozen")]
    with ThreadPoolExecutor(3) as pool:  # as in a Dask worker with several threads
        made = list(pool.map(lambda key: run(key, tmp_path, progress=False), keys))
    for key, record in zip(keys, made, strict=True):
        expected = read_record(key.path(smoke))["epochs"]
        assert [e["val_loss"] for e in record["epochs"]] == [e["val_loss"] for e in expected]


def test_a_worker_that_is_killed_ends_no_sweep(tmp_path, monkeypatch):
    runs = [RunKey("etth1", arm, "paper", "smoke", seed) for seed in (0, 1) for arm in ("adamw", "metaadamw")]

    def killed(key, results, device, wait):
        if key == runs[0]:
            path = key.path(results, ".lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path):
                os.kill(os.getpid(), signal.SIGKILL)
        run(key, results, device, progress=False)
        return key, None

    monkeypatch.setattr(studies, "study_runs", lambda *_: runs)
    with monkeypatch.context() as patch:
        patch.setattr(studies, "_run_one", killed)
        failed = sweep("smoke", tmp_path, jobs=2, progress=False)
    assert runs[0] in failed
    assert set(failed) <= set(runs[:2]), "those that were under way"
    assert all(key.path(tmp_path).exists() for key in runs[2:])
    assert sweep("smoke", tmp_path, jobs=2, progress=False) == []
    assert all(key.path(tmp_path).exists() for key in runs)


def test_a_sweep_to_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["sweep", "smoke", "--device", "cuda:77", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: device is 'cuda:77'")


def test_a_run_that_fails_late_is_recorded_without_its_test_part(tmp_path, monkeypatch):
    task, calls = TASKS["etth1"], []

    def fails(model, batch):
        calls.append(batch)
        if len(calls) > 6:  # in the second epoch
            raise RuntimeError("the matrix is singular")
        return task.score(model, batch)

    monkeypatch.setitem(TASKS, "etth1", dataclasses.replace(task, score=fails))
    record = run(RunKey("etth1", "adamw", "clean", "smoke", 0), tmp_path, progress=False)
    assert (record["status"], record["test"]) == ("failed", None)
    assert len(record["epochs"]) == 1


def test_a_record_made_with_other_settings_is_not_passed_off(tmp_path):
    key, settings = RunKey("etth1", "adamw", "paper", "smoke", 0), etth1.settings("smoke")
    made = run(key, tmp_path, progress=False)
    assert run(key, tmp_path, progress=False, settings=settings) == made
    with pytest.raises(ValueError, match=r"made with other settings \(lr 0.0005 instead of 0.5\)"):
        run(key, tmp_path, progress=False, settings=dataclasses.replace(settings, lr=0.5))
    other = RunKey("etth1", "adamw", "paper", "smoke", 1)
    run(other, tmp_path, progress=False, settings=dataclasses.replace(settings, lr=0.5))
    for again in (run, lambda key, results, progress: missing([key], results)):  # a sweep must not count it either
        with pytest.raises(ValueError, match=r"made with other settings \(lr 0.5 instead of 0.0005\)"):
            again(other, tmp_path, progress=False)


def test_the_committed_records_were_made_with_the_settings_of_their_profiles():
    """Older ones lack some that had one value then."""
    for record in read_records(repository() / "data" / "results"):
        key = RunKey(**record["run"])
        asked = dataclasses.asdict(training.run_settings(key))
        made = record["settings"]
        differing = {name for name in asked if name in made and made[name] != training._as_json(asked)[name]}
        assert not differing, f"{key}: {differing}"


def test_the_record_tells_the_source_that_the_run_began_with(tmp_path, monkeypatch):
    revisions = iter(["a", "b", "c"])
    monkeypatch.setattr(records, "_revision", lambda: next(revisions))
    key = RunKey("etth1", "adamw", "paper", "smoke", 0)
    interrupt_before_the_second_epoch(key, tmp_path, monkeypatch)
    record = run(key, tmp_path, progress=False)
    assert record["environment"]["revision"] == "b"
    assert [e["revision"] for e in record["earlier_environments"]] == ["a"]


def test_a_task_named_twice_is_meant_once(tmp_path):
    assert study_runs("main/lite", tmp_path, ["etth1", "etth1"]) == study_runs("main/lite", tmp_path, ["etth1"])
    with pytest.raises(ValueError, match="imdb-symmetric40"):
        study_runs("together", tmp_path, ["imdb-symmetric40"])


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, "cuda"), (False, "cpu")])
def test_runs_go_to_a_gpu_where_there_is_one(has_gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert training.pick_device("auto") == expected
    assert training.pick_device("cpu") == "cpu"
    for command in (["run", "etth1", "--optimizer", "adamw"], ["sweep", "smoke"], ["bench"]):
        assert parser().parse_args(command).device == "auto"


def test_a_chapter_starts_without_the_tasks_and_their_packages():
    code = (
        "import sys; import metaadamw_lite.experiments.notebook, metaadamw_lite.experiments.figures\n"
        "print([m for m in ('torchvision', 'datasets', 'peft', 'cleanlab', 'sacrebleu') if m in sys.modules])\n"
        "from metaadamw_lite.experiments import TASKS; print(*TASKS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "etth1 wikitext2 multi30k cifar10 imdb"]
