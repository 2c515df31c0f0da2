"""Checks that this machine can run an artefact, then loads TVM's runtime and the compiled code.

TVM's Python package is never imported: it needs the compiler's 260 MB library. Two small shared
libraries are enough, from the artefact's own ``lib`` directory (a bundle) or from the installed
apache-tvm. Every check comes before the first library is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.manifest import Manifest, Target

RUNTIME_LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so")
_CPU = 1
_SAME_ARCH = {"AMD64": "x86_64", "arm64": "aarch64"}
# A function that only the second runtime library registers: its presence means both are loaded.
_WITNESS = "vm.builtin.kv_state_add_sequence"


def check(directory: Path, manifest: Manifest) -> list[Path]:
    """Check everything but the parameters; load nothing.

    Returns
    -------
    list of Path
        TVM's runtime libraries, in loading order.

    Raises
    ------
    ArtefactError
        Another machine, other versions, a missing file, or a library whose hash is wrong.

    """
    check_target(manifest.target)
    libraries = find_runtime(directory, manifest)
    path = directory / manifest.library.file
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        raise ArtefactError(f"The artefact is incomplete: there is no {path}.") from None
    if digest != manifest.library.sha256:
        raise ArtefactError(
            f"{path} is damaged: its SHA-256 is not the manifest's. "
            "Copy or compile the artefact again."
        )
    return libraries


def check_target(target: Target, cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Refuse an artefact for another architecture, or for features this CPU lacks."""
    if target.device_type != _CPU:
        raise ArtefactError(
            f"This artefact was compiled for {target.name} ({target.kind}), which this release's "
            "runtime cannot drive; compile it again with --target cpu."
        )
    machine = platform.machine()
    machine = _SAME_ARCH.get(machine, machine)
    if machine != target.arch:
        raise ArtefactError(
            f"This artefact was compiled for {target.name} ({target.arch}) and this machine is "
            f"{machine}; compile it again here with --target cpu."
        )
    try:
        text = cpuinfo.read_text()
    except OSError:
        return  # a system that does not tell: nothing to compare with
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(match.group(1).split()) if match else set(target.flags)
    missing = [flag for flag in target.flags if flag not in have]
    if missing:
        raise ArtefactError(
            f"This artefact was compiled for {target.name} ({target.arch}) and this machine lacks "
            f"{', '.join(missing)}; compile it again with --target cpu, or with an older level."
        )


def find_runtime(directory: Path, manifest: Manifest) -> list[Path]:
    """Find TVM's runtime libraries: the bundle's, else those of the installed apache-tvm.

    Raises
    ------
    ArtefactError
        There are none, or their version is not the one the artefact was compiled with.

    """
    check_ffi(manifest.versions.tvm_ffi)
    bundle = directory / "lib"
    if (bundle / RUNTIME_LIBRARIES[0]).is_file():
        folder = bundle
    else:
        wanted = manifest.versions.tvm
        spec = importlib.util.find_spec("tvm")
        if spec is None or spec.origin is None:
            raise ArtefactError(
                f"The artefact brings no TVM runtime and apache-tvm is not installed; install "
                f"apache-tvm=={wanted} or compile with --bundle."
            )
        installed = _installed("apache-tvm")
        if _release(installed) != _release(wanted):
            raise ArtefactError(
                f"The artefact was compiled with apache-tvm {wanted} and {installed} is "
                f"installed; install that version or compile again."
            )
        folder = Path(spec.origin).parent / "lib"
    paths = [folder / name for name in RUNTIME_LIBRARIES]
    for path in paths:
        if not path.is_file():
            raise ArtefactError(f"TVM's runtime is incomplete: there is no {path}.")
    return paths


def check_ffi(wanted: str) -> None:
    """Require the artefact's release of apache-tvm-ffi or a later one of the same 0.x series."""
    installed = _installed("apache-tvm-ffi")
    have, want = _release(installed), _release(wanted)
    if have[:2] != want[:2] or have < want:
        raise ArtefactError(
            f"The artefact was compiled with apache-tvm-ffi {wanted} and {installed} is "
            f"installed; install apache-tvm-ffi=={wanted} or compile again."
        )


def load_executable(libraries: list[Path], library: Path) -> Any:
    """Load TVM's runtime, once a process, and the compiled module: a `tvm_ffi.Module`."""
    from gqsa_compiler.runtime._ffi import tvm_ffi

    if tvm_ffi.get_global_func(_WITNESS, allow_missing=True) is None:
        for path in libraries:
            try:
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise ArtefactError(f"TVM's runtime cannot be loaded: {error}.") from None
    try:
        return tvm_ffi.load_module(str(library))
    except Exception as error:
        raise ArtefactError(f"{library} cannot be loaded: {error}.") from None


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise ArtefactError(f"{package} is not installed; install it with pip.") from None


def _release(text: str) -> tuple[int, ...]:
    """Return the first three numbers of a version: post releases are the same code."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()
