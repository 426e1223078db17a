"""Ctrl-C, and a cluster's SIGTERM, as a request that long work grants once it has saved."""

import os
import signal
import sys
import threading
import time

# torchrun passes on a signal that its processes may already have received from the terminal.
_REPEATED_SECONDS = 2.0


class Interrupted(KeyboardInterrupt):
    """Raised when a signal ended long work, after its state was saved and reported.

    ``status`` is the command's exit status: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.status = 128 + signum


class DeferredInterrupt:
    """Within its block, the first Ctrl-C or SIGTERM is kept in ``signum``, and a later Ctrl-C stops at once.

    The first one is acknowledged on standard error. A later SIGTERM changes nothing, since clusters repeat
    it. Outside of the main thread nothing changes.

    Args:
        finishing: last work before the end, such as "finishing this step and saving".
        rank: of this process. Rank 0 acknowledges.
        count: of processes. For several, a Ctrl-C soon after the first signal changes nothing either, since
            torchrun repeats signals.

    Attributes:
        signum: the number of the first signal; ``None`` until it arrives.
    """

    def __init__(self, finishing: str, *, rank: int = 0, count: int = 1) -> None:
        self.signum: int | None = None
        self.finishing, self.rank, self.count = finishing, rank, count

    @property
    def requested(self) -> bool:
        """True once a signal has arrived."""
        return self.signum is not None

    def __enter__(self) -> "DeferredInterrupt":
        main = threading.current_thread() is threading.main_thread()
        self.previous = {
            number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM) if main
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self.time = signum, now
            if self.rank == 0:
                _write(f"\nfar: {self.finishing}. Ctrl-C again stops at once and loses unsaved work\n")
        elif signum != signal.SIGINT:
            pass
        elif self.count == 1:
            raise KeyboardInterrupt
        elif now - self.time > _REPEATED_SECONDS:
            _write("\nfar: stopped at once\n")
            os._exit(130)  # other ranks may be gone, so cleanup that waits for them would hang


def _write(text: str) -> None:
    """Write to standard error from a signal handler, which may have interrupted another write."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())
