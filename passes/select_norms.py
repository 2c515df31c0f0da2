"""Phase 3: norms that stay on their own get a scheduled kernel."""

from __future__ import annotations

from gqsa_compiler._tvm import PyExprMutator, mutator, relax, tvm
from gqsa_compiler.passes.rewriter import Expr, is_call
from gqsa_compiler.schedules.cuda import norm as cuda
from gqsa_compiler.schedules.generic import norm as generic
from gqsa_compiler.targets import TargetSpec


@tvm.transform.module_pass(opt_level=0, name="SelectNorms")
class SelectNorms:
    """Replace ``rms_norm`` and ``layer_norm`` over the last axis of [m, K] by our kernel."""

    def __init__(self, target: TargetSpec) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function."""
        out = mod
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                rewriter = _Norms(out, self.target)
                rewriter.builder_.update_func(gvar, rewriter.visit_expr(func))
                out = rewriter.builder_.get()
        return out if mod.attrs is None else out.with_attrs(mod.attrs)


@mutator
class _Norms(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, target: TargetSpec) -> None:
        super().__init__(mod)
        self.build = cuda.norm if target.kind == "cuda" else generic.norm

    def visit_call_(self, call: relax.Call) -> Expr:
        center = is_call(call, "relax.nn.layer_norm")
        if not (center or is_call(call, "relax.nn.rms_norm")) or not _rows(call, center):
            return super().visit_call_(call)
        features = int(call.args[0].ty.shape[1])
        kernel = self.build(features, float(call.attrs.epsilon), center=center)
        name = f"{'layer' if center else 'rms'}_norm_{features}"
        gvar = self.builder_.add_func(kernel, name)
        args = [self.visit_expr(arg) for arg in call.args]
        return relax.call_tir(gvar, args, out_ty=call.ty)


def _rows(call: relax.Call, center: bool) -> bool:
    """Whether the call normalises the rows of a float32 matrix, with scale and shift."""
    axes = [int(axis) for axis in call.attrs.axes]
    x = call.args[0].ty
    if len(x.shape) != 2 or str(x.dtype) != "float32" or axes not in ([-1], [1]):
        return False
    return not center or (bool(call.attrs.center) and bool(call.attrs.scale))
