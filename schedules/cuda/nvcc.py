"""NVIDIA's compiler: where it is, and what it says of a kernel."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.cuda.arch import Arch

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];")
_USED = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class KernelUse:
    """What ptxas says of one kernel.

    Parameters
    ----------
    name : str
    registers : int
        A thread's.
    stack_bytes, spill_bytes : int
        Local memory of a thread: arrays that are indexed by what is not constant, and registers
        that there were not enough of. Both are 0 in a kernel that is fast.
    """

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def find_nvcc() -> Path:
    """Find nvcc on the PATH, or in the Python package ``nvidia-cuda-nvcc``.

    Raises
    ------
    CompileError
        There is none.
    """
    on_path = shutil.which("nvcc")
    if on_path is not None:
        return Path(on_path)
    found = package_programs("nvcc")
    if found:
        return found[-1]
    raise CompileError(
        "Code for CUDA needs NVIDIA's compiler nvcc, which is neither on the PATH nor installed "
        "as a package; pip install 'gqsa-compiler[cuda]' gets it."
    )


def package_programs(name: str) -> list[Path]:
    """List a program of CUDA's toolkit where NVIDIA's Python packages have it, newest last."""
    return [
        path for folder in _package_folders() for path in sorted(folder.glob(f"cu*/bin/{name}"))
    ]


def _package_folders() -> tuple[Path, ...]:
    """List where NVIDIA's Python packages are installed."""
    package = importlib.util.find_spec("nvidia")
    if package is None:
        return ()
    return tuple(Path(folder) for folder in package.submodule_search_locations or ())


def compile_cubin(source: str, arch: Arch) -> tuple[bytes, tuple[KernelUse, ...]]:
    """Compile CUDA C to machine code of one architecture; needs no GPU.

    Returns
    -------
    cubin : bytes
    uses : tuple of KernelUse
        One a kernel.

    Raises
    ------
    CompileError
        There is no nvcc, or it failed; the message has its first lines.
    """
    return _compile(source, [f"-arch={arch.name}", "-cubin"], arch.name)


def compile_fatbin(source: str, code: Sequence[str]) -> tuple[bytes, tuple[KernelUse, ...]]:
    """Compile CUDA C to a container of several codes; needs no GPU.

    Parameters
    ----------
    source : str
    code : sequence of str
        ``sm_80`` (machine code) or ``compute_80`` (PTX, which a driver translates).

    Returns
    -------
    fatbin : bytes
    uses : tuple of KernelUse
        One a kernel and machine code.

    Raises
    ------
    CompileError
        As `compile_cubin`.
    """
    wanted = []
    for name in code:
        number = name.rpartition("_")[2]
        wanted.append(f"-gencode=arch=compute_{number},code={name}")
    return _compile(source, [*wanted, "-fatbin"], ", ".join(code))


def _compile(source: str, options: Sequence[str], what: str) -> tuple[bytes, tuple[KernelUse, ...]]:
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory(prefix="gqsa-cuda-") as folder:
        path, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.out"
        path.write_text(_one_shared_array(source), encoding="utf-8")
        command = [str(nvcc), *options, "-O3", "-Xptxas", "-v", "-diag-suppress=177,1046"]
        done = subprocess.run(
            [*command, "-o", str(made), str(path)], capture_output=True, text=True
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            said = "; ".join([line for line in lines if "error" in line][:3] or lines[:3])
            raise CompileError(f"{nvcc} could not compile a kernel for {what}: {said}")
        return made.read_bytes(), parse_uses(done.stderr)


def _one_shared_array(source: str) -> str:
    """Give dynamic shared memory one name and type, as C++ wants it in all kernels of a file.

    TVM declares it in each kernel anew, with a type of that kernel and a name that others have too.
    It begins at a multiple of 128 bytes, the largest piece of a row's activations.
    """
    array = r"extern __shared__ __align__(128) unsigned char gqsa_shared[];"
    return _SHARED.sub(array + r" \1* \2 = reinterpret_cast<\1*>(gqsa_shared);", source)


def parse_uses(text: str) -> tuple[KernelUse, ...]:
    """Read what ``ptxas -v`` prints."""
    uses = []
    pieces = _ENTRY.split(text)
    for name, said in zip(pieces[1::2], pieces[2::2], strict=True):
        spills, used = _SPILLS.search(said), _USED.search(said)
        if spills is None or used is None:
            raise CompileError(f"ptxas says of kernel {name} what cannot be read: {said.strip()}")
        stack, stored, loaded = (int(number) for number in spills.groups())
        uses.append(KernelUse(name, int(used.group(1)), stack, stored + loaded))
    return tuple(uses)
