"""Shared by the commands: output that any terminal, file or pipe takes, and exit codes."""

import codecs
import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from metaadamw_lite.experiments.datasets import DataError
from metaadamw_lite.experiments.extra import hint
from metaadamw_lite.experiments.records import is_the_machines_fault
from metaadamw_lite.experiments.training import RunInProgressError

CLOSED_PIPE = 141
"""Exit code of a command whose output has lost its reader, as shells report a tool that SIGPIPE ended."""
_ASCII = {"–": "-", "−": "-", "…": "...", "×": "x", "≤": "<=", "²": "^2", "⟨": "<", "⟩": ">"}
_ASCII |= {"Φ": "Phi", "α": "alpha", "β": "beta", "σ": "sigma"}


def run_command(do: Callable[[], int], interrupted: str) -> int:
    """Call ``do`` and return its exit code, or the code of the error that ended it.

    A fault of the caller or of the machine is told in one line (2). Ctrl+C (130) and a closed pipe (141) are no faults.
    Characters that the encoding of the output lacks are spelt in ASCII.

    Args:
        do: parses the arguments and executes the command.
        interrupted: the message after Ctrl+C.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_spell.__name__)
    try:
        try:
            return do()
        finally:
            for stream in streams:
                stream.flush()  # a flush at the interpreter's end would fail with a traceback
    except Exception as error:
        broken = [stream for stream in streams if _discard_unwritable(stream)]
        if broken and isinstance(error, BrokenPipeError):
            return CLOSED_PIPE
        if not (isinstance(error, (ValueError, DataError, RunInProgressError)) or is_the_machines_fault(error)):
            raise
        what = hint(error) if isinstance(error, ModuleNotFoundError) else str(error) or type(error).__name__
        print(f"error: {what}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def _discard_unwritable(stream: TextIO) -> bool:
    """Tell whether a stream can no longer be written to, and drop its buffer then."""
    try:
        stream.flush()
        closed = _lacks_reader(stream)  # a stream without a buffer has nothing to flush
    except OSError:
        closed = True
    if closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    return closed


def _lacks_reader(stream: TextIO) -> bool:
    """Tell whether a stream is a pipe whose other end is closed."""
    try:
        number = stream.fileno()
    except OSError:  # a stand-in of a test or a notebook
        return False
    if not hasattr(select, "poll"):  # on Windows
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a character that an encoding lacks. Bytes of a file name that are no text stay as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _ASCII.get(character, "?"), error.start + 1


codecs.register_error(_spell.__name__, _spell)
