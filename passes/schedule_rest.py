"""Phase 4: schedule what no kernel of ours covers, and refuse what nothing scheduled."""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import Schedule, tirx, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.emit import SCHEDULED
from gqsa_compiler.targets import TargetSpec

_LANES = 16
_THREADS = 256


@tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
class ScheduleRest:
    """Schedule element-wise PrimFuncs (casts, gathers, splits, scalings).

    On a CPU they move a few kilobytes a token, so they are vectorised and run on the calling
    thread: handing them to the thread pool costs more than they take. On a GPU every element has a
    thread. Anything with a reduction is left alone here, and `CheckScheduled` then names it.
    """

    def __init__(self, target: TargetSpec) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule every PrimFunc that is not scheduled yet."""
        functions = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and not _is_scheduled(func):
                scheduled = _elementwise(func, self.target.kind == "cuda")
                if scheduled is not None:
                    functions[gvar] = scheduled
        out = mod.clone()
        for gvar, func in functions.items():
            out.update_func(gvar, func)
        return out


@tvm.transform.module_pass(opt_level=0, name="CheckScheduled")
class CheckScheduled:
    """Fail when a PrimFunc reached code generation without a schedule."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module as it is, or raise `CompileError`."""
        names = sorted(
            str(gvar.name_hint)
            for gvar, func in mod.functions_items()
            if isinstance(func, tirx.PrimFunc) and not _is_scheduled(func)
        )
        if names:
            raise CompileError(
                f"No schedule covers {', '.join(names[:5])}"
                f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}: "
                "the model uses an operation that has no kernel for this target."
            )
        return mod


def _is_scheduled(func: tirx.PrimFunc) -> bool:
    return bool(func.attrs) and SCHEDULED in func.attrs and bool(func.attrs[SCHEDULED])


def _elementwise(func: tirx.PrimFunc, on_gpu: bool) -> tirx.PrimFunc | None:
    """Inline producers and share out the last block; None when a block reduces."""
    sch = Schedule(func)
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    for block in blocks:
        kinds = {int(iter_var.iter_type) for iter_var in sch.get(block).iter_vars}
        if kinds - {int(tirx.IterVar.DataPar)}:
            return None
    for block in blocks[:-1]:
        sch.compute_inline(block)
    if on_gpu:
        _bind_threads(sch, blocks[-1])
        return sch.mod["main"].with_attr(SCHEDULED, True)
    loops = sch.get_loops(blocks[-1])
    if loops:
        extent = sch.get(loops[-1]).extent
        if isinstance(extent, tirx.IntImm) and int(extent) % _LANES == 0:
            _, lanes = sch.split(loops[-1], [None, _LANES])
            sch.vectorize(lanes)
    return sch.mod["main"].with_attr(SCHEDULED, True)


def _bind_threads(sch: Schedule, block: Any) -> None:
    """Give every element of a block a thread."""
    loops = sch.get_loops(block)
    if not loops:
        loops = [sch.add_unit_loop(block)]
    outer, inner = sch.split(sch.fuse(*loops), [None, _THREADS])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")
