"""The polynomial functions against float64."""

from __future__ import annotations

import math as std_math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler._tvm import B, IRBuilder, Target, tvm
from gqsa_compiler.schedules import reference
from gqsa_compiler.schedules.generic import math
from gqsa_compiler.schedules.generic.emit import int64, load, store
from tests.schedules.linear_cases import HOST

Array = npt.NDArray[Any]
POINTS = np.concatenate(
    [
        np.linspace(-20, 20, 4000),
        np.linspace(-1e-3, 1e-3, 80),
        [0.0, -0.0, 100.0, -100.0, 1e30, -1e30, 3e38, -3e38],
    ]
).astype(np.float32)
FUNCTIONS = ("exp", "erf", "silu", "gelu", "gelu_tanh", "relu")


@pytest.fixture(scope="module", params=[1, 8])
def results(request: pytest.FixtureRequest) -> dict[str, Array]:
    """Every function of every point, computed by one compiled kernel."""
    lanes, count = request.param, len(POINTS)
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("main")
        x = B.arg("x", B.buffer((count,), "float32"))
        outs = [B.arg(f, B.buffer((count,), "float32")) for f in FUNCTIONS]
        with B.serial(int64(0), int64(count // lanes)) as i:
            at = i * int64(lanes)
            for name, out in zip(FUNCTIONS, outs, strict=True):
                store(out, getattr(math, name)(load(x, at, lanes=lanes)), at, lanes=lanes)
    assert count % lanes == 0
    executable = tvm.compile(tvm.IRModule({"main": builder.get()}), Target(HOST.tvm_dict()))
    arrays = [tvm.runtime.tensor(np.zeros_like(POINTS)) for _ in FUNCTIONS]
    executable["main"](tvm.runtime.tensor(POINTS), *arrays)
    return {name: a.numpy() for name, a in zip(FUNCTIONS, arrays, strict=True)}


def test_exp(results: dict[str, Array]) -> None:
    exact = np.exp(np.clip(POINTS.astype(np.float64), -87, 88))
    np.testing.assert_allclose(results["exp"], exact, rtol=3e-7)


def test_erf(results: dict[str, Array]) -> None:
    erf = np.vectorize(std_math.erf)(POINTS.astype(np.float64))
    np.testing.assert_allclose(results["erf"], erf, atol=5e-7)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(results: dict[str, Array], name: Any) -> None:
    with np.errstate(over="ignore"):
        exact = reference.activate(name, POINTS)
    small = np.abs(POINTS) < 1e30
    np.testing.assert_allclose(results[name][small], exact[small], rtol=1e-6, atol=2e-6)
    assert np.all(np.isfinite(results[name]))
