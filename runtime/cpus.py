"""What this processor can do, which of its CPUs are ours, and how many threads suit them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

_SYSTEM = Path("/sys")
_CGROUPS = Path("/proc/self/cgroup")
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


def default_threads(system: Path = _SYSTEM, cgroups: Path = _CGROUPS) -> int:
    """Count the cores that this process may use, within its container's CPU quota.

    Two threads of one core share its vector units, and TVM's waiting workers spin: more threads
    than cores are slower.
    """
    cores = len(_cores(system))
    return max(1, min([cores, *_quotas(system / "fs/cgroup", cgroups)]))


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


def _quotas(root: Path, cgroups: Path) -> Iterator[int]:
    """Yield the CPU limits of this process's control groups, rounded up to whole CPUs.

    A group's limit holds for the groups in it. Inside a container the group's own path may not be
    there: its limit is the root's then.
    """
    paths = {(root, "/"), (root / "cpu", "/")}  # versions 2 and 1
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths.add((root, path))
        elif "cpu" in controllers.split(","):
            paths.add((root / "cpu", path))
    for base, path in paths:
        group = base / path.lstrip("/")
        for folder in (group, *group.parents[: len(Path(path).parents)]):
            yield from _quota(folder)


def _quota(group: Path) -> Iterator[int]:
    """Yield a control group's limit, if it has one: microseconds in each period of so many."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            limit, period = map(int, " ".join((group / f).read_text() for f in files).split())
        except (OSError, ValueError):  # another version, or no limit: ``max 100000``
            continue
        if limit > 0:  # -1 is none
            yield max(1, -(-limit // period))
