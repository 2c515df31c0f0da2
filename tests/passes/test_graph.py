"""The graph phase: matmuls become linear ops, parallel ones fold, epilogues and norms fuse."""

from __future__ import annotations

import pytest

from gqsa_compiler._tvm import R, tvm
from gqsa_compiler.passes.bind import BindRecords
from gqsa_compiler.passes.fold_parallel_linears import FoldParallelLinears
from gqsa_compiler.passes.fuse_epilogue import FuseActivation, FuseBias, FuseResidual
from gqsa_compiler.passes.fuse_norm import FuseNorm
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.passes.rewrite_linear import RewriteLinear
from tests.passes.helpers import apply, bsr, dense, linears, ops, weight_names


@tvm.script.ir_module
class Mlp:
    """rms_norm -> silu(gate) * up -> down -> + residual."""

    @R.function
    def main(
        x: R.Tensor(("n", 64), "float32"),
        norm: R.Tensor((64,), "float32"),
        gate: R.Tensor((128, 64), "float32"),
        up: R.Tensor((128, 64), "float32"),
        down: R.Tensor((64, 128), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            h = R.nn.rms_norm(x, norm, axes=[-1], epsilon=1e-5)
            g = R.matmul(h, R.permute_dims(gate))
            u = R.matmul(h, R.permute_dims(up))
            a = R.multiply(R.nn.silu(g), u)
            d = R.matmul(a, R.permute_dims(down))
            out = R.add(d, x)
            R.output(out)
        return out


MLP_RECORDS = [dense("norm", 64), bsr("gate", 128, 64), bsr("up", 128, 64), bsr("down", 64, 128)]


@tvm.script.ir_module
class Qkv:
    """concat(q(x) + bias, k(x) + bias, v(x) + bias)."""

    @R.function
    def main(
        x: R.Tensor(("n", 64), "float32"),
        q: R.Tensor((64, 64), "float32"),
        k: R.Tensor((32, 64), "float32"),
        v: R.Tensor((32, 64), "float32"),
        bq: R.Tensor((64,), "float32"),
        bk: R.Tensor((32,), "float32"),
        bv: R.Tensor((32,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            yq = R.add(R.matmul(x, R.permute_dims(q)), bq)
            yk = R.add(R.matmul(x, R.permute_dims(k)), bk)
            yv = R.add(R.matmul(x, R.permute_dims(v)), bv)
            out = R.concat((yq, yk, yv), axis=-1)
            R.output(out)
        return out


def qkv_records(group_k: int = 16) -> list[ParamRecord]:
    weights = [bsr("q", 64, 64), bsr("k", 32, 64, group_size=group_k), bsr("v", 32, 64)]
    return [*weights, dense("bq", 64), dense("bk", 32), dense("bv", 32)]


def graph_phase() -> list[tvm.transform.Pass]:
    return [
        RewriteLinear(),
        FuseBias(),
        FoldParallelLinears(),
        FuseActivation(),
        FuseResidual(),
        FuseNorm(),
    ]


def test_matmul_by_a_recorded_parameter_becomes_a_linear_with_its_record() -> None:
    mod = apply(Mlp, BindRecords(MLP_RECORDS), RewriteLinear("int8"))
    calls = linears(mod)
    assert [(c.spec.n, c.spec.k, c.spec.nnz) for c in calls] == [
        (128, 64, 256),
        (128, 64, 256),
        (64, 128, 256),
    ]
    assert {c.spec.activation_dtype for c in calls} == {"int8"}
    assert "relax.matmul" not in ops(mod)
    assert "relax.permute_dims" not in ops(mod)


def test_matmul_by_something_computed_is_left_alone() -> None:
    @tvm.script.ir_module
    class Computed:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32"), w: R.Tensor((8, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.matmul(x, R.permute_dims(R.add(w, w)))
                R.output(out)
            return out

    mod = apply(Computed, BindRecords([dense("w", 8, 8)]), RewriteLinear())
    assert linears(mod) == []
    assert "relax.matmul" in ops(mod)


def test_matmul_by_an_untransposed_parameter_is_left_alone() -> None:
    @tvm.script.ir_module
    class Untransposed:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32"), w: R.Tensor((8, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                out = R.matmul(x, w)
                R.output(out)
            return out

    assert linears(apply(Untransposed, BindRecords([dense("w", 8, 8)]), RewriteLinear())) == []


def test_an_mlp_becomes_two_kernels() -> None:
    mod = apply(Mlp, BindRecords(MLP_RECORDS), *graph_phase())
    first, second = linears(mod)
    assert weight_names(first) == ["gate", "up"]
    assert (first.spec.n, first.spec.n_out) == (256, 128)
    assert (first.spec.nnz, first.spec.norm_eps) == (512, pytest.approx(1e-5))
    assert first.spec.epilogue.gated
    assert first.spec.epilogue.activation == "silu"
    assert first.norm is not None
    assert weight_names(second) == ["down"]
    assert second.spec.epilogue.residual
    assert second.residual is not None
    assert set(ops(mod)) == {"relax.call_pure_packed"}


def test_q_k_v_fold_with_their_biases() -> None:
    mod = apply(Qkv, BindRecords(qkv_records()), *graph_phase())
    (call,) = linears(mod)
    assert weight_names(call) == ["q", "k", "v"]
    assert call.spec.epilogue.bias
    assert [str(b.name) for b in call.biases] == ["bq", "bk", "bv"]
    assert "relax.concat" not in ops(mod)


def test_layers_of_different_group_size_do_not_fold() -> None:
    mod = apply(Qkv, BindRecords(qkv_records(group_k=32)), *graph_phase())
    assert [weight_names(c) for c in linears(mod)] == [["q"], ["k"], ["v"]]
    assert "relax.concat" in ops(mod)


def test_layers_of_different_bits_do_not_fold() -> None:
    records = [r if r.name != "v" else bsr("v", 32, 64, bits=8) for r in qkv_records()]
    mod = apply(Qkv, BindRecords(records), *graph_phase())
    assert [weight_names(c) for c in linears(mod)] == [["q"], ["k"], ["v"]]
    assert [c.spec.bits for c in linears(mod)] == [4, 4, 8]
    assert "relax.concat" in ops(mod)


@pytest.mark.parametrize("other", [{"bits": 2}, {"group_size": 32}])
def test_gate_and_up_that_differ_stay_two_kernels(other: dict[str, int]) -> None:
    records = [r if r.name != "up" else bsr("up", 128, 64, **other) for r in MLP_RECORDS]
    mod = apply(Mlp, BindRecords(records), *graph_phase())
    assert sorted(weight_names(c) for c in linears(mod)) == [["down"], ["gate"], ["up"]]
    gate = next(c for c in linears(mod) if weight_names(c) == ["gate"])
    assert gate.spec.epilogue.activation == "silu"
    assert not gate.spec.epilogue.gated
    assert "relax.multiply" in ops(mod)


def test_a_result_that_is_read_twice_is_not_fused_away() -> None:
    @tvm.script.ir_module
    class Twice:
        @R.function
        def main(x: R.Tensor(("n", 64), "float32"), w: R.Tensor((64, 64), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, R.permute_dims(w))
                a = R.nn.relu(y)
                out = R.add(a, y)
                R.output(out)
            return out

    mod = apply(Twice, BindRecords([bsr("w", 64, 64)]), *graph_phase())
    (call,) = linears(mod)
    assert call.spec.epilogue.activation is None
    assert "relax.nn.relu" in ops(mod)


def test_an_activation_after_a_bias_fuses_in_order_and_not_after_a_residual() -> None:
    @tvm.script.ir_module
    class Fc:
        @R.function
        def main(
            x: R.Tensor(("n", 64), "float32"),
            w: R.Tensor((64, 64), "float32"),
            b: R.Tensor((64,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.add(R.matmul(x, R.permute_dims(w)), b)
                z = R.nn.relu(y)
                s = R.add(z, x)
                out = R.nn.relu(s)
                R.output(out)
            return out

    mod = apply(Fc, BindRecords([bsr("w", 64, 64), dense("b", 64)]), *graph_phase())
    (call,) = linears(mod)
    epilogue = call.spec.epilogue
    assert (epilogue.bias, epilogue.activation, epilogue.residual) == (True, "relu", True)
    assert ops(mod).count("relax.nn.relu") == 1


def test_a_norm_with_another_reader_is_not_fused() -> None:
    @tvm.script.ir_module
    class Shared:
        @R.function
        def main(
            x: R.Tensor(("n", 64), "float32"),
            g: R.Tensor((64,), "float32"),
            w: R.Tensor((64, 64), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.nn.rms_norm(x, g, axes=[-1], epsilon=1e-5)
                y = R.matmul(h, R.permute_dims(w))
                out = R.add(y, h)
                R.output(out)
            return out

    mod = apply(Shared, BindRecords([dense("g", 64), bsr("w", 64, 64)]), *graph_phase())
    (call,) = linears(mod)
    assert call.norm is None
    assert "relax.nn.rms_norm" in ops(mod)


def test_a_broadcast_add_is_no_residual() -> None:
    @tvm.script.ir_module
    class Broadcast:
        @R.function
        def main(
            x: R.Tensor(("n", 64), "float32"),
            row: R.Tensor((1, 64), "float32"),
            w: R.Tensor((64, 64), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                out = R.add(R.matmul(x, R.permute_dims(w)), row)
                R.output(out)
            return out

    mod = apply(Broadcast, BindRecords([bsr("w", 64, 64)]), *graph_phase())
    assert not linears(mod)[0].spec.epilogue.residual
