"""Make shapes and views of memory once, not again in every block: each is a call of TVM's VM.

A block of a decoder has the shapes of the one before it, and storage is reused between them: three
quarters of the calls of a decoded token were such repetitions (3% of the time of a small model).
"""

from __future__ import annotations

from gqsa_compiler._tvm import relax, structural_equal, structural_hash, tirx, tvm
from gqsa_compiler.passes.rewriter import Expr, key

_VIEWS = frozenset(
    {
        "relax.vm.alloc_tensor",  # a tensor in a storage: which one decides what it shares
        "vm.builtin.make_shape",  # the shape heap is filled once, at the function's start
        "vm.builtin.reshape",
        "vm.builtin.tuple_getitem",
    }
)


@relax.transform.function_pass(opt_level=0, name="ShareViews")
class ShareViews:
    """Keep the first of equal calls that only describe memory."""

    def transform_function(
        self, func: relax.Function, mod: tvm.IRModule, _ctx: tvm.transform.PassContext
    ) -> relax.Function:
        """Rewrite one function, lowered to calls of the VM."""
        if not isinstance(func.body, relax.SeqExpr):
            return func
        scalars = {key(g) for g, f in mod.functions_items() if _is_constant(f)}
        names: dict[int, relax.Var] = {}
        seen: dict[tuple[int, ...], tuple[Expr, relax.Var]] = {}
        blocks = []
        for block in func.body.blocks:
            kept = []
            for binding in block.bindings:
                value = _renamed(binding.value, names)
                if isinstance(value, relax.Var):  # another name for it
                    names[key(binding.var)] = value
                    continue
                if _is_view(value, scalars):
                    known, var = seen.setdefault(_identity(value), (value, binding.var))
                    if not var.same_as(binding.var) and _equal(known, value):
                        names[key(binding.var)] = var
                        continue
                kept.append(relax.VarBinding(binding.var, value))
            blocks.append(relax.BindingBlock(kept))
        result = relax.SeqExpr(blocks, _renamed(func.body.body, names))
        body = relax.BlockBuilder(mod).normalize(result)  # gives it its type
        return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)


def _is_view(value: Expr, scalars: set[int]) -> bool:
    if not isinstance(value, relax.Call):
        return False
    if isinstance(value.op, relax.GlobalVar):
        return key(value.op) in scalars
    if isinstance(value.op, relax.ExternFunc):
        return value.op.global_symbol in _VIEWS
    return isinstance(value.op, tvm.ir.Op) and value.op.name in _VIEWS


def _identity(call: relax.Call) -> tuple[int, ...]:
    """Return a number that equal calls have in common, for each argument."""
    arguments = (key(a) if isinstance(a, relax.Var) else structural_hash(a) for a in call.args)
    return (structural_hash(call.op), *arguments)


def _equal(a: relax.Call, b: relax.Call) -> bool:
    return structural_equal(a.op, b.op) and all(
        structural_equal(*pair) for pair in zip(a.args, b.args, strict=True)
    )


def _is_constant(func: Expr) -> bool:
    """Say whether a host function computes a number from nothing."""
    return isinstance(func, tirx.PrimFunc) and not func.params


def _renamed(value: Expr, names: dict[int, relax.Var]) -> Expr:
    """Replace variables among the arguments of a call or the fields of a tuple."""
    if isinstance(value, relax.Var):
        return names.get(key(value), value)
    if isinstance(value, relax.Call):
        arguments = [_renamed(a, names) for a in value.args]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args, value.span, value.ty)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_renamed(field, names) for field in value.fields], value.span)
    return value
