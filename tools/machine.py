"""What a measurement ran on: the part of every benchmark's JSON that describes the machine."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gqsa_compiler.runtime.cpus import allowed_cpus, default_threads, host_flags

_PACKAGES = ("gqsa-compiler", "apache-tvm", "apache-tvm-ffi", "numpy")
# Features that decide which kernels a program has.
_FLAGS = re.compile(r"avx|f16c|fma$|amx|asimd|i8mm|bf16|sve")
_ENVIRONMENT = re.compile(r"(OMP|GOMP|KMP|TVM|GGML|LLAMA)_")


def describe() -> dict[str, Any]:
    """Describe this machine, how busy it is, and the versions and settings in use."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "features": sorted(flag for flag in host_flags() if _FLAGS.match(flag)),
        "cores": default_threads(),
        "cpus": len(allowed_cpus()),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "environment": {k: v for k, v in os.environ.items() if _ENVIRONMENT.match(k)},
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return what the processor calls itself, or its architecture where it does not say."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
