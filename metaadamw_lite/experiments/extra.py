"""The extra that brings a missing package. Imports nothing but Python's own modules."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def hint(error: ModuleNotFoundError) -> str:
    """Name the extra that brings the missing package."""
    peers = ("dadaptation", "prodigyopt", "schedulefree")
    extra = "peers" if str(error.name).partition(".")[0] in peers else "experiments"
    return f"{error}; what is missing comes by pip install 'metaadamw-lite[{extra}]', or '.[{extra}]' in a checkout"


@contextmanager
def say_which_extra() -> Iterator[None]:
    """End a program in one line, with exit code 2, where an import lacks its package."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("metaadamw_lite"):
            raise
        print(f"error: {hint(error)}", file=sys.stderr)
        sys.exit(2)
