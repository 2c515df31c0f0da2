"""A compiled module's directory: made again in one process, overwritten, inspected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from gqsa_compiler.errors import ArtefactError, CheckpointError, ModelError, UsageError
from gqsa_compiler.inspect import inspect_path, variant_here
from gqsa_compiler.modules import compile_module, compress_onnx, is_module
from gqsa_compiler.runtime import load_module
from gqsa_compiler.runtime.manifest import MANIFEST_FILE
from tests.cli.conftest import Gqsa, gqsa  # noqa: F401 -- a fixture
from tests.frontends.onnx.graphs import model, node


def _write(path: Path, op: str) -> Path:
    """Write a graph of one operator of x [n, 4] and a matrix."""
    matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
    graph = model(
        [node("MatMul", "x w", "z"), node(op, "z", "y")],
        {"x": (TensorProto.FLOAT, ["n", 4])},
        {"y": ["n", 6]},
        {"w": matrix},
    )
    onnx.save(graph, str(path))
    return path


def test_an_artefact_made_again_runs_its_new_code(tmp_path: Path) -> None:
    """The system's loader knows libraries by name: the old code would run with new weights."""
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    z = x @ np.arange(24, dtype=np.float32).reshape(4, 6)
    compile_module(_write(tmp_path / "one.onnx", "Neg"), tmp_path / "out")
    first = load_module(tmp_path / "out", threads=1)
    np.testing.assert_allclose(first(x), -z, rtol=1e-5)
    compile_module(_write(tmp_path / "two.onnx", "Abs"), tmp_path / "out", overwrite=True)
    with load_module(tmp_path / "out", threads=1) as second:
        np.testing.assert_allclose(second(x), abs(z), rtol=1e-5)
    np.testing.assert_allclose(first(x), -z, rtol=1e-5)
    first.close()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    compile_module(_write(folder / "tiny.onnx", "Neg"), folder / "out")
    return folder / "out"


def test_a_compiled_module_is_inspected(artefact: Path, gqsa: Gqsa) -> None:  # noqa: F811
    found = inspect_path(artefact)
    assert found["format"] == "gqsa-module"
    assert variant_here(artefact) == found["variants"][0]["target"]["name"]
    printed = gqsa("inspect", artefact).out
    assert "tiny (module)" in printed
    assert "x float32 [n, 4]" in printed
    assert "y float32 [n, 6]" in printed
    assert "n 1 to 4096" in printed
    assert "w " in printed
    assert gqsa("inspect", artefact, "--json").json == found


def test_verbs_for_language_models_say_what_a_module_is(artefact: Path, gqsa: Gqsa) -> None:  # noqa: F811
    for verb in (["run", artefact, "-p", "x"], ["bench", artefact], ["chat", artefact]):
        assert "load_module" in gqsa(*verb).error


def test_a_damaged_manifest_of_a_module_is_one_sentence(artefact: Path, tmp_path: Path) -> None:
    data = json.loads((artefact / MANIFEST_FILE).read_text())
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({**data, "inputs": 3}))
    with pytest.raises(ArtefactError, match="inputs"):
        inspect_path(tmp_path)


def test_integers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """They would wrap around to other ones: token ids, for instance."""
    graph = model(
        [node("Add", "x x", "y")], {"x": (TensorProto.INT32, ["n"])}, {"y": ["n"]},
        dtypes={"y": TensorProto.INT32},
    )  # fmt: skip
    onnx.save(graph, str(tmp_path / "ints.onnx"))
    compile_module(tmp_path / "ints.onnx", tmp_path / "out")
    with load_module(tmp_path / "out", threads=1) as module:
        assert module(np.array([1, -2])).tolist() == [2, -4]
        with pytest.raises(UsageError, match="x has numbers from 3 to 4294967297, and int32 holds"):
            module(np.array([3, (1 << 32) + 1]))


def test_a_size_fixed_for_compression_stays_fixed(tmp_path: Path) -> None:
    """A graph may only be compilable with it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 8)).astype(np.float32)
    graph = model([node("MatMul", "x w", "y")], {"x": (TensorProto.FLOAT, ["n", "m", 32])},
                  {"y": ["n", "m", 8]}, {"w": weight})  # fmt: skip
    onnx.save(graph, str(tmp_path / "graph.onnx"))
    calls = [{"x": rng.standard_normal((4, 6, 32)).astype(np.float32)}]
    compress_onnx(
        tmp_path / "graph.onnx", "w4s30g16", tmp_path / "ckpt", calibration=calls,
        shapes={"n": 4, "m": (1, 9)},
    )  # fmt: skip
    compile_module(tmp_path / "ckpt", tmp_path / "out")
    with load_module(tmp_path / "out", threads=1) as module:
        assert module.inputs[0].shape == ("4", "m", "32")
        assert module(np.zeros((4, 2, 32), np.float32)).shape == (4, 2, 8)


@pytest.mark.parametrize("version", [2, 0, True, 1.0, "1", None])
def test_a_checkpoint_of_another_version(version: object, tmp_path: Path) -> None:
    """It is told what it is, and not taken for one of this version."""
    config = {"model_type": "gqsa_module", "module_version": version, "sizes": {}}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "model.onnx").touch()
    assert is_module(checkpoint)
    says = rf"config\.json has module_version {version!r}; this program reads 1\. Use the version"
    with pytest.raises(CheckpointError, match=says):
        compile_module(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "ignore", "words", "size"),
    [
        (np.float32, ("w",), r"compressed \(w: left dense on purpose", 1.0),
        (np.float16, (), "multiplies by a constant float32 matrix", 1.0),
        (np.float32, (), "weights of layer w are at most 1e-08 in size", 1e-8),
    ],
)
def test_why_nothing_is_compressed(
    dtype: type[np.floating], ignore: tuple[str, ...], words: str, size: float, tmp_path: Path
) -> None:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = model([node("MatMul", "x w", "y")], {"x": (kind, ["n", 32])}, {"y": ["n", 8]},
                  {"w": np.full((32, 8), size, dtype)}, dtypes={"y": kind})  # fmt: skip
    onnx.save(graph, str(tmp_path / "graph.onnx"))
    calls = [{"x": np.ones((4, 32), dtype)}]
    with pytest.raises(ModelError, match=words):
        compress_onnx(
            tmp_path / "graph.onnx", "w4s30g16", tmp_path / "c", calibration=calls, ignore=ignore
        )
