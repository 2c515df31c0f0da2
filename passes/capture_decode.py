"""Phase 5: the launches of a decoded token become one CUDA graph.

TVM's own `RewriteCUDAGraph` takes in what it can prove to stay where it is: no call of a
``vm.builtin``, so neither tensors out of the parameter tuple nor attention over the cache. Here the
runtime promises it (`gqsa_compiler.runtime.graphs` says how), and all of `decode` is captured.
"""

from __future__ import annotations

import math

from gqsa_compiler._tvm import PyExprMutator, mutator, relax, tirx, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes.add_decode import DECODE
from gqsa_compiler.passes.memory import STORAGES, UPPER_BOUND
from gqsa_compiler.passes.rewriter import Expr, is_call

CAPTURED = "decode_captured"
RUN_OR_CAPTURE = "vm.builtin.cuda_graph.run_or_capture"
CACHED_ALLOC = "vm.builtin.cuda_graph.get_cached_alloc"
POSITIONS = "vm.builtin.attention_kv_cache_get_query_positions"
LAYOUT = "layout"
"""`decode`'s second argument, a shape of one number: with the token count, what a graph is for."""


@tvm.transform.module_pass(opt_level=0, name="CaptureDecode")
class CaptureDecode:
    """Split `decode` in three, after `StaticPlanBlockMemory`.

    `decode_storages` allocates its memory, once a virtual machine. `decode_captured` computes:
    all its launches, and nothing else that the GPU would see. `decode` brings the cache's tables
    to the GPU, then has the graph for its token count and `layout` played, or made.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite `decode`, and nothing else."""
        func = mod[DECODE]
        mover = _MoveStorages(mod, relax.utils.copy_with_new_vars(func))
        captured = mover.captured()
        rest = mod.clone()
        del rest[DECODE]
        builder = relax.BlockBuilder(rest)
        pure = {"relax.force_pure": True}  # these allocate: that is an effect
        with builder.function(STORAGES, [], attrs=pure):
            made = [builder.emit(call) for call in mover.moved]
            builder.emit_func_output(builder.emit(relax.Tuple(made)))
        storages = builder.get().get_global_var(STORAGES)
        _decode(builder, func, storages, builder.add_func(captured, CAPTURED))
        out = builder.get()
        return out if mod.attrs is None else out.with_attrs(mod.attrs)


def _decode(builder: relax.BlockBuilder, func: relax.Function, storages: Expr, graph: Expr) -> None:
    """Add what is left of `decode`."""
    with_ctx = relax.op.call_builtin_with_ctx
    new = relax.utils.copy_with_new_vars(func)
    tokens, cache, params = new.params
    layout = relax.Var(LAYOUT, relax.ShapeType([tirx.Var("pages", "int64")]))
    made = builder.get()[storages].ret_ty
    with builder.function(DECODE, [tokens, layout, cache, params], attrs=dict(func.attrs)):
        # Not in the graph: what this copies differs from token to token.
        builder.emit(relax.Call(relax.ExternFunc(POSITIONS), [cache], ty_args=[tokens.ty]))
        given = relax.Tuple([storages, relax.prim_value(0)])
        memory = builder.emit(with_ctx(CACHED_ALLOC, given, ty_args=made))
        parts = [builder.emit(relax.TupleGetItem(memory, i)) for i in range(len(made.fields))]
        known_by = relax.ShapeExpr([tokens.ty.shape[0], *layout.ty.values])
        inputs = relax.Tuple([tokens, cache, params, *parts])
        given = relax.Tuple([graph, inputs, relax.prim_value(0), known_by])
        builder.emit_func_output(builder.emit(with_ctx(RUN_OR_CAPTURE, given, ty_args=new.ret_ty)))


@mutator
class _MoveStorages(PyExprMutator):
    """Make a function's storages its arguments; its result gets one of them too."""

    def __init__(self, mod: tvm.IRModule, func: relax.Function) -> None:
        super().__init__(mod)
        self.func = func
        self.bounds = {str(name): int(most) for name, most in func.attrs[UPPER_BOUND].items()}
        self.moved: list[relax.Call] = []
        self.params: list[relax.Var] = []

    def captured(self) -> relax.Function:
        """Rewrite the function; `moved` are the storages that it now takes."""
        body = self.visit_with_new_scope(self.func.body)
        params = [*self.func.params, *self.params]
        func = relax.Function(params, body, self.func.ret_ty, self.func.is_pure)
        return func.with_attr("relax.force_pure", True)

    def _move(self, storage: relax.Call) -> relax.Var:
        self.moved.append(storage)
        self.params.append(relax.Var(f"storage{len(self.moved)}", relax.ObjectType()))
        return self.params[-1]

    def _most(self, size: Expr) -> int:
        if isinstance(size, tirx.IntImm):
            return int(size)
        if isinstance(size, tirx.Var) and str(size.name) in self.bounds:
            return self.bounds[str(size.name)]
        raise CompileError(f"{DECODE} has a tensor of {size} rows, which has no bound.")

    def visit_call_(self, call: relax.Call) -> Expr:
        call = super().visit_call_(call)
        if is_call(call, "relax.memory.alloc_storage"):
            return self._move(call)
        if is_call(call, "relax.builtin.alloc_tensor"):  # the result, which nobody has planned
            shape, dtype, device, scope = call.args
            items = math.prod(self._most(size) for size in shape.values)
            size = items * tvm.DataType(dtype.value).itemsize
            memory = relax.op.memory
            storage = self._move(
                memory.alloc_storage(relax.ShapeExpr([size]), device, scope, dtype)
            )
            return memory.alloc_tensor(storage, relax.prim_value(0), shape, dtype, device)
        return call


__all__ = ["CACHED_ALLOC", "CAPTURED", "LAYOUT", "RUN_OR_CAPTURE", "STORAGES", "CaptureDecode"]
