"""Phase 2: matmul(x, W^T) by a parameter with a record becomes one `gqsa.linear` call."""

from __future__ import annotations

from gqsa_compiler._tvm import relax, tvm
from gqsa_compiler.passes.linear_op import LinearCall
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.passes.rewriter import Expr, Graph, is_call, rewrite_pass
from gqsa_compiler.schedules.spec import ActivationDtype, LinearSpec


def RewriteLinear(activation_dtype: ActivationDtype = "float32") -> tvm.transform.Pass:
    """Rewrite matmuls by structure and record, never by name.

    Parameters
    ----------
    activation_dtype : str
        ``float32``, ``int16`` or ``int8``, for compressed layers; dense layers compute in float32.
    """

    def rule(graph: Graph, _var: relax.Var, call: relax.Call) -> Expr | None:
        if not is_call(call, "relax.matmul") or len(call.args[0].ty.shape) != 2:
            return None
        weight = _transposed_parameter(graph, call.args[1])
        record = None if weight is None else graph.record(weight)
        if weight is None or record is None:
            return None
        return LinearCall(_spec(record, activation_dtype), call.args[0], (weight,)).emit()

    return rewrite_pass("RewriteLinear", rule)


def _spec(record: ParamRecord, activation_dtype: ActivationDtype) -> LinearSpec:
    n, k = record.shape
    if record.linear_bits:
        return LinearSpec(
            n,
            k,
            "bsr",
            f"int{record.linear_bits}",
            group_size=record.linear_group,
            nnz=n * (k // record.linear_group),
            symmetric=True,
            activation_dtype=activation_dtype,
        )
    if record.storage == "dense":
        return LinearSpec(n, k, "dense", record.dtype)
    return LinearSpec(
        n,
        k,
        "bsr",
        record.dtype,
        group_size=record.group_size,
        nnz=record.nnz,
        symmetric=record.symmetric,
        activation_dtype=activation_dtype,
    )


def _transposed_parameter(graph: Graph, expr: Expr) -> relax.Var | None:
    """Return W for ``permute_dims(W)`` or ``permute_dims(astype(W))``, W a 2-d parameter."""
    value = graph.value(expr)
    if not is_call(value, "relax.permute_dims"):
        return None
    axes = value.attrs.axes
    if axes is not None and [int(a) for a in axes] not in ([1, 0], [-1, -2]):
        return None
    source = value.args[0]
    cast = graph.value(source)
    if is_call(cast, "relax.astype"):
        source = cast.args[0]
    known = graph.record(source)
    return source if known is not None and len(known.shape) == 2 else None
