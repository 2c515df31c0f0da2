"""The Python examples of docs/modules.md run."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from gqsa_compiler.frontends.onnx.graph import OPERATORS
from tests.frontends.onnx.graphs import model, node

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "modules.md").read_text(encoding="utf-8")


def test_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.chdir(tmp_path)
    weight = {"w": np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)}
    graph = model(
        [node("MatMul", "x w", "y")], {"x": (TensorProto.FLOAT, ["batch", 64])},
        {"y": ["batch", 8]}, weight,
    )  # fmt: skip
    onnx.save(graph, "model.onnx")
    first, second = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(first, "docs/modules.md", "exec"), {})
    assert capsys.readouterr().out == "['0', '2'] ()\n(3, 32)\n"
    exec(compile(second.replace('"CKPT"', '"OTHER"'), "docs/modules.md", "exec"), {})
    assert (tmp_path / "OTHER" / "model.onnx").is_file()


def test_the_operators_are_all_listed() -> None:
    listed = set(re.findall(r"\w+", TEXT[TEXT.index("Operators: ") :].split("## ")[0]))
    assert {name for _, name in OPERATORS} <= listed
