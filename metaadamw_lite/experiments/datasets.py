"""Where data come from, how they are checked, and how what is made of them is kept.

``METAADAMW_DATA`` names the folder; without it, it is ``data/cache`` of the checkout that the current directory is in,
or of the current directory outside one. What is missing there is downloaded from its public source into the same
layout. Every file is checked before it is used: ``DataFile`` by size and SHA-256, ``Table`` (whose file depends on who
wrote it, but not its rows) by its columns and number of rows, what comes from ``file_from`` by whoever reads it.
"""

import hashlib
import inspect
import os
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import joblib
import numpy as np
import pandas as pd
from filelock import FileLock

from metaadamw_lite.experiments.records import checkout, expanded

T = TypeVar("T")


class DataError(RuntimeError):
    """A data file is missing, truncated or not the one it should be."""


@dataclass(frozen=True)
class DataFile:
    """One file of a public data set.

    Attributes:
        path: where it lies inside the data folder.
        url: its public source.
        size: in bytes.
        sha256: of its content, in hexadecimal.
    """

    path: str
    url: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Table:
    """One part of a public data set as a parquet file.

    Attributes:
        path: where it lies inside the data folder.
        rows: how many it has.
        columns: their names.
        source: where it can be had, for messages.
        download: fetches it from there.
    """

    path: str
    rows: int
    columns: tuple[str, ...]
    source: str
    download: Callable[[], pd.DataFrame]


def cache() -> Path:
    """Where what is downloaded or made of data is kept, for notebooks and commands alike."""
    return (checkout() or Path()) / "data" / "cache"


def data_folder() -> Path:
    """The folder of real data: ``METAADAMW_DATA``, else the ``cache``.

    Raises:
        ValueError: if that begins with "~" and the home folder is not known.
    """
    named = os.environ.get("METAADAMW_DATA")
    return expanded(named, "METAADAMW_DATA") if named else cache()


def fetch(file: DataFile) -> Path:
    """The path of a checked data file, downloaded first if it is not there.

    Raises:
        DataError: if the file can be had neither way, or is not the expected one. The message names it and says what
            to do.
    """

    def download(part: Path) -> None:
        with urllib.request.urlopen(file.url, timeout=60) as response:
            part.write_bytes(response.read())
        _check(file, part)

    path = _had(file.path, file.url, download)
    _check(file, path)
    return path


def file_from(name: str, source: str, download: Callable[[Path], None]) -> Path:
    """The path of a file in the data folder, made by ``download`` first if it is not there.

    Raises:
        DataError: if it can be had neither way.
    """
    return _had(name, source, download)


def read_table(table: Table) -> pd.DataFrame:
    """The rows of a checked table, downloaded first if it is not there.

    Raises:
        DataError: as ``fetch`` does.
    """
    return _read(table, _locate(table))


def hub_table(
    path: str, rows: int, columns: tuple[str, ...], name: str, split: str, config: str | None = None
) -> Table:
    """A table that the Hugging Face hub has as the split of a data set."""

    def download() -> pd.DataFrame:
        from datasets import load_dataset

        frame: pd.DataFrame = load_dataset(name, config, split=split).to_pandas()
        return frame.filter(items=columns)  # one that lacks a column is refused when it is read

    part = f"the split {split!r}" + ("" if config is None else f" of the configuration {config!r}")
    return Table(path, rows, columns, f"{part} of https://huggingface.co/datasets/{name}", download)


def prepared(make: Callable[..., T], tables: Sequence[Table], *arguments: Any) -> T:
    """What ``make(*arguments)`` makes of some tables, kept on disk in the ``cache``: it is made only once.

    It is made anew when a file, an argument, the module of the function or what the text tasks share changes.

    Raises:
        DataError: as ``fetch`` does, and if ``make`` cannot read what the rows hold.
        OSError, MemoryError, ImportError: for a disk that is full, and what else says nothing of the rows.
    """
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in map(_locate, tables)]
    memory = joblib.Memory(cache() / "prepared", verbose=0)
    try:
        result: T = memory.cache(_make, ignore=["make"])(make, _source(make), files, *arguments)
    except DataError:
        raise
    except Exception as error:  # whatever a library makes of a text that is none, or of an image that is broken
        full_disk = isinstance(error, OSError) and error.errno is not None  # and not an image that cannot be read
        if full_disk or isinstance(error, MemoryError | ImportError):
            raise
        paths = ", ".join(path for path, *_ in files)
        raise DataError(f"{paths}: not all rows hold what they should ({error!r})") from error
    return result


def _make(make: Callable[..., T], _source: str, _files: list[Any], *arguments: Any) -> T:
    return make(*arguments)


def _source(make: Callable[..., Any]) -> str:
    """The function's name and a digest of the code that it may call."""
    files = [Path(inspect.getfile(make)), Path(__file__), Path(__file__).with_name("text.py")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{make.__module__}.{make.__qualname__} {digest}"


def held_out(texts: Iterable[str]) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Which samples the ``clean`` protocol splits off the training set: about one in ten, the same each time.

    A sample's own content decides, so that copies of it stay on the same side.
    """
    return np.array([zlib.crc32(text.encode()) % 10 == 0 for text in texts])


def _locate(table: Table) -> Path:
    """Where a table lies, after a download if need be."""

    def download(part: Path) -> None:
        table.download().to_parquet(part)
        _read(table, part)

    return _had(table.path, table.source, download)


def _check(file: DataFile, path: Path) -> None:
    size = path.stat().st_size
    if size != file.size:
        raise DataError(f"{path} has {size:,} bytes, expected {file.size:,}; delete it to have it downloaded again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != file.sha256:
        raise DataError(
            f"{path} has the expected {file.size:,} bytes but SHA-256 {digest}, expected {file.sha256}; "
            "delete it to have it downloaded again"
        )


def _read(table: Table, path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a whole parquet file ({error}); delete it to have it downloaded again"
        ) from error
    if set(frame.columns) != set(table.columns) or len(frame) != table.rows:
        raise DataError(
            f"{path} has {len(frame):,} rows of {', '.join(map(str, frame.columns))}, expected {table.rows:,} rows of "
            f"{', '.join(table.columns)}; delete it to have it downloaded again"
        )
    return frame


def _had(name: str, source: str, download: Callable[[Path], None]) -> Path:
    """The path of a file in the data folder; ``download`` makes it, beside it first, until it is whole and checked.

    One process at a time downloads to a folder: the parts of a data set may come in one archive.
    """
    path = data_folder() / name
    if path.exists():
        return path
    part = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            if not path.exists():  # another process may have had it come while we waited
                part = Path(folder) / path.name
                download(part)
                part.replace(path)
    except Exception as error:  # whatever a library makes of what came
        why = str(error).replace(str(part), "the download") if isinstance(error, DataError) else repr(error)
        raise DataError(
            f"{path} is missing and could not be downloaded ({why}). Either set METAADAMW_DATA to a folder that has "
            f"{name}, or {_by_hand(name, source, path)}. Synthetic data of the same shape: --data synthetic"
        ) from error
    return path


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    lock = folder / ".download.lock"
    with FileLock(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # as in ``training``


def _by_hand(name: str, source: str, path: Path) -> str:
    """How to get a file where there is a network."""
    if source.endswith(Path(name).suffix):
        return f"download {source} to {path}"
    return f"run the same command once where it can reach {source} and bring the {path} that it makes"
