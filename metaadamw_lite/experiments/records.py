"""Records of runs: one JSON file each, written whole or not at all.

``data/results/TASK/VARIANT/PROTOCOL-PROFILE-seedN.json``. A run with a record is done. During the run its checkpoint
(``.ckpt``) and its lock (``.lock``) lie there; they are no part of the results.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from metaadamw_lite.checks import check_choice, check_seed
from metaadamw_lite.experiments.task import PROFILES, PROTOCOLS, SOURCES

Record = dict[str, Any]
"""The content of a run's JSON file."""

FORMAT = 2
_MACHINE_ERRORS = (
    OSError,
    MemoryError,
    ImportError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
_MACHINE_WORDS = ("can't allocate memory", "not enough memory", "bad_alloc", "CUDA error", "CUBLAS_", "CUDNN_")
"""Words in plain RuntimeErrors of the machine: too little memory on a CPU, libraries on a GPU."""


def checkout() -> Path | None:
    """Return the checkout around the current directory: the first folder up with ``data/paper``. None outside one."""
    here = Path.cwd().resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "data" / "paper").is_dir()), None)


def repository() -> Path:
    """Return the checkout with the paper's tables and the committed records: the current directory's, or the package's.

    Raises:
        FileNotFoundError: if neither the current directory nor the package is in a checkout.
    """
    package = Path(__file__).resolve().parents[2]
    folder = checkout() or (package if (package / "data" / "paper").is_dir() else None)
    if folder is None:
        raise FileNotFoundError(
            f"{Path.cwd()} is not inside a checkout of metaadamw_lite (no data/paper above it), and the package was "
            "not installed from one by `pip install -e`; work in a checkout (papermill: --cwd CHECKOUT/notebooks)"
        )
    return folder


def paper_table(number: int) -> pd.DataFrame:
    """Read a table of the paper: 2, 4 and 5 by task, 1 by parameter, 3 by factor and value (both text, as printed)."""
    index = {1: ["parameter"], 3: ["factor", "value"]}.get(number, ["task"])
    dtype = str if number in (1, 3) else None
    return pd.read_csv(repository() / "data" / "paper" / f"table{number}.csv", index_col=index, dtype=dtype)


def papers_gain(task: str) -> float:
    """Return MetaAdamW's improvement on AdamW in the paper's Table 2, in percent; NaN for a task that it lacks."""
    return float(paper_table(2)["improvement_percent"].get(task, math.nan))


def default_results() -> Path:
    """Return the default folder of records: ``data/results`` of the ``checkout``, or of the current directory."""
    folder = checkout() or Path()
    return (
        (Path() if folder == Path.cwd().resolve() else folder) / "data" / "results"
    )  # relative and short, for messages


def expanded(path: str | Path, name: str) -> Path:
    """Expand "~" or "~user" in a typed path.

    Args:
        path: as typed.
        name: of the option or variable, for messages.

    Raises:
        ValueError: for an empty path, or an unknown home folder.
    """
    if not str(path):
        raise ValueError(f"{name} is '', which is no path")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} is {str(path)!r}, but that home folder is not known; write the whole path") from error


def expanded_folder(path: str | Path, name: str) -> Path:
    """Expand the path of a folder that exists or can be made, as ``expanded`` does.

    Raises:
        ValueError: also if a file or a broken link is in its place or above it.
    """
    folder = expanded(path, name)
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, but {there} is no folder")
    return folder


class NotRecordedError(FileNotFoundError):
    """The runs or measurements of a page have no record yet.

    Args:
        made_by: the command that makes the records.
    """

    def __init__(self, made_by: str) -> None:
        super().__init__(f"not recorded yet: made by `{made_by}`")


class RecordError(ValueError):
    """A record is broken: edited by hand, truncated, or of another run."""


@dataclass(frozen=True)
class RunKey:
    """The identity of a run; runs with the same key are the same run.

    Raises:
        ValueError: for an unknown profile, protocol or data source, or a negative seed.
    """

    task: str
    variant: str
    protocol: str
    profile: str
    seed: int
    source: str = "real"

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_choice("profile", self.profile, PROFILES)
        check_choice("data", self.source, SOURCES)
        check_seed(self.seed)
        if self.profile == "smoke":  # always on synthetic data
            object.__setattr__(self, "source", "synthetic")

    @property
    def stem(self) -> str:
        """The record's file name without its ending; "synthetic" marks made-up data, except in the profile "smoke"."""
        stand_in = "synthetic-" if self.source == "synthetic" and self.profile != "smoke" else ""
        return f"{self.protocol}-{self.profile}-{stand_in}seed{self.seed}"

    def path(self, results: Path, ending: str = ".json") -> Path:
        """Return the path of the record, or of the checkpoint (".ckpt") or the lock (".lock")."""
        return results / self.task / self.variant / (self.stem + ending)

    def __str__(self) -> str:
        return f"{self.task} {self.variant} {self.stem}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by replacing it at once, so that it is never half written.

    Raises:
        OSError: if it cannot be written; the file before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
    finally:
        part.unlink(missing_ok=True)


def write_record(record: Record, key: RunKey, results: Path) -> Path:
    """Write the record of a run and return its path. Numbers that are not finite become null."""
    path = key.path(results)
    content = {"format": FORMAT, "run": asdict(key), **_finite(record)}
    content["digest"] = _digest(content)
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: if it is not JSON, lacks a part, was changed after it was written, or has another run's path.
        OSError: if it cannot be read, whatever its content.
    """
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        key = RunKey(**record["run"])
        for part in ("settings", "status", "data", "epochs", "best", "test", "environment", "digest"):
            record[part]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"{path} is not a record ({error!r}); delete it to have the run made again") from error
    if record.get("format") != FORMAT:
        raise RecordError(f"{path} has format {record.get('format')!r}; this code reads {FORMAT}")
    if record["digest"] != _digest({name: part for name, part in record.items() if name != "digest"}):
        raise RecordError(f"{path} was changed after it was written (its digest differs); restore it or delete it")
    place = key.path(Path())
    if place.parts != path.parts[-3:]:
        raise RecordError(f"{path} is the record of {key}, which belongs at {place}")
    return record


def _digest(content: Record) -> str:
    """Return SHA-256 of a record's content, whatever the order of its parts: against slips, not against forgers."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_records(results: Path, task: str | None = None) -> list[Record]:
    """Read all records below a folder, of one task or of all, in the order of their paths, without ``strays``.

    Raises:
        RecordError, OSError: as ``read_record`` does.
    """
    paths = sorted(results.glob(f"{task or '*'}/*/*.json"))
    return [read_record(path) for path in paths if _is_place_of_run(path.relative_to(results)) and path.is_file()]


class Records:
    """The records of a folder, each read once, at its first use.

    Records written later are missing here; a new ``Records`` reads them.

    Args:
        path: the folder; None for ``data/results`` of the checkout.

    Raises:
        FileNotFoundError: without a path and outside a checkout.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = repository() / "data" / "results" if path is None else path
        self._by_task: dict[str, list[Record]] = {}
        self._by_key: dict[RunKey, Record | None] = {}

    @classmethod
    def holding(cls, records: Iterable[Record]) -> "Records":
        """Hold records in memory, of any tasks, in place of those of a folder."""
        held, records = cls(Path()), list(records)
        for task in _tasks():
            held._keep(task, [record for record in records if record["run"]["task"] == task])
        return held

    def of(self, task: str) -> list[Record]:
        """Return a task's records from real data, in the order of their paths. Do not change them.

        Raises:
            ValueError: for an unknown task.
            RecordError, OSError: as ``read_record`` does.
        """
        check_choice("task", task, _tasks())
        if task not in self._by_task:
            self._keep(task, read_records(self.path, task))
        return self._by_task[task]

    def get(self, key: RunKey) -> Record | None:
        """Return a run's record, or None without one.

        Raises:
            RecordError, OSError: as ``read_record`` does.
        """
        if key not in self._by_key and key.task not in self._by_task:
            path = key.path(self.path)
            self._by_key[key] = read_record(path) if path.is_file() else None
        return self._by_key.get(key)

    def _keep(self, task: str, records: list[Record]) -> None:
        self._by_task[task] = [record for record in records if record["data"] != "synthetic"]
        self._by_key |= {RunKey(**record["run"]): record for record in records}


def strays(results: Path) -> list[Path]:
    """List files and folders among the records that belong to no run: copies, hidden files, notes, wrong folders.

    The content of a folder without task or variant is not listed.
    """
    found, folders = [], [results] if results.is_dir() else []
    while folders:
        for path in folders.pop().iterdir():
            place = path.relative_to(results)
            belongs = _is_place_of_run(place)
            if path.is_dir() and len(place.parts) < 3 and belongs:
                folders.append(path)
            elif not belongs or path.is_dir() or len(place.parts) < 3:
                found.append(path)
    return sorted(found)


_FILE = re.compile(
    rf"({'|'.join(PROTOCOLS)})-({'|'.join(PROFILES)})-((?<!smoke-)synthetic-)?seed(0|[1-9][0-9]*)"
    r"\.(json|ckpt|lock|(json|ckpt)\.[0-9]+\.part)"
)


def _is_place_of_run(place: Path) -> bool:
    """Tell whether TASK, TASK/VARIANT or TASK/VARIANT/FILE names a task, a variant and a file of a run."""
    from metaadamw_lite.experiments import lope_study  # imports this module
    from metaadamw_lite.experiments.variants import VARIANTS

    task, *variant = place.parts[:2]
    variants = lope_study.ARMS if task in lope_study.NOISE else VARIANTS
    if task not in _tasks() or any(name not in variants for name in variant):
        return False
    files = place.parts[2:]
    return len(files) < 2 and all(map(_FILE.fullmatch, files))


def _tasks() -> list[str]:
    """Return the names of all tasks."""
    from metaadamw_lite.experiments import NOISY, TASKS, lope_study  # import this module

    return [*TASKS, *NOISY, *lope_study.NOISE]


def is_the_machines_fault(error: Exception) -> bool:
    """Tell errors of the machine from errors of the run: no memory, a full disk, no GPU, a missing package."""
    return isinstance(error, _MACHINE_ERRORS) or any(words in str(error) for words in _MACHINE_WORDS)


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, versions and source revision, for the record."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "revision": _revision(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _revision() -> str | None:
    """Return the commit of the source, with "+" if the package was changed since; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=30,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", str(here.parent))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of ``peak_memory_mib``, on systems that can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory since the reset: allocated on the GPU, or resident in this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10
    except (OSError, StopIteration):
        return None


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _finite(y) for k, y in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(y) for y in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
