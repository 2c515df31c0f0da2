"""What this processor can do, which of its CPUs are ours, and how many threads suit them."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

_SYSTEM = Path("/sys")
_ARCHITECTURES = {"AMD64": "x86_64", "arm64": "aarch64"}  # other systems' names


def host_arch() -> str:
    """Return this machine's architecture by its Linux name: ``x86_64``, ``aarch64``."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def host_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Read this machine's CPU flags; empty where the system does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def allowed_cpus(system: Path = _SYSTEM) -> list[int]:
    """List the CPUs that this process may run on: one of every core first, then their twins."""
    cores = _cores(system)
    firsts = [core[0] for core in cores]
    return firsts + sorted(cpu for core in cores for cpu in core[1:])


def default_threads(system: Path = _SYSTEM) -> int:
    """Count the cores that this process may use, within its container's CPU quota.

    Two threads of one core share its vector units, and TVM's waiting workers spin: more threads
    than cores are slower.
    """
    cores = len(_cores(system))
    return max(1, min(cores, _quota(system / "fs/cgroup/cpu.max", cores)))


def _cores(system: Path) -> list[list[int]]:
    """Group the allowed CPUs by core; each is a core of its own where the system does not tell."""
    cores: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        path = system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            core = path.read_text()
        except OSError:
            core = str(cpu)
        cores.setdefault(core, []).append(cpu)
    return list(cores.values())


def _quota(path: Path, otherwise: int) -> int:
    """Read a container's limit, ``<microseconds> <period>``, rounded up to whole CPUs."""
    try:
        limit, period = map(int, path.read_text().split())
    except (OSError, ValueError):  # no container, or no limit: ``max 100000``
        return otherwise
    return -(-limit // period)
