"""Ctrl-C, and a cluster's SIGTERM, as a request that long work grants when it can."""

import os
import signal
import sys
import threading
import time

# torchrun passes on a signal that its processes may have got from the terminal already.
_REPEATED_SECONDS = 2.0


class DeferredInterrupt:
    """Within its block, the first Ctrl-C or SIGTERM sets ``requested``, and a second one stops at once.

    The first one is answered on the standard error. In a thread other than the main one nothing changes.

    Args:
        finishing: what the work does before it ends, such as "finishing this step and saving".
        rank: of this process. The first answers.
        count: of processes. Several stop at once only at a later Ctrl-C: torchrun repeats signals, and clusters SIGTERM.
    """

    def __init__(self, finishing: str, *, rank: int = 0, count: int = 1) -> None:
        self.requested, self.finishing, self.rank, self.count = False, finishing, rank, count

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
        if not self.requested:
            self.requested, self.time = True, now
            if self.rank == 0:
                _tell(f"\nfar: {self.finishing}; Ctrl-C again stops at once, and loses what is not saved\n")
        elif self.count == 1:
            raise KeyboardInterrupt
        elif signum == signal.SIGINT and now - self.time > _REPEATED_SECONDS:
            _tell("\nfar: stopped at once\n")
            os._exit(130)  # the others may be gone, so nothing that waits for them can be finished


def _tell(text: str) -> None:
    """Write to the standard error from a signal handler, which may have interrupted a write."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, text.encode())
