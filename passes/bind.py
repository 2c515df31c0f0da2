"""Phase 1: tell the module how each parameter is stored."""

from __future__ import annotations

from collections.abc import Sequence

from gqsa_compiler._tvm import PyExprMutator, mutator, relax, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes import records as records_
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.passes.rewriter import is_call, key

COMPUTE_DTYPE = "float32"


@tvm.transform.module_pass(opt_level=0, name="BindRecords")
class BindRecords:
    """Attach a `ParamRecord` to each parameter and give dense ones their storage dtype.

    A dense parameter stored as float16 or bfloat16 gets that type; its uses read
    ``astype(p, float32)``. A gather of rows (an embedding) converts after the gather, so that
    the table is never converted whole.

    Parameters
    ----------
    records : sequence of ParamRecord
        In the order of the functions' parameters after their `num_input` inputs.
    """

    def __init__(self, records: Sequence[ParamRecord]) -> None:
        self.records = tuple(records)

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function."""
        out = mod
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                rewriter = _Bind(out)
                bound = rewriter.bind(func, self.records, str(gvar.name_hint))
                rewriter.builder_.update_func(gvar, bound)
                out = rewriter.builder_.get()
        if mod.attrs is not None:
            out = out.with_attrs(mod.attrs)
        return records_.attach(out, self.records)


@mutator
class _Bind(PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self.stored: dict[int, relax.Var] = {}

    def bind(
        self, func: relax.Function, records: tuple[ParamRecord, ...], name: str
    ) -> relax.Function:
        num_input = int(func.attrs["num_input"])
        inputs, params = list(func.params)[:num_input], list(func.params)[num_input:]
        if len(params) != len(records):
            raise CompileError(
                f"Function {name!r} has {len(params)} parameters, but {len(records)} are known; "
                "the frontend must list every parameter of every function."
            )
        new_params = []
        for var, record in zip(params, records, strict=True):
            shape = tuple(int(dim) for dim in var.ty.shape)
            if shape != tuple(record.shape):
                raise CompileError(
                    f"Parameter {record.name!r} has shape {list(record.shape)} in the checkpoint, "
                    f"but the model needs {list(shape)}."
                )
            if record.storage == "dense" and record.dtype != str(var.ty.dtype):
                stored = relax.Var(str(var.name), relax.TensorType(var.ty.shape, record.dtype))
                self.stored[key(var)] = stored
                new_params.append(stored)
            else:
                new_params.append(var)
        if not self.stored:
            return func
        body = self.visit_with_new_scope(func.body)
        return relax.Function([*inputs, *new_params], body, func.ret_ty, func.is_pure, func.attrs)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if is_call(call, "relax.take") and key(call.args[0]) in self.stored:
            table = self.stored[key(call.args[0])]
            rows = relax.op.take(
                table, self.visit_expr(call.args[1]), axis=call.attrs.axis, mode=call.attrs.mode
            )
            return relax.op.astype(self.builder_.emit(rows), COMPUTE_DTYPE)
        return super().visit_call_(call)

    def visit_var_(self, var: relax.Var) -> relax.Expr:
        stored = self.stored.get(key(var))
        if stored is None:
            return super().visit_var_(var)
        return self.builder_.emit(relax.op.astype(stored, COMPUTE_DTYPE))
