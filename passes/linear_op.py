"""The linear layer as one Relax call, between its discovery and the choice of its kernel.

``call_pure_packed("gqsa.linear", spec_json, x, (weights...), operands...)`` where the weights
are the parameters of the layers folded into one (stacked along N) and the operands are, where
the spec asks for them: ``norm`` [K], ``bias`` (a tuple, one [N_i] for each weight),
``residual`` [m, N_out].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gqsa_compiler._tvm import StringImm, relax
from gqsa_compiler.passes.rewriter import Expr, is_call
from gqsa_compiler.schedules.spec import LinearSpec

NAME = "gqsa.linear"


@dataclass(frozen=True, eq=False)
class LinearCall:
    """A parsed ``gqsa.linear`` call."""

    spec: LinearSpec
    x: Expr
    weights: tuple[relax.Var, ...]
    norm: Expr | None = None
    biases: tuple[Expr, ...] = ()
    residual: Expr | None = None

    @classmethod
    def parse(cls, expr: Expr) -> LinearCall | None:
        """Read a call back; None when `expr` is anything else."""
        if not is_call(expr, "relax.call_pure_packed"):
            return None
        func = expr.args[0]
        if not isinstance(func, relax.ExternFunc) or str(func.global_symbol) != NAME:
            return None
        spec = LinearSpec.from_json(str(expr.args[1].value))
        x, weights, *rest = list(expr.args[2:])
        norm = rest.pop(0) if spec.norm_eps is not None else None
        biases = tuple(rest.pop(0).fields) if spec.epilogue.bias else ()
        residual = rest.pop(0) if spec.epilogue.residual else None
        return cls(spec, x, tuple(weights.fields), norm, biases, residual)

    def emit(self) -> relax.Call:
        """Write the call."""
        rows = self.x.ty.shape[0]
        operands: list[Expr] = []
        if self.norm is not None:
            operands.append(self.norm)
        if self.biases:
            operands.append(relax.Tuple(list(self.biases)))
        if self.residual is not None:
            operands.append(self.residual)
        return relax.call_pure_packed(
            NAME,
            StringImm(self.spec.to_json()),
            self.x,
            relax.Tuple(list(self.weights)),
            *operands,
            ty_args=relax.TensorType((rows, self.spec.n_out), "float32"),
        )

    def with_epilogue(self, **changes: object) -> LinearSpec:
        """Return the spec with fields of its epilogue changed."""
        return replace(self.spec, epilogue=replace(self.spec.epilogue, **changes))  # type: ignore[arg-type]


def stack(calls: Sequence[LinearCall]) -> LinearCall | None:
    """Fold layers that read the same input into one, stacked along N.

    Returns None when they differ in anything that one kernel cannot span (storage, bits, group
    size, bias on some only), or already have an epilogue beyond a bias.
    """
    first = calls[0]
    alike = [replace(c.spec, n=0, nnz=0) == replace(first.spec, n=0, nnz=0) for c in calls]
    plain = replace(first.spec.epilogue, bias=False) == type(first.spec.epilogue)()
    if not all(alike) or not plain or first.norm is not None:
        return None
    if not all(c.x.same_as(first.x) for c in calls):
        return None
    spec = replace(
        first.spec,
        n=sum(c.spec.n for c in calls),
        nnz=sum(c.spec.nnz for c in calls),
    )
    return LinearCall(
        spec,
        first.x,
        tuple(w for c in calls for w in c.weights),
        biases=tuple(b for c in calls for b in c.biases),
    )
