"""Where data files come from, and how they are checked.

``METAADAMW_DATA`` names the folder; without it, it is ``data/cache`` of the current directory. A file that is missing
there is downloaded from its public source. Every file is checked by size and SHA-256 before it is used.
"""

import hashlib
import http.client
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path


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


def data_folder() -> Path:
    """The folder of real data: ``METAADAMW_DATA``, else ``data/cache``."""
    return Path(os.environ.get("METAADAMW_DATA") or "data/cache")


def fetch(file: DataFile) -> Path:
    """The path of a checked data file, downloaded first if it is not there.

    Raises:
        DataError: if the file can be had neither way, or is not the expected one. The message names it and says what
            to do.
    """
    path = data_folder() / file.path
    if not path.exists():
        _download(file, path)
    _check(file, path)
    return path


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


def _download(file: DataFile, path: Path) -> None:
    """Download to a temporary file beside ``path`` and move it there once it is whole and checked."""
    part = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            with urllib.request.urlopen(file.url, timeout=60) as response:
                part.write_bytes(response.read())
            _check(file, part)
            part.replace(path)
    except (DataError, http.client.HTTPException, OSError) as error:
        why = str(error).replace(str(part), "the download") if isinstance(error, DataError) else repr(error)
        raise DataError(
            f"{path} is missing and could not be downloaded ({why}). Either set METAADAMW_DATA to a folder that has "
            f"{file.path}, or download {file.url} to {path}. Synthetic data of the same shape: --data synthetic"
        ) from error
