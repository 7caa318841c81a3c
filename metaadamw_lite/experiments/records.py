"""What a run leaves behind: one JSON file, written whole or not at all.

``data/results/TASK/VARIANT/PROTOCOL-PROFILE-seedN.json``. A run with a record is done; beside it, while the run is
going on, lie its checkpoint (``.ckpt``) and its lock (``.lock``), which are not part of the results.
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
"""A run's record, as ``write_record`` wrote it."""

FORMAT = 2
_MACHINE_ERRORS = (
    OSError,
    MemoryError,
    ImportError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)
_MACHINE_WORDS = ("can't allocate memory", "not enough memory", "bad_alloc", "CUDA error", "CUBLAS_", "CUDNN_")
"""What plain RuntimeErrors say that are the machine's fault: of memory on a CPU, and of libraries on a GPU."""


def checkout() -> Path | None:
    """The checkout that the current directory is in, the first folder up with ``data/paper``; None outside one."""
    here = Path.cwd().resolve()
    return next((folder for folder in (here, *here.parents) if (folder / "data" / "paper").is_dir()), None)


def repository() -> Path:
    """The checkout with the paper's tables and the committed records: the current directory's, or else the package's.

    Raises:
        FileNotFoundError: outside a checkout, by a package that is not in one.
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
    """A table of the paper: 2, 4 and 5 indexed by task, 1 by parameter, 3 by factor and value (as printed, text)."""
    index = {1: ["parameter"], 3: ["factor", "value"]}.get(number, ["task"])
    dtype = str if number in (1, 3) else None
    return pd.read_csv(repository() / "data" / "paper" / f"table{number}.csv", index_col=index, dtype=dtype)


def papers_gain(task: str) -> float:
    """By how many percent MetaAdamW improves on AdamW in the paper's Table 2; NaN for a task that the paper lacks."""
    return float(paper_table(2)["improvement_percent"].get(task, math.nan))


def default_results() -> Path:
    """Where records are unless told otherwise: ``data/results`` of the ``checkout``, or of the current directory."""
    folder = checkout() or Path()
    return (Path() if folder == Path.cwd().resolve() else folder) / "data" / "results"  # short, for messages


def expanded(path: str | Path, name: str) -> Path:
    """A path as somebody typed it, with "~" or "~user" replaced by the home folder.

    Args:
        path: as typed.
        name: what it is called, for messages.

    Raises:
        ValueError: if it is empty, or that home folder is not known.
    """
    if not str(path):
        raise ValueError(f"{name} is '', which is no path")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} is {str(path)!r}, but that home folder is not known; write the whole path") from error


def expanded_folder(path: str | Path, name: str) -> Path:
    """``expanded``, for a folder that is there or can be made.

    Raises:
        ValueError: also if something else is in its place or above it: a file, or a link to nothing.
    """
    folder = expanded(path, name)
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, but {there} is no folder")
    return folder


class NotRecordedError(FileNotFoundError):
    """A page is to show runs or measurements that have no record yet.

    Args:
        made_by: the command that makes the records.
    """

    def __init__(self, made_by: str) -> None:
        super().__init__(f"not recorded yet: made by `{made_by}`")


class RecordError(ValueError):
    """A record that is not what it should be: edited by hand, truncated, or of another run."""


@dataclass(frozen=True)
class RunKey:
    """Which run it is; two runs with the same key are the same run.

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
        """The record's file name without its ending; stand-in data shows in it unless the profile says so already."""
        stand_in = "synthetic-" if self.source == "synthetic" and self.profile != "smoke" else ""
        return f"{self.protocol}-{self.profile}-{stand_in}seed{self.seed}"

    def path(self, results: Path, ending: str = ".json") -> Path:
        """Where the record (or, by another ending, the checkpoint or the lock) lies."""
        return results / self.task / self.variant / (self.stem + ending)

    def __str__(self) -> str:
        return f"{self.task} {self.variant} {self.stem}"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it is either absent, as before, or whole."""
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
    """Write the record of a run and return its path. What is not finite becomes null."""
    path = key.path(results)
    content = {"format": FORMAT, "run": asdict(key), **_finite(record)}
    content["digest"] = _digest(content)
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        RecordError: if it is not JSON, lacks a part, was changed after it was written, or says that it is another run
            than its path says.
        OSError: if it cannot be read, which says nothing of what is in it.
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
    """SHA-256 of a record's content, in whatever order its parts are: against slips, not against forgers."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_records(results: Path, task: str | None = None) -> list[Record]:
    """All records below a folder, of one task or of all, in the order of their paths; ``strays`` are passed over.

    Raises:
        RecordError, OSError: as ``read_record`` does.
    """
    paths = sorted(results.glob(f"{task or '*'}/*/*.json"))
    return [read_record(path) for path in paths if _is_place_of_run(path.relative_to(results)) and path.is_file()]


class Records:
    """The records of a folder, each read once, when it is first asked for.

    What is written afterwards is not seen; a new one sees it.

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
        """Records that are at hand, of any tasks, in place of those of a folder."""
        held, records = cls(Path()), list(records)
        for task in _tasks():
            held._keep(task, [record for record in records if record["run"]["task"] == task])
        return held

    def of(self, task: str) -> list[Record]:
        """A task's records that were made from real data, in the order of their paths. Not to be changed.

        Raises:
            ValueError: for an unknown task.
            RecordError, OSError: as ``read_record`` does.
        """
        check_choice("task", task, _tasks())
        if task not in self._by_task:
            self._keep(task, read_records(self.path, task))
        return self._by_task[task]

    def get(self, key: RunKey) -> Record | None:
        """A run's record; None where there is none.

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
    """Files and folders among the records that belong to no run: copies, hidden files, notes, folders named like one.

    Of a folder that belongs to no task or variant only itself is listed.
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
    """Whether TASK, TASK/VARIANT or TASK/VARIANT/FILE has the names of a task, a variant of it and a file of a run."""
    from metaadamw_lite.experiments import lope_study  # which need this module
    from metaadamw_lite.experiments.variants import VARIANTS

    task, *variant = place.parts[:2]
    variants = lope_study.ARMS if task in lope_study.NOISE else VARIANTS
    if task not in _tasks() or any(name not in variants for name in variant):
        return False
    files = place.parts[2:]
    return len(files) < 2 and all(map(_FILE.fullmatch, files))


def _tasks() -> list[str]:
    """The names of all tasks."""
    from metaadamw_lite.experiments import NOISY, TASKS, lope_study  # which need this module

    return [*TASKS, *NOISY, *lope_study.NOISE]


def is_the_machines_fault(error: Exception) -> bool:
    """Whether an error says nothing of the run: no memory, a full disk, no GPU, a missing package."""
    return isinstance(error, _MACHINE_ERRORS) or any(words in str(error) for words in _MACHINE_WORDS)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and source revision, for the record."""
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
    """The commit of the source, with "+" if the package was changed since; None outside a checkout."""
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
    """Let ``peak_memory_mib`` count from now on, where the system can do that (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float | None:
    """Largest memory since the reset: allocated on the GPU, or resident in this process; None if it cannot be told."""
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
