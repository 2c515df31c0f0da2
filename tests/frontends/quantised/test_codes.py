"""From unpacked codes to layers: regrouping, absent groups, and what does not fit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gqsa_compiler.checkpoint import to_dense
from gqsa_compiler.frontends.quantised.codes import Codes, Misfit, regroup
from tests.frontends.quantised.packers import Matrix, random_matrix


def codes_of(m: Matrix, **fields: Any) -> Codes:
    given = {
        "codes": m.codes.astype(np.uint8),
        "scales": m.scales,
        "zeros": m.zeros.astype(np.uint8),
        "bits": m.bits,
    }
    return Codes(**{**given, **fields})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("k", "group", "size"), [(96, 32, 32), (192, 96, 32), (512, 512, 256), (40, 40, 8)]
)
def test_layers_are_exact(bits: int, k: int, group: int, size: int) -> None:
    m = random_matrix(6, k, bits=bits, group=group)
    layer = codes_of(m).layer("p", "model")
    assert (layer.group_size, layer.bits, layer.symmetric) == (size, bits, False)
    np.testing.assert_array_equal(to_dense(layer), m.dense)
    np.testing.assert_array_equal(codes_of(m).dense(), m.dense)
    # Groups that are all zero are not stored.
    blocks = m.dense.reshape(6, -1, size)
    assert layer.nnz == np.count_nonzero(blocks.any(axis=2))


def test_symmetric_layers_store_no_zero_points() -> None:
    m = random_matrix(5, 64, symmetric=True)
    for zeros in (None, m.zeros.astype(np.uint8)):
        layer = codes_of(m, zeros=zeros).layer("p", "model")
        assert layer.symmetric
        np.testing.assert_array_equal(to_dense(layer), m.dense)


def test_a_scale_of_zero_is_an_absent_group() -> None:
    m = random_matrix(4, 64)
    m.scales[1, 0] = 0
    layer = codes_of(m).layer("p", "model")
    assert 0 not in layer.scales
    np.testing.assert_array_equal(to_dense(layer), m.dense)


def test_scales_of_other_dtypes_are_taken_where_they_are_exact() -> None:
    for dtype in (ml_dtypes.bfloat16, np.float32):
        m = random_matrix(4, 64, scale_dtype=ml_dtypes.bfloat16)
        wide = Matrix(m.codes, m.scales.astype(dtype), m.zeros, m.bits, m.columns)
        np.testing.assert_array_equal(to_dense(codes_of(wide).layer("p", "model")), m.dense)


@pytest.mark.parametrize("scale", [1e-7, 1e6, 0.1])
def test_scales_that_are_no_float16(scale: float) -> None:
    m = random_matrix(4, 64, scale_dtype=np.float32)
    scales = np.full_like(m.scales, 0.5)
    scales[2, 1] = scale
    codes = m.codes.copy()
    codes[2, 32] = (m.zeros[2, 1] + 1) % 16  # the group is kept
    with pytest.raises(Misfit, match=r"model: 1 of 8 scales of layer 'p' \(float32, e\.g\."):
        Codes(codes.astype(np.uint8), scales, m.zeros.astype(np.uint8), 4).layer("p", "model")
    # In a group that is all zero no scale matters.
    codes[2, 32:] = m.zeros[2, 1]
    layer = Codes(codes.astype(np.uint8), scales, m.zeros.astype(np.uint8), 4).layer("p", "model")
    assert np.isfinite(layer.scales).all()


def test_order_by_whole_groups_is_undone() -> None:
    m = random_matrix(4, 96)
    order = np.array([2, 0, 1]).repeat(32)
    moved = Matrix(m.codes, m.scales, m.zeros, m.bits, order)
    layer = codes_of(moved, columns=order).layer("p", "model")
    assert layer.group_size == 32
    np.testing.assert_array_equal(to_dense(layer), moved.dense)
    np.testing.assert_array_equal(codes_of(moved, columns=order).dense(), moved.dense)


def test_scattered_columns_do_not_fit() -> None:
    m = random_matrix(4, 96)
    order = np.random.default_rng(1).permutation(m.columns)
    found = codes_of(m, columns=order)
    with pytest.raises(Misfit, match=r"'p' are scattered \(activation order.*static groups"):
        found.layer("p", "model")
    moved = Matrix(m.codes, m.scales, m.zeros, m.bits, order)
    np.testing.assert_array_equal(found.dense(), moved.dense)


def test_groups_that_eight_does_not_divide() -> None:
    with pytest.raises(Misfit, match="layer 'p' has groups of 12 of its 24 columns"):
        regroup(24, 2, None, "p", "model")
    with pytest.raises(Misfit, match="has groups of 20 of its 20 columns"):
        regroup(20, 1, None, "p", "model")
    with pytest.raises(Misfit, match="has 3 groups in 64 columns, so that they cannot be of one"):
        regroup(64, 3, None, "p", "model")
    with pytest.raises(Misfit, match="has groups of 12 of its 24 columns"):
        regroup(24, 2, np.arange(24) // 12, "p", "model")
    assert regroup(48, 3, None, "p", "model")[0] == 16
