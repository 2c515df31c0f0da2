"""Phase 5: bounds for the static memory plan, and what the plan came to."""

from __future__ import annotations

from collections.abc import Mapping

from gqsa_compiler._tvm import post_order_visit, relax, tirx, tvm
from gqsa_compiler.passes.rewriter import is_call


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
        """Attach `tir_var_upper_bound` to every Relax function."""
        out = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                out.update_func(gvar, func.with_attr("tir_var_upper_bound", self.bounds))
        return out


def workspace_bytes(mod: tvm.IRModule) -> int:
    """Return the largest sum of planned storages of any function of `mod`, in bytes.

    Parameters
    ----------
    mod : IRModule
        After `StaticPlanBlockMemory`.
    """
    largest = 0
    for _, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        total = 0

        def visit(node: relax.Expr) -> None:
            nonlocal total
            if is_call(node, "relax.memory.alloc_storage"):
                size = node.args[0].values[0]
                total += int(size) if isinstance(size, tirx.IntImm) else 0

        post_order_visit(func.body, visit)
        largest = max(largest, total)
    return largest
