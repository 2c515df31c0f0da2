"""Every rule for a layer, each broken on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from gqsa_compiler.checkpoint import BSRLayer, LayerScheme, QuantizationConfig, validate_layer
from gqsa_compiler.errors import CheckpointError
from tests.checkpoint.helpers import layers

# Rows: groups 0, 2 | none | 1 | 0, 1, 2, 3: seven groups, so qzeros has four padding bits.
GOOD = BSRLayer(
    name="p",
    shape=(4, 32),
    group_size=8,
    indptr=np.array([0, 2, 2, 3, 7], np.int32),
    indices=np.array([0, 2, 1, 0, 1, 2, 3], np.uint16),
    qweight=np.arange(28, dtype=np.uint8).reshape(7, 4),
    scales=np.array([1, -1, 0, 6e-8, 65504, 0.5, 2], np.float16),
    qzeros=np.array([0x21, 0x43, 0x65, 0x07], np.uint8),
)


def changed(array: Any, at: Any, value: Any) -> Any:
    array = array.copy()
    array[at] = value
    return array


def test_the_good_layer_is_good() -> None:
    validate_layer(GOOD)
    validate_layer(GOOD, QuantizationConfig(group_size=8))
    validate_layer(replace(GOOD, qzeros=None), QuantizationConfig(group_size=8, symmetric=True))


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_whatever_the_constructors_make_is_valid(layer: BSRLayer) -> None:
    config = QuantizationConfig(
        bits=layer.bits, group_size=layer.group_size, symmetric=layer.symmetric
    )
    validate_layer(layer, config)


def of_bits(bits: int, zeros: npt.NDArray[np.uint8]) -> BSRLayer:
    qweight = np.zeros((7, bits), np.uint8)
    return replace(GOOD, bits=bits, qweight=qweight, qzeros=zeros)


@pytest.mark.parametrize(("bits", "size", "used"), [(2, 2, 6), (3, 3, 5), (8, 7, 8)])
def test_the_shapes_follow_from_the_bits(bits: int, size: int, used: int) -> None:
    zeros = np.full(size, 0xFF, np.uint8)
    zeros[-1] = (1 << used) - 1
    validate_layer(of_bits(bits, zeros))
    for other in (size - 1, size + 1):
        with pytest.raises(CheckpointError, match=rf"qzeros has shape \[{other}\], not"):
            validate_layer(of_bits(bits, np.zeros(other, np.uint8)))
    if used < 8:
        with pytest.raises(CheckpointError, match="padding bits at the end of qzeros are not 0"):
            validate_layer(of_bits(bits, changed(zeros, -1, 1 << used)))


def test_a_layer_may_be_empty() -> None:
    empty = replace(
        GOOD,
        indptr=np.zeros(5, np.int32),
        indices=GOOD.indices[:0],
        qweight=GOOD.qweight[:0],
        scales=GOOD.scales[:0],
        qzeros=GOOD.qzeros[:0] if GOOD.qzeros is not None else None,
    )
    validate_layer(empty)
    assert empty.sparsity == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bits": 5}, "5 bits a code, not 2, 3, 4, 8"),
        ({"bits": 3}, r"qweight has shape \[7, 4\], not \[7, 3\]"),
        ({"bits": 8}, r"qweight has shape \[7, 4\], not \[7, 8\]"),
        ({"group_size": 12}, "group size 12 is not a power of two"),
        ({"group_size": 4}, "group size 4 is not a power of two"),
        ({"shape": (0, 32)}, r"shape \[0, 32\] is out of range"),
        ({"shape": (4, 0)}, r"shape \[4, 0\] is out of range"),
        ({"shape": (4, -32)}, "out of range"),
        ({"shape": (2**40, 32)}, "out of range"),
        ({"shape": (4, 36)}, "group size 8 does not divide its 36 columns"),
        ({"shape": (4, 65537 * 8)}, "more than 65536 groups of 8"),
        ({"shape": (5, 32)}, r"indptr has shape \[5\], not \[6\]"),
        ({"shape": (4, 24)}, r"indices holds 3, but a row has 3 groups \(0 to 2\)"),
        ({"indptr": GOOD.indptr.astype(np.int64)}, "indptr has dtype int64, not int32"),
        ({"indices": GOOD.indices.astype(np.int32)}, "indices has dtype int32, not uint16"),
        ({"indices": GOOD.indices.reshape(7, 1)}, "indices is not a vector"),
        ({"qweight": GOOD.qweight.astype(np.int8)}, "qweight has dtype int8"),
        ({"qweight": GOOD.qweight[:, :3]}, r"qweight has shape \[7, 3\], not \[7, 4\]"),
        ({"qweight": GOOD.qweight[:6]}, r"qweight has shape \[6, 4\], not \[7, 4\]"),
        ({"scales": GOOD.scales.astype(np.float32)}, "scales has dtype float32"),
        ({"scales": GOOD.scales[:6]}, r"scales has shape \[6\], not \[7\]"),
        ({"scales": changed(GOOD.scales, 5, np.inf)}, "scale 5 is not a finite number"),
        ({"scales": changed(GOOD.scales, 0, np.nan)}, "scale 0 is not a finite number"),
        ({"qzeros": np.zeros(7, np.uint8)}, r"qzeros has shape \[7\], not \[4\]"),
        ({"qzeros": np.zeros(4, np.int8)}, "qzeros has dtype int8"),
        ({"qzeros": np.array([0, 0, 0, 0x10], np.uint8)}, "padding bits"),
        ({"indptr": changed(GOOD.indptr, 0, 1)}, "indptr runs from 1 to 7, not from 0 to 7"),
        ({"indptr": changed(GOOD.indptr, 4, 6)}, "indptr runs from 0 to 6, not from 0 to 7"),
        ({"indptr": changed(GOOD.indptr, 4, 8)}, "indptr runs from 0 to 8"),
        ({"indptr": changed(GOOD.indptr, 1, 3)}, "indptr decreases after row 1"),
        ({"indptr": changed(GOOD.indptr, 2, -5)}, "indptr decreases after row 1"),
        ({"indptr": changed(GOOD.indptr, 2, 2**31 - 1)}, "indptr decreases after row 2"),
        ({"indices": changed(GOOD.indices, 1, 4)}, "indices holds 4, but a row has 4 groups"),
        ({"indices": changed(GOOD.indices, 1, 65535)}, "indices holds 65535"),
        ({"indices": changed(GOOD.indices, 1, 0)}, r"increasing in row 0 \(0 follows 0\)"),
        ({"indices": changed(GOOD.indices, 6, 2)}, r"increasing in row 3 \(2 follows 2\)"),
        ({"indices": changed(GOOD.indices, 4, 3)}, r"increasing in row 3 \(2 follows 3\)"),
        # The empty row 1 must not hide a fall between rows 0 and 2 that belongs to row 2.
        ({"indptr": np.array([0, 1, 1, 3, 7], np.int32)}, r"in row 2 \(1 follows 2\)"),
    ],
)
def test_a_broken_rule_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        validate_layer(replace(GOOD, **change), source="dir/model.safetensors")
    assert str(caught.value).startswith("Layer 'p' in dir/model.safetensors is not valid: ")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"group_size": 16}, "tensors say group_size 8, quantization_config says 16"),
        ({"group_size": 8, "bits": 8}, "tensors say bits 4, quantization_config says 8"),
        ({"group_size": 8, "symmetric": True}, "say symmetric False, .* says True"),
        ({"group_size": 8, "ignore": ("p",)}, "lists it in ignore"),
        (
            {"group_size": 8, "per_layer": {"p": LayerScheme(4, 32, False, 0.5)}},
            "tensors say group_size 8, quantization_config says 32",
        ),
    ],
)
def test_a_layer_must_agree_with_the_config(config: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        validate_layer(GOOD, QuantizationConfig(**config))


def test_a_layers_own_scheme_comes_first() -> None:
    own = {"p": LayerScheme(4, 8, False, 0.1)}
    validate_layer(GOOD, QuantizationConfig(group_size=64, symmetric=True, per_layer=own))


def test_the_ratio_is_informational() -> None:
    validate_layer(GOOD, QuantizationConfig(group_size=8, ratio=0.9))
