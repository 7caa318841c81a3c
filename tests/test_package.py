"""The package as others install it: what its files hold, what it needs, and what it says where that is missing."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import metaadamw_lite
from metaadamw_lite.experiments.command import run_command

ROOT = Path(__file__).resolve().parent.parent
EXTRA = "cleanlab dask datasets distributed joblib matplotlib pandas peft PIL pyarrow sacrebleu sklearn scipy"
EXTRA += " seaborn statsmodels tabulate torchvision tqdm IPython"


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_the_optimizer_imports_neither_torchs_compiler_nor_a_package_beside_torch_and_numpy():
    code = f"""
import sys
sys.modules |= dict.fromkeys({EXTRA.split()!r})  # as if they were not installed
import torch
before = "torch._dynamo" in sys.modules
from metaadamw_lite import MetaAdamW
assert ("torch._dynamo" in sys.modules) == before, "the compiler"
model = torch.nn.Linear(2, 1)
optimizer = MetaAdamW(model.named_parameters())
model(torch.ones(3, 2)).sum().backward()
optimizer.step()
print(optimizer.alpha.numel())
"""
    done = python(code)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize("command", ["bench", "status"])
def test_a_command_without_its_extra_says_in_one_line_which_to_install(command):
    code = """
import runpy, sys
sys.modules["pandas"] = None
sys.argv[1:] = [sys.argv[1]]
runpy.run_module("metaadamw_lite.experiments", run_name="__main__", alter_sys=True)
"""
    done = python(code, command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "pandas" in done.stderr
    assert "metaadamw-lite[experiments]" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "extra"), [("peft", "experiments"), ("torchvision.io", "experiments"), ("prodigyopt", "peers")]
)
def test_a_package_that_is_missed_later_is_told_with_its_extra_too(package, extra, capsys):
    def do():
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    assert run_command(do, "") == 2
    error = capsys.readouterr().err
    assert f"No module named {package!r}" in error
    assert f"metaadamw-lite[{extra}]" in error


@pytest.mark.slow
def test_the_built_files_hold_the_package_and_nothing_else(tmp_path):
    pytest.importorskip("build", reason="in the extra `test`")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if not name.startswith("data/") and (ROOT / name).is_file():
            copy = tmp_path / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    built = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tmp_path / "source")]
    done = subprocess.run(built, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert metaadamw_lite.__version__ in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {f"metaadamw_lite/{p.relative_to(ROOT / 'metaadamw_lite')}" for p in ROOT.glob("metaadamw_lite/**/*.py")}
    assert {name for name in names if ".dist-info/" not in name} == code | {"metaadamw_lite/py.typed"}
    with tarfile.open(sdist) as files:
        inside = {name.partition("/")[2] for name in files.getnames()}
    assert code | {"metaadamw_lite/py.typed", "README.md", "LICENSE", "pyproject.toml"} <= inside
    assert not any(name.startswith(("data", "notebooks")) for name in inside)
    pytest.importorskip("twine", reason="in the extra `test`")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
