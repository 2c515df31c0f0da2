"""Descriptions of memory are made once."""

from __future__ import annotations

import numpy as np

from gqsa_compiler._tvm import R, relax, tvm
from gqsa_compiler.passes.share_views import ShareViews
from tests.passes.helpers import apply, values


@tvm.script.ir_module(check_well_formed=False)  # lowered code is impure
class Blocks:
    """Two blocks of a lowered function: views of two storages, a shape, kernels."""

    @R.function
    def main(params: R.Any, first: R.Any, second: R.Any):
        R.func_attr({"relax.force_pure": True})
        s1 = R.call_packed("vm.builtin.make_shape", R.prim_value(4), ty_args=(R.Shape(ndim=1),))
        a1 = R.vm.alloc_tensor(first, R.prim_value(0), s1, R.dtype("float32"))
        w1 = R.call_packed("vm.builtin.tuple_getitem", params, R.prim_value(0), ty_args=(R.Any,))
        _ = R.call_packed("kernel", w1, a1, ty_args=(R.Tuple,))
        s2 = R.call_packed("vm.builtin.make_shape", R.prim_value(4), ty_args=(R.Shape(ndim=1),))
        a2 = R.vm.alloc_tensor(first, R.prim_value(0), s2, R.dtype("float32"))
        b2 = R.vm.alloc_tensor(second, R.prim_value(0), s2, R.dtype("float32"))
        h2 = R.vm.alloc_tensor(first, R.prim_value(0), s2, R.dtype("float16"))
        w2 = R.call_packed("vm.builtin.tuple_getitem", params, R.prim_value(1), ty_args=(R.Any,))
        v2 = R.call_packed("vm.builtin.tuple_getitem", params, R.prim_value(0), ty_args=(R.Any,))
        same = a2
        _1 = R.call_packed("kernel", w2, v2, same, b2, h2, ty_args=(R.Tuple,))
        _2 = R.call_packed("kernel", w2, v2, same, b2, h2, ty_args=(R.Tuple,))
        return (a1, b2)


def calls(mod: tvm.IRModule) -> list[relax.Call]:
    return [v for v in values(mod) if isinstance(v, relax.Call)]


def named(mod: tvm.IRModule, name: str) -> list[relax.Call]:
    return [
        c for c in calls(mod) if isinstance(c.op, relax.ExternFunc) and c.op.global_symbol == name
    ]


def test_repetitions_go_and_what_differs_stays() -> None:
    mod = apply(Blocks, ShareViews())
    assert len(named(mod, "vm.builtin.make_shape")) == 1
    assert len(named(mod, "vm.builtin.tuple_getitem")) == 2  # of fields 0 and 1
    tensors = [c for c in calls(mod) if isinstance(c.op, tvm.ir.Op)]
    assert len(tensors) == 3  # first as float32 and as float16, second
    assert len(named(mod, "kernel")) == 3  # has effects: never shared


def test_kernels_get_the_views_that_were_kept() -> None:
    first, second, third = named(apply(Blocks, ShareViews()), "kernel")
    weight, tensor = first.args
    assert second.args[1].same_as(weight)
    assert second.args[2].same_as(tensor)
    assert not second.args[0].same_as(weight)
    assert [a.same_as(b) for a, b in zip(second.args, third.args, strict=True)] == [True] * 5


def test_a_function_computes_what_it_did() -> None:
    @tvm.script.ir_module
    class Doubled:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32")):
            with R.dataflow():
                a = R.add(x, x)
                b = R.reshape(a, (-1, 4))
                c = R.add(b, b)
                d = R.reshape(c, (-1, 8))
                out = R.add(d, a)
                R.output(out)
            return out

    built = {}
    for name, extra in (("with", [ShareViews()]), ("without", [])):
        mod = relax.get_pipeline("zero")(Doubled)
        transform = relax.transform
        mod = apply(
            mod,
            transform.LegalizeOps(),
            transform.RewriteDataflowReshape(),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            *extra,
            transform.AttachGlobalSymbol(),
        )
        vm = relax.VirtualMachine(relax.build(mod, "llvm", relax_pipeline=None), tvm.cpu())
        x = np.arange(24, dtype=np.float32).reshape(3, 8)
        built[name] = vm["main"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_array_equal(built["with"], 6 * np.arange(24).reshape(3, 8))
    np.testing.assert_array_equal(built["with"], built["without"])
