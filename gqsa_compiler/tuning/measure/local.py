"""Measuring on this machine: each trial in a process of its own, with limits."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from importlib import util
from importlib.resources import files
from pathlib import Path
from typing import Protocol

from gqsa_compiler.errors import CompileError
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.toolchain import library_linker
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.measure.workspace import Candidate, Workspace

SOURCE = "measure.cpp"
PROGRAM = "gqsa-measure"
LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so")
_NO_MEMORY = ("not enough memory", "cannot allocate memory", "bad_alloc", "failed to map segment")
_THREAD_BYTES = 256 << 20  # of address space: a stack, and the allocator's arena
_MOST_OUTPUT = 16 << 20


class Measurer(Protocol):
    """Measures candidates against an incumbent, somewhere."""

    @property
    def machine(self) -> dict[str, str]:
        """What records say of the machine."""

    @property
    def slots(self) -> int:
        """How many candidates it measures at once."""

    def measure(
        self,
        space: Workspace,
        candidate: Candidate,
        incumbent: Candidate,
        rounds: int = 0,
    ) -> Outcome:
        """Check a candidate and time it in turns with the incumbent; rounds 0: the usual number."""


def program_source() -> str:
    """Return the source of the measuring program."""
    return files(__package__).joinpath(SOURCE).read_text(encoding="utf-8")


def build_program(target: TargetSpec, path: Path) -> None:
    """Compile the measuring program for a target.

    Raises
    ------
    CompileError
        There is no compiler for it, or no headers of apache-tvm-ffi.
    """
    command = [w for w in library_linker(target).command if w not in ("-shared", "-fPIC")]
    source = path.with_suffix(".cpp")
    source.write_text(program_source(), encoding="utf-8")
    words = ["-std=c++17", "-O2", f"-I{package('tvm_ffi') / 'include'}", str(source)]
    done = subprocess.run(
        [*command, *words, "-o", str(path), "-ldl", "-pthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    source.unlink()
    if done.returncode:
        said = " ".join(done.stderr.split())[-500:]
        raise CompileError(f"{command[0]} could not compile {SOURCE}: {said}")


def package(name: str) -> Path:
    """Return the folder of an installed package.

    Raises
    ------
    CompileError
        It is not installed.
    """
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise CompileError(f"The package {name} is not installed.")
    return Path(spec.origin).parent


def host_libraries(folder: Path) -> Path:
    """Make a folder of links to this machine's TVM runtime libraries, and return it."""
    folder.mkdir(parents=True)
    for name in LIBRARIES:
        found = [p for p in (package(n) / "lib" / name for n in ("tvm_ffi", "tvm")) if p.is_file()]
        if not found:
            raise CompileError(f"{name} is in neither apache-tvm nor apache-tvm-ffi.")
        (folder / name).symlink_to(found[0])
    return folder


class LocalMeasurer:
    """Measures in subprocesses: what a candidate does to its process ends its trial only.

    Parameters
    ----------
    folder : Path
        Empty; the program and links to its libraries go there.
    target : TargetSpec
    emulator : sequence of str
        What runs the program, where this machine cannot itself (``qemu-aarch64 -L ...``).
    libraries : Path or None
        Folder of TVM's runtime libraries for the target; None: this machine's.
    """

    slots = 1

    def __init__(
        self,
        folder: Path,
        target: TargetSpec,
        emulator: tuple[str, ...] = (),
        libraries: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._program = folder / PROGRAM
        build_program(target, self._program)
        self._emulator = emulator
        self._libraries = libraries or host_libraries(folder / "lib")

    @property
    def machine(self) -> dict[str, str]:
        """What records say of the machine."""
        uname = os.uname()
        return {
            "host": uname.nodename,
            "system": f"{uname.sysname} {uname.release}",
            "how": "emulator" if self._emulator else "process",
        }

    def measure(
        self,
        space: Workspace,
        candidate: Candidate,
        incumbent: Candidate,
        rounds: int = 0,
    ) -> Outcome:
        """Check a candidate and time it in turns with the incumbent."""
        folder = space.write_job(candidate, incumbent, rounds)
        limits = space.limits
        # Each kernel has copies of its weight, and one more; the rest is the runtime and threads.
        room = 2 * (limits.rotate_bytes + 2 * space.weight_bytes) + 4 * space.case_bytes
        room += limits.memory_bytes + space.threads * _THREAD_BYTES
        words = [*self._emulator, str(self._program), str(folder), str(self._libraries)]
        return run_job(words, limits.run_seconds, None if self._emulator else room)


def run_job(words: list[str], seconds: float, memory: int | None) -> Outcome:
    """Run the measuring program and read what it prints.

    Parameters
    ----------
    words : list of str
        The command.
    seconds : float
        After which it is ended.
    memory : int or None
        Most address space, in bytes; None: no limit.
    """

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    # A session of its own, so that the candidate's children end with it.
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_quiet(limit),
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Outcome("hang", f"It took more than {seconds:g} s.")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return read_outcome(process.returncode, out, err)


def _quiet(limit: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the session's
        limit()

    return prepare


def read_outcome(code: int, out: bytes, err: bytes) -> Outcome:
    """Read what the measuring program printed; nothing in it is taken on trust.

    Parameters
    ----------
    code : int
        Its exit code; negative: the signal that ended it.
    out, err : bytes
        Its standard output and error.
    """
    said = " ".join(err.decode(errors="replace").split())[-500:]
    if any(words in said.lower() for words in _NO_MEMORY):
        return Outcome("memory", said)
    if code != 0:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Outcome("crash", f"It ended with {how}. {said}".strip())
    samples: dict[int, list[tuple[float, float]]] = {}
    done = False
    try:
        for line in out[:_MOST_OUTPUT].decode().splitlines():
            event = json.loads(line)
            if event["event"] == "wrong":
                return _wrong(event)
            if event["event"] == "sample":
                incumbent, candidate = (float(s) for s in event["seconds"])
                if not (0 < incumbent < 1e6 and 0 < candidate < 1e6):
                    raise ValueError("a time that is none")
                samples.setdefault(int(event["tokens"]), []).append((incumbent, candidate))
            done = done or event["event"] == "done"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Outcome("crash", f"It printed something else than results: {error}.")
    if not done:
        return Outcome("crash", "It ended before it was done.")
    return Outcome("ok", samples=samples)


def _wrong(event: dict[str, object]) -> Outcome:
    times, who = event.get("times"), event.get("kernel")
    how = "is not a number" if times == -1.0 else f"is {times} times beyond its bound"
    what = "" if who == "candidate" else " of the incumbent"
    return Outcome("wrong", f"An output{what} for {event.get('tokens')} tokens {how}.")
