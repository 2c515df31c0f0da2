"""What the layouts for 8-bit activations hold, read back byte by byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import UsageError
from gqsa_compiler.schedules.activations import check_shared_weights
from gqsa_compiler.schedules.arm import narrow_sparse_pack
from gqsa_compiler.schedules.arm.input_factors import POWER, input_factors
from gqsa_compiler.schedules.arm.narrow_bsr import ArmNarrowInt4
from gqsa_compiler.schedules.arm.narrow_dense_rule import ArmNarrowDense4, ArmNarrowDense8
from gqsa_compiler.schedules.arm.narrow_sparse_pack import SparseRecords
from gqsa_compiler.schedules.reference import decode
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import parse_target, parse_targets
from tests.schedules.linear_cases import random_keep, random_layer, spec_of

TARGET = parse_target("aarch64")


def sparse(
    size: int, groups: int, *, scales: tuple[float, float] = (1e-3, 1e-2)
) -> tuple[BSRLayer, LinearSpec]:
    rng = np.random.default_rng(size)
    keep = random_keep((19, groups), rng, 0.5)
    layer = random_layer(keep, size, rng, scales=scales)
    return layer, spec_of(layer, activation_dtype="int8")


@pytest.mark.parametrize(("size", "groups"), [(16, 40), (16, 300), (32, 13), (64, 7), (256, 3)])
def test_records_hold_the_layer(size: int, groups: int) -> None:
    layer, spec = sparse(size, groups)
    rule = ArmNarrowInt4()
    packed = rule.pack(spec, rule.space(spec, TARGET)[0], [layer])
    records, starts = SparseRecords.of(spec), packed["row_starts"].astype(int)
    width = 2 if groups > 256 else 1
    dense = np.zeros((spec.n, groups, size))
    for row in range(spec.n):
        at, left = starts[row] * records.size, starts[row + 1] - starts[row]
        codes, steps, columns = [], [], []
        while left:
            units = 4 if left >= 4 else 1
            record = packed["records"][at : at + units * records.size]
            vectors = record[: records.steps_at(units)].reshape(-1, 16)
            codes.append(np.stack([vectors & 15, vectors >> 4], 1).reshape(-1, size))
            steps.append(record[records.steps_at(units) : records.columns_at(units)])
            columns.append(record[records.columns_at(units) :].view(f"<u{width}"))
            at, left = at + units * records.size, left - units
        if not codes:
            continue
        whole = np.concatenate(steps).astype(np.int64)[::-1].cumsum()[::-1]
        signed = (np.concatenate(codes).astype(np.int64) ^ 8) - 8
        for scale, code, column in zip(whole, signed, np.concatenate(columns), strict=True):
            dense[row, column] += scale * 16 * packed["factors"][row] * code
    zeros = narrow_sparse_pack.zero_words(spec)
    block = packed["zeros"].reshape(-1, zeros, 8, 4)
    first = [0, 8, 11]  # the last of 19 rows' blocks begins anew
    for number, start in enumerate(first):
        offsets = block[number].swapaxes(0, 1).reshape(8, -1)[:, :groups]
        for lane in range(8):
            if number < 2 or start + lane >= 16:
                row = start + lane
                dense[row] -= (offsets[lane] * packed["zero_factors"][row])[:, None]
    weights = dense.reshape(spec.n, spec.k)
    stored = rule.stored(spec, rule.space(spec, TARGET)[0], layer)
    np.testing.assert_allclose(weights, stored, rtol=0, atol=1e-6 * np.abs(stored).max())


@pytest.mark.parametrize("size", [16, 256])
def test_a_layer_that_keeps_nothing(size: int) -> None:
    layer = random_layer(np.zeros((19, 3), bool), size, np.random.default_rng(0))
    spec = spec_of(layer, activation_dtype="int8")
    rule = ArmNarrowInt4()
    config = rule.space(spec, TARGET)[0]
    packed = rule.pack(spec, config, [layer])
    assert not packed["records"].any()
    assert not packed["row_starts"].any()
    assert not rule.stored(spec, config, layer).any()


def test_large_inputs_do_not_set_the_scale_of_all() -> None:
    """One column group in 32 is fifty times as large: what bytes then lose is a tenth."""
    rng = np.random.default_rng(3)
    layer, spec = sparse(16, 32)
    sizes = np.where(np.arange(512) // 16 == 5, 50.0, 1.0)
    x = rng.standard_normal((40, 512)) * sizes
    measured = replace(layer, input_rms=np.sqrt((x**2).mean(0)).astype(np.float32))
    assert (input_factors([layer]) == 1).all()
    factors = input_factors([layer, measured])
    np.testing.assert_array_equal(factors, input_factors([measured]))
    assert np.median(factors) == pytest.approx(1)
    assert factors[5] == pytest.approx(50**POWER, rel=0.2)
    lost = []
    for each in (layer, measured):
        weights, offsets = narrow_sparse_pack.stored_parts(spec, each)
        divided = x / np.repeat(input_factors([each]), 16)
        steps = np.abs(divided).max(1, keepdims=True) / 127
        errors = (np.rint(divided / steps) * steps - divided) @ (
            weights - np.repeat(offsets, 16, axis=1)
        ).T
        lost.append((errors**2).mean())
    assert lost[1] < 0.1 * lost[0]


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_input_factors_leave_the_layer_as_it_is(power: float) -> None:
    layer, spec = sparse(32, 13)
    rng = np.random.default_rng(0)
    sizes = np.exp(power * rng.standard_normal(layer.shape[1])).astype(np.float32)
    stored = narrow_sparse_pack.stored(spec, replace(layer, input_rms=sizes))
    exact = decode(layer)
    assert ((stored - exact) ** 2).mean() < 1e-3 * (exact**2).mean()


@pytest.mark.parametrize("scales", [(1e-3, 1e-2), (1e-2, 1.01e-2), (1e-6, 1e-1)])
def test_what_rounding_scales_adds(scales: tuple[float, float]) -> None:
    layer, spec = sparse(16, 128, scales=scales)
    rule = ArmNarrowInt4()
    stored = rule.stored(spec, rule.space(spec, TARGET)[0], layer)
    exact = decode(layer)
    # A thousandth of the energy of the errors that codes of 4 bits make: 1/12 of a step squared.
    dense = np.zeros((spec.n, 128))
    rows = np.repeat(np.arange(spec.n), np.diff(layer.indptr))
    dense[rows, layer.indices] = layer.scales
    energy = (dense**2).sum() * 16 / 12
    assert ((stored - exact) ** 2).sum() < 0.06 * energy


def test_sums_stay_within_32_bits() -> None:
    rng = np.random.default_rng(0)
    layer = random_layer(np.ones((8, 512), bool), 16, rng, scales=(1e-2, 1.001e-2))
    layer = replace(layer, qweight=np.zeros_like(layer.qweight))
    spec = replace(spec_of(layer, activation_dtype="int8"), nnz=layer.nnz)
    rule = ArmNarrowInt4()
    packed = rule.pack(spec, rule.space(spec, TARGET)[0], [layer])
    scales = np.abs(layer.scales.astype(np.float64)).reshape(8, 512)
    whole = np.rint(scales / (packed["factors"] * 16)[:, None]).sum(1)
    # Codes are 8 less than the least, in all columns of a lane.
    assert (whole * 16 * 8 * 4 * 128 <= 2**30).all()
    assert (whole > 1000).all()


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, True)])
def test_full_rows_lose_next_to_nothing(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    layer = random_layer(np.ones((21, 8), bool), 32, rng, bits=bits, symmetric=symmetric)
    spec = spec_of(layer, activation_dtype="int8")
    rule = ArmNarrowDense8() if bits == 8 else ArmNarrowDense4()
    stored = rule.stored(spec, rule.space(spec, TARGET)[0], layer)
    exact = decode(layer)
    assert np.linalg.norm(stored - exact) < 5e-3 * np.linalg.norm(exact)


def test_which_layers_have_kernels_of_bytes() -> None:
    _, spec = sparse(16, 40)
    assert select(spec, TARGET)[0].name == "arm.narrow_int4"
    full = replace(spec, nnz=19 * 40)
    assert select(full, TARGET)[0].name == "arm.narrow_dense_int4"
    eight = replace(full, weight_dtype="int8", symmetric=True)
    assert select(eight, TARGET)[0].name == "arm.narrow_dense_int8"
    for other in (
        replace(spec, weight_dtype="int2"),
        replace(spec, group_size=8),
        replace(eight, symmetric=False),
    ):
        assert select(other, TARGET)[0].name.startswith("generic.")
    assert select(spec, parse_target("aarch64:cortex-a72"))[0].name == "generic.bsr_int4"


def test_targets_with_and_without_dot_products_share_nothing() -> None:
    targets = parse_targets("aarch64,aarch64:cortex-a72")
    check_shared_weights("int16", targets)
    with pytest.raises(UsageError, match=r"of which one has no dot products"):
        check_shared_weights("int8", targets)
