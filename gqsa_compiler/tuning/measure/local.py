"""Measuring on this machine: each trial in a process of its own, with limits."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from gqsa_compiler.errors import CompileError
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.measure.program import PROGRAM, build_program, host_libraries
from gqsa_compiler.tuning.measure.workspace import Candidate, Workspace

_NO_MEMORY = (
    "not enough memory",
    "cannot allocate memory",
    "bad_alloc",
    "failed to map segment",
    "out of memory",
)
_THREAD_BYTES = 256 << 20  # of address space: a stack, and the allocator's arena
_MOST_OUTPUT = 16 << 20
_LEAST = 1e-9  # seconds: nothing that is called takes less


class Measurer(Protocol):
    """Measures candidates against an incumbent, somewhere."""

    @property
    def machine(self) -> dict[str, str]:
        """What records say of the machine."""

    @property
    def slots(self) -> int:
        """How many candidates it measures at once."""

    @property
    def read_bandwidth(self) -> float:
        """Bytes a second that its memory gives; 0 where it does not tell."""

    def measure(
        self,
        space: Workspace,
        candidate: Candidate,
        incumbent: Candidate,
        rounds: int = 0,
    ) -> Outcome:
        """Check a candidate and time it in turns with the incumbent; rounds 0: the usual number."""

    def stop(self) -> bool:
        """End what is being measured; False if that has to be waited for."""


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
        self._libraries = libraries or host_libraries(folder / "lib", target)
        self._on_gpu = target.kind == "cuda"
        self._running: list[subprocess.Popen[bytes]] = []
        self._gpu = self._describe_gpu() if self._on_gpu else {}

    @property
    def machine(self) -> dict[str, str]:
        """What records say of the machine."""
        uname = os.uname()
        return {
            "host": uname.nodename,
            "system": f"{uname.sysname} {uname.release}",
            "how": "emulator" if self._emulator else "process",
            **({"gpu": str(self._gpu["name"])} if self._gpu else {}),
        }

    @property
    def read_bandwidth(self) -> float:
        """Bytes a second that the GPU copies, read and written ones; 0 on a CPU."""
        return float(self._gpu.get("copy", 0.0))

    def _describe_gpu(self) -> dict[str, Any]:
        """Ask the program which GPU there is.

        Raises
        ------
        CompileError
            It can use none.
        """
        words = [str(self._program), "--gpu", str(self._libraries)]
        done = subprocess.run(words, capture_output=True, check=False)
        if done.returncode:
            raise CompileError(" ".join(done.stderr.decode(errors="replace").split())[-500:])
        return read_gpu(done.stdout)

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
        # CUDA reserves far more addresses than it uses.
        memory = None if self._emulator or self._on_gpu else room
        return run_job(words, limits.run_seconds, memory, self._running)

    def stop(self) -> bool:
        """End what is being measured."""
        for process in list(self._running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return True


def run_job(
    words: list[str],
    seconds: float,
    memory: int | None,
    running: list[subprocess.Popen[bytes]] | None = None,
) -> Outcome:
    """Run the measuring program and read what it prints.

    Parameters
    ----------
    words : list of str
        The command.
    seconds : float
        After which it is ended.
    memory : int or None
        Most address space, in bytes; None: no limit.
    running : list of Popen or None
        Has the process in it as long as it runs.
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
        running = [] if running is None else running
        running.append(process)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Outcome("hang", f"It took more than {seconds:g} s.")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            running.remove(process)
    return read_outcome(process.returncode, out, err)


def _quiet(limit: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the session's
        limit()

    return prepare


def read_gpu(out: bytes) -> dict[str, Any]:
    """Read what the program prints of a GPU: ``name``, ``arch``, ``cache``, ``copy``.

    Raises
    ------
    CompileError
        It is something else.
    """
    try:
        found = json.loads(out[:_MOST_OUTPUT])
        name, arch, rate = str(found["name"]), str(found["arch"]), float(found["copy"])
        if found["event"] != "gpu" or not 0 < len(name) < 256 or not 0 < rate < 1e15:
            raise ValueError("a GPU that is none")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CompileError(f"What the program says of the GPU is damaged: {error}.") from None
    return {"name": name, "arch": arch, "copy": rate}


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
                if not (_LEAST < incumbent < 1e6 and _LEAST < candidate < 1e6):
                    raise ValueError("a time that is none")
                samples.setdefault(int(event["tokens"]), []).append((incumbent, candidate))
            done = done or event["event"] == "done"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        return Outcome("crash", f"It printed something else than results: {error}.")
    if not done:
        return Outcome("crash", "It ended before it was done.")
    return Outcome("ok", samples=samples)


def _wrong(event: dict[str, object]) -> Outcome:
    times, who = event.get("times"), event.get("kernel")
    how = "is not a number" if times == -1.0 else f"is {times} times beyond its bound"
    what = "" if who == "candidate" else " of the incumbent"
    return Outcome("wrong", f"An output{what} for {event.get('tokens')} tokens {how}.")
