"""The native programs, built by CMake, and how tests talk to them."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "runtime" / "native"
# Kept between runs, so that only the first one waits for the compiler.
BUILDS = ROOT / "build" / "native-tests"
_HEADERS = {
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "pcre2.h": "libpcre2-dev",
    "utf8proc.h": "libutf8proc-dev",
}


@dataclass(frozen=True)
class Programs:
    """A build: the command line, the tests' probe and the C program over gqsa.h."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "gqsa-run"

    @property
    def probe(self) -> Path:
        return self.folder / "gqsa-probe"

    @property
    def api(self) -> Path:
        return self.folder / "gqsa-api"


def why_not() -> str | None:
    """Return why nothing can be built here, or None where it can."""
    for tool in ("cmake", "c++", "cc"):
        if shutil.which(tool) is None:
            return f"there is no {tool} to build the native runtime with"
    missing = []
    for header, package in _HEADERS.items():
        done = subprocess.run(
            ["c++", "-E", "-x", "c++", "-DPCRE2_CODE_UNIT_WIDTH=8", "-"],
            input=f"#include <{header}>\n",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            missing.append(package)
    if missing:
        return f"the native runtime needs Debian's {' '.join(missing)}, or what has its headers"
    return None


def build(name: str, *options: str) -> Programs:
    """Configure and build; `pytest.skip` where the tools for it are missing."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = BUILDS / name
    folder.mkdir(parents=True, exist_ok=True)
    # Processes that share the tests take turns: one builds, the others find it built.
    with (BUILDS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build(folder, *options)
    return Programs(folder)


def _build(folder: Path, *options: str) -> None:
    chosen = ["-DGQSA_TEST_TOOLS=ON", "-DGQSA_WERROR=ON", *options]
    configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), *chosen]
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    for command in (
        [*configure, python],
        ["cmake", "--build", str(folder), "-j", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


class Probe:
    """A running gqsa-probe: requests and answers are JSON lines."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=60)

    def reply(self, op: str, **request: Any) -> dict[str, Any]:
        """Ask, and return the whole answer: ``ok``, or ``error`` and ``kind``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": op, **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"gqsa-probe ended with {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, op: str, **request: Any) -> Any:
        """Ask what must succeed."""
        answer = self.reply(op, **request)
        assert "ok" in answer, answer
        return answer["ok"]

    def error(self, op: str, **request: Any) -> str:
        """Ask what must be refused; return the sentence."""
        answer = self.reply(op, **request)
        assert "error" in answer, answer
        return str(answer["error"])


def run(
    programs: Programs, *words: str | Path, stdin: str | bytes = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run gqsa-run."""
    return subprocess.run(
        [str(programs.run), *map(str, words)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=300,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def generated(programs: Programs, directory: Path, *words: str) -> dict[str, Any]:
    """Run gqsa-run --json, which must succeed, and return its document."""
    done = run(programs, directory, *words, "--json")
    assert done.returncode == 0, done.stderr.decode()
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def refusal(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """Return the one line of a refused run; a crash has another exit code."""
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert done.returncode == code, (done.returncode, done.stderr.decode())
    assert done.stdout == b""
    assert len(lines) == 1, done.stderr.decode()
    return lines[0]


def options(chosen: dict[str, Any]) -> Sequence[str]:
    """Write generation options as the command line has them."""
    words = []
    for name, value in chosen.items():
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(each)]
    return words
