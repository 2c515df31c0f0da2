"""The Arm kernels with 8-bit activations against numpy, in an emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules import reference
from gqsa_compiler.schedules.arm import narrow_sparse_pack
from gqsa_compiler.schedules.arm.input_factors import input_factors
from gqsa_compiler.schedules.arm.narrow_bsr import ArmNarrowInt4
from gqsa_compiler.schedules.arm.narrow_dense_rule import ArmNarrowDense4, ArmNarrowDense8
from gqsa_compiler.schedules.arm.narrow_inputs import LARGEST
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.targets import parse_target
from tests.schedules.arm.emulated import Kernels
from tests.schedules.linear_cases import random_keep, random_layer, random_operands, spec_of
from tools.arm_kernels import missing_tool

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=f"there is no {missing_tool()}")

Array = npt.NDArray[Any]
TARGET = parse_target("aarch64")
ALL = Epilogue(bias=True, activation="silu", gated=True, residual=True)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("narrow"))


def rounded(values: Array, width: int, most: float) -> Array:
    """Round to integers up to `most` times a scale of every `width` columns."""
    spans = values.reshape(len(values), -1, width)
    peak = np.abs(spans).max(-1, keepdims=True)
    scale = np.where(peak > 0, peak / most, 1.0)
    return (np.rint(spans / scale) * scale).reshape(values.shape)


def products(rule: Any, spec: LinearSpec, layer: BSRLayer, values: Array) -> tuple[Array, float]:
    """Return what a kernel makes of normalised inputs [m, K], and what a code of them is worth."""
    size = spec.group_size
    if rule.name.startswith("arm.narrow_dense"):
        weight = rule.stored(spec, rule.space(spec, TARGET)[0], layer)
        step = np.abs(values).max() / LARGEST * np.abs(weight).max()
        return rounded(values, size, LARGEST) @ weight.T, float(step)
    weight, offsets = narrow_sparse_pack.stored_parts(spec, layer)
    values = values / np.repeat(input_factors([layer]), size)
    inputs = rounded(values, spec.k, LARGEST)
    sums = inputs.reshape(len(values), -1, size).sum(-1)
    rest = rounded(sums, sums.shape[1], LARGEST) @ offsets.T
    steps = np.abs(values).max() * np.abs(weight).max() + np.abs(sums).max() * np.abs(offsets).max()
    return inputs @ weight.T - rest, float(steps / LARGEST)


def check(kernels: Kernels, rule: Any, spec: LinearSpec, layer: BSRLayer, m: int) -> None:
    """Run a kernel and compare; few inputs may be rounded the other way, by the norm's rounding."""
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, spec.k)).astype(np.float32)
    operands = random_operands(spec, m, rng)
    got = kernels.run(rule, spec, [layer], x, operands, None, TARGET)
    values = x.astype(np.float64)
    if "norm" in operands:
        factor = 1.0 / np.sqrt((values**2).mean(-1, keepdims=True) + (spec.norm_eps or 0.0))
        values = values * factor * operands.pop("norm")
    y, step = products(rule, spec, layer, values)
    want = finished(spec, y, operands)
    error = np.abs(got - want)
    assert np.isfinite(got).all()
    assert np.median(error) < 2e-5 * np.abs(want).max()
    assert error.max() < 4 * step * max(1.0, np.abs(y).max())


def finished(spec: LinearSpec, y: Array, operands: dict[str, Array]) -> Array:
    """Apply a layer's epilogue to its products."""
    identity = np.eye(spec.n)
    bare = replace(spec, k=spec.n, weight="dense", norm_eps=None)
    return reference.linear(bare, identity, y, **operands)


# bits, group size, rows, column groups, symmetric, share kept, fields of the spec
SPARSE: dict[str, tuple[int, int, int, int, bool, float, dict[str, Any]]] = {
    "g16": (4, 16, 37, 40, False, 0.5, {}),
    "all": (4, 16, 38, 40, False, 0.5, {"norm_eps": 1e-5, "epilogue": ALL}),
    "g32": (3, 32, 11, 13, True, 0.5, {}),
    "g64": (4, 64, 9, 7, False, 0.6, {}),
    "g128": (4, 128, 9, 5, False, 0.6, {}),
    "g256": (4, 256, 9, 3, False, 0.6, {}),
    "wide": (4, 16, 8, 300, False, 0.3, {}),
    "one_row": (4, 16, 1, 3, False, 0.9, {}),
    "three_rows": (4, 16, 3, 9, False, 0.9, {}),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "all" else pytest.mark.slow) for n in SPARSE],
)
def test_sparse_rows(kernels: Kernels, name: str) -> None:
    bits, size, n, groups, symmetric, kept, fields = SPARSE[name]
    rng = np.random.default_rng(size)
    keep = random_keep((n, groups), rng, kept)
    keep[0, 0] = True
    keep[0, -1] = False
    layer = random_layer(keep, size, rng, bits=bits, symmetric=symmetric)
    if symmetric:
        signs = rng.choice([-1, 1], layer.nnz).astype(np.float16)
        layer = replace(layer, scales=layer.scales * signs)
    if name in ("all", "g32", "g256"):
        sizes = rng.lognormal(0, 1.5, layer.shape[1]).astype(np.float32)
        layer = replace(layer, input_rms=sizes)
    spec = spec_of(layer, activation_dtype="int8", **fields)
    rule = ArmNarrowInt4()
    for m in (1, 6):
        check(kernels, rule, spec, layer, m)


# bits, group size, rows, column groups, symmetric, fields
DENSE: dict[str, tuple[int, int, int, int, bool, dict[str, Any]]] = {
    "head": (4, 32, 37, 8, False, {"norm_eps": 1e-5}),
    "all": (4, 16, 38, 8, False, {"norm_eps": 1e-5, "epilogue": ALL}),
    "symmetric": (3, 64, 16, 4, True, {}),
    "bytes": (8, 64, 21, 3, True, {"norm_eps": 1e-5}),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "head" else pytest.mark.slow) for n in DENSE],
)
def test_full_rows(kernels: Kernels, name: str) -> None:
    bits, size, n, groups, symmetric, fields = DENSE[name]
    rng = np.random.default_rng(size)
    layer = random_layer(np.ones((n, groups), bool), size, rng, bits=bits, symmetric=symmetric)
    if symmetric:
        signs = rng.choice([-1, 1], layer.nnz).astype(np.float16)
        layer = replace(layer, scales=layer.scales * signs)
    spec = spec_of(layer, activation_dtype="int8", **fields)
    rule: Any = ArmNarrowDense8() if bits == 8 else ArmNarrowDense4()
    for m in (1, 6):
        check(kernels, rule, spec, layer, m)


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_is_not_finite_stays_so(kernels: Kernels, value: float) -> None:
    rng = np.random.default_rng(0)
    keep = random_keep((38, 40), rng, 0.5)
    keep[:, 0] = True
    for rule, layer in (
        (ArmNarrowInt4(), random_layer(keep, 16, rng)),
        (ArmNarrowDense4(), random_layer(np.ones((37, 8), bool), 32, rng)),
    ):
        spec = spec_of(layer, activation_dtype="int8")
        for m in (1, 5):
            x = rng.standard_normal((m, spec.k)).astype(np.float32)
            x[0, 7] = value
            out = kernels.run(rule, spec, [layer], x, {}, None, TARGET)  # type: ignore[arg-type]
            assert not np.isfinite(out[0]).any()
            assert np.isfinite(out[1:]).all()
