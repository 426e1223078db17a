"""Lines on the standard error that say what a command is doing while nothing else does."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_SECONDS = 2.0


@contextlib.contextmanager
def noticed(doing: str) -> Iterator[None]:
    """Say what the block does, such as "reading avatars-64", if it takes longer than two seconds.

    Of several processes that torchrun started, the first says it.
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
