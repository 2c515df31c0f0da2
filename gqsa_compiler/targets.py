"""TARGET names and what each one means: a code generator, an architecture, CPU features."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import UsageError

# Linux's /proc/cpuinfo flag -> LLVM's feature name, for the features our x86 code may use.
_X86_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx_vnni": "avxvnni",
    "avx512_bf16": "avx512bf16",
    "avx512vbmi": "avx512vbmi",
}
_X86_V3 = ("avx2", "fma", "f16c")
_X86_V4 = (*_X86_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_ARM_FLAGS = {"asimd": "neon", "asimdhp": "fullfp16", "asimddp": "dotprod", "i8mm": "i8mm"}


@dataclass(frozen=True)
class TargetSpec:
    """A machine to compile for.

    Parameters
    ----------
    name : str
        What the user wrote, e.g. ``cpu``.
    kind : str
        TVM's code generator: ``llvm`` (``cuda`` comes with its own schedules).
    arch : str
        ``x86_64`` or ``aarch64``, as `platform.machine` says it.
    cpu : str
        LLVM's ``mcpu``: a level, never one machine's name, so that `features` tells the whole.
    features : tuple of str
        LLVM feature names the code may use beyond the level, sorted. The runtime refuses a
        machine that lacks any of `required_flags`.
    triple : str
        LLVM's target triple.
    """

    name: str
    kind: str
    arch: str
    cpu: str
    features: tuple[str, ...]
    triple: str

    @property
    def vector_bits(self) -> int:
        """Width in bits of the widest vector register the code may use."""
        if "avx512f" in self.features:
            return 512
        if "avx2" in self.features:
            return 256
        return 128

    @property
    def required_flags(self) -> tuple[str, ...]:
        """The features under the names of /proc/cpuinfo, sorted."""
        table = _X86_FLAGS if self.arch == "x86_64" else _ARM_FLAGS
        return tuple(sorted(flag for flag, llvm in table.items() if llvm in self.features))

    def tvm_dict(self) -> dict[str, Any]:
        """Return the dictionary that `tvm.target.Target` takes."""
        return {
            "kind": self.kind,
            "mtriple": self.triple,
            "mcpu": self.cpu,
            "mattr": [f"+{feature}" for feature in self.features],
        }


def _x86(name: str, level: str, features: set[str]) -> TargetSpec:
    return TargetSpec(name, "llvm", "x86_64", level, tuple(sorted(features)), "x86_64-linux-gnu")


def _arm(name: str, features: set[str]) -> TargetSpec:
    return TargetSpec(
        name, "llvm", "aarch64", "generic", tuple(sorted(features)), "aarch64-linux-gnu"
    )


def host_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Read this machine's CPU flags; empty where the system does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def host_arch() -> str:
    """Return this machine's architecture under the name that `TargetSpec.arch` uses."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def _host(name: str) -> TargetSpec:
    machine = host_arch()
    flags = host_flags()
    if machine == "x86_64":
        have = {llvm for flag, llvm in _X86_FLAGS.items() if flag in flags}
        if have.issuperset(_X86_V4):
            return _x86(name, "x86-64-v4", have)
        have = {f for f in have if not f.startswith("avx512")}
        level = "x86-64-v3" if have.issuperset(_X86_V3) else "x86-64-v2"
        return _x86(name, level, have)
    if machine == "aarch64":
        return _arm(name, {llvm for flag, llvm in _ARM_FLAGS.items() if flag in flags} | {"neon"})
    raise UsageError(
        f"This machine's architecture is {machine}, which gqsa cannot compile for; "
        "name a target with --target."
    )


TARGET_NAMES = ("cpu", "x86-64-v3", "x86-64-v4", "aarch64", "aarch64-i8mm")


def parse_target(name: str) -> TargetSpec:
    """Look up a TARGET name.

    Raises
    ------
    UsageError
        The name is unknown; the message lists those that exist.
    """
    if name == "cpu":
        return _host(name)
    if name == "x86-64-v3":
        return _x86(name, "x86-64-v3", set(_X86_V3))
    if name == "x86-64-v4":
        return _x86(name, "x86-64-v4", set(_X86_V4))
    if name == "aarch64":
        return _arm(name, {"neon", "dotprod"})
    if name == "aarch64-i8mm":
        return _arm(name, {"neon", "dotprod", "i8mm"})
    raise UsageError(f"Unknown target {name!r}; choose one of {', '.join(TARGET_NAMES)}.")
