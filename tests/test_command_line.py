"""The commands as they are typed: any terminal, file or pipe, and any path."""

import io
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from tqdm import tqdm

from metaadamw_lite.experiments import bench, datasets, studies, training
from metaadamw_lite.experiments.__main__ import main
from metaadamw_lite.experiments.command import run_command
from metaadamw_lite.experiments.records import RecordError, RunKey, read_records, strays

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
RUN = ["run", "etth1", "--optimizer", "metaadamw", "--profile", "smoke"]
SWEEP = ["sweep", "smoke", "--task", "etth1"]


@pytest.fixture
def terminal(monkeypatch):
    """``terminal(encoding)`` puts streams of an encoding in place of the two; their bytes are what ends up there."""

    def put(encoding):
        out, err = io.BytesIO(), io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding=encoding))
        return out, err

    return put


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "cp932", "latin-1", "koi8-r", "utf-8"])
@pytest.mark.parametrize("command", [["status"], ["status", "main"], ["--help"], ["sweep", "--help"], RUN])
def test_a_command_prints_in_any_encoding(encoding, command, terminal, tmp_path):
    out, _ = terminal(encoding)
    if "--help" in command:
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 0
    else:
        assert main([*command, "--results", str(tmp_path)]) == 0
    assert out.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "cp932", "utf-8"])
def test_what_an_encoding_lacks_is_spelt(encoding, terminal):
    out, err = terminal(encoding)

    def do():
        print("α – Φ ≤ 語 \udcff")
        with tqdm(total=2, desc="Φ – 語", file=sys.stderr) as bar:
            bar.set_postfix({"α": "0.9–1.1"})
            tqdm.write("Φ – 語")
            bar.update(2)
        raise ValueError("Φ is –")

    assert run_command(do, "") == 2
    sys.stderr.flush()
    first = out.getvalue().splitlines()[0]
    assert first.endswith(b" \xff"), "a byte of a file name that is no text stays as it is"
    words = first[:-2].decode(encoding).split(" ")
    assert len(words) == 5
    for word, character, spelt in zip(words, "α–Φ≤語", ["alpha", "-", "Phi", "<=", "?"], strict=True):
        try:
            character.encode(encoding)
        except UnicodeEncodeError:
            assert word == spelt
        else:
            assert word == character
    assert err.getvalue().decode(encoding).splitlines()[-1].startswith("error: ")


def test_the_bench_prints_in_any_encoding(terminal, monkeypatch):
    row = bench.asdict(bench.Row("step, Φ 8×16", "ours", 1, 1, 1, 1, 1, 2))
    monkeypatch.setattr(bench, "measure_all", lambda *_: {"rows": [row]})
    out, _ = terminal("ascii")
    assert main(["bench"]) == 0
    assert b"step, Phi 8x16" in out.getvalue()


def test_a_closed_stream_is_no_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&-`
    assert main(["status", "--results", str(tmp_path)]) == 0


@pytest.mark.parametrize("encoding", ["cp437", "cp1252", "cp932"])
def test_without_a_command_every_study_is_listed_with_what_it_lacks(encoding, terminal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # outside a checkout, so that nothing is recorded
    out, _ = terminal(encoding)
    assert main([]) == 0
    lines = out.getvalue().decode(encoding).splitlines()
    named = {line.split()[0].partition("/")[0] for line in lines if "0/" in line}
    assert named == set(studies.STUDIES)


def test_missing_runs_cost_what_the_recorded_ones_of_their_task_took(monkeypatch, tmp_path):
    key = RunKey("etth1", "adamw", "paper", "lite", 0)
    record = {"run": asdict(key), "epochs": [{"seconds": 1800.0}, {"seconds": 1800.0}]}
    monkeypatch.setattr(studies, "read_records", lambda _, task: [record] if task == "etth1" else [])
    table = studies.costs(tmp_path)
    column = table["hours, one run after the other"]
    runs = studies.study_runs("main/lite", tmp_path, ["etth1"])
    assert table.loc["main/lite", "missing"] == len(studies.study_runs("main/lite", tmp_path))
    assert column["main/lite"] == f"{len(runs)}.0 + ?"
    assert column["main/paper"] == "?"


# ---------------------------------------------------------------- pipes


def ends_in(output, module, arguments, unbuffered="", **streams):
    """Exit code and errors of a command in a C locale whose output goes to a file descriptor."""
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=output,
        env={**os.environ, **C_LOCALE, "PYTHONUNBUFFERED": unbuffered},
        check=False,
        **({"stderr": subprocess.PIPE} | streams),
    )
    return process.returncode, process.stderr


@pytest.fixture
def closed_pipe():
    """Nobody reads it: as ``| head -1`` when it has its line."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(("arguments", "unbuffered"), [(["status"], ""), (["status"], "1"), (["--help"], "")])
def test_a_closed_pipe_ends_a_command_in_silence(arguments, unbuffered, closed_pipe):
    assert ends_in(closed_pipe, "metaadamw_lite.experiments", arguments, unbuffered) == (141, b"")


def test_a_run_whose_bar_goes_to_a_closed_pipe_leaves_no_record_of_a_failure(closed_pipe, tmp_path):
    arguments = [*RUN, "--results", str(tmp_path)]
    code, _ = ends_in(closed_pipe, "metaadamw_lite.experiments", arguments, stderr=closed_pipe)
    assert code == 141
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_told_in_one_line():
    with Path("/dev/full").open("wb") as full:
        code, told = ends_in(full, "metaadamw_lite.experiments", ["status"])
    assert code == 2
    assert told.startswith(b"error: ")
    assert told.count(b"\n") == 1


def test_a_pipe_between_processes_that_breaks_is_no_closed_output(capsys):
    def do():
        raise BrokenPipeError(32, "Broken pipe", "a worker")

    assert run_command(do, "") == 2
    assert "a worker" in capsys.readouterr().err


# ---------------------------------------------------------------- paths


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def told(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("spelling", ["~/x", "~/x/", "~/./x"])
def test_a_tilde_is_the_home_folder(spelling, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, f"--results={spelling}"]) == 0
    assert RunKey("etth1", "metaadamw", "paper", "smoke", 0).path(tmp_path / "home" / "x").exists()
    assert names(tmp_path) == ["home"]


@pytest.mark.parametrize("command", [RUN, SWEEP, ["status"], ["status", "main"]], ids=" ".join)
@pytest.mark.parametrize("typed", ["~nobody-here/x", "~nobody-here", "", "file", "file/x", "link", "link/x", "loop/x"])
def test_what_is_no_folder_of_results_is_refused_in_one_line(typed, command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    assert main([*command, f"--results={typed}"]) == 2
    assert repr(typed) in told(capsys)
    assert names(tmp_path) == ["file", "link", "loop"]


def test_no_home_at_all_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does for a user without an entry
    monkeypatch.chdir(tmp_path)
    assert main([*SWEEP, "--results=~/x"]) == 2
    assert "'~/x'" in told(capsys)
    assert names(tmp_path) == []


@pytest.mark.parametrize("command", [RUN, SWEEP], ids=" ".join)
def test_a_folder_that_is_only_for_reading_is_one_line(command, capsys):
    assert main([*command, "--results=/proc/results"]) == 2
    assert "/proc/results" in told(capsys)


def test_the_data_folder_is_expanded_too(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("METAADAMW_DATA", "~/data")
    assert datasets.data_folder() == tmp_path / "home" / "data"
    monkeypatch.setenv("METAADAMW_DATA", "~nobody-here/data")
    results = tmp_path / "results"
    assert main(["run", "etth1", "--optimizer", "adamw", "--results", str(results)]) == 2
    assert "METAADAMW_DATA is '~nobody-here/data'" in told(capsys)
    assert not list(results.rglob("*.json"))


@pytest.mark.parametrize("option", ["--json", "--reference"])
@pytest.mark.parametrize("typed", ["~nobody-here/x", "", "file/x", "link/x"])
def test_paths_of_the_bench_are_read_in_the_same_way(option, typed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "measure_all", lambda *_: pytest.fail("it measures for minutes"))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    assert main(["bench", f"{option}={typed}"]) == 2
    told(capsys)
    assert names(tmp_path) == ["file", "link"]


# ---------------------------------------------------------------- strays among the records

KEY = RunKey("etth1", "adamw", "paper", "smoke", 0)
STRAYS = [
    "etth1/adamw/paper-smoke-seed0 (conflicted copy).json",
    "etth1/adamw/paper-smoke-seed0.sync-conflict-20260101-120000-ABCDEFG.json",
    "etth1/adamw/paper-smoke-seed0.json.bak",
    "etth1/adamw/paper-smoke-seed0.json~",
    "etth1/adamw/paper-smoke-seed0 2.json",
    "etth1/adamw/Copy of paper-smoke-seed0.json",
    "etth1/adamw/._paper-smoke-seed0.json",
    "etth1/adamw/.paper-smoke-seed0.json.swp",
    "etth1/adamw/.ipynb_checkpoints/paper-smoke-seed0-checkpoint.json",
    "etth1/adamw/old/paper-smoke-seed0.json",
    "etth1/adamw copy/paper-smoke-seed0.json",
    "etth1/adamw.bak/paper-smoke-seed0.json",
    "etth1/.DS_Store",
    "etth1/notes.json",
    "etth1 (1)/adamw/paper-smoke-seed0.json",
    ".stversions/etth1/adamw/paper-smoke-seed0.json",
    ".DS_Store",
    "notes.txt",
    "Thumbs.db",
    "etth1/adamw/paper-smoke-seed1.json/",
    "etth1/adamw/paper-smoke-seed00.json",
    "etth1/adamw/paper-smoke-synthetic-seed0.json",
    "etth1/adamw-copy/paper-smoke-seed0.json",
    "etth1/adamw_old/paper-smoke-seed0.json",
    "etth1/lora/paper-smoke-seed0.json",
    "etth1-2/adamw/paper-smoke-seed0.json",
    "archive/adamw/paper-smoke-seed0.json",
    "lope-noise5/adamw/paper-smoke-seed0.json",
    ".empty/",
]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    training.run(KEY, results, progress=False)
    return KEY.path(results).read_bytes()


def put(results, stray, content):
    path = results / stray
    if stray.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("content", ["a copy", "no record"])
@pytest.mark.parametrize("stray", STRAYS)
def test_a_stray_among_the_records_is_named_once_and_passed_over(stray, content, record, tmp_path, capsys, monkeypatch):
    KEY.path(tmp_path).parent.mkdir(parents=True)
    KEY.path(tmp_path).write_bytes(record)
    put(tmp_path, stray, record if content == "a copy" else b"{}")
    monkeypatch.setattr(studies, "study_runs", lambda *_: [KEY])
    monkeypatch.setattr(sys.modules[main.__module__], "study_runs", lambda *_: [KEY])
    for command in (["status"], ["status", "smoke"], SWEEP):
        assert main([*command, f"--results={tmp_path}"]) == 0
        warning = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(warning) == 1
        named = Path(warning[0].partition(": passed over what is no record: ")[2])
        assert (tmp_path / stray).is_relative_to(named), warning
    assert [r["run"]["seed"] for r in read_records(tmp_path)] == [0], "in the book, without a word"
    assert capsys.readouterr() == ("", "")


def test_all_strays_are_named_in_one_warning_and_nothing_else(record, tmp_path, capsys):
    for stray in STRAYS:
        put(tmp_path, stray, record)
    KEY.path(tmp_path).write_bytes(record)
    for ending in (".ckpt", ".lock", ".json.123.part"):  # of a run that is going on
        KEY.path(tmp_path, ending).touch()
    assert main(["status", f"--results={tmp_path}"]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    outermost = strays(tmp_path)
    assert len(outermost) == len(STRAYS)
    assert all(str(path) in warning for path in outermost)
    shutil.rmtree(tmp_path / "etth1")
    assert main(["status", f"--results={tmp_path / 'etth1'}"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe"], ids=["empty", "not a record", "not text"])
def test_a_damaged_record_is_told_beside_strays(damage, record, tmp_path, capsys):
    put(tmp_path, STRAYS[0], record)
    KEY.path(tmp_path).write_bytes(damage)
    assert main(["status", "smoke", f"--results={tmp_path}"]) == 2
    assert f"{KEY.path(tmp_path)} is not a record" in capsys.readouterr().err
    with pytest.raises(RecordError):
        read_records(tmp_path)


def test_a_folder_in_the_place_of_a_record_is_told_before_the_run(tmp_path, capsys):
    KEY.path(tmp_path).mkdir(parents=True)
    assert main(["run", "etth1", "--optimizer", "adamw", "--profile", "smoke", f"--results={tmp_path}"]) == 2
    assert "is a folder, in the place of a record" in told(capsys)
