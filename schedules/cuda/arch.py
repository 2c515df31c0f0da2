"""What the kernels need to know of a GPU architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gqsa_compiler._tvm import Target
from gqsa_compiler.errors import UsageError
from gqsa_compiler.targets import SHARED_BYTES, TargetSpec, cuda_fields

WARP = 32
"""Threads of a warp."""


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Parameters
    ----------
    name : str
        As nvcc says it, ``sm_90``.
    shared_bytes : int
        Shared memory that one block may ask for (CUDA C++ programming guide, table "Technical
        specifications per compute capability").
    processors : int
        Streaming multiprocessors of the common GPU of this architecture: a kernel's default
        number of blocks. A100, RTX 3090, RTX 4090 and H100 SXM.
    """

    name: str
    shared_bytes: int
    processors: int

    def target(self) -> Target:
        """Return TVM's target, with this machine as its host."""
        return Target(cuda_fields(self.name, self.shared_bytes), host=Target({"kind": "llvm"}))


ARCHES: Mapping[str, Arch] = {
    "sm_80": Arch("sm_80", SHARED_BYTES["sm_80"], 108),
    "sm_86": Arch("sm_86", SHARED_BYTES["sm_86"], 82),
    "sm_89": Arch("sm_89", SHARED_BYTES["sm_89"], 128),
    "sm_90": Arch("sm_90", SHARED_BYTES["sm_90"], 132),
}


def arch_of(name: str) -> Arch:
    """Look an architecture up.

    Raises
    ------
    UsageError
        There are no kernels for it.
    """
    if name not in ARCHES:
        known = ", ".join(ARCHES)
        raise UsageError(f"There are no CUDA kernels for {name!r}; choose one of {known}.")
    return ARCHES[name]


def arch_for(target: TargetSpec) -> Arch:
    """Return the architecture of a target's code, with the shared memory that it may ask for.

    Raises
    ------
    UsageError
        There are no kernels for it.
    """
    return replace(arch_of(target.arch), shared_bytes=target.shared_bytes)
