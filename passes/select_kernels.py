"""Phase 3: choose a kernel for every linear layer and give every function the packed weights."""

from __future__ import annotations

from gqsa_compiler._tvm import PyExprMutator, mutator, relax, tirx, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes import records as records_
from gqsa_compiler.passes.linear_op import LinearCall
from gqsa_compiler.passes.plan import BiasTensor, Kernel, PackedTensor, PackPlan, RawTensor
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.passes.rewriter import Expr, Graph, key
from gqsa_compiler.schedules.choice import Configurations, Defaults
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import TargetSpec

PARAMS = "params"
"""Name of the last argument of every compiled function: the tuple of all packed tensors."""
GET_ITEM = "vm.builtin.tuple_getitem"


@tvm.transform.module_pass(opt_level=0, name="SelectKernels")
class SelectKernels:
    """Replace every ``gqsa.linear`` by a call of its kernel.

    Afterwards each function takes its inputs and one tuple, the same for all: the tensors of
    `plan`, in order.

    Parameters
    ----------
    target : TargetSpec
    plan : PackPlan
        Empty; filled here.
    configurations : Configurations or None
        Chooses each kernel's configuration; None: the rules' defaults.
    """

    def __init__(
        self, target: TargetSpec, plan: PackPlan, configurations: Configurations | None = None
    ) -> None:
        self.target = target
        self.plan = plan
        self.configurations = configurations or Defaults()

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Plan over all functions first, then rewrite each."""
        records = records_.read(mod)
        functions = [
            (gvar, func)
            for gvar, func in mod.functions_items()
            if isinstance(func, relax.Function) and func.attrs and "num_input" in func.attrs
        ]
        functions.sort(key=lambda item: str(item[0].name_hint))
        chooser = _Chooser(self.target, self.plan, self.configurations)
        for _, func in functions:
            chooser.visit(Graph(func, records))
        out = mod
        for gvar, func in functions:
            rewriter = _Lower(out, Graph(func, records), chooser)
            rewriter.builder_.update_func(gvar, rewriter.lower())
            out = rewriter.builder_.get()
        if mod.attrs is not None:
            out = out.with_attrs(mod.attrs)
        return relax.transform.DeadCodeElimination()(out)


class _Chooser:
    """Kernels by the weights they read, PrimFuncs by what they compute."""

    def __init__(self, target: TargetSpec, plan: PackPlan, configurations: Configurations) -> None:
        self.target = target
        self.plan = plan
        self.configurations = configurations
        self._kernels: dict[tuple[str, ...], Kernel] = {}
        self._primfuncs: dict[object, tirx.PrimFunc] = {}

    def visit(self, graph: Graph) -> None:
        """Add a function's kernels and the other parameters it reads to the plan."""
        inside: dict[int, int] = {}
        for _, value in graph.bindings():
            linear = LinearCall.parse(value)
            if linear is None:
                continue
            for var in (*linear.weights, *linear.biases):
                inside[key(var)] = inside.get(key(var), 0) + 1
            kernel = self._kernel(linear, graph)
            for tensor in self.weight_tensors(kernel):
                self.plan.add(tensor)
            if linear.biases:
                self.plan.add(bias_tensor(linear, graph))
        for var, record in graph.parameters():
            if graph.uses(var) > inside.get(key(var), 0):
                if record.storage != "dense":
                    raise CompileError(
                        f"Parameter {record.name!r} is compressed, but the model reads it in "
                        "another way than as a linear layer's weight; "
                        "leave that layer out of the compression (`ignore`)."
                    )
                self.plan.add(RawTensor(record))

    def _kernel(self, linear: LinearCall, graph: Graph) -> Kernel:
        records = tuple(_known(graph, weight) for weight in linear.weights)
        names = tuple(record.name for record in records)
        rule, _ = select(linear.spec, self.target)
        kernel = self._kernels.get(names)
        if kernel is None:
            # One choice for all uses of the weights: their packed copy depends on it.
            choice = self.configurations.choose(rule, linear.spec, self.target)
            kernel = Kernel(records, linear.spec, rule, choice.config, choice.source, choice.detail)
            self._kernels[names] = kernel
            self.plan.kernels.append(kernel)
        elif (
            kernel.rule.name != rule.name
            or kernel.spec.epilogue.gated != linear.spec.epilogue.gated
        ):
            raise CompileError(
                f"Layer {kernel.name} would need two packed copies of its weights: "
                f"{kernel.rule.name} and {rule.name} read different layouts."
            )
        return kernel

    def kernel(self, linear: LinearCall, graph: Graph) -> Kernel:
        """Return the kernel that `visit` chose."""
        return self._kernels[tuple(_known(graph, weight).name for weight in linear.weights)]

    def weight_tensors(self, kernel: Kernel) -> list[RawTensor | PackedTensor]:
        """List the weight tensors that a kernel reads."""
        if kernel.shares_stored_tensor:
            return [RawTensor(kernel.records[0])]
        return [
            PackedTensor(kernel, part.name, part.shape, part.dtype)
            for part in kernel.rule.params(kernel.spec, kernel.config)
        ]

    def primfunc(self, spec: LinearSpec, kernel: Kernel) -> tirx.PrimFunc:
        """Build the kernel's function; layers that differ in `nnz` only share one."""
        code = kernel.rule.code_key(spec)
        cached = (kernel.rule.name, kernel.config, code)
        if cached not in self._primfuncs:
            self._primfuncs[cached] = kernel.rule.build(spec, kernel.config, self.target)
        return self._primfuncs[cached]


def _known(graph: Graph, var: Expr) -> ParamRecord:
    record = graph.record(var)
    if record is None:
        raise CompileError("A linear layer's weight is not a parameter of the model.")
    return record


def bias_tensor(linear: LinearCall, graph: Graph) -> BiasTensor:
    """Return the tensor that holds a (folded) layer's biases."""
    return BiasTensor(tuple(_known(graph, bias) for bias in linear.biases))


@mutator
class _Lower(PyExprMutator):
    """Rewrite one function."""

    def __init__(self, mod: tvm.IRModule, graph: Graph, chooser: _Chooser) -> None:
        super().__init__(mod)
        self.graph = graph
        self.chooser = chooser
        # An object: a tuple's tensors would be checked one by one, every time that a function is
        # called, and their lengths would have to be known before the weights are packed.
        self.params = relax.Var(PARAMS, relax.ObjectType())

    def lower(self) -> relax.Function:
        func = self.graph.func
        inputs = list(func.params)[: int(func.attrs["num_input"])]
        body = self.visit_with_new_scope(func.body)
        attrs = func.attrs
        return relax.Function([*inputs, self.params], body, func.ret_ty, func.is_pure, attrs)

    def _param(self, index: int) -> relax.Var:
        tensor = self.chooser.plan.tensors[index]
        open_length = None in tensor.shape
        made = relax.TensorType(
            shape=None if open_length else tensor.shape,
            dtype=tensor.dtype,
            ndim=len(tensor.shape) if open_length else -1,
        )
        place = relax.prim_value(index)
        return self.builder_.emit(
            relax.call_pure_packed(GET_ITEM, self.params, place, ty_args=made)
        )

    def visit_var_(self, var: relax.Var) -> Expr:
        record = self.graph.record(var)
        if record is None:
            return super().visit_var_(var)
        return self._param(self.chooser.plan.add(RawTensor(record)))

    def visit_call_(self, call: relax.Call) -> Expr:
        linear = LinearCall.parse(call)
        if linear is None:
            return super().visit_call_(call)
        kernel = self.chooser.kernel(linear, self.graph)
        plan = self.chooser.plan
        args = [self.visit_expr(linear.x)]
        if linear.norm is not None:
            args.append(self.visit_expr(linear.norm))
        args += [self._param(plan.add(t)) for t in self.chooser.weight_tensors(kernel)]
        if linear.biases:
            args.append(self._param(plan.add(bias_tensor(linear, self.graph))))
        if linear.residual is not None:
            args.append(self.visit_expr(linear.residual))
        primfunc = self.chooser.primfunc(linear.spec, kernel)
        spec = linear.spec
        gvar = self.builder_.add_func(primfunc, f"{kernel.rule.name}_{spec.n}x{spec.k}")
        return relax.call_tir(gvar, args, out_ty=call.ty_args[0])
