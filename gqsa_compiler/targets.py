"""TARGET names and what each one means: a code generator, an architecture, CPU features."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gqsa_compiler.arm_cores import ARM_CORES
from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.gpu_names import GPU_ARCHES, PREFIX, near_names
from gqsa_compiler.runtime.cpus import host_arch, host_flags
from gqsa_compiler.runtime.gpus import CPU, CUDA, open_driver

# LLVM's feature name -> Linux's /proc/cpuinfo flags that code with it needs. Only what a kernel
# asks for: whatever is listed, LLVM uses wherever it can, and machines without it are refused.
_X86_FEATURES: Mapping[str, tuple[str, ...]] = {
    "avx2": ("avx", "avx2", "xsave"),
    "f16c": ("avx", "f16c", "xsave"),
    "fma": ("avx", "fma", "xsave"),
    "avx512bf16": ("avx512_bf16",),
    "avx512bw": ("avx512bw",),
    "avx512cd": ("avx512cd",),
    "avx512dq": ("avx512dq",),
    "avx512f": ("avx512f",),
    "avx512vl": ("avx512vl",),
}
_ARM_FEATURES: Mapping[str, tuple[str, ...]] = {
    "neon": ("asimd",),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
    "bf16": ("bf16",),
}
_X86_256 = frozenset({"avx2", "f16c", "fma"})
_X86_512 = _X86_256 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}

# LLVM's x86 levels, the lowest first, and the flags that each adds: with a level as `mcpu`, LLVM
# emits any of its instructions (BMI2's shifts, MOVBE ...), asked for or not.
_X86_LEVELS: Mapping[str, tuple[str, ...]] = {
    "x86-64": (),
    "x86-64-v2": ("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"),
    "x86-64-v3": (
        "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave",
    ),
    "x86-64-v4": ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
}  # fmt: skip

SHARED_BYTES: Mapping[str, int] = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
}
"""The GPU architectures that there are kernels for, and the shared memory in bytes that one block
may ask for (CUDA C++ programming guide, "Technical specifications per compute capability")."""
_OLDEST_GPU = "sm_80"


@dataclass(frozen=True)
class TargetSpec:
    """A machine to compile for.

    Parameters
    ----------
    name : str
        What the user wrote, e.g. ``cpu``.
    kind : str
        TVM's code generator: ``llvm`` or ``cuda``.
    arch : str
        ``x86_64`` or ``aarch64``, as `platform.machine` says it; of a GPU ``sm_90`` and so on, as
        nvcc says it.
    cpu : str
        LLVM's ``mcpu``: a level, never one machine's name, so that it and `features` tell all
        that the code may use. Empty for a GPU.
    features : tuple of str
        LLVM feature names that our kernels use, sorted. The runtime refuses a machine that lacks
        any of `required_flags`. Of a GPU: ``compute_80``, where PTX goes along, which a driver can
        translate for any later GPU.
    triple : str
        LLVM's target triple; of a GPU that of the machine it is in.
    """

    name: str
    kind: str
    arch: str
    cpu: str
    features: tuple[str, ...]
    triple: str

    @property
    def machine(self) -> str:
        """Architecture of the CPU: the code's, or that beside the GPU."""
        return self.triple.partition("-")[0] if self.kind == "cuda" else self.arch

    @property
    def vector_bits(self) -> int:
        """Width in bits of the widest vector register the code may use."""
        if "avx512f" in self.features:
            return 512
        if "avx2" in self.features:
            return 256
        return 128

    @property
    def linked(self) -> bool:
        """The code cannot be a library: it is linked into the native program (phones)."""
        return self.triple.endswith("-android")

    @property
    def required_flags(self) -> tuple[str, ...]:
        """What a machine must have to run the code, in the names of /proc/cpuinfo, sorted.

        For a GPU: what code is there, of which its driver must be able to take one.
        """
        if self.kind == "cuda":
            return tuple(sorted((self.arch, *self.features)))
        if self.arch == "x86_64":
            needed = _level_flags(self.cpu) | _flags_of(_X86_FEATURES, self.features)
        else:
            needed = _flags_of(_ARM_FEATURES, self.features)
        return tuple(sorted(needed))

    @property
    def device_type(self) -> int:
        """DLPack's number of the device that the code runs on."""
        return CUDA if self.kind == "cuda" else CPU

    @property
    def shared_bytes(self) -> int:
        """Shared memory in bytes that a block on a GPU may ask for.

        Where PTX goes along, no more than every later GPU has: some have less than earlier ones.
        """
        return min(SHARED_BYTES.values()) if self.features else SHARED_BYTES[self.arch]

    def tvm_dict(self) -> dict[str, Any]:
        """Return the dictionary that `tvm.target.Target` takes."""
        if self.kind == "cuda":
            host = {"kind": "llvm", "mtriple": self.triple}
            return {**cuda_fields(self.arch, self.shared_bytes), "host": host}
        return {
            "kind": self.kind,
            "mtriple": self.triple,
            "mcpu": self.cpu,
            "mattr": [f"+{feature}" for feature in self.features],
        }


def cuda_fields(arch: str, shared_bytes: int) -> dict[str, Any]:
    """Return what TVM has to know of a GPU: without it, it takes that of one of 2015."""
    return {
        "kind": "cuda",
        "arch": arch,
        "max_shared_memory_per_block": shared_bytes,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "registers_per_block": 65536,
    }


def _flags_of(table: Mapping[str, tuple[str, ...]], features: Collection[str]) -> set[str]:
    return {flag for feature in features for flag in table[feature]}


def _level_flags(level: str) -> set[str]:
    """Collect the flags of an x86 level and of all below it."""
    names = list(_X86_LEVELS)
    below = names[: names.index(level) + 1]
    return {flag for name in below for flag in _X86_LEVELS[name]}


def _x86(name: str, level: str, features: Collection[str]) -> TargetSpec:
    return TargetSpec(name, "llvm", "x86_64", level, tuple(sorted(features)), "x86_64-linux-gnu")


def _arm(name: str, features: Collection[str]) -> TargetSpec:
    return TargetSpec(
        name, "llvm", "aarch64", "generic", tuple(sorted(features)), "aarch64-linux-gnu"
    )


def host_target(name: str, arch: str, flags: Collection[str]) -> TargetSpec:
    """Choose the best target for a machine.

    Parameters
    ----------
    name : str
        The target's name.
    arch : str
        As `host_arch` says it.
    flags : collection of str
        As `host_flags` reads them.

    Returns
    -------
    TargetSpec
        Its `required_flags` are all among `flags` (on Arm: but ``asimd``, which every 64-bit Arm
        has).

    Raises
    ------
    UsageError
        There is no code generator for the architecture.
    """
    have = set(flags)
    if arch == "x86_64":
        level = [level for level in _X86_LEVELS if _level_flags(level) <= have][-1]
        # Where a hypervisor hides some of a level's flags, its vectors are used all the same.
        features = {name for name, needs in _X86_FEATURES.items() if have.issuperset(needs)}
        return _x86(name, level, features if features >= _X86_512 else features & _X86_256)
    if arch == "aarch64":
        return _arm(name, {"neon"} | {f for f, needs in _ARM_FEATURES.items() if have >= {*needs}})
    raise UsageError(
        f"This machine's architecture is {arch}, which gqsa cannot compile for; "
        "name a target with --target."
    )


def _cuda(name: str, arch: str, *, ptx: bool = False) -> TargetSpec:
    features = (arch.replace("sm_", "compute_"),) if ptx else ()
    return TargetSpec(name, "cuda", arch, "", features, f"{host_arch()}-linux-gnu")


def _cuda_here(name: str) -> TargetSpec:
    """Choose code for the GPU of this machine; without one, for the oldest, with PTX."""
    try:
        major, minor = open_driver().capability(0)
    except GqsaError:
        return _cuda(name, _OLDEST_GPU, ptx=True)
    arch = f"sm_{major}{minor}"
    if arch in SHARED_BYTES:
        return _cuda(name, arch)
    if (major, minor) < (8, 0):
        raise UsageError(
            f"This machine's GPU has compute capability {major}.{minor}, and the kernels need 8.0 "
            "or later; choose a CPU target."
        )
    older = [known for known in SHARED_BYTES if int(known[3:]) < 10 * major + minor]
    return _cuda(name, older[-1], ptx=True)


CPU_NAMES = (
    "cpu",
    "x86-64-v3",
    "x86-64-v4",
    "x86-64-v4-bf16",
    "aarch64",
    "aarch64-i8mm",
    *(f"aarch64:{core}" for core in ARM_CORES),
    "android-arm64",
)
GPU_NAMES = ("cuda", *(f"cuda:{arch}" for arch in SHARED_BYTES))
TARGET_NAMES = (*CPU_NAMES, *GPU_NAMES)


def parse_target(name: str) -> TargetSpec:
    """Look up a TARGET name.

    Raises
    ------
    UsageError
        The name is unknown; the message lists those that exist, or of GPUs the nearest ones.
    """
    if name == "cpu":
        return host_target(name, host_arch(), host_flags())
    if name == "x86-64-v3":
        return _x86(name, "x86-64-v3", _X86_256)
    if name == "x86-64-v4":
        return _x86(name, "x86-64-v4", _X86_512)
    if name == "x86-64-v4-bf16":
        return _x86(name, "x86-64-v4", _X86_512 | {"avx512bf16"})
    if name == "aarch64":
        return _arm(name, {"neon", "dotprod"})
    if name == "aarch64-i8mm":
        return _arm(name, {"neon", "dotprod", "i8mm", "bf16"})
    if name.startswith("aarch64:") and name.removeprefix("aarch64:") in ARM_CORES:
        return _arm(name, ARM_CORES[name.removeprefix("aarch64:")].features)
    if name == "android-arm64":
        return replace(_arm(name, {"neon", "dotprod"}), triple="aarch64-linux-android")
    if name == "cuda":
        return _cuda_here(name)
    if name.startswith("cuda:") and name.removeprefix("cuda:") in SHARED_BYTES:
        return _cuda(name, name.removeprefix("cuda:"))
    if name in GPU_ARCHES:
        return _cuda(name, GPU_ARCHES[name])
    if name.startswith(PREFIX):
        near = near_names(name)
        meant = f"did you mean {' or '.join(near)}? Otherwise name" if near else "name"
        raise UsageError(
            f"There is no GPU {name!r} among those that the kernels are known for; {meant} its "
            f"architecture, one of {', '.join(GPU_NAMES[1:])}."
        )
    raise UsageError(
        f"Unknown target {name!r}; choose one of {', '.join(TARGET_NAMES)}, or a GPU by its name, "
        "such as nvidia/nvidia-h100."
    )


def parse_targets(names: str) -> tuple[TargetSpec, ...]:
    """Look up a TARGET, or several of one architecture with commas between them.

    Returns
    -------
    tuple of TargetSpec
        The most capable first: that with the widest vectors, then with the most features.

    Raises
    ------
    UsageError
        A name is unknown or stands twice, two mean the same code, or architectures differ.
    """
    found: list[TargetSpec] = []
    for name in names.split(","):
        target = parse_target(name.strip())
        for other in found:
            if other.name == target.name:
                raise UsageError(f"The targets {names} name {target.name} twice; name it once.")
            if (other.kind, other.arch) != (target.kind, target.arch):
                raise UsageError(
                    f"{other.name} and {target.name} are different architectures, whose weights "
                    "are packed differently; compile an artefact for each."
                )
            if other.linked or target.linked:
                raise UsageError(
                    f"{(target if target.linked else other).name} is a program of its own; compile "
                    "it without another target."
                )
            if replace(other, name=target.name) == target:
                raise UsageError(
                    f"{other.name} and {target.name} mean the same code here; name one of the two."
                )
        found.append(target)
    found.sort(key=lambda target: (target.vector_bits, len(target.required_flags)), reverse=True)
    return tuple(found)


__all__ = [
    "CPU_NAMES",
    "GPU_NAMES",
    "SHARED_BYTES",
    "TARGET_NAMES",
    "TargetSpec",
    "host_arch",
    "host_flags",
    "host_target",
    "parse_target",
    "parse_targets",
]
