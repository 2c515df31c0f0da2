"""Checks that this machine can run an artefact, then loads TVM's runtime and the compiled code.

TVM's Python package is never imported: it needs the compiler's 260 MB library. Two small shared
libraries are enough, from the artefact's own ``lib`` directory (a bundle) or from the installed
apache-tvm. Every check comes before the first library is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gqsa_compiler.runtime.cpus import host_arch, host_flags
from gqsa_compiler.runtime.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.gpus import CUDA, check_gpu, open_driver
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.schema import Target, Variant

RUNTIME_LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so")
"""TVM's runtime, in loading order."""
CUDA_LIBRARY = "libtvm_runtime_cuda.so"
"""What is loaded after these for a GPU; it needs `CUDA_RUNTIME` and the driver."""
CUDA_RUNTIME = "libcudart.so.13"
BUNDLE = "lib"
"""The artefact's folder that has them, if it brings its own."""
SUMS = "SHA256SUMS"
"""In that folder: the libraries' hashes, as sha256sum writes them."""
PROGRAM = "gqsa-run"
"""What a variant's library is called where the code is linked into the native program."""
_CPU = 1
_CPUINFO = Path("/proc/cpuinfo")
# A function that only the second runtime library registers: its presence means both are loaded.
_WITNESS = "vm.builtin.kv_state_add_sequence"
# Registered where the runtime itself is, when we load it: it cannot tell its version.
_VERSION = "gqsa.tvm_runtime_version"


def check(directory: Path, manifest: Manifest, variant: Variant) -> list[Path]:
    """Check everything but the machine and the parameters; load nothing.

    Parameters
    ----------
    directory : Path
        The artefact.
    manifest : Manifest
    variant : Variant
        From `choose`; no other variant's library is looked at.

    Returns
    -------
    list of Path
        TVM's runtime libraries, in loading order.

    Raises
    ------
    ArtefactError
        Other versions, a missing file, or a library whose hash is wrong.

    """
    path = directory / variant.library.file
    if variant.library.file == PROGRAM:
        raise ArtefactError(f"The model's code is in a program of its own: run {path}.")
    more = [CUDA_LIBRARY] if variant.target.device_type == CUDA else []
    libraries = find_runtime(directory, manifest, more)
    check_code(path, variant)
    return libraries


def check_code(path: Path, variant: Variant) -> None:
    """Compare a variant's library with the manifest's hash of it.

    Raises
    ------
    ArtefactError
        It is missing or another.

    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        raise ArtefactError(f"The artefact is incomplete: there is no {path}.") from None
    if digest != variant.library.sha256:
        raise ArtefactError(
            f"{path} is damaged: its SHA-256 is not the manifest's. "
            "Copy or compile the artefact again."
        )


def choose(manifest: Manifest, name: str | None = None, cpuinfo: Path = _CPUINFO) -> Variant:
    """Choose the code to run: the first variant, the most capable, that this machine can run.

    Parameters
    ----------
    manifest : Manifest
    name : str, optional
        A variant's target name, to have no other.
    cpuinfo : Path

    Raises
    ------
    ArtefactError
        This machine can run none, or not the one that is asked for.
    UsageError
        There is no variant of that name.

    """
    variants = manifest.variants
    if name is not None:
        variants = tuple(variant for variant in variants if variant.target.name == name)
        if not variants:
            raise UsageError(
                f"The artefact has no code for {name!r}; choose one of "
                f"{', '.join(variant.target.name for variant in manifest.variants)}."
            )
    elif not host_flags(cpuinfo):
        variants = variants[::-1]  # a system that does not tell: what asks for least
    for variant in variants[:-1]:
        if fits(variant.target, cpuinfo):
            return variant
    check_target(variants[-1].target, cpuinfo)
    return variants[-1]


def fits(target: Target, cpuinfo: Path = _CPUINFO) -> bool:
    """Tell whether this machine can run a variant."""
    try:
        check_target(target, cpuinfo)
    except ArtefactError:
        return False
    return True


def check_target(target: Target, cpuinfo: Path = _CPUINFO) -> None:
    """Refuse code for another architecture, or for features this CPU or GPU lacks."""
    if target.device_type not in (_CPU, CUDA):
        raise ArtefactError(
            f"This artefact was compiled for {target.name} ({target.kind}), which this release's "
            "runtime cannot drive; compile it again with --target cpu."
        )
    machine, on_gpu = host_arch(), target.device_type == CUDA
    arch = target.triple.partition("-")[0] if on_gpu else target.arch
    if machine != arch:
        raise ArtefactError(
            f"This artefact was compiled for {target.name} ({arch}) and this machine is "
            f"{machine}; compile it again here with --target cpu."
        )
    if on_gpu:
        check_gpu(target.name, target.flags, open_driver())
        return
    have = host_flags(cpuinfo)
    if not have:
        return  # a system that does not tell: nothing to compare with
    missing = [flag for flag in target.flags if flag not in have]
    if missing:
        raise ArtefactError(
            f"This artefact was compiled for {target.name} ({target.arch}) and this machine lacks "
            f"{', '.join(missing)}; compile it again with --target cpu, or with an older level."
        )


def find_runtime(directory: Path, manifest: Manifest, more: Sequence[str] = ()) -> list[Path]:
    """Find TVM's runtime libraries: the bundle's, else those of the installed apache-tvm.

    Parameters
    ----------
    directory : Path
        The artefact.
    manifest : Manifest
    more : sequence of str
        Names of others that are needed from the same place.

    Raises
    ------
    ArtefactError
        There are none, their version is not the one the artefact was compiled with, or a bundle's
        hash is wrong.

    """
    check_ffi(manifest.versions.tvm_ffi)
    bundle = directory / BUNDLE
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
    paths = [folder / name for name in (*RUNTIME_LIBRARIES, *more)]
    for path in paths:
        if not path.is_file():
            raise ArtefactError(f"TVM's runtime is incomplete: there is no {path}.")
    if folder == bundle and (bundle / SUMS).is_file():  # a release before this one wrote none
        _check_bundle(bundle / SUMS, paths)
    return paths


def _check_bundle(file: Path, libraries: Sequence[Path]) -> None:
    """Compare a bundle's libraries with the hashes that it was made with."""
    words = file.read_text(encoding="utf-8", errors="replace").split()
    sums = dict(zip(words[1::2], words[::2], strict=False))
    for path in libraries:
        if sums.get(path.name) != hashlib.sha256(path.read_bytes()).hexdigest():
            raise ArtefactError(
                f"{path} is damaged: its SHA-256 is not that in {file.name}; copy the artefact "
                "again."
            )


def check_ffi(wanted: str) -> None:
    """Require the artefact's release of apache-tvm-ffi or a later one of the same 0.x series."""
    installed = _installed("apache-tvm-ffi")
    have, want = _release(installed), _release(wanted)
    if have[:2] != want[:2] or have < want:
        raise ArtefactError(
            f"The artefact was compiled with apache-tvm-ffi {wanted} and {installed} is "
            f"installed; install apache-tvm-ffi=={wanted} or compile again."
        )


def load_executable(libraries: list[Path], library: Path, tvm_version: str) -> Any:
    """Load TVM's runtime, once a process, and the compiled module.

    Parameters
    ----------
    libraries : list of Path
        From `check`. Not used where a TVM runtime is in the process already, another artefact's
        or that of ``import tvm``: there can be only one.
    library : Path
        The compiled code.
    tvm_version : str
        The release of TVM that compiled it.

    Returns
    -------
    tvm_ffi.Module

    Raises
    ------
    ArtefactError
        A library cannot be loaded, or the runtime in the process is another release's.

    """
    from gqsa_compiler.runtime._ffi import tvm_ffi

    if tvm_ffi.get_global_func(_WITNESS, allow_missing=True) is not None:
        _check_loaded(tvm_ffi.get_global_func(_VERSION, allow_missing=True), tvm_version)
    else:
        for path in libraries:
            if path.name in RUNTIME_LIBRARIES:
                _load(path)
        tvm_ffi.register_global_func(_VERSION, lambda: tvm_version)
    for path in libraries:
        if path.name == CUDA_LIBRARY:
            _load_cuda_runtime()
            _load(path)
    spelt = _spelling(library)
    try:
        return tvm_ffi.load_module(spelt)
    except Exception as error:
        reason = str(error).replace(spelt, library.name)
        raise ArtefactError(f"{library} cannot be loaded: {reason}.") from None


def _spelling(library: Path) -> str:
    """Spell a file's path in a way that no other file has had at the same place.

    The system's loader knows libraries by their names: asked for an artefact that was compiled
    again under its old name it would give the code from before, to run with the new weights.
    """
    found = library.stat()
    mark = zlib.crc32(f"{found.st_dev} {found.st_ino} {found.st_mtime_ns}".encode())
    steps = "".join("/." if mark >> bit & 1 else "//" for bit in range(32))
    return f"{library.absolute().parent}{steps}/{library.name}"


def _load(path: Path) -> None:
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtefactError(f"TVM's runtime cannot be loaded: {error}.") from None


def _load_cuda_runtime() -> None:
    """Load CUDA's own runtime: the system's, else that of the package ``nvidia-cuda-runtime``."""
    places = [CUDA_RUNTIME]
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or ()) if package else ():
        places += [str(path) for path in sorted(Path(folder).glob(f"cu*/lib/{CUDA_RUNTIME}"))]
    for place in places:
        try:
            ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise ArtefactError(
        f"CUDA's runtime {CUDA_RUNTIME} is not here; install it (pip install nvidia-cuda-runtime)."
    )


def _check_loaded(ours: Callable[[], str] | None, wanted: str) -> None:
    """Require that the TVM runtime in this process, ours or ``import tvm``'s, is `wanted`."""
    loaded = (
        ours() if ours else getattr(sys.modules.get("tvm"), "__version__", "of unknown version")
    )
    if _release(loaded) != _release(wanted):
        raise ArtefactError(
            f"The artefact was compiled with apache-tvm {wanted} and this process has loaded the "
            f"TVM runtime {loaded} already; run the artefact in a process of its own."
        )


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise ArtefactError(f"{package} is not installed; install it with pip.") from None


def _release(text: str) -> tuple[int, ...]:
    """Return the first three numbers of a version: post releases are the same code."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()
