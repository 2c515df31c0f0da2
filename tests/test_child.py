"""Work in a child process: results, errors, death, and interruption."""

from __future__ import annotations

import os
import signal
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
