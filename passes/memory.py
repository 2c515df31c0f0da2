"""Phase 5: bounds for the static memory plan, and what the plan came to."""

from __future__ import annotations

from collections.abc import Mapping

from gqsa_compiler._tvm import post_order_visit, relax, tirx, tvm
from gqsa_compiler.passes.rewriter import is_call

UPPER_BOUND = "tir_var_upper_bound"
"""The memory planner's attribute: the largest values of symbolic variables, by name."""
STORAGES = "decode_storages"
"""The function that allocates what a captured `decode` keeps for itself."""


@tvm.transform.module_pass(opt_level=0, name="BoundTokens")
class BoundTokens:
    """State the largest value of every symbolic token count, so that memory is planned once.

    Parameters
    ----------
    bounds : mapping
        Symbolic variable's name to its largest value, e.g. ``{"n": prefill_chunk}``.
    """

    def __init__(self, bounds: Mapping[str, int]) -> None:
        self.bounds = dict(bounds)

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Attach `tir_var_upper_bound` to every Relax function that has none of its own."""
        out = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and UPPER_BOUND not in (func.attrs or {}):
                out.update_func(gvar, func.with_attr(UPPER_BOUND, self.bounds))
        return out


def workspace_bytes(mod: tvm.IRModule) -> int:
    """Return the largest sum of planned storages of any function of `mod`, in bytes.

    What a captured function keeps for itself comes on top.

    Parameters
    ----------
    mod : IRModule
        After `StaticPlanBlockMemory`.
    """
    kept, largest = 0, 0
    for gvar, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        if str(gvar.name_hint) == STORAGES:
            kept = _storage_bytes(func)
        else:
            largest = max(largest, _storage_bytes(func))
    return kept + largest


def _storage_bytes(func: relax.Function) -> int:
    total = 0

    def visit(node: relax.Expr) -> None:
        nonlocal total
        if is_call(node, "relax.memory.alloc_storage"):
            size = node.args[0].values[0]
            total += int(size) if isinstance(size, tirx.IntImm) else 0

    post_order_visit(func.body, visit)
    return total
