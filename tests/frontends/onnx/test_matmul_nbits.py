from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from gqsa_compiler.checkpoint import pack_codes, to_dense
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.onnx.graph import import_onnx
from tests.frontends.onnx.graphs import model, node

N, K, SIZE = 6, 64, 32


def _arrays(bits: int, *, zeros: bool) -> tuple[dict[str, Any], np.ndarray]:
    """Tensors of a MatMulNBits, and the weight [N, K] that they mean."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (N, K // SIZE, SIZE), np.uint8)
    points = np.full((N, K // SIZE), 1 << (bits - 1), np.uint8)
    if zeros:
        points = rng.integers(0, 1 << bits, points.shape, np.uint8)
    codes[2, 1] = points[2, 1]  # a block of zeros
    scales = rng.standard_normal(points.shape).astype(np.float16).astype(np.float32)
    weight = (codes.astype(np.float32) - points[..., None]) * scales[..., None]
    arrays = {"w": pack_codes(codes, bits), "s": scales.reshape(-1)}
    if zeros:
        arrays["z"] = pack_codes(points, bits).reshape(-1)
    return arrays, weight.reshape(N, K)


def _model(arrays: dict[str, Any], width: int, **attributes: int) -> Any:
    said = {"K": K, "N": N, "bits": width, "block_size": SIZE, **attributes}
    names = " ".join(["x", *arrays])
    nodes = [node("MatMulNBits", names, "y", domain="com.microsoft", **said)]
    inputs = {"x": (TensorProto.FLOAT, ["b", K])}
    return model(nodes, inputs, {"y": ["b", N]}, arrays, domains=["com.microsoft"])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_become_groups_bit_for_bit(bits: int, zeros: bool) -> None:
    arrays, weight = _arrays(bits, zeros=zeros)
    graph = import_onnx(_model(arrays, bits))
    (parameter,) = graph.parameters
    layer = parameter.layer
    assert layer is not None
    assert (layer.bits, layer.group_size, layer.symmetric) == (bits, SIZE, not zeros)
    np.testing.assert_array_equal(to_dense(layer), weight)
    assert layer.nnz == N * K // SIZE - 1  # the block of zeros is absent
    assert graph.dense == ()


def test_scales_beyond_float16_leave_the_layer_dense_and_exact() -> None:
    arrays, _ = _arrays(4, zeros=False)
    arrays["s"] = arrays["s"] * np.float32(1.0001)
    graph = import_onnx(_model(arrays, 4))
    ((name, reason),) = graph.dense
    assert name == "w"
    assert "float16" in reason
    (parameter,) = graph.parameters
    assert parameter.array is not None
    codes = parameter.array.reshape(N, -1, SIZE) / arrays["s"].reshape(N, -1, 1)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    arrays, _ = _arrays(4, zeros=False)
    with pytest.raises(ModelError, match="not supported"):
        import_onnx(_model(arrays, 4, bits=5))
    with pytest.raises(ModelError, match="its weights are not"):
        import_onnx(_model(arrays, 4, N=N + 1))
    short = {**arrays, "s": arrays["s"][1:]}
    with pytest.raises(ModelError, match="scales"):
        import_onnx(_model(short, 4))
    ordered = {**arrays, "z": np.zeros(0, np.uint8), "g": np.zeros(K, np.int32)}
    with pytest.raises(ModelError, match="g_idx"):
        import_onnx(_model(ordered, 4))
