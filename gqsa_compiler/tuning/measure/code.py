"""A candidate's code: from a rule's TIR to a library with the function ``main``."""

from __future__ import annotations

import resource
import signal
import tempfile
from pathlib import Path
from typing import Any

from gqsa_compiler._child import run_in_child
from gqsa_compiler._tvm import Target, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.schedules.cuda.library import export_kernel
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.toolchain import library_linker

_ROOM = 4 << 30  # of address space, for making code


class BuildError(CompileError):
    """A candidate's code could not be made."""


def make_code(
    rule: ScheduleRule[Any],
    spec: LinearSpec,
    config: KernelConfig,
    target: TargetSpec,
    path: Path,
    seconds: int,
) -> None:
    """Build a kernel's library in a process of its own.

    Parameters
    ----------
    rule : ScheduleRule
    spec : LinearSpec
    config : KernelConfig
    target : TargetSpec
    path : Path
        Of the library; object files go beside it.
    seconds : int
        That it may take.

    Raises
    ------
    BuildError
        The rule, TVM, LLVM, nvcc or the linker failed, or took too long or too much memory.
    """

    def generate() -> None:
        # In the child: whatever hangs is ended by the alarm, whatever grows by the limit.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        limit = _address_space() + _ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        linker = library_linker(target)

        def link(output: str, objects: list[str], **_options: Any) -> None:
            linker(Path(output), objects)

        function = rule.build(spec, config, target)
        described = Target(target.tvm_dict())
        with tempfile.TemporaryDirectory(dir=path.parent) as objects:
            if target.kind == "cuda":
                code = target.required_flags
                export_kernel(function, described, code, path, link, Path(objects))
                return
            module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
            made = tvm.compile(module, described, tir_pipeline=cpu_code.register())
            made.export_library(str(path), fcompile=link, workspace_dir=objects)

    try:
        run_in_child(generate, "Code generation")
    except CompileError as error:
        text = str(error)
        if f"signal {int(signal.SIGALRM)})" in text:
            text = f"Making the code took more than {seconds} s."
        raise BuildError(text) from error


def _address_space() -> int:
    """Return the bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
