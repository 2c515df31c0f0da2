"""Short modules and readers for the pass tests."""

from __future__ import annotations

from collections.abc import Sequence

from gqsa_compiler._tvm import relax, tvm
from gqsa_compiler.passes.linear_op import LinearCall
from gqsa_compiler.passes.records import ParamRecord


def bsr(
    name: str, n: int, k: int, group_size: int = 16, nnz: int | None = None, bits: int = 4
) -> ParamRecord:
    """Record of a compressed layer's weight; half of its groups kept unless told."""
    kept = n * (k // group_size) // 2 if nnz is None else nnz
    return ParamRecord(name, "bsr", f"int{bits}", (n, k), group_size=group_size, nnz=kept)


def dense(name: str, *shape: int, dtype: str = "float32") -> ParamRecord:
    """Record of a dense parameter."""
    return ParamRecord(name, "dense", dtype, tuple(shape))


def linears(mod: tvm.IRModule, name: str = "main") -> list[LinearCall]:
    """All `gqsa.linear` calls of a function, in order."""
    calls = [LinearCall.parse(value) for value in values(mod, name)]
    return [call for call in calls if call is not None]


def values(mod: tvm.IRModule, name: str = "main") -> list[relax.Expr]:
    """All bound values of a function, in order."""
    return [b.value for block in mod[name].body.blocks for b in block.bindings]


def ops(mod: tvm.IRModule, name: str = "main") -> list[str]:
    """Names of the Relax operators that a function calls, in order."""
    calls = [v for v in values(mod, name) if isinstance(v, relax.Call)]
    return [str(call.op.name) for call in calls if isinstance(call.op, tvm.ir.Op)]


def apply(mod: tvm.IRModule, *passes: tvm.transform.Pass) -> tvm.IRModule:
    """Run passes one after the other."""
    return tvm.transform.Sequential(list(passes))(mod)


def weight_names(call: LinearCall) -> Sequence[str]:
    """Names of a call's weight variables."""
    return [str(weight.name) for weight in call.weights]
