"""Decoding against one-weight-at-a-time arithmetic, and the constructors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler.checkpoint import (
    BSRLayer,
    convert,
    decode_groups,
    from_codes,
    from_dense,
    to_dense,
    to_scipy,
)
from gqsa_compiler.errors import CheckpointError
from gqsa_compiler.limits import BITS
from tests.checkpoint.helpers import layers, naive_dense, random_layer, same_layer


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_dense_is_exact(layer: BSRLayer) -> None:
    dense = to_dense(layer)
    assert dense.dtype == np.float32
    assert np.array_equal(dense, naive_dense(layer))


@settings(max_examples=40, deadline=None)
@given(layer=layers())
def test_scipy_agrees_with_dense(layer: BSRLayer) -> None:
    sparse = to_scipy(layer)
    assert sparse.blocksize == (1, layer.group_size)
    assert sparse.shape == layer.shape
    assert sparse.data.shape[0] == layer.nnz
    sparse.check_format(full_check=True)
    assert np.array_equal(sparse.toarray(), to_dense(layer))


def test_dense_in_small_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer("p", (50, 128), 16, seed=1)
    whole = to_dense(layer)
    monkeypatch.setattr(convert, "_CHUNK_VALUES", 16 * 7)
    assert np.array_equal(to_dense(layer), whole)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("start", "stop"), [(3, 10), (0, 1), (8, 16), (9, 33), (5, 5)])
def test_decode_groups_takes_a_range(bits: int, start: int, stop: int) -> None:
    layer = random_layer("p", (9, 64), 8, seed=2, bits=bits)
    assert layer.nnz > 33
    assert np.array_equal(decode_groups(layer, start, stop), decode_groups(layer)[start:stop])
    assert np.array_equal(layer.zeros(start, stop), layer.zeros()[start:stop])
    assert np.array_equal(layer.codes(start, stop), layer.codes()[start:stop])


@settings(max_examples=40, deadline=None)
@given(layer=layers())
def test_from_codes_inverts_unpacking(layer: BSRLayer) -> None:
    n, k = layer.shape
    g = layer.group_size
    keep = np.zeros((n, k // g), bool)
    rows = np.repeat(np.arange(n), np.diff(layer.indptr))
    keep[rows, layer.indices] = True
    codes = np.full((n, k // g, g), 1 << layer.bits, np.int64)  # dropped ones are not read
    codes[keep] = layer.codes()
    scales = np.full(keep.shape, np.inf)
    scales[keep] = layer.scales
    zeros = None
    if not layer.symmetric:
        zeros = np.full(keep.shape, -1, np.int64)
        zeros[keep] = layer.zeros()
    again = from_codes(layer.name, (n, k), g, keep, codes, scales, zeros, layer.bits)
    assert same_layer(again, replace(layer, input_rms=None))


def codes_arguments() -> dict[str, Any]:
    return {
        "name": "p",
        "shape": (2, 32),
        "group_size": 16,
        "keep_mask": np.ones((2, 2), bool),
        "codes": np.zeros((2, 2, 16), np.uint8),
        "scales": np.ones((2, 2)),
        "zeros": np.zeros((2, 2), np.uint8),
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"group_size": 12}, "group size 12 does not divide K = 32"),
        ({"group_size": 0}, "group size 0 does not divide"),
        ({"keep_mask": np.ones((2, 3), bool)}, r"keep_mask has shape \[2, 3\], not \[2, 2\]"),
        ({"codes": np.zeros((2, 2, 8), np.uint8)}, "codes has shape"),
        ({"scales": np.ones(4)}, r"scales has shape \[4\]"),
        ({"zeros": np.zeros((2, 1), np.uint8)}, "zeros has shape"),
        ({"codes": np.full((2, 2, 16), 16, np.uint8)}, "code outside 0 to 15"),
        ({"codes": np.full((2, 2, 16), -1, np.int8)}, "code outside 0 to 15"),
        ({"zeros": np.full((2, 2), 16, np.uint8)}, "zero point outside 0 to 15"),
        ({"bits": 2, "codes": np.full((2, 2, 16), 4, np.uint8)}, "code outside 0 to 3"),
        ({"bits": 3, "zeros": np.full((2, 2), 8, np.uint8)}, "zero point outside 0 to 7"),
        ({"bits": 8, "codes": np.full((2, 2, 16), 256, np.int64)}, "code outside 0 to 255"),
        ({"bits": 5}, "cannot have codes of 5 bits; they have 2, 3, 4, 8"),
        ({"scales": np.full((2, 2), 1e6)}, "scale 0 is not a finite number"),
        ({"scales": np.full((2, 2), np.nan)}, "scale 0 is not a finite number"),
        ({"scales": np.full((2, 2), 2e-8)}, "has only scales that float16 rounds to 0"),
    ],
)
def test_from_codes_refuses(change: dict[str, Any], says: str) -> None:
    from_codes(**codes_arguments())
    with pytest.raises(CheckpointError, match=says):
        from_codes(**{**codes_arguments(), **change})


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    symmetric=st.booleans(),
    bits=st.sampled_from(BITS),
)
def test_from_dense_rounds_to_nearest(seed: int, size: float, symmetric: bool, bits: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((5, 64)) * size).astype(np.float32)
    weight[0] = 0
    weight[1] *= 1e-9  # too small for any scale
    keep = rng.random((5, 4)) < 0.7
    layer = from_dense("p", weight, 16, keep, symmetric=symmetric, bits=bits)
    assert layer.bits == bits
    error = np.abs(to_dense(layer) - weight).reshape(5, 4, 16)
    assert layer.nnz == np.count_nonzero(keep)
    assert layer.symmetric == symmetric
    assert not to_dense(layer)[0].any()
    # Half a step, and at the ends of the range what rounding the scale to float16 costs.
    steps = layer.scales.astype(np.float32)
    assert (
        error[keep].max(axis=1) <= steps * 0.51 + (2**bits - 1) * np.spacing(layer.scales)
    ).all()


def test_from_dense_keeps_everything_by_default() -> None:
    layer = from_dense("p", np.eye(16, dtype=np.float32), 8)
    assert layer.sparsity == 0.0
    assert np.allclose(to_dense(layer), np.eye(16), atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "group_size", "says"),
    [
        (np.zeros((2, 20)), 16, "group size 16 does not divide K = 20"),
        (np.full((2, 16), np.nan), 16, "not finite"),
        (np.full((2, 16), 2e6), 16, "too large for a float16 scale"),
        (np.full((2, 16), 2e-8), 16, "too small for a float16 scale"),
    ],
)
def test_from_dense_refuses(weight: Any, group_size: int, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        from_dense("p", weight, group_size)


def test_from_dense_refuses_other_bits() -> None:
    with pytest.raises(CheckpointError, match="codes of 6 bits"):
        from_dense("p", np.zeros((2, 16)), 16, bits=6)


def test_from_dense_does_not_look_at_dropped_groups() -> None:
    weight = np.ones((1, 32), np.float32)
    weight[0, :16] = 1e7
    layer = from_dense("p", weight, 16, np.array([[False, True]]))
    assert to_dense(layer)[0, 16:] == pytest.approx(1.0, abs=1e-3)
