"""What the passes choose for a GPU, before and after."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gqsa_compiler._tvm import R, Target, relax, tirx, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.passes.attach_kv_cache import AttachKVCache
from gqsa_compiler.passes.device_kernels import DeviceKernels
from gqsa_compiler.passes.schedule_rest import CheckScheduled, ScheduleRest
from gqsa_compiler.passes.select_norms import SelectNorms
from gqsa_compiler.schedules.generic.rope import rope_qkv
from gqsa_compiler.schedules.kv_cache import KVCacheSpec
from gqsa_compiler.targets import parse_target
from tests.passes.helpers import apply, ops
from tests.schedules.kv_cache_model import attention_module

CPU, GPU = parse_target("cpu"), parse_target("cuda:sm_80")
SPEC = KVCacheSpec(2, 4, 2, 16, ("mha", "mha_sliding"), 7, dtype="float16")


def threads_of(function: tirx.PrimFunc) -> set[str]:
    """Collect the thread axes that a function binds."""
    return set(re.findall(r"(?:blockIdx|threadIdx)\.[xyz]", function.script()))


def primfuncs(mod: tvm.IRModule) -> dict[str, tirx.PrimFunc]:
    """Return the PrimFuncs of a module by name."""
    return {
        str(gvar.name_hint): function
        for gvar, function in mod.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }


@tvm.script.ir_module
class Norm:
    @R.function
    def main(x: R.Tensor(("n", 48), "float32"), w: R.Tensor((48,), "float32")):
        with R.dataflow():
            y = R.nn.rms_norm(x, w, axes=[-1], epsilon=1e-5)
            out = R.multiply(R.add(y, x), R.const(0.5, "float32"))
            R.output(out)
        return out


def test_what_is_left_gets_a_thread_an_element() -> None:
    transform = relax.transform
    with Target(GPU.tvm_dict()):
        mod = apply(
            Norm,
            SelectNorms(GPU),
            transform.LegalizeOps(),
            transform.AnnotateTIROpPattern(),
            transform.FuseOps(),
            transform.FuseTIR(),
            transform.DeadCodeElimination(),
            ScheduleRest(GPU),
            CheckScheduled(),
        )
    found = primfuncs(mod)
    assert len(found) == 2
    for function in found.values():
        assert threads_of(function) == {"blockIdx.x", "threadIdx.x"}


def test_a_scalar_gets_a_thread_too() -> None:
    builder = relax.BlockBuilder()
    with builder.function("main", []):
        builder.emit_func_output(builder.emit(relax.op.zeros((), "float16")))
    mod = apply(builder.finalize(), relax.transform.LegalizeOps(), ScheduleRest(GPU))
    (function,) = primfuncs(mod).values()
    assert threads_of(function) == {"blockIdx.x", "threadIdx.x"}


def test_rope_is_built_again_for_a_gpu() -> None:
    module = tvm.IRModule({"rope": rope_qkv(4, 2, 16, 8, qk_norm=True)})
    assert threads_of(DeviceKernels(CPU)(module)["rope"]) == set()
    there = DeviceKernels(GPU)(module)["rope"]
    assert threads_of(there) == {"blockIdx.x", "threadIdx.x"}
    before = [str(p.ty) for p in module["rope"].params]
    assert len(before) == len(there.params)


def test_the_cache_of_a_gpu_is_float16() -> None:
    mod = AttachKVCache(SPEC, GPU)(attention_module(SPEC))
    casts = [name for name in ops(mod, "run") if name == "relax.astype"]
    assert len(casts) == 2 * SPEC.num_layers
    assert ops(mod, "run").count("relax.clip") == SPEC.num_layers  # to a half's range
    for name, function in primfuncs(mod).items():
        assert "threadIdx.x" in threads_of(function), name
    scales: list[float] = []

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call) and node.op == tvm.ir.Op.get("relax.call_dps_packed"):
            scales.append(float(node.args[1].fields[2].value))
            assert str(node.args[1].fields[3].ty.dtype) == "float16"
            assert str(node.ty_args[0].dtype) == "float16"

    relax.analysis.post_order_visit(mod["run"], visit)
    assert scales[0] == -scales[1] > 0
    wrong = KVCacheSpec(1, 4, 2, 16, ("mha",))
    with pytest.raises(CompileError, match=r"On a GPU keys and values are kept in float16"):
        AttachKVCache(wrong, GPU)(attention_module(wrong))
