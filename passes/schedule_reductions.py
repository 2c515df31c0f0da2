"""Phase 4: schedule the reductions of general modules: attention, softmax, means, convolutions.

Decoders have kernels for all of theirs, so their pipeline leaves this out, and an operation without
a kernel is an error there. A module that somebody else wrote may have anything, most of it small
beside its linear layers.
"""

from __future__ import annotations

from typing import Any

from gqsa_compiler._tvm import Schedule, ScheduleError, tirx, tvm
from gqsa_compiler.schedules.generic.emit import SCHEDULED

_LANES = (16, 8, 4)
_LITTLE = 1 << 12
"""Steps in all, with `_TYPICAL` for each loop of varying length, below which no thread is woken."""
_TYPICAL = 64
_HEADS = 4
"""Steps of a loop that are worth sharing out."""


@tvm.transform.module_pass(opt_level=0, name="ScheduleReductions")
class ScheduleReductions:
    """Give PrimFuncs with a reduction loops in an order that a CPU's vector units can use."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Schedule every PrimFunc that is not scheduled yet and reduces something."""
        out = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and not (func.attrs and SCHEDULED in func.attrs):
                scheduled = _schedule(func)
                if scheduled is not None:
                    out.update_func(gvar, scheduled)
        return out


def _schedule(func: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """Schedule a function; None if nothing in it reduces."""
    sch = Schedule(func)
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    if not any(_reduces(sch, block) for block in blocks):
        return None
    kept = []
    for block in blocks:
        if _reduces(sch, block) or not _inlined(sch, block):
            kept.append(block)
    for block in kept:
        _share(sch, block)
    return sch.mod["main"].with_attr(SCHEDULED, True)


def _reduces(sch: Schedule, block: Any) -> bool:
    return any(kind != int(tirx.IterVar.DataPar) for kind in _kinds(sch, block))


def _kinds(sch: Schedule, block: Any) -> list[int]:
    return [int(iter_var.iter_type) for iter_var in sch.get(block).iter_vars]


def _inlined(sch: Schedule, block: Any) -> bool:
    """Compute a value where it is read, if it is no output and is read as it is written."""
    if not sch.get_consumers(block):
        return False
    try:
        sch.compute_inline(block)
    except ScheduleError:
        return False
    return True


def _share(sch: Schedule, block: Any) -> None:
    """Order a block's loops: threads, reduction, lanes."""
    loops, kinds = sch.get_loops(block), _kinds(sch, block)
    if len(loops) != len(kinds) or not loops:
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != 0]
    if not spatial:
        return
    last = spatial.pop()
    lanes = _vector(sch, last)
    inner = last
    if lanes:
        last, inner = sch.split(last, [None, lanes])
        spatial.append(last)
    sch.reorder(*spatial, *reduced, inner)
    if lanes:
        sch.vectorize(inner)
    outer = spatial[:-1] if lanes and len(spatial) > 1 else spatial
    if outer and _work(sch, [*spatial, *reduced, inner]) >= _LITTLE:
        sch.parallel(_shared(sch, outer))
    if reduced:  # last: a block without its initial value takes no other primitive
        initial = sch.decompose_reduction(block, reduced[0])
        if lanes:
            sch.vectorize(sch.get_loops(initial)[-1])


def _shared(sch: Schedule, loops: list[Any]) -> Any:
    """Choose the loop that threads share: the first, or the second where the first may be short.

    Loops of varying length cannot be joined: their indices would no longer be affine.
    """
    if len(loops) > 1:
        first, second = (sch.get(loop).extent for loop in loops[:2])
        long = isinstance(second, tirx.IntImm) and int(second) >= _HEADS
        if long and not (isinstance(first, tirx.IntImm) and int(first) >= _HEADS):
            return loops[1]
    return loops[0]


def _vector(sch: Schedule, loop: Any) -> int:
    """Return the lanes that divide a loop; 0 if its length varies or is odd."""
    extent = sch.get(loop).extent
    if not isinstance(extent, tirx.IntImm):
        return 0
    return next((lanes for lanes in _LANES if int(extent) % lanes == 0), 0)


def _work(sch: Schedule, loops: list[Any]) -> int:
    """Count the steps of loops; one of varying length counts as `_TYPICAL`."""
    total = 1
    for loop in loops:
        extent = sch.get(loop).extent
        total *= int(extent) if isinstance(extent, tirx.IntImm) else _TYPICAL
    return total
