"""A small base for graph rewrites: look at a whole function, replace single calls.

Relax functions here are one dataflow block in A-normal form. A rule sees the original function
through `Graph` and returns a new expression over the ORIGINAL variables; the mutator renames
them. What becomes unused is removed by dead code elimination, run by `rewrite_module`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from gqsa_compiler._tvm import PyExprMutator, mutator, post_order_visit, relax, tvm, tvm_ffi
from gqsa_compiler.passes import records as records_
from gqsa_compiler.passes.records import ParamRecord

Expr: TypeAlias = Any  # relax.Expr; TVM has no types for mypy to read
Rule = Callable[["Graph", relax.Var, relax.Call], Expr | None]


def key(node: tvm_ffi.Object) -> int:
    """Identity of a node. (`==` on TVM expressions builds an expression.)"""
    return int(node.__chandle__())


class Graph:
    """The bindings of one Relax function, indexed.

    Parameters
    ----------
    func : relax.Function
    records : tuple of ParamRecord
        One for each parameter after the function's `num_input` inputs.
    """

    def __init__(self, func: relax.Function, records: tuple[ParamRecord, ...]) -> None:
        self.func = func
        self._value: dict[int, Expr] = {}
        self._uses: dict[int, int] = {}
        self._order: list[tuple[relax.Var, Expr]] = []
        num_input = int(func.attrs["num_input"]) if func.attrs and "num_input" in func.attrs else 0
        params = list(func.params)[num_input:]
        self._params = list(zip(params, records, strict=False))
        self._records = {key(v): r for v, r in self._params}
        for block in func.body.blocks:
            for binding in block.bindings:
                self._value[key(binding.var)] = binding.value
                self._order.append((binding.var, binding.value))
                self._count(binding.value)
        self._count(func.body.body)

    def _count(self, expr: Expr) -> None:
        def visit(node: Expr) -> None:
            if isinstance(node, relax.Var):
                self._uses[key(node)] = self._uses.get(key(node), 0) + 1

        post_order_visit(expr, visit)

    def bindings(self) -> Iterator[tuple[relax.Var, Expr]]:
        """Yield every (variable, value) in order."""
        yield from self._order

    def parameters(self) -> Iterator[tuple[relax.Var, ParamRecord]]:
        """Yield every parameter with its record."""
        yield from self._params

    def value(self, expr: Expr) -> Expr:
        """Return what a variable is bound to, through aliases; other expressions as they are."""
        while isinstance(expr, relax.Var) and key(expr) in self._value:
            expr = self._value[key(expr)]
        return expr

    def record(self, expr: Expr) -> ParamRecord | None:
        """Return the record of a parameter variable, None for anything else."""
        return self._records.get(key(expr)) if isinstance(expr, relax.Var) else None

    def uses(self, var: relax.Var) -> int:
        """Count the places that read `var`."""
        return self._uses.get(key(var), 0)

    def users(self, var: relax.Var) -> list[Expr]:
        """List the bound values that read `var` directly."""
        wanted = key(var)
        found = []
        for _, value in self._order:
            hit = False

            def visit(node: Expr) -> None:
                nonlocal hit
                hit = hit or (isinstance(node, relax.Var) and key(node) == wanted)

            post_order_visit(value, visit)
            if hit:
                found.append(value)
        return found


def is_call(expr: Expr, op: str) -> bool:
    """Whether `expr` is a call of the Relax operator `op`, e.g. ``relax.matmul``."""
    return (
        isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and str(expr.op.name) == op
    )


@mutator
class _Replace(PyExprMutator):
    """Put each replacement in the place of its call."""

    def __init__(self, mod: tvm.IRModule, replacements: dict[int, Expr]) -> None:
        super().__init__(mod)
        self.replacements = replacements

    def visit_call_(self, call: relax.Call) -> Expr:
        new = self.replacements.pop(key(call), None)
        if new is None:
            return super().visit_call_(call)
        return self.visit_expr(new)


def rewrite_module(mod: tvm.IRModule, rule: Rule) -> tvm.IRModule:
    """Apply `rule` once to every call of every Relax function.

    Parameters
    ----------
    mod : IRModule
    rule : callable
        ``rule(graph, var, call)`` returns the call's replacement, or None to leave it.
    """
    records = records_.read(mod)
    out = mod
    for gvar, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        graph = Graph(func, records)
        replacements: dict[int, Expr] = {}
        for var, value in graph.bindings():
            if isinstance(value, relax.Call):
                new = rule(graph, var, value)
                if new is not None:
                    replacements[key(value)] = new
        if replacements:
            rewriter = _Replace(out, replacements)
            rewriter.builder_.update_func(gvar, rewriter.visit_expr(func))
            out = rewriter.builder_.get()
    if mod.attrs is not None:
        out = out.with_attrs(mod.attrs)
    return relax.transform.DeadCodeElimination()(out)


def rewrite_pass(name: str, rule: Rule) -> tvm.transform.Pass:
    """Return a module pass that applies `rule` once to every call of every Relax function."""

    def transform(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite_module(mod, rule)

    return tvm.transform.module_pass(transform, opt_level=0, name=name)
