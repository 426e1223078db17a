"""The first signal is a request, a later Ctrl-C stops at once, and repetitions by machines change nothing."""

import signal
import subprocess
import sys
import threading

import pytest

from far.cli import cache
from far.cli.main import main
from far.interrupt import DeferredInterrupt


def test_first_signal_is_a_request_and_a_later_ctrl_c_stops(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with DeferredInterrupt("saving what there is") as request:
        assert not request.requested
        signal.raise_signal(signal.SIGTERM)
        assert request.requested
        [line] = capfd.readouterr().err.strip().splitlines()
        assert line.startswith("far: saving what there is")
        assert "Ctrl-C" in line
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_repeated_sigterm_changes_nothing(first: int, capfd: pytest.CaptureFixture[str]) -> None:
    with DeferredInterrupt("saving") as request:
        for signum in (first, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(signum)
        assert request.signum == first
        assert len(capfd.readouterr().err.strip().splitlines()) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_repeated_signals_to_several_processes_are_one_request(capfd: pytest.CaptureFixture[str]) -> None:
    with DeferredInterrupt("saving", rank=1, count=2) as request:
        for signum in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(signum)
        assert request.requested
    assert capfd.readouterr().err == "", "only rank 0 prints"


SCRIPT = """
import signal, sys
from far import interrupt
interrupt._REPEATED_SECONDS = 0.0
with interrupt.DeferredInterrupt("saving", rank=int(sys.argv[1]), count=2):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    print("still here", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("never")
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_later_ctrl_c_stops_several_processes_at_once(rank: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, rank], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (130, "still here\n")


def test_other_threads_do_not_change_signal_handlers() -> None:
    handler = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with DeferredInterrupt("saving") as request:
            found.append((request.requested, signal.getsignal(signal.SIGINT)))

    found: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, handler)]


def test_interrupted_command_names_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "run", interrupted)
    assert main(["cache", "recipe.yaml"]) == 130
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("far: interrupted")
    assert "same command" in line
