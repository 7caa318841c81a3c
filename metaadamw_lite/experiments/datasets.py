"""Data files: their download, their checks, and a cache of the arrays made from them.

``METAADAMW_DATA`` names the folder. The default is ``data/cache`` of the checkout around the current directory, or of
the current directory outside a checkout. Missing files are downloaded from their public sources into the same layout.
Every file is checked before use: a ``DataFile`` by size and SHA-256, a ``Table`` (parquet bytes depend on their writer)
by its columns and number of rows, a file of ``file_from`` by its reader.
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
    """A data file is missing, truncated or not the expected one."""


@dataclass(frozen=True)
class DataFile:
    """One file of a public data set.

    Attributes:
        path: place inside the data folder.
        url: public source.
        size: in bytes.
        sha256: digest of the content, in hexadecimal.
    """

    path: str
    url: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Table:
    """One part of a public data set as a parquet file.

    Attributes:
        path: place inside the data folder.
        rows: number of rows.
        columns: their names.
        source: public source, for messages.
        download: fetches the rows from the source.
    """

    path: str
    rows: int
    columns: tuple[str, ...]
    source: str
    download: Callable[[], pd.DataFrame]


def cache() -> Path:
    """Return the folder of downloads and prepared arrays, for notebooks and commands alike."""
    return (checkout() or Path()) / "data" / "cache"


def data_folder() -> Path:
    """Return the folder of real data: ``METAADAMW_DATA``, else the ``cache``.

    Raises:
        ValueError: if ``METAADAMW_DATA`` begins with "~" and the home folder is not known.
    """
    named = os.environ.get("METAADAMW_DATA")
    return expanded(named, "METAADAMW_DATA") if named else cache()


def fetch(file: DataFile) -> Path:
    """Return the path of a checked data file, after a download if it is missing.

    Raises:
        DataError: if the file is missing and cannot be downloaded, or is not the expected one. The message says what
            to do.
    """

    def download(part: Path) -> None:
        with urllib.request.urlopen(file.url, timeout=60) as response:
            part.write_bytes(response.read())
        _check(file, part)

    path = file_from(file.path, file.url, download)
    _check(file, path)
    return path


def read_table(table: Table) -> pd.DataFrame:
    """Read the rows of a checked table, after a download if it is missing.

    Raises:
        DataError: as ``fetch`` does.
    """
    return _read(table, _locate(table))


def hub_table(
    path: str, rows: int, columns: tuple[str, ...], name: str, split: str, config: str | None = None
) -> Table:
    """Describe a table that is a split of a data set on the Hugging Face hub."""

    def download() -> pd.DataFrame:
        from datasets import load_dataset

        frame: pd.DataFrame = load_dataset(name, config, split=split).to_pandas()
        return frame.filter(items=columns)  # reading refuses a table that lacks a column

    part = f"the split {split!r}" + ("" if config is None else f" of the configuration {config!r}")
    return Table(path, rows, columns, f"{part} of https://huggingface.co/datasets/{name}", download)


def prepared(make: Callable[..., T], tables: Sequence[Table], *arguments: Any) -> T:
    """Return the result of ``make(*arguments)`` on some tables, kept on disk in the ``cache``.

    It is made anew when a file, an argument, the function's module, this module or ``text`` changes.

    Raises:
        DataError: as ``fetch`` does, and if ``make`` cannot read the rows.
        OSError, MemoryError, ImportError: for a full disk, too little memory, or a missing package.
    """
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in map(_locate, tables)]
    memory = joblib.Memory(cache() / "prepared", verbose=0)
    try:
        result: T = memory.cache(_make, ignore=["make"])(make, _source(make), files, *arguments)
    except DataError:
        raise
    except Exception as error:  # libraries raise errors of any kind for broken texts and images
        full_disk = isinstance(error, OSError) and error.errno is not None  # unlike that of a broken image
        if full_disk or isinstance(error, MemoryError | ImportError):
            raise
        paths = ", ".join(path for path, *_ in files)
        raise DataError(f"{paths}: not all rows hold what they should ({error!r})") from error
    return result


def _make(make: Callable[..., T], _source: str, _files: list[Any], *arguments: Any) -> T:
    return make(*arguments)


def _source(make: Callable[..., Any]) -> str:
    """Return the function's name and a digest of the code that it may call."""
    files = [Path(inspect.getfile(make)), Path(__file__), Path(__file__).with_name("text.py")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{make.__module__}.{make.__qualname__} {digest}"


def is_held_out(texts: Iterable[str]) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Mark the samples that the ``clean`` protocol splits off the training set: about one in ten, the same each time.

    A sample's own content decides, so that its copies stay on the same side.

    Returns:
        A mask (N,).
    """
    return np.array([zlib.crc32(text.encode()) % 10 == 0 for text in texts])


def _locate(table: Table) -> Path:
    """Return the path of a table, after a download if it is missing."""

    def download(part: Path) -> None:
        table.download().to_parquet(part)
        _read(table, part)

    return file_from(table.path, table.source, download)


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


def file_from(name: str, source: str, download: Callable[[Path], None]) -> Path:
    """Return the path of a file in the data folder; ``download`` makes it in a temporary folder if it is missing.

    One process at a time downloads to a folder, since the parts of a data set may come in one archive.

    Raises:
        DataError: if the file is missing and ``download`` fails.
    """
    path = data_folder() / name
    if path.exists():
        return path
    part = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            if not path.exists():  # another process may have downloaded it in the meantime
                part = Path(folder) / path.name
                download(part)
                part.replace(path)
    except Exception as error:  # libraries raise errors of any kind for a broken download
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
    """Tell how to get a file on a machine with a network."""
    if source.endswith(Path(name).suffix):
        return f"download {source} to {path}"
    return f"run the same command once where it can reach {source} and bring the {path} that it makes"
