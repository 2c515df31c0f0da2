"""Norm kernels, the schedule of what is left, and the memory plan."""

from __future__ import annotations

import numpy as np
import pytest

from gqsa_compiler._tvm import R, T, Target, relax, tirx, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes.memory import BoundTokens, workspace_bytes
from gqsa_compiler.passes.schedule_rest import SCHEDULED, CheckScheduled, ScheduleRest
from gqsa_compiler.passes.select_norms import SelectNorms
from gqsa_compiler.targets import parse_target
from tests.passes.helpers import apply, ops

CPU = parse_target("cpu")


@tvm.script.ir_module
class Norms:
    @R.function
    def main(
        x: R.Tensor(("n", 48), "float32"),
        w: R.Tensor((48,), "float32"),
        b: R.Tensor((48,), "float32"),
    ):
        with R.dataflow():
            y = R.nn.rms_norm(x, w, axes=[-1], epsilon=1e-5)
            z = R.nn.layer_norm(y, w, b, axes=[-1], epsilon=1e-6)
            out = R.multiply(R.add(z, x), R.const(0.5, "float32"))
            R.output(out)
        return out


def lowered() -> tvm.IRModule:
    transform = relax.transform
    return apply(
        Norms,
        SelectNorms(CPU),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
        ScheduleRest(CPU),
        CheckScheduled(),
    )


def test_norms_call_our_kernels() -> None:
    mod = apply(Norms, SelectNorms(CPU))
    assert ops(mod)[:2] == ["relax.call_tir", "relax.call_tir"]
    names = sorted(str(g.name_hint) for g in mod.get_global_vars())
    assert names == ["layer_norm_48", "main", "rms_norm_48"]


def test_a_norm_over_another_axis_is_left_alone() -> None:
    @tvm.script.ir_module
    class Columns:
        @R.function
        def main(x: R.Tensor((48, 48), "float32"), w: R.Tensor((48,), "float32")):
            with R.dataflow():
                out = R.nn.rms_norm(x, w, axes=[0], epsilon=1e-5)
                R.output(out)
            return out

    assert ops(apply(Columns, SelectNorms(CPU))) == ["relax.nn.rms_norm"]


def test_everything_is_scheduled_and_elementwise_code_is_vectorised() -> None:
    mod = lowered()
    functions = {str(g.name_hint): f for g, f in mod.functions_items()}
    fused = [f for n, f in functions.items() if "add" in n and isinstance(f, tirx.PrimFunc)]
    assert len(fused) == 1, "add and multiply fuse into one function"
    assert "vectorized" in fused[0].script()


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_lowered_module_computes_the_same(tokens: int) -> None:
    target = Target(parse_target("cpu").tvm_dict())
    vm = relax.VirtualMachine(relax.build(lowered(), target), tvm.cpu())
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((tokens, 48), 48, 48))
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w
    z = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * w + b
    out = vm["main"](*(tvm.runtime.tensor(a) for a in (x, w, b))).numpy()
    np.testing.assert_allclose(out, (z + x) * 0.5, rtol=1e-4, atol=1e-5)


def test_an_unscheduled_reduction_is_an_error_that_names_it() -> None:
    @tvm.script.ir_module
    class Sum:
        @T.prim_func(s_tir=True)
        def row_sum(x: T.Buffer((4, 8), "float32"), out: T.Buffer((4,), "float32")):
            for i, j in T.grid(4, 8):
                with T.sblock("sum"):
                    vi, vj = T.axis.remap("SR", [i, j])
                    with T.init():
                        out[vi] = T.float32(0)
                    out[vi] = out[vi] + x[vi, vj]

    mod = ScheduleRest(CPU)(Sum)
    assert SCHEDULED not in (mod["row_sum"].attrs or {})
    with pytest.raises(CompileError, match="No schedule covers row_sum"):
        CheckScheduled()(mod)


def test_memory_is_planned_for_the_bound() -> None:
    mod = apply(
        lowered(),
        BoundTokens({"n": 100}),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
    )
    # Two intermediates of 100 x 48 float32; the result is allocated for the caller.
    assert workspace_bytes(mod) == 2 * 100 * 48 * 4
