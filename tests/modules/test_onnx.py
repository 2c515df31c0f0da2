from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from gqsa_compiler.errors import CompileError, ModelError, UsageError
from gqsa_compiler.modules import ModuleOptions, compile_module, compress_onnx
from gqsa_compiler.modules.files import GRAPH_FILE
from gqsa_compiler.runtime import load_module
from tests.frontends.onnx.graphs import model, node

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
HEADS, WIDTH, WORDS = 2, 32, 50


def _encoder() -> onnx.ModelProto:
    """A block of an encoder: embedding, attention with a mask, a norm, a gated MLP by Gemm."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    arrays: dict[str, Any] = {
        "table": weights(WORDS, WIDTH) * 7,
        "q": weights(WIDTH, WIDTH), "k.weight": weights(WIDTH, WIDTH), "v": weights(WIDTH, WIDTH),
        "q.bias": weights(WIDTH),
        "norm.weight": np.abs(weights(WIDTH)), "norm.bias": weights(WIDTH),
        "up": weights(64, WIDTH), "up.bias": weights(64), "down": weights(64, WIDTH),
        "small": weights(WIDTH, 3),
        "scale": np.float32(0.25), "never": np.float32(-1e9), "nothing": np.float32(0),
        "split": np.array([0, 0, HEADS, -1]), "joined": np.array([0, 0, WIDTH]),
        "rows": np.array([-1, WIDTH]), "one": np.array([1]), "two": np.array([2]),
        "code_scale": np.float32(0.05), "code_zero": np.uint8(128),
    }  # fmt: skip
    nodes = [
        node("Gather", "table ids", "e"),
        node("MatMul", "e q", "q0"),
        node("Add", "q0 q.bias", "q1"),
        node("Transpose", "k.weight", "kt", perm=[1, 0]),
        node("MatMul", "e kt", "k1"),
        node("MatMul", "e v", "v1"),
    ]
    for name in "qkv":
        nodes += [
            node("Reshape", f"{name}1 split", f"{name}2"),
            node("Transpose", f"{name}2", f"{name}3", perm=[0, 2, 3, 1] if name == "k" else
                 [0, 2, 1, 3]),
        ]  # fmt: skip
    nodes += [
        node("MatMul", "q3 k3", "s0"),
        node("Mul", "s0 scale", "s1"),
        node("Cast", "mask", "seen", to=TensorProto.BOOL),
        node("Unsqueeze", "seen one", "seen1"),
        node("Unsqueeze", "seen1 two", "seen2"),
        node("Where", "seen2 nothing never", "bias"),
        node("Add", "s1 bias", "s2"),
        node("Softmax", "s2", "s3", axis=-1),
        node("MatMul", "s3 v3", "a0"),
        node("Transpose", "a0", "a1", perm=[0, 2, 1, 3]),
        node("Reshape", "a1 joined", "a2"),
        node("Add", "a2 e", "r0"),
        node("LayerNormalization", "r0 norm.weight norm.bias", "r1", axis=-1),
        node("Reshape", "r1 rows", "flat"),
        node("Gemm", "flat up up.bias", "u0", transB=1),
        node("Sigmoid", "u0", "u1"),
        node("Mul", "u0 u1", "u2"),
        node("Shape", "r1", "size"),
        node("MatMul", "u2 down", "d0"),
        node("Reshape", "d0 size", "d1"),
        node("Add", "d1 r1", "d2"),
        node("ReduceMean", "d2 one", "m0", keepdims=0),
        node("QuantizeLinear", "m0 code_scale code_zero", "m1"),
        node("DequantizeLinear", "m1 code_scale code_zero", "m2"),
        node("MatMul", "m2 small", "y"),
    ]
    inputs = {"ids": (INT64, ["b", "t"]), "mask": (INT64, ["b", "t"])}
    return model(nodes, inputs, {"y": ["b", 3]}, arrays)


def _inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    mask = np.ones((batch, length), np.int64)
    mask[0, length // 2 :] = 0
    return {"ids": rng.integers(0, WORDS, (batch, length)), "mask": mask}


SHAPES = {"b": (1, 4), "t": (2, 20)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    onnx.save(_encoder(), str(folder / "encoder.onnx"))
    report = compress_onnx(
        folder / "encoder.onnx", "w4s30g16", folder / "checkpoint",
        calibration=[_inputs(4, 20), _inputs(3, 9)], shapes=SHAPES, ignore=("small",),
    )  # fmt: skip
    assert [layer.name for layer in report.layers] == ["q", "k", "v", "up", "down"]
    assert [layer.name for layer in report.dense] == ["small"]
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def artefact(checkpoint: Path) -> Path:
    place = checkpoint.parent / "artefact"
    report = compile_module(checkpoint, place, ModuleOptions(activations="float32"))
    assert [item.layer for item in report.fallbacks] == ["small"]
    return place


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (2, 7), (4, 20)])
def test_the_compiled_graph_computes_what_the_evaluator_does(
    checkpoint: Path, artefact: Path, batch: int, length: int
) -> None:
    inputs = _inputs(batch, length)
    (wanted,) = ReferenceEvaluator(str(checkpoint / GRAPH_FILE)).run(None, inputs)
    with load_module(artefact) as module:
        result = module(**inputs)
    # The graph rounds to steps of 0.05, and a value between two may go either way.
    np.testing.assert_allclose(result, wanted, atol=0.06)
    assert np.median(np.abs(result - wanted)) < 1e-5


def test_the_compressed_graph_is_close_to_the_dense_one(checkpoint: Path) -> None:
    inputs = _inputs(4, 20)
    (dense,) = ReferenceEvaluator(_encoder()).run(None, inputs)
    (sparse,) = ReferenceEvaluator(str(checkpoint / GRAPH_FILE)).run(None, inputs)
    assert 0 < np.linalg.norm(sparse - dense) < 0.5 * np.linalg.norm(dense)


def test_sizes_of_inputs_that_share_a_name_have_to_agree(artefact: Path) -> None:
    inputs = {**_inputs(2, 7), "mask": np.ones((2, 6), np.int64)}
    with load_module(artefact) as module:
        with pytest.raises(UsageError, match="Axis 1 of input mask has size 6; it must be 7"):
            module(**inputs)
        with pytest.raises(UsageError, match="Axis 1 of input ids has size 21; it must be 2 to 20"):
            module(**_inputs(2, 21))


def test_a_size_can_be_fixed_and_no_fallback_names_dense_layers(tmp_path: Path) -> None:
    onnx.save(_encoder(), str(tmp_path / "m.onnx"))
    options = ModuleOptions(shapes={"b": 1, "t": 8}, no_fallback=True)
    with pytest.raises(CompileError, match="stayed dense"):
        compile_module(tmp_path / "m.onnx", tmp_path / "a", options)
    assert not (tmp_path / "a").exists()


def test_blocks_that_had_to_be_decoded_are_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.integers(0, 256, (8, 2, 16), np.uint8),
        "s": (rng.random(16) / 8).astype(np.float32),  # more digits than float16
    }
    said = {"K": 64, "N": 8, "bits": 4, "block_size": 32}
    nodes = [node("MatMulNBits", "x w s", "y", domain="com.microsoft", **said)]
    graph = model(nodes, {"x": (FLOAT, [3, 64])}, {"y": [3, 8]}, arrays, domains=["com.microsoft"])
    onnx.save(graph, str(tmp_path / "m.onnx"))
    report = compile_module(tmp_path / "m.onnx", tmp_path / "a")
    (fallback,) = report.fallbacks
    assert fallback.layer == "w"
    assert fallback.reason == "decoded: its scales have more digits than float16"


def test_bad_requests_are_named(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(_encoder(), str(path))
    with pytest.raises(UsageError, match="no calibration inputs"):
        compress_onnx(path, "w4s30g16", tmp_path / "c", calibration=[])
    with pytest.raises(UsageError, match="call 1: the graph takes ids, mask, each once"):
        compress_onnx(path, "w4s30g16", tmp_path / "c", calibration=[{"ids": np.zeros((1, 2))}])
    beyond = {**_inputs(1, 4), "ids": np.full((1, 4), WORDS)}
    with pytest.raises(ModelError, match="cannot run on the calibration inputs"):
        compress_onnx(path, "w4s30g16", tmp_path / "c", calibration=[beyond])
    with pytest.raises(ModelError, match="no linear layer"):
        compress_onnx(path, "w4s30g16", tmp_path / "c", calibration=[_inputs(1, 4)], ignore=("*",))
    with pytest.raises(UsageError, match="neither an ONNX file nor a module checkpoint"):
        compile_module(tmp_path, tmp_path / "a")
    with pytest.raises(UsageError, match="one CPU target at a time"):
        compile_module(path, tmp_path / "a", ModuleOptions(target="x86-64-v3,x86-64-v4"))
    with pytest.raises(UsageError, match="Unknown activations"):
        compile_module(path, tmp_path / "a", ModuleOptions(activations="int7"))
    with pytest.raises(UsageError, match="exists"):
        compile_module(path, checkpoint)
