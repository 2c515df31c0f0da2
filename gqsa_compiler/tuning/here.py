"""Whether this machine can run, and so measure, a target's code."""

from __future__ import annotations

from gqsa_compiler.errors import ArtefactError, UsageError
from gqsa_compiler.runtime.cpus import host_arch, host_flags
from gqsa_compiler.runtime.gpus import open_driver, runs
from gqsa_compiler.schedules.cuda.nvcc import find_nvcc
from gqsa_compiler.targets import TargetSpec


def check_runs_here(target: TargetSpec) -> None:
    """Check that this machine can run a target's code.

    Raises
    ------
    UsageError
        It cannot.
    CompileError
        The target is a GPU, and there is no nvcc.
    """
    if target.kind == "cuda":
        _check_gpu(target)
        find_nvcc()
        return
    missing = [flag for flag in target.required_flags if flag not in host_flags()]
    if target.arch != host_arch() or missing:
        lacks = f" (it lacks {', '.join(missing)})" if missing else ""
        raise UsageError(
            f"This machine cannot run code for {target.name}{lacks}; carry a bundle to one that "
            "can: gqsa tune export."
        )


def _check_gpu(target: TargetSpec) -> None:
    """Check that this machine has a GPU which runs a target's code."""
    carry = f"carry a bundle to one that can: gqsa tune export MODEL --target {target.name} -o DIR."
    try:
        driver = open_driver()
    except ArtefactError as error:
        raise UsageError(f"This machine has no GPU to measure on; {carry}") from error
    if not any(runs(code, driver.capability(0)) for code in target.required_flags):
        raise UsageError(
            f"The GPU here, {driver.name(0)}, cannot run code for {target.name}; tune with "
            f"--target cuda, or {carry}"
        )
