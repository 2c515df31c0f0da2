"""The native runtime's programs: where they lie, and building them from the C++ sources.

`runtime/native` is part of the installed package. What is built of it goes into a folder of the
user's, since the package's own may not be writable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from gqsa_compiler import runtime
from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.toolchain import ANDROID, LINKED

PROGRAM = "gqsa-run"
"""The program's name in a build and in a bundle."""
KINDS = ("x86_64", "aarch64", ANDROID)
"""What there are builds for: Linux with glibc, and a static build for phones."""
_STANDARD_ERROR = 2


def source_folder() -> Path:
    """Return the folder of the C++ sources and their scripts."""
    return Path(runtime.__file__).parent / "native"


def native_folder(kind: str) -> Path:
    """Return where the build for an architecture lies, or would lie.

    Parameters
    ----------
    kind : str
        One of `KINDS`.

    Returns
    -------
    Path
        ``$GQSA_NATIVE/<kind>``; without that variable a folder of this release, and of the
        apache-tvm that is installed, in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``). It
        holds ``gqsa-run``; for another architecture than this machine's also ``lib``, TVM's
        runtime libraries; for `ANDROID` ``linked``, what a program is linked from.
    """
    chosen = os.environ.get("GQSA_NATIVE")
    if chosen:
        return Path(chosen) / kind
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    release = f"{version('gqsa-compiler')}-tvm{version('apache-tvm')}"
    return Path(cache) / "gqsa" / "native" / release / kind


def is_built(kind: str) -> bool:
    """Tell whether there is a build for an architecture."""
    folder = native_folder(kind)
    return (folder / (LINKED if kind == ANDROID else PROGRAM)).exists()


def build(kind: str) -> Path:
    """Build for an architecture, with messages on standard error, and return the folder.

    Raises
    ------
    UsageError
        There is no such build.
    CompileError
        It failed; what the tools said stands on standard error.
    """
    if kind not in KINDS:
        raise UsageError(f"There is no native build for {kind}; choose one of {', '.join(KINDS)}.")
    script = source_folder() / "build.sh"
    for tool in ("sh", "cmake"):
        if shutil.which(tool) is None:
            raise CompileError(
                f"Building gqsa-run needs {tool}, which is not on the PATH; install it (Debian: "
                f"apt-get install {tool}; cmake also with pip)."
            )
    folder = native_folder(kind)
    done = subprocess.run(
        ["sh", str(script), kind, sys.executable, str(folder)], stdout=_STANDARD_ERROR, check=False
    )
    if done.returncode:
        raise CompileError(
            f"Building gqsa-run for {kind} failed (see above); docs/mobile.md says what it needs."
        )
    return folder
