from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.onnx.file import load_model
from gqsa_compiler.frontends.onnx.graph import import_onnx
from tests.frontends.onnx.graphs import model, node

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Cannot read"):
        load_model(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_bytes(b"\xff\xff not a model")
    with pytest.raises(ModelError, match="not an ONNX file"):
        load_model(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="has no graph"):
        load_model(tmp_path / "empty.onnx")


def test_old_operator_sets_are_refused(tmp_path: Path) -> None:
    old = model([node("Relu", "x", "y")], {"x": (FLOAT, [2])}, {"y": [2]}, opset=9)
    onnx.save(old, str(tmp_path / "old.onnx"))
    with pytest.raises(ModelError, match="operator set 9"):
        load_model(tmp_path / "old.onnx")


def _external(tmp_path: Path, **changes: str) -> Path:
    made = model(
        [node("MatMul", "x w", "y")], {"x": (FLOAT, [2, 8])}, {"y": [2, 4]},
        {"w": np.ones((8, 4), np.float32)},
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(made, str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    if changes:
        made = onnx.load(str(path), load_external_data=False)
        for entry in made.graph.initializer[0].external_data:
            entry.value = changes.get(entry.key, entry.value)
        path.write_bytes(made.SerializeToString())
    return path


def test_external_data_are_read_from_beside_the_model_only(tmp_path: Path) -> None:
    (parameter,) = import_onnx(_external(tmp_path)).parameters
    assert parameter.array is not None
    np.testing.assert_array_equal(parameter.array, np.ones((4, 8)))
    for place in ("../w.bin", "/etc/passwd", ""):
        with pytest.raises(ModelError, match="not opened"):
            import_onnx(_external(_folder(tmp_path), location=place))
    with pytest.raises(ModelError, match="too short"):
        import_onnx(_external(_folder(tmp_path), offset="4096"))
    with pytest.raises(ModelError, match="cannot be read"):
        import_onnx(_external(_folder(tmp_path), location="gone.bin"))


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / f"f{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return folder


def test_sizes_have_to_exist_and_to_be_possible() -> None:
    made = model([node("Relu", "x", "y")], {"x": (FLOAT, ["b", 2])}, {"y": ["b", 2]})
    with pytest.raises(UsageError, match="no size 'c'"):
        import_onnx(made, shapes={"c": 3})
    with pytest.raises(UsageError, match="cannot go from 3 to 2"):
        import_onnx(made, shapes={"b": (3, 2)})
    assert import_onnx(made, shapes={"b": 3}).inputs[0].shape == (3, 2)
    assert import_onnx(made, shapes={"b": (2, 3)}).inputs[0].shape == ("b", 2)


def test_operators_that_are_not_supported_are_named() -> None:
    made = model([node("NonZero", "x", "y")], {"x": (FLOAT, [4])}, {"y": None})
    with pytest.raises(ModelError, match="NonZero is not supported"):
        import_onnx(made)
    made = model(
        [node("Linear", "x", "y", domain="ai.gqsa")], {"x": (FLOAT, [4])}, {"y": None},
        domains=["ai.gqsa"],
    )  # fmt: skip
    with pytest.raises(ModelError, match="no such operator in this release"):
        import_onnx(made)


def test_shapes_that_depend_on_values_are_refused() -> None:
    made = model(
        [node("Reshape", "x s", "y")],
        {"x": (FLOAT, [4, 4]), "s": (INT64, [2])},
        {"y": None},
    )
    with pytest.raises(ModelError, match="depends on values"):
        import_onnx(made)


def test_a_missing_value_is_named() -> None:
    made = model([node("Add", "x gone", "y")], {"x": (FLOAT, [4])}, {"y": [4]})
    with pytest.raises(ModelError, match="no value 'gone'"):
        import_onnx(made)
