"""Work in a child process: results, errors, death, and interruption."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from gqsa_compiler._child import run_in_child
from gqsa_compiler.errors import CompileError


def test_results_are_left_in_files(tmp_path: Path) -> None:
    run_in_child(lambda: (tmp_path / "done").write_text(str(os.getpid())) and None, "Work")
    assert int((tmp_path / "done").read_text()) != os.getpid()


def test_an_error_comes_back_with_its_message() -> None:
    def fail() -> None:
        raise CompileError("Layer x is odd.")

    with pytest.raises(CompileError, match=r"^Layer x is odd\.$"):
        run_in_child(fail, "Work")


def test_another_exception_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("seven")

    with pytest.raises(CompileError, match="ValueError: seven"):
        run_in_child(fail, "Work")
    assert "Traceback" in capfd.readouterr().err


class Closed:
    """A stream that the child cannot write to; the parent, which is tested with it, can."""

    def __init__(self, error: type[Exception]) -> None:
        self._error, self._parent = error, os.getpid()

    def write(self, _text: str) -> int:
        """Fail."""
        raise self._error("gone")

    def flush(self) -> None:
        """Fail in the child."""
        if os.getpid() != self._parent:
            raise self._error("gone")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("error", [BrokenPipeError, RuntimeError])
def test_the_parents_clean_up_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str, error: type[Exception]
) -> None:
    """Also where the child cannot even print what went wrong."""

    def fail() -> None:
        raise ValueError("seven")

    def run() -> None:
        try:
            run_in_child(fail, "Work")
        finally:
            with log.open("a", encoding="utf-8") as file:
                print(os.getpid(), file=file)

    monkeypatch.setattr(sys, stream, Closed(error))
    log = tmp_path / "cleaned"
    with pytest.raises(CompileError, match=r"^ValueError: seven$"):
        run()
    assert log.read_text() == f"{os.getpid()}\n"


def test_work_that_is_done_needs_no_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(BrokenPipeError))
    run_in_child(lambda: (tmp_path / "done").write_text("yes") and None, "Work")
    assert (tmp_path / "done").read_text() == "yes"


def test_a_message_that_is_no_text() -> None:
    def fail() -> None:
        raise CompileError("No file \udcff.")

    with pytest.raises(CompileError, match=r"^No file \?\.$"):
        run_in_child(fail, "Work")


@pytest.mark.parametrize(
    ("death", "how"),
    [(lambda: os._exit(3), "exit code 3"), (lambda: os.kill(os.getpid(), 9), "signal 9")],
)
def test_a_death_is_reported(death: object, how: str) -> None:
    with pytest.raises(CompileError, match=rf"Work ended early \({how}\)"):
        run_in_child(death, "Work")  # type: ignore[arg-type]


def test_an_interrupt_kills_the_child_at_once(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_child(work, "Work")
    assert time.monotonic() - begin < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
