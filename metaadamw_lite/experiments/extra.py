"""Which extra to install where a package is missing; imports nothing but Python's own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def hint(error: ModuleNotFoundError) -> str:
    """Say which extra brings the package that is missing."""
    missing = str(error.name).partition(".")[0]
    extra = "peers" if missing in ("dadaptation", "prodigyopt", "schedulefree") else "experiments"
    return f"no package {missing}; it comes with an extra: pip install 'metaadamw-lite[{extra}]', or '.[{extra}]' here"


@contextmanager
def say_which_extra() -> Iterator[None]:
    """End a program in one line, with exit code 2, where a package that it imports is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith("metaadamw_lite"):
            raise
        print(f"error: {hint(error)}", file=sys.stderr)
        sys.exit(2)
