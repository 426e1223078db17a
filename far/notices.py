"""Notices on the standard error while a command works without other output."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_SECONDS = 2.0


@contextlib.contextmanager
def noticed(doing: str) -> Iterator[None]:
    """Print ``doing``, such as "reading avatars-64", if the block takes longer than two seconds.

    With torchrun, only rank 0 prints.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    timer = threading.Timer(_SECONDS, print, [f"far: {doing} …"], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
