"""Errors become one message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
import typer

from gqsa_compiler.cli.command import command, describe
from gqsa_compiler.cli.signals import Stopped
from gqsa_compiler.errors import CheckpointError, UsageError
from tests.cli.conftest import Gqsa


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("There is no x."), 2, "There is no x."),
        (CheckpointError("Layer q is damaged."), 1, "Layer q is damaged."),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (Stopped(signal.SIGTERM), 143, "SIGTERM"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "while writing a/b"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "No space left"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), 1, "Not enough memory ("),
        (MemoryError(), 1, "Not enough memory; free some, use a machine with more, or a smaller"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), 1, "Permission denied: c."),
        (ValueError("long\nstory, last line"), 1, "Unexpected ValueError: story, last line"),
        (ValueError(), 1, "no message"),
    ],
)
def test_describe(error: BaseException, code: int, words: str) -> None:
    message, found = describe(error)
    assert found == code
    assert words in message
    assert "\n" not in message


def test_traceback_only_when_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def verb(verbose: bool = False) -> None:
        raise ValueError("broken")

    for verbose in (False, True):
        with pytest.raises(typer.Exit) as ended:
            verb(verbose=verbose)
        assert ended.value.exit_code == 1
        err = capsys.readouterr().err
        assert "broken" in err
        assert ("Traceback" in err) == verbose


def test_a_terminated_verb_cleans_up(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    @command
    def verb() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    with pytest.raises(typer.Exit) as ended:
        verb()
    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "SIGTERM" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    code = (
        "from gqsa_compiler.cli.command import command\n"
        "import typer\n"
        "@command\n"
        "def verb():\n"
        "    while True: print('x' * 1000, flush=True)\n"
        "try: verb()\n"
        "except typer.Exit as ended: raise SystemExit(ended.exit_code)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGPIPE
    assert err == b""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("run",), "Missing argument 'DIR'"),
        (("run", "x", "--frob"), "No such option: --frob"),
        (("eval", "x"), "Missing option '--text'"),
        (("compress", "x", "-o", "y", "--samples", "0"), "'0' samples: give a whole number"),
        (("compile", "x", "--activations", "int4"), "Invalid value for '--activations'"),
    ],
)
def test_bad_words_are_one_line_and_exit_code_2(
    gqsa: Gqsa, words: tuple[str, ...], message: str
) -> None:
    done = gqsa(*words)
    assert done.code == 2
    assert message in done.error
    assert done.out == ""
