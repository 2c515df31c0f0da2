"""The linkers: which one makes a target's library or program, found before any work."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from gqsa_compiler.errors import CompileError
from gqsa_compiler.targets import TargetSpec, host_arch

ANDROID = "android-arm64"
"""The build of the native runtime that programs for phones are linked with."""
LINKED = "linked"
"""The folder of its archives."""
_NDK_API = 28  # Android 9: the first that every 64-bit phone with dot products has had
_NDK_TOOL = f"toolchains/llvm/prebuilt/linux-x86_64/bin/aarch64-linux-android{_NDK_API}-clang++"
_GLIBC = "2.28"  # what TVM's own aarch64 libraries need at least
_STACK_BYTES = 8 << 20  # of each thread; musl's own default is too small for compiled kernels


@dataclass(frozen=True)
class Linker:
    """A command that links C++ and TVM's objects.

    Parameters
    ----------
    command : tuple of str
        The program and its first arguments.
    """

    command: tuple[str, ...]

    def __call__(self, output: Path, arguments: Sequence[str]) -> None:
        """Link.

        Raises
        ------
        CompileError
            The linker failed; with what it said.
        """
        command = [*self.command, *arguments, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.splitlines()
            errors = [line for line in lines if "error" in line] or lines[-3:]
            said = " ".join(" ".join(errors).split())[:500]
            raise CompileError(f"{self.command[0]} could not link {output.name}: {said}")


def library_linker(target: TargetSpec) -> Linker:
    """Find what links shared libraries for a target.

    Raises
    ------
    CompileError
        There is nothing; with the packages that have it.
    """
    arch = target.machine
    if arch == host_arch():
        names, package = ["g++", "c++", "clang++"], "g++"
    else:
        names, package = [f"{arch}-linux-gnu-g++"], f"g++-{arch.replace('_', '-')}-linux-gnu"
    for name in names:
        if shutil.which(name):
            return Linker((name, "-shared", "-fPIC"))
    zig = find_zig()
    if zig is not None:
        triple = f"{arch}-linux-gnu.{_GLIBC}"
        return Linker((zig, "c++", "-target", triple, "-shared", "-fPIC"))
    raise CompileError(
        f"Linking for {target.name} needs {names[0]} or zig, and neither is on the PATH; install "
        f"one (Debian: apt-get install {package}; or pip install ziglang)."
    )


def program_linker(target: TargetSpec) -> Linker:
    """Find what links whole programs for phones: the NDK in ``$ANDROID_NDK``, else zig.

    Raises
    ------
    CompileError
        There is neither, or `ANDROID_NDK` is no NDK.
    """
    common = ("-Wl,--gc-sections", "-s")
    ndk = os.environ.get("ANDROID_NDK")
    if ndk:
        tool = Path(ndk) / _NDK_TOOL
        if not tool.is_file():
            raise CompileError(
                f"ANDROID_NDK is {ndk}, which has no {_NDK_TOOL}; name the folder of an Android "
                "NDK for Linux, or unset it to link with zig."
            )
        return Linker((str(tool), "-static-libstdc++", "-Wl,-z,max-page-size=16384", *common))
    zig = find_zig()
    if zig is None:
        raise CompileError(
            f"Linking for {target.name} needs zig (pip install ziglang), or an Android NDK whose "
            "folder ANDROID_NDK names."
        )
    stack = f"-Wl,-z,stack-size={_STACK_BYTES}"
    return Linker((zig, "c++", "-target", "aarch64-linux-musl", "-static", stack, *common))


def package_folder(name: str) -> Path:
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


def find_zig() -> str | None:
    """Find zig: on the PATH, else in the Python package ``ziglang``."""
    found = shutil.which("zig")
    if found is not None:
        return found
    spec = util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    program = Path(spec.origin).parent / "zig"
    return str(program) if program.is_file() else None
