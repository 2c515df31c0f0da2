"""Phase 3: adapters' low-rank paths beside the linear layers that they change.

``y = W x`` becomes ``u = A x``, a dense linear op of its own that reads the same input (and
normalises it as the layer does), and ``y = W x + u B``, one kernel for all layers that are folded
into the op. What an activation or a gate would be applied to has to wait for the sum, so it moves
from the layer's epilogue into that kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gqsa_compiler._tvm import PyExprMutator, copy_with_new_vars, mutator, relax, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes import records as records_
from gqsa_compiler.passes.linear_op import LinearCall
from gqsa_compiler.passes.plan import LowRankSite, PackPlan
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.passes.rewriter import Expr, Graph
from gqsa_compiler.schedules.low_rank.kernel import low_rank
from gqsa_compiler.schedules.low_rank.spec import LowRankDtype, LowRankSpec, Part
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.targets import TargetSpec

COPIED = ("forward", "hidden_states", "logits")
"""The functions that an adapter has copies of. (A GPU's `decode` is captured with the addresses of
its parameters, which an adapter would change.)"""
PREFIX = "with_adapter_"
"""Before the name of a function: the one that computes the same with an adapter. (It comes after
all others in the alphabet, so that the adapters' tensors are the last ones of the plan.)"""


@dataclass(frozen=True)
class LowRankOptions:
    """Which layers get a low-rank path.

    Parameters
    ----------
    ranks : mapping of str to int
        The largest rank that an adapter has, by the layer's name (a record's `layer`).
    dtype : str
        What A and B are stored in.
    merged : bool
        The model's own functions get the paths; otherwise copies of them do, whose names begin with
        `PREFIX`.
    """

    ranks: Mapping[str, int]
    dtype: LowRankDtype = "float16"
    merged: bool = False


@tvm.transform.module_pass(opt_level=0, name="AddLowRank")
class AddLowRank:
    """Add the paths. The sites that were found go into `plan`.

    The weights of gate and up have one packed copy, whose layout depends on whether their kernel
    does the gating; so where a path needs them apart, the model's own functions gate in a kernel of
    its own as well.

    Parameters
    ----------
    target : TargetSpec
    options : LowRankOptions
    plan : PackPlan
        Its `sites` are filled.
    """

    def __init__(self, target: TargetSpec, options: LowRankOptions, plan: PackPlan) -> None:
        self.target = target
        self.options = options
        self.plan = plan

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every function of the model."""
        records = records_.read(mod)
        functions = [
            (gvar, func)
            for gvar, func in mod.functions_items()
            if isinstance(func, relax.Function) and func.attrs and "num_input" in func.attrs
        ]
        functions.sort(key=lambda item: str(item[0].name_hint))
        sites = self._sites([Graph(func, records) for _, func in functions])
        out = mod
        for gvar, func in functions:
            name = str(gvar.name_hint)
            if not self.options.merged and name in COPIED:
                copy = copy_with_new_vars(func).with_attr("global_symbol", PREFIX + name)
                rewriter = _AddPaths(out, Graph(copy, records), sites, self, paths=True)
                rewriter.builder_.add_func(rewriter.rewrite(), PREFIX + name)
                out = rewriter.builder_.get()
            rewriter = _AddPaths(out, Graph(func, records), sites, self, paths=self.options.merged)
            rewriter.builder_.update_func(gvar, rewriter.rewrite())
            out = rewriter.builder_.get()
        if mod.attrs is not None:
            out = out.with_attrs(mod.attrs)
        self.plan.sites[:] = sites.values()
        return records_.attach(out, [*records, *(r for s in sites.values() for r in s.records)])

    def _sites(self, graphs: list[Graph]) -> dict[tuple[str, ...], LowRankSite]:
        """Find the linear ops that an adapter changes, by the layers folded into each."""
        sites: dict[tuple[str, ...], LowRankSite] = {}
        for graph in graphs:
            for _, value in graph.bindings():
                linear = LinearCall.parse(value)
                if linear is None:
                    continue
                weights = [graph.record(weight) for weight in linear.weights]
                folded = [record for record in weights if record is not None]
                if any(record.layer in self.options.ranks for record in folded):
                    site = self._site(folded, linear.spec)
                    sites[site.layers] = site
        found = {layer for site in sites.values() for layer in site.changed}
        missing = sorted(set(self.options.ranks) - found)
        if missing:
            raise CompileError(
                f"An adapter changes {missing[0]}, which the compiled model does not compute as a "
                "linear layer."
            )
        return sites

    def _site(self, folded: list[ParamRecord], spec: LinearSpec) -> LowRankSite:
        ranks = self.options.ranks
        return LowRankSite(
            layers=tuple(record.layer for record in folded),
            features=tuple(record.shape[0] for record in folded),
            changed=tuple(record.layer for record in folded if record.layer in ranks),
            rank=max(ranks.get(record.layer, 0) for record in folded),
            k=spec.k,
            dtype=self.options.dtype,
        )


@mutator
class _AddPaths(PyExprMutator):
    """Rewrite one function, with the paths or only what they need of its layers."""

    def __init__(
        self,
        mod: tvm.IRModule,
        graph: Graph,
        sites: Mapping[tuple[str, ...], LowRankSite],
        owner: AddLowRank,
        *,
        paths: bool,
    ) -> None:
        super().__init__(mod)
        self.graph = graph
        self.sites = sites
        self.target = owner.target
        self.paths = paths
        self.added = {
            record.name: relax.Var(record.name, relax.TensorType(record.shape, record.dtype))
            for site in (sites.values() if paths else ())
            for record in site.records
        }

    def rewrite(self) -> relax.Function:
        """Return the function, which takes the adapter's tensors after its own parameters."""
        func = self.graph.func
        body = self.visit_with_new_scope(func.body)
        params = [*func.params, *self.added.values()]
        return relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)

    def visit_call_(self, call: relax.Call) -> Expr:
        linear = LinearCall.parse(call)
        site = None if linear is None else self._site(linear)
        if linear is None or site is None:
            return super().visit_call_(call)
        epilogue = linear.spec.epilogue
        if not self.paths and not epilogue.gated:
            return super().visit_call_(call)
        linear = replace(
            linear,
            x=self.visit_expr(linear.x),
            norm=None if linear.norm is None else self.visit_expr(linear.norm),
            residual=None if linear.residual is None else self.visit_expr(linear.residual),
        )
        waits = epilogue.activation is not None
        base = self._base(linear) if waits else linear
        arguments = [self.builder_.emit(base.emit())]
        if self.paths:
            a, b = (self.added[record.name] for record in site.records)
            arguments += [self.builder_.emit(_inputs(linear, site, a).emit()), b]
        else:
            arguments *= 2
        spec = LowRankSpec(
            _parts(site, self.paths),
            site.rank if self.paths else 0,
            site.dtype,
            epilogue.activation,
            epilogue.gated,
        )
        kernel = low_rank(spec, self.target)
        gvar = self.builder_.add_func(kernel, f"low_rank_{spec.rank}_{spec.n}x{site.k}")
        result = relax.call_tir(gvar, arguments, out_ty=call.ty_args[0])
        if waits and linear.residual is not None:
            return relax.op.add(self.builder_.emit(result), linear.residual)
        return result

    def _site(self, linear: LinearCall) -> LowRankSite | None:
        known = [self.graph.record(weight) for weight in linear.weights]
        return self.sites.get(tuple(record.layer for record in known if record is not None))

    @staticmethod
    def _base(linear: LinearCall) -> LinearCall:
        """Return the layer without what has to wait for the sum; the bias stays."""
        bare = Epilogue(bias=linear.spec.epilogue.bias)
        return replace(linear, spec=replace(linear.spec, epilogue=bare), residual=None)


def _inputs(linear: LinearCall, site: LowRankSite, a: relax.Var) -> LinearCall:
    """Return ``A x``, of the input as the layer reads it."""
    spec = LinearSpec(
        site.slots * site.rank, site.k, "dense", site.dtype, norm_eps=linear.spec.norm_eps
    )
    return LinearCall(spec, linear.x, (a,), norm=linear.norm)


def _parts(site: LowRankSite, paths: bool) -> tuple[Part, ...]:
    slots = iter(range(len(site.layers)))
    return tuple(
        Part(features, next(slots) if paths and layer in site.changed else None)
        for layer, features in zip(site.layers, site.features, strict=True)
    )
