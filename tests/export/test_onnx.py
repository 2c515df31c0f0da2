from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from gqsa_compiler.checkpoint import CheckpointReader
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export import export_model
from gqsa_compiler.export.onnx_module import relax_to_onnx
from gqsa_compiler.frontends.onnx.graph import import_onnx
from gqsa_compiler.frontends.torch_export import import_module
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    dense = make_tiny("llama", folder / "dense", num_hidden_layers=1)
    checkpoint = make_checkpoint(dense, folder / "checkpoint")
    report = export_model(str(checkpoint), folder / "onnx", "onnx")
    assert report.exact
    assert sum(report.layers.values()) == 7
    return checkpoint, folder / "onnx" / "model.onnx"


def test_the_graph_gives_the_logits_of_the_decoded_checkpoint(exported: tuple[Path, Path]) -> None:
    checkpoint, path = exported
    onnx.checker.check_model(str(path))
    with CheckpointReader(checkpoint) as reader:
        model = load_checkpoint_dense(reader).float().eval()
    tokens = torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(tokens).logits.numpy()
    (result,) = ReferenceEvaluator(str(path)).run(None, {"input_ids": tokens.numpy()})
    np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=1e-4)
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"input_ids": tokens.numpy()})
    np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=1e-4)


def test_the_layers_come_back_bit_for_bit(exported: tuple[Path, Path]) -> None:
    checkpoint, path = exported
    graph = import_onnx(path, shapes={"batch": (1, 2), "length": (2, 16)})
    found = {item.layer.name: item.layer for item in graph.parameters if item.layer is not None}
    with CheckpointReader(checkpoint) as reader:
        assert set(found) == set(reader.layer_names)
        for name, layer in found.items():
            stored = reader.layer(name)
            for part in ("indptr", "indices", "qweight", "scales"):
                np.testing.assert_array_equal(getattr(layer, part), getattr(stored, part))


def _exported(function: Any, *inputs: torch.Tensor) -> Any:
    class Module(torch.nn.Module):
        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = function(*arguments)
            return result

    return import_module(Module(), inputs)


def test_operators_without_a_counterpart_are_named() -> None:
    graph = _exported(lambda x: x.sort()[0], torch.randn(4, 8))
    with pytest.raises(ModelError, match="cannot be written as ONNX"):
        relax_to_onnx(graph.mod, {}, {}, "test")


def test_operators_compute_what_pytorch_does() -> None:
    def function(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        a, b = x.split([3, 5], dim=-1)
        a = torch.cat([a.rsqrt(), b.square().clamp(0.1)], -1)
        a = torch.where(a > 0.5, a, torch.zeros_like(a)) + x.mean(-1, keepdim=True)
        a = a[1:].cumsum(0)[:, ids]
        return torch.nn.functional.silu(a).sum(1) + torch.tril(a).sum(-1)

    x, ids = torch.rand(4, 8) + 0.1, torch.tensor([0, 3, 5, 2])
    graph = _exported(function, x, ids)
    model, _ = relax_to_onnx(graph.mod, {}, {}, "test")
    onnx.checker.check_model(model, full_check=True)
    feeds = dict(zip(graph.inputs, (x.numpy(), ids.numpy()), strict=True))
    (result,) = ReferenceEvaluator(model).run(None, feeds)
    np.testing.assert_allclose(result, function(x, ids).numpy(), rtol=1e-5)
