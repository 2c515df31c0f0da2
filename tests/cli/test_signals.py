"""Ctrl-C and its like: the exit code is the signal's, whatever its exception becomes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from gqsa_compiler.cli.command import command
from gqsa_compiler.cli.signals import Stopped, own_ctrl_c, stop_signals
from tests.cli.conftest import Gqsa
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

_MAIN = "import sys; from gqsa_compiler.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, "Interrupted."), (signal.SIGTERM, "SIGTERM")]
)
def test_an_exception_that_tvm_has_changed(
    number: signal.Signals, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import tvm_ffi

    def work() -> None:
        signal.raise_signal(number)

    @command
    def verb() -> None:
        # Whatever a Python callback raises comes back as a RuntimeError.
        tvm_ffi.convert(work)()

    with pytest.raises(typer.Exit) as ended:
        verb()
    assert ended.value.exit_code == 128 + number
    error = capsys.readouterr().err
    assert words in error
    assert "Unexpected" not in error


def test_ctrl_c_in_a_pass(gqsa: Gqsa, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gqsa_compiler.passes import select_kernels

    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    checkpoint = make_checkpoint(dense, tmp_path / "checkpoint")
    monkeypatch.setattr(
        select_kernels, "select", lambda *_: signal.raise_signal(signal.SIGINT), raising=True
    )
    done = gqsa("compile", checkpoint, "-o", tmp_path / "out")
    assert done.error == "Interrupted."
    assert done.code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "dense"]


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    with stop_signals() as stop, stop_signals() as inner:
        assert inner is stop
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGHUP
    assert [signal.getsignal(number) for number in numbers] == before


def test_ignored_signals_stay_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_verb_that_handles_ctrl_c_goes_on() -> None:
    with stop_signals() as stop, own_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.number is None


@pytest.mark.parametrize("inner", ["datetime", "numpy._core._multiarray_umath"])
def test_a_signal_waits_for_c_code_that_is_loading(inner: str) -> None:
    """What is raised while numpy's C code imports something is printed, or an ImportError."""
    code = (
        "import builtins, os, signal, sys, time, typer\n"
        "from gqsa_compiler.cli.command import command\n"
        "real = builtins.__import__\n"
        "def fake(name, *rest):\n"
        f"    if name == {inner!r} and sys._getframe(1).f_code.co_name.startswith('_call_with'):\n"
        "        builtins.__import__ = real\n"
        "        print('now')\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "@command\n"
        "def verb():\n"
        "    builtins.__import__ = fake\n"
        "    import numpy\n"
        "    time.sleep(30)\n"
        "try: verb()\n"
        "except typer.Exit as ended: raise SystemExit(ended.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert done.stdout == "now\n"
    assert done.stderr == "error: Interrupted.\n"
    assert done.returncode == 130


@pytest.mark.parametrize("delay", [0.1, 0.15, 0.2, 0.25])
def test_ctrl_c_in_the_first_moments(tmp_path: Path, delay: float) -> None:
    """Its handler is in place before anything slow is imported."""
    ready, wait = os.pipe()
    code = f"import os; os.write({wait}, b'x'); {_MAIN}"
    source = tmp_path / "text.txt"
    os.mkfifo(source)  # opening it waits for a writer: the verb cannot end before the signal
    process = subprocess.Popen(
        [sys.executable, "-c", code, "eval", "none", "--text", str(source)],
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[wait],
    )
    os.read(ready, 1)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=25)
    os.close(ready)
    os.close(wait)
    assert error.endswith("error: Interrupted.\n")
    assert "Traceback" not in error
    assert process.returncode == 130
