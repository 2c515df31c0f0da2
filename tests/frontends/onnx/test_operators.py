"""Operators whose corner cases were wrong or unsafe, compiled and compared with onnx's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto

from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.onnx.evaluator import evaluator
from gqsa_compiler.frontends.onnx.graph import import_onnx
from gqsa_compiler.modules import compile_module
from gqsa_compiler.runtime import load_module
from gqsa_compiler.runtime.module import Module
from tests.frontends.onnx.graphs import Shape, model, node

FLOAT, INT64, HALF = TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT16
BIG = 1 << 40
Inputs = Mapping[str, tuple[int, Shape]]


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _graph(
    nodes: Sequence[NodeProto], inputs: Inputs, arrays: Mapping[str, Any], kind: int = FLOAT
) -> ModelProto:
    return model(nodes, inputs, {"y": None}, arrays, dtypes={"y": kind})


def _compiled(graph: ModelProto, folder: Path) -> Module:
    onnx.save(graph, str(folder / "graph.onnx"))
    compile_module(folder / "graph.onnx", folder / "out")
    return load_module(folder / "out", threads=1)


ROWS: Inputs = {"x": (FLOAT, ["n", 4])}
INTS: Inputs = {"x": (INT64, ["n"]), "d": (INT64, ["n"])}
IMAGE: Inputs = {"x": (FLOAT, [1, 2, 6, 6])}


def _slice(start: int, end: int) -> dict[str, Any]:
    return {"s": np.array([start]), "e": np.array([end]), "a": np.array([0])}


@dataclass(frozen=True)
class Case:
    """Nodes that compute `y`, what they read, and an input for each of two calls."""

    nodes: Sequence[NodeProto]
    inputs: Inputs
    arrays: Mapping[str, Any]
    kind: int
    calls: Sequence[Mapping[str, np.ndarray]]

    def renamed(self, prefix: str) -> list[NodeProto]:
        """Return the nodes with other names, so that many cases fit in one graph."""
        nodes = []
        for given in self.nodes:
            one = NodeProto()
            one.CopyFrom(given)
            one.input[:] = [name and f"{prefix}.{name}" for name in given.input]
            one.output[:] = [f"{prefix}.{name}" for name in given.output]
            one.name = f"{prefix}.{given.name}"
            nodes.append(one)
        return nodes


HALVES = {"w": _x(40, 3).astype(np.float16), "b": _x(3).astype(np.float16)}
CASES = {
    "slice from before the start": Case(
        [node("Slice", "x s e a", "y")], {"x": (FLOAT, ["n", 4])}, _slice(-5, BIG), FLOAT,
        [{"x": _x(1, 4)}, {"x": _x(7, 4)}]),
    "slice that ends before it starts": Case(
        [node("Slice", "x s e a", "y")], {"x": (FLOAT, ["o", 4])}, _slice(2, -2), FLOAT,
        [{"x": _x(3, 4)}, {"x": _x(7, 4)}]),
    "division towards zero": Case(
        [node("Div", "x d", "y")], {"x": (INT64, [4]), "d": (INT64, [4])}, {}, INT64,
        [{"x": np.array([7, -7, -8, -9]), "d": np.array([2, 2, 2, -1])},
         {"x": np.array([7, -7, -8, 0]), "d": np.array([-2, -2, -2, 5])}]),
    "division by a constant": Case(
        [node("Div", "x two", "y")], {"x": (INT64, [3])}, {"two": np.array(-2)}, INT64,
        [{"x": np.array([7, -7, 0])}]),
    "remainder": Case(
        [node("Mod", "x d", "y")], {"x": (INT64, [3]), "d": (INT64, [3])}, {}, INT64,
        [{"x": np.array([7, -7, -8]), "d": np.array([2, 2, -3])}]),
    "remainder with the sign of what is divided": Case(
        [node("Mod", "x d", "y", fmod=1)], {"x": (INT64, [3]), "d": (INT64, [3])}, {}, INT64,
        [{"x": np.array([7, -7, -8]), "d": np.array([2, 2, -3])}]),
    "remainder of floats": Case(
        [node("Mod", "x d", "y", fmod=1)], {"x": (FLOAT, [3]), "d": (FLOAT, [3])}, {}, FLOAT,
        [{"x": np.float32([7.5, -7.5, -8]), "d": np.float32([2, 2, -3])}]),
    "no axes are all axes": Case(
        [node("ReduceSum", "x a", "y")], {"x": (FLOAT, [3, 4])}, {"a": np.array([], np.int64)},
        FLOAT, [{"x": _x(3, 4)}]),
    "no axes are no reduction": Case(
        [node("ReduceSumSquare", "x", "y", noop_with_empty_axes=1)], {"x": (FLOAT, [3, 4])}, {},
        FLOAT, [{"x": _x(3, 4)}]),
    "pooling with gaps": Case(
        [node("MaxPool", "x", "y", kernel_shape=[2, 2], dilations=[2, 2])],
        {"x": (FLOAT, [1, 2, 6, 6])}, {}, FLOAT, [{"x": _x(1, 2, 6, 6)}]),
    "infinities of one sign": Case(
        [node("IsInf", "x", "z", detect_negative=0), node("Cast", "z", "y", to=FLOAT)],
        {"x": (FLOAT, [4])}, {}, FLOAT, [{"x": np.float32([np.inf, -np.inf, 0, np.nan])}]),
    "integers clipped at one end": Case(
        [node("Clip", "x - h", "y")], {"x": (INT64, [3])}, {"h": np.array(3)}, INT64,
        [{"x": np.array([-9, 2, 9])}]),
    "running sum": Case(
        [node("CumSum", "x a", "y")], {"x": (INT64, [2, "m"])}, {"a": np.array(1)}, INT64,
        [{"x": np.arange(70).reshape(2, 35)}, {"x": np.arange(2).reshape(2, 1)}]),
    "running sum before": Case(
        [node("CumSum", "x a", "y", exclusive=1)], {"x": (FLOAT, [6, 4])}, {"a": np.array(-2)},
        FLOAT, [{"x": _x(6, 4)}]),
    "softplus": Case(
        [node("Softplus", "x", "a"), node("Mish", "x", "b"), node("Add", "a b", "y")],
        {"x": (FLOAT, [4])}, {}, FLOAT, [{"x": np.float32([100, -100, 0, 3])}]),
    "dropout": Case(
        [node("Dropout", "x", "y")], {"x": (FLOAT, [4])}, {}, FLOAT, [{"x": _x(4)}]),
    "a bias for each row": Case(
        [node("Gemm", "x w b", "y")], {"x": (FLOAT, [3, 4])}, {"w": _x(4, 3), "b": _x(3, 1)},
        FLOAT, [{"x": _x(3, 4)}]),
    "half precision": Case(
        [node("Gemm", "x w b", "y")], {"x": (HALF, [3, 40])}, HALVES, HALF,
        [{"x": _x(3, 40).astype(np.float16)}]),
    "two sizes of nearly one name": Case(
        [node("Concat", "x z", "y", axis=0)],
        {"x": (FLOAT, ["a b", 4]), "z": (FLOAT, ["a_b", 4])}, {}, FLOAT,
        [{"x": _x(2, 4), "z": _x(3, 4)}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Any, Any]]]:
    """Compile all cases as one graph; return what each of two calls gives, and should give."""
    nodes: list[NodeProto] = []
    inputs: dict[str, tuple[int, Shape]] = {}
    arrays: dict[str, Any] = {}
    for name, case in CASES.items():
        nodes += case.renamed(name)
        inputs |= {f"{name}.{key}": value for key, value in case.inputs.items()}
        arrays |= {f"{name}.{key}": value for key, value in case.arrays.items()}
    outputs = {f"{name}.y": None for name in CASES}
    dtypes = {f"{name}.y": case.kind for name, case in CASES.items()}
    graph = model(nodes, inputs, outputs, arrays, dtypes=dtypes)
    found = []
    with _compiled(graph, tmp_path_factory.mktemp("operators")) as module:
        for number in (0, -1):
            call = {
                f"{name}.{key}": value
                for name, case in CASES.items()
                for key, value in case.calls[number].items()
            }
            pairs = zip(module(**call), evaluator(graph).run(None, call), strict=True)
            found.append(dict(zip(CASES, pairs, strict=True)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_as_onnx_computes_it(name: str, results: list[dict[str, tuple[Any, Any]]]) -> None:
    for call in results:
        found, wanted = call[name]
        assert found.dtype == wanted.dtype
        tolerance = 1e-2 if wanted.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_a_division_by_zero_does_not_end_the_process(tmp_path: Path) -> None:
    graph = _graph([node("Div", "x d", "a"), node("Mod", "x d", "b"), node("Add", "a b", "y")],
                   INTS, {}, INT64)  # fmt: skip
    with _compiled(graph, tmp_path) as module:
        low = np.iinfo(np.int64).min
        assert module(np.array([5, low, 6]), np.array([0, -1, 4]))[2] == 3


@pytest.mark.parametrize(
    ("nodes", "inputs", "arrays", "good", "bad"),
    [
        pytest.param([node("Reshape", "x s", "y")], ROWS, {"s": np.array([-1, 8])}, 4, 5, id="-1"),
        pytest.param([node("Reshape", "x s", "y")], ROWS, {"s": np.array([2, 8])}, 4, 8, id="2x8"),
        pytest.param([node("Transpose", "x", "t", perm=[1, 0]), node("MatMul", "t w", "y")],
                     ROWS, {"w": _x(3, 5)}, 3, 4, id="features"),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_fit_stops_the_module(
    nodes: Sequence[NodeProto],
    inputs: Inputs,
    arrays: Mapping[str, Any],
    good: int,
    bad: int,
    tmp_path: Path,
) -> None:
    """It would read beyond the tensor, or leave a part of it out."""
    graph = _graph(nodes, inputs, arrays)
    with _compiled(graph, tmp_path) as module:
        x = _x(good, 4)
        np.testing.assert_allclose(module(x), evaluator(graph).run(None, {"x": x})[0], rtol=1e-4)
        with pytest.raises(UsageError, match=rf"x \[{bad}, 4\]\): a shape inside it does not"):
            module(_x(bad, 4))


def test_sizes_of_two_inputs_that_have_to_be_the_same(tmp_path: Path) -> None:
    """Nothing in the graph says so; TVM would read beyond the smaller tensor."""
    nodes = [
        node("Shape", "z", "s"),
        node("Expand", "x s", "a"),
        node("Transpose", "x", "t", perm=[1, 0]),
        node("MatMul", "t z", "b"),
        node("ReduceSum", "b", "c"),
        node("Add", "a c", "y"),
    ]
    graph = _graph(nodes, {"x": (FLOAT, ["n", 4]), "z": (FLOAT, ["m", 4])}, {})
    with _compiled(graph, tmp_path) as module:
        call = {"x": _x(3, 4), "z": _x(3, 4)}
        (wanted,) = evaluator(graph).run(None, call)
        np.testing.assert_allclose(module(**call), wanted, rtol=1e-4)
        for count in (2, 4):
            with pytest.raises(UsageError, match="a shape inside it does not follow"):
                module(_x(3, 4), _x(count, 4))


@pytest.mark.parametrize(
    ("nodes", "inputs", "arrays", "words"),
    [
        ([node("GatherElements", "x i", "y", axis=1)],
         {"x": (FLOAT, [2, 4]), "i": (INT64, [3, 4])}, {}, "more places than the data"),
        ([node("Gather", "x i", "y", axis=1)], ROWS, {"i": np.array(4)}, "no place 4 among 4"),
        ([node("ArgMax", "x", "y", select_last_index=1)], ROWS, {}, "only the first"),
        ([node("CumSum", "x a", "y", reverse=1)], ROWS, {"a": np.array(1)}, "from the end"),
        ([node("Pow", "x x", "y")], {"x": (INT64, ["n"])}, {}, "powers of int64"),
        ([node("Dropout", "x r t", "y")], ROWS, {"r": np.float32(0.5), "t": np.array(True)},
         "training_mode is set"),
        ([node("BatchNormalization", "x w w w w", "y", training_mode=1)], ROWS, {"w": _x(4)},
         "training_mode is set"),
        ([node("Cast", "x", "b", to=TensorProto.BOOL), node("ReduceMax", "b", "y")], ROWS, {},
         "truth values"),
        ([node("Shape", "x", "s"), node("Div", "s o", "y")], ROWS, {"o": np.array([0, 1])},
         "cannot be imported: .*[Dd]ivi"),
        ([node("Shape", "x", "s"), node("Gather", "s i", "y")], ROWS, {"i": np.array(9)},
         "Gather_y.* cannot be imported"),
        ([node("Cast", "x", "y")], ROWS, {}, "Cast_y.* cannot be imported: it lacks 'to'"),
        ([node("Transpose", "w", "y", perm=[0, 0, 7])], ROWS, {"w": _x(4, 4)}, "cannot be import"),
        ([node("Expand", "w s", "y")], ROWS, {"w": _x(1), "s": np.array([BIG])}, "too large"),
        ([node("MatMul", "w v", "y")], ROWS, {"w": _x(100000, 1), "v": _x(1, 100000)}, "too large"),
        ([node("Range", "a b c", "y")], ROWS, {"a": np.array(0), "b": np.array(BIG),
                                               "c": np.array(1)}, "too large"),
        ([node("Identity", "w", "y")], ROWS, {"w": np.array(["a", "b"], object)}, "texts are not"),
        ([node("Relu", "x", "y"), node("Neg", "x", "y")], ROWS, {}, "which is there already"),
        ([node("Relu", "z", "y"), node("Neg", "y", "z")], ROWS, {}, "no value 'z'"),
        ([node("Cast", "x", "y", to=TensorProto.BFLOAT16)], ROWS, {}, "output 'y' is bfloat16"),
        ([node("Neg", "x", "y")], {"x": (TensorProto.BFLOAT16, [4])}, {}, "input 'x' is bfloat16"),
        ([node("Neg", "w", "y")], {}, {"w": _x(4)}, "has no inputs"),
        ([node("Ne\ng", "x", "y")], ROWS, {}, r"node 0 names the operator 'Ne\\ng'"),
        ([node("Add", "w v", "y")], ROWS, {"w": _x(4), "v": _x(3)}, "Add_y.* cannot be computed"),
    ],
)  # fmt: skip
def test_refused_in_a_sentence(
    nodes: Sequence[NodeProto],
    inputs: Inputs,
    arrays: Mapping[str, Any],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ModelError, match=words) as found:
        import_onnx(_graph(nodes, inputs, arrays))
    assert "\n" not in str(found.value)
    del found
    assert "BlockBuilder" not in capfd.readouterr().err
