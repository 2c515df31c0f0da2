"""Weights that several layers share: one stored copy, one packed copy, or dense with a reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from gqsa_compiler.checkpoint import CheckpointReader, to_dense
from gqsa_compiler.modules import ModuleOptions, compile_module, compress_module, compress_onnx
from gqsa_compiler.modules.files import GRAPH_FILE
from gqsa_compiler.runtime import load_module
from gqsa_compiler.runtime.module_manifest import ModuleManifest
from tests.frontends.onnx.graphs import model, node


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


class Shared(nn.Module):
    """Three blocks: the first runs twice, and the third one has the first one's weights."""

    def __init__(self) -> None:
        super().__init__()
        first, third = Block(), Block()
        third.up.weight, third.down.weight = first.up.weight, first.down.weight
        self.blocks = nn.ModuleList([first, first, third])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


NAMES = ["blocks.0.down", "blocks.0.up"]


def check_copies(checkpoint: Path, artefact: Path, names: list[str]) -> None:
    """One copy of each layer is stored, and one is packed."""
    with CheckpointReader(checkpoint) as reader:
        assert sorted(reader.layer_names) == names
        assert not [name for name in reader.tensor_names if name.endswith("weight")]
    graph = onnx.load(str(checkpoint / GRAPH_FILE), load_external_data=False).graph
    stored = Counter(item.name for item in graph.initializer)
    assert all(stored[f"{name}.qweight"] == 1 for name in names)
    assert max(stored.values()) == 1
    packed = Counter(
        parameter.name.rpartition(".")[2]
        for parameter in ModuleManifest.read(artefact).parameters
        if any(parameter.name.startswith(name) for name in names)
    )
    assert packed
    assert set(packed.values()) == {len(names)}


def test_shared_blocks_are_compressed_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Shared().eval(), torch.randn(64, 32)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    report = compress_module(net, (x,), "w4s30g16", tmp_path / "c", dynamic_shapes=shapes)
    assert sorted(layer.name for layer in report.layers) == NAMES
    assert report.shared == {"blocks.2.up": "blocks.0.up", "blocks.2.down": "blocks.0.down"}
    assert report.dense == ()
    options = ModuleOptions(activations="float32", no_fallback=True)
    compiled = compile_module(tmp_path / "c", tmp_path / "a", options)
    assert all("bsr" in use.kernel for use in compiled.kernels)
    check_copies(tmp_path / "c", tmp_path / "a", NAMES)
    with CheckpointReader(tmp_path / "c") as reader, torch.no_grad():
        for name in NAMES:
            weight = torch.from_numpy(to_dense(reader.layer(name)))
            net.get_submodule(name).weight.copy_(weight)
        wanted = net(x).numpy()
    with load_module(tmp_path / "a") as module:
        np.testing.assert_allclose(module(x.numpy()), wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_on_purpose_dense_keeps_those_that_share_its_weight_dense(tmp_path: Path) -> None:
    net, x = Shared().eval(), torch.randn(8, 32)
    report = compress_module(net, (x,), "w4s30g16", tmp_path / "c", ignore=("blocks.2.up",))
    assert [layer.name for layer in report.layers] == ["blocks.0.down"]
    assert {layer.name for layer in report.dense} == {"blocks.0.up", "blocks.2.up"}


def test_convolutions_that_share_a_filter_stay_dense(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv1d(32, 32, 1), nn.Conv1d(32, 32, 1), nn.Conv1d(32, 32, 1))
    net[2].weight = net[0].weight
    report = compress_module(net.eval(), (torch.randn(2, 32, 8),), "w4s30g16", tmp_path / "c")
    assert [layer.name for layer in report.layers] == ["1"]
    assert all("read in another way too" in layer.reason for layer in report.dense)


def _graph() -> onnx.ModelProto:
    """A matrix of two products, one of two that read it in both directions, and a tied one."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((32, 32)).astype(np.float32) / 6,
        "both": rng.standard_normal((32, 32)).astype(np.float32) / 6,
        "table": rng.standard_normal((40, 32)).astype(np.float32),
        "bias": rng.standard_normal(32).astype(np.float32),
    }
    nodes = [
        node("Gather", "table ids", "x"),
        node("MatMul", "x w", "a"),
        node("Relu", "a", "b"),
        node("Gemm", "b w bias", "c"),
        node("MatMul", "c both", "d"),
        node("Gemm", "d both bias", "e", transB=1),
        node("Transpose", "table", "head", perm=[1, 0]),
        node("MatMul", "e head", "y"),
    ]
    return model(nodes, {"ids": (TensorProto.INT64, ["n"])}, {"y": ["n", 40]}, arrays)


def test_a_matrix_of_several_products_in_onnx(tmp_path: Path) -> None:
    onnx.save(_graph(), str(tmp_path / "m.onnx"))
    ids = {"ids": np.arange(40)}
    report = compress_onnx(
        tmp_path / "m.onnx", "w4s30g16", tmp_path / "c", calibration=[ids], shapes={"n": (1, 64)}
    )
    assert [layer.name for layer in report.layers] == ["w"]
    assert {layer.name for layer in report.dense} == {"both", "table"}
    assert all("read in another way too" in layer.reason for layer in report.dense)
    compiled = compile_module(tmp_path / "c", tmp_path / "a", ModuleOptions(activations="float32"))
    sparse = [use for use in compiled.kernels if "bsr" in use.kernel]
    assert {use.layer for use in sparse} == {"w"}
    graph = onnx.load(str(tmp_path / "c" / GRAPH_FILE), load_external_data=False).graph
    names = [item.name for item in graph.initializer]
    assert names.count("w.qweight") == 1
    assert "w" not in names
    (wanted,) = ReferenceEvaluator(str(tmp_path / "c" / GRAPH_FILE)).run(None, ids)
    with load_module(tmp_path / "a") as module:
        np.testing.assert_allclose(module(**ids), wanted, rtol=1e-4, atol=1e-4)
    packed = [p.shape for p in ModuleManifest.read(tmp_path / "a").parameters]
    assert packed.count((40, 32)) == 1


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(64, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.head(self.inner(self.table(ids)))
            return result

    compress_module(Tied().eval(), (torch.arange(24),), "w4s30g16", tmp_path / "c")
    with CheckpointReader(tmp_path / "c") as reader:
        assert len([n for n in reader.tensor_names if reader.shape_dtype(n)[0] == (64, 32)]) == 1
