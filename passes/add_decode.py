"""Phase 1: a function for decoding, one token of each sequence, on a GPU."""

from __future__ import annotations

from gqsa_compiler._tvm import PyExprMutator, mutator, relax, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes.memory import UPPER_BOUND
from gqsa_compiler.passes.rewriter import Expr, is_call, key

FORWARD, DECODE = "forward", "decode"


@tvm.transform.module_pass(opt_level=0, name="AddDecode")
class AddDecode:
    """Add `decode`: `forward` of as many rows as tokens, so that none need be chosen.

    Its memory is planned for `max_batch` tokens and belongs to it alone, since what is captured of
    it (`CaptureDecode`) must find everything where it was.

    Parameters
    ----------
    max_batch : int
        Sequences at once.
    """

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Copy `forward` and leave its argument `rows` out."""
        forward = relax.utils.copy_with_new_vars(mod[FORWARD])
        inputs = int(forward.attrs["num_input"])
        tokens, rows = list(forward.params)[:2]
        names = [str(param.name) for param in list(forward.params)[:inputs]]
        if names[:2] != ["tokens", "rows"]:
            raise CompileError(f"{FORWARD} takes {', '.join(names)}, not first tokens and rows.")
        forward = forward.bind_symbolic_vars({"m": tokens.ty.shape[0]})
        rows = next(param for param in forward.params if str(param.name) == "rows")
        rewriter = _AllRows(mod, rows)
        decode = rewriter.rewrite(forward)
        decode = decode.with_attr("num_input", inputs - 1)
        decode = decode.with_attr(UPPER_BOUND, {"n": self.max_batch})
        decode = decode.with_attr("tir_non_negative_var", ["n"])
        decode = decode.with_attr("global_symbol", DECODE)
        out = mod.clone()
        out[DECODE] = decode
        return out


@mutator
class _AllRows(PyExprMutator):
    """Replace the choice of rows by all of them."""

    def __init__(self, mod: tvm.IRModule, rows: relax.Var) -> None:
        super().__init__(mod)
        self.rows = rows
        self.found = 0

    def rewrite(self, func: relax.Function) -> relax.Function:
        params = [param for param in func.params if not param.same_as(self.rows)]
        body = self.visit_with_new_scope(func.body)
        if self.found != 1:
            raise CompileError(f"{FORWARD} chooses rows {self.found} times, not once.")
        return relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)

    def visit_call_(self, call: relax.Call) -> Expr:
        if is_call(call, "relax.take") and key(call.args[1]) == key(self.rows):
            self.found += 1
            return self.visit_expr(call.args[0])
        return super().visit_call_(call)


__all__ = ["DECODE", "FORWARD", "AddDecode"]
