"""Commands in several processes, started by torchrun, with one thread each, so that sums are equal."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    # For scripts that import the tests, and benchmarks through them.
    "PYTHONPATH": os.pathsep.join(
        filter(None, [*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH")])
    ),
}


def start(processes: int, *program: object) -> subprocess.Popen:
    """A program (``-m``, ``far``, … or a script and its arguments) in so many processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
        *program,
    ]
    return subprocess.Popen(
        list(map(str, command)), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(processes: int, *program: object) -> str:
    """Return what it prints until its end; one process is without torchrun.

    torch's own threads of FSDP2 and gloo rarely end a process with a memory fault (docs/reliability.md). One
    such end is a warning and a second try.
    """
    if processes == 1:
        done = subprocess.run(
            [sys.executable, *map(str, program)], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    status, output, errors = _to_the_end(processes, *program)
    if status and re.search(r"exitcode *: -(6|11)\b", errors):
        warnings.warn(
            f"a process ended with a memory fault: {' '.join(map(str, program))}\n{errors}",
            RuntimeWarning,
            stacklevel=2,
        )
        status, output, errors = _to_the_end(processes, *program)
    assert status == 0, errors
    return output


def _to_the_end(processes: int, *program: object) -> tuple[int, str, str]:
    process = start(processes, *program)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def kill_one(process: subprocess.Popen) -> None:
    """``kill -9`` one of the processes; torchrun ends the others."""
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
