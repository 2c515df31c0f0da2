"""SelectKernels: kernels, shared code, one packed copy, and the parameter tuple."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gqsa_compiler._tvm import R, relax, tirx, tvm
from gqsa_compiler.artefact import packed_tensors
from gqsa_compiler.checkpoint import BSRLayer, to_dense
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes.pipeline import PipelineOptions, run
from gqsa_compiler.passes.plan import PackedTensor, PackPlan, RawTensor, folded_name
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.passes.select_kernels import GET_ITEM, SelectKernels
from gqsa_compiler.targets import parse_target
from tests.checkpoint.helpers import random_layer
from tests.passes.helpers import apply, bsr, dense
from tests.passes.test_graph import MLP_RECORDS, Mlp, graph_phase


@tvm.script.ir_module
class Tied:
    """An embedding that is also the head, with two layers of one shape between."""

    @R.function
    def main(
        tokens: R.Tensor(("n",), "int32"),
        table: R.Tensor((96, 64), "float32"),
        first: R.Tensor((64, 64), "float32"),
        second: R.Tensor((64, 64), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            x = R.take(table, tokens, axis=0)
            y = R.matmul(x, R.permute_dims(first))
            z = R.matmul(y, R.permute_dims(second))
            out = R.matmul(z, R.permute_dims(table))
            R.output(out)
        return out


def tied_records() -> list[ParamRecord]:
    return [
        dense("table", 96, 64, dtype="float16"),
        bsr("first.weight", 64, 64, nnz=100),
        bsr("second.weight", 64, 64, nnz=120),
    ]


def bound(mod: tvm.IRModule, records: list[ParamRecord]) -> tvm.IRModule:
    from gqsa_compiler.passes.bind import BindRecords

    return apply(mod, BindRecords(records), *graph_phase())


def pure_packed_calls(mod: tvm.IRModule) -> list[relax.Call]:
    """List the calls of packed functions without effects, of all functions."""
    found = []

    def visit(expr: relax.Expr) -> None:
        name = getattr(expr.op, "name", "") if isinstance(expr, relax.Call) else ""
        if name == "relax.call_pure_packed":
            found.append(expr)

    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func.body, visit)
    return found


def test_layers_that_differ_in_kept_groups_share_one_function() -> None:
    plan = PackPlan()
    mod = apply(bound(Tied, tied_records()), SelectKernels(parse_target("cpu"), plan))
    functions = [g for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    assert len(functions) == 2, "one for both compressed layers, one for the head"
    assert [kernel.name for kernel in plan.kernels] == ["first", "second", "table"]
    names = {str(call.args[0].global_symbol) for call in pure_packed_calls(mod)}
    assert names == {GET_ITEM}, "no linear op is left"


def test_a_tied_embedding_is_one_tensor() -> None:
    plan = PackPlan()
    apply(bound(Tied, tied_records()), SelectKernels(parse_target("cpu"), plan))
    tables = [t for t in plan.tensors if t.name == "table"]
    assert [type(t) for t in tables] == [RawTensor]
    assert not any(isinstance(t, PackedTensor) and t.kernel.name == "table" for t in plan.tensors)


def test_every_function_takes_its_inputs_and_the_same_tuple() -> None:
    plan = PackPlan()
    mod = apply(bound(Tied, tied_records()), SelectKernels(parse_target("cpu"), plan))
    tokens, params = mod["main"].params
    assert str(tokens.name) == "tokens"
    assert isinstance(params.ty, relax.ObjectType)
    made = {
        int(call.args[2].value): call.ty_args[0]
        for call in pure_packed_calls(mod)
        if call.args[1].same_as(params)
    }
    assert sorted(made) == list(range(len(plan.tensors)))
    for place, tensor in enumerate(plan.tensors):
        assert (made[place].ndim, str(made[place].dtype)) == (len(tensor.shape), tensor.dtype)
        if None not in tensor.shape:
            assert tuple(int(size) for size in made[place].shape) == tensor.shape


def test_a_compressed_parameter_with_another_use_is_an_error_that_names_it() -> None:
    records = [bsr("table.weight", 96, 64), *tied_records()[1:]]
    with pytest.raises(CompileError, match=r"'table.weight' is compressed, but .*ignore"):
        apply(bound(Tied, records), SelectKernels(parse_target("cpu"), PackPlan()))


def test_folded_names() -> None:
    assert folded_name(["a.b.q"]) == "a.b.q"
    assert folded_name(["a.b.q", "a.b.k"]) == "a.b.{q+k}"
    assert folded_name(["a.x.q", "a.y.k"]) == "a.x.q+a.y.k"


class Weights:
    """Random weights for `records`."""

    def __init__(self, records: list[ParamRecord], density: float) -> None:
        rng = np.random.default_rng(0)
        self.layers: dict[str, BSRLayer] = {}
        self.arrays: dict[str, np.ndarray] = {}
        for seed, record in enumerate(records):
            if record.storage == "dense":
                array = rng.standard_normal(record.shape).astype(record.dtype)
                self.arrays[record.name] = array
            else:
                n, k = record.shape
                self.layers[record.name] = random_layer(
                    record.name,
                    (n, k),
                    record.group_size,
                    density=density,
                    seed=seed,
                    bits=int(record.dtype.removeprefix("int")),
                )

    def load(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def layer(self, name: str) -> BSRLayer:
        return self.layers[name]

    def decoded(self, name: str) -> np.ndarray:
        return to_dense(self.layers[name]) if name in self.layers else self.arrays[name]


MIXED_RECORDS = [
    dense("norm", 64),
    bsr("gate", 128, 64, 16, bits=3),
    bsr("up", 128, 64, 32, bits=2),
    bsr("down", 64, 128, 64, bits=8),
]


@pytest.mark.parametrize(
    ("given", "density"),
    [(MLP_RECORDS, 0.5), (MLP_RECORDS, 1.0), (MIXED_RECORDS, 0.5)],
    ids=["half", "full", "mixed"],
)
def test_the_whole_pipeline_computes_what_the_dense_module_does(
    given: list[ParamRecord], density: float
) -> None:
    weights = Weights(given, density)
    records = [
        r if r.storage == "dense" else replace(r, nnz=weights.layers[r.name].nnz) for r in given
    ]
    target = parse_target("cpu")
    mod, plan = run(Mlp, records, PipelineOptions(target, None, {"n": 16}))
    tvm_target = tvm.target.Target(target.tvm_dict())
    vm = relax.VirtualMachine(relax.build(mod, tvm_target, relax_pipeline=None), tvm.cpu())
    packed = [
        tvm.runtime.tensor(array)
        for _, array in packed_tensors(plan, weights, lambda _s, _d, _t: None)
    ]
    w = {name: weights.decoded(name) for name in ("norm", "gate", "up", "down")}
    for tokens in (1, 9):
        x = np.random.default_rng(1).standard_normal((tokens, 64)).astype(np.float32)
        out = vm["main"](tvm.runtime.tensor(x), packed).numpy()
        h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w["norm"]
        gate = h @ w["gate"].T
        expected = (gate / (1 + np.exp(-gate)) * (h @ w["up"].T)) @ w["down"].T + x
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_observers_see_every_phase_in_order() -> None:
    seen: list[str] = []
    options = PipelineOptions(parse_target("cpu"), None, {"n": 16})
    run(Mlp, MLP_RECORDS, options, lambda phase, _mod: seen.append(phase))
    assert seen == ["bind", "graph", "dispatch", "lower", "memory", "finalize"]
