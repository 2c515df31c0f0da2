"""The lowering for CPUs gives what TVM's own gives, for functions that other schedules made."""

from __future__ import annotations

import numpy as np

from gqsa_compiler._tvm import T, Target, tvm
from gqsa_compiler.passes import cpu_code
from gqsa_compiler.targets import parse_target


@T.prim_func(private=True, s_tir=True)
def _mean_of_squares(x: T.Buffer((37, 19), "float32"), out: T.Buffer((37,), "float32")) -> None:
    squares = T.sblock_alloc_buffer((37, 19), "float32")
    for i, j in T.grid(37, 19):
        with T.sblock("square"):
            row, column = T.axis.remap("SS", [i, j])
            squares[row, column] = x[row, column] * x[row, column]
    for i, j in T.grid(37, 19):
        with T.sblock("sum"):
            row, column = T.axis.remap("SR", [i, j])
            with T.init():
                out[row] = T.float32(0)
            out[row] += squares[row, column] / T.float32(19)


def test_blocks_with_an_intermediate_buffer() -> None:
    module = tvm.IRModule({"main": _mean_of_squares.with_attr("global_symbol", "main")})
    target = Target(parse_target("cpu").tvm_dict())
    built = tvm.compile(module, target, tir_pipeline=cpu_code.register())
    x = np.random.default_rng(0).standard_normal((37, 19)).astype(np.float32)
    out = tvm.runtime.tensor(np.zeros(37, np.float32))
    built["main"](tvm.runtime.tensor(x), out)
    np.testing.assert_allclose(out.numpy(), (x**2).mean(1), rtol=1e-5)
