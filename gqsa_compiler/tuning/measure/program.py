"""The measuring program and the libraries that it loads."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from importlib import util
from importlib.resources import files
from pathlib import Path

from gqsa_compiler.errors import CompileError
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.toolchain import library_linker, package_folder

SOURCES = ("measure.cpp", "job.h", "device.h", "tvm_api.h")
PROGRAM = "gqsa-measure"
_LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so")
_GPU_LIBRARIES = (*_LIBRARIES, "libtvm_runtime_cuda.so")
CUDA_RUNTIME = "libcudart.so.13"


def libraries_of(target: TargetSpec) -> tuple[str, ...]:
    """Name the libraries of TVM's that code for a target needs."""
    return _GPU_LIBRARIES if target.kind == "cuda" else _LIBRARIES


def build_program(target: TargetSpec, path: Path) -> None:
    """Compile the measuring program for a target.

    Raises
    ------
    CompileError
        There is no compiler for it, or no headers of apache-tvm-ffi.
    """
    command = [w for w in library_linker(target).command if w not in ("-shared", "-fPIC")]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name in SOURCES:
            text = files(__package__).joinpath(name).read_text(encoding="utf-8")
            (Path(folder) / name).write_text(text, encoding="utf-8")
        words = ["-std=c++17", "-O2", f"-I{package_folder('tvm_ffi') / 'include'}"]
        words += [str(Path(folder) / SOURCES[0]), "-o", str(path), "-ldl", "-pthread"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())[-500:]
        raise CompileError(f"{command[0]} could not compile {SOURCES[0]}: {said}")


def host_libraries(folder: Path, target: TargetSpec) -> Path:
    """Make a folder of links to this machine's runtime libraries, and return it.

    Those are TVM's, and for a GPU CUDA's too, if it is found.

    Raises
    ------
    CompileError
        One of TVM's is missing.
    """
    folder.mkdir(parents=True)
    for name in libraries_of(target):
        places = (package_folder(n) / "lib" / name for n in ("tvm_ffi", "tvm"))
        found = [place for place in places if place.is_file()]
        if not found:
            raise CompileError(f"{name} is in neither apache-tvm nor apache-tvm-ffi.")
        (folder / name).symlink_to(found[0])
    runtime = find_cuda_runtime() if target.kind == "cuda" else None
    if runtime is not None:
        (folder / CUDA_RUNTIME).symlink_to(runtime)
    return folder


def find_cuda_runtime() -> Path | None:
    """Find CUDA's runtime library: the package ``nvidia-cuda-runtime``, else the system's."""
    nvidia = util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or ()) if nvidia else ():
        for path in sorted(Path(folder).glob(f"cu*/lib/{CUDA_RUNTIME}")):
            return path
    try:
        ctypes.CDLL(CUDA_RUNTIME)
    except OSError:
        return None
    # The loader does not say where it found it, but the system does.
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if "/libcudart.so.13" in line:
            return Path(line[line.index("/") :])
    return None
