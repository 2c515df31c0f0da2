from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import gqsa_compiler
from gqsa_compiler.checkpoint import CheckpointReader, to_dense
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.onnx.graph import import_onnx
from gqsa_compiler.modules import compress_module, is_module
from gqsa_compiler.modules.files import GRAPH_FILE
from gqsa_compiler.runtime import ArtefactError, load, load_module
from tests.modules.conftest import Made

LAYERS = ["patch", "mix", "query", "key", "value", "up", "down"]


def _decoded(made: Made) -> np.ndarray:
    """Run PyTorch with the checkpoint's decoded weights."""
    net = copy.deepcopy(made.net)
    with CheckpointReader(made.checkpoint) as reader, torch.no_grad():
        for name in reader.layer_names:
            weight = to_dense(reader.layer(name))
            target = net.get_submodule(name).weight
            if name == "mix":  # two groups: the blocks on the diagonal
                weight = np.concatenate([weight[:32, :16], weight[32:, 16:]])
            target.copy_(torch.from_numpy(weight).reshape(target.shape))
        return net(made.x).numpy()


def test_what_fits_is_compressed_and_the_rest_is_named(made: Made) -> None:
    assert sorted(layer.name for layer in made.report.layers) == sorted(LAYERS)
    dense = {layer.name: layer.reason for layer in made.report.dense}
    assert set(dense) == {"kept", "odd"}
    assert "ignore" in dense["kept"]
    assert "do not divide its 24 inputs" in dense["odd"]
    with CheckpointReader(made.checkpoint) as reader:
        assert sorted(reader.layer_names) == sorted(LAYERS)
        assert reader.quantization.ignore == ("kept",)
        assert reader.layer("up").sparsity == pytest.approx(0.3, abs=0.01)


def test_the_checkpoint_is_a_model_that_other_runtimes_read(made: Made) -> None:
    path = made.checkpoint / GRAPH_FILE
    onnx.checker.check_model(str(path))
    (result,) = ReferenceEvaluator(str(path)).run(None, {"x": made.x.numpy()})
    np.testing.assert_allclose(result, _decoded(made), rtol=1e-4, atol=1e-5)
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": made.x.numpy()})
    np.testing.assert_allclose(result, _decoded(made), rtol=1e-4, atol=1e-5)


def test_the_import_gives_the_layers_back_bit_for_bit(made: Made) -> None:
    graph = import_onnx(made.checkpoint / GRAPH_FILE)
    found = {item.layer.name: item.layer for item in graph.parameters if item.layer is not None}
    with CheckpointReader(made.checkpoint) as reader:
        assert set(found) == set(reader.layer_names)
        for name, layer in found.items():
            stored = reader.layer(name)
            for part in ("indptr", "indices", "qweight", "scales", "qzeros"):
                np.testing.assert_array_equal(getattr(layer, part), getattr(stored, part))


def test_the_compiled_module_computes_what_pytorch_does(made: Made) -> None:
    wanted = _decoded(made)
    with load_module(made.artefact) as module:
        (given,), (result,) = module.inputs, module.outputs
        assert (given.name, given.shape) == ("x", ("batch", "4", "16", "16"))
        assert (result.name, result.shape) == ("scores", ("batch", "5"))
        np.testing.assert_allclose(module(made.x.numpy()), wanted, rtol=1e-4, atol=1e-5)
        one = module(x=made.x.numpy()[2:3])
        np.testing.assert_allclose(one, wanted[2:3], rtol=1e-4, atol=1e-5)


def test_every_compressed_layer_is_on_a_sparse_kernel(made: Made) -> None:
    kernels = {use.layer: use for use in made.compiled.kernels}
    assert all("bsr" in kernels[name].kernel for name in LAYERS)
    assert {item.layer for item in made.compiled.fallbacks} == {"kept", "odd"}


def test_inputs_are_checked(made: Made) -> None:
    x = made.x.numpy()
    with load_module(made.artefact) as module:
        with pytest.raises(UsageError, match=r"takes x, each once"):
            module()
        with pytest.raises(UsageError, match=r"takes x, each once"):
            module(x, x)
        with pytest.raises(UsageError, match=r"takes x, each once"):
            module(y=x)
        with pytest.raises(UsageError, match="must be float32, not complex"):
            module(x.astype(np.complex64))
        with pytest.raises(UsageError, match="3 axes"):
            module(x[0])
        with pytest.raises(UsageError, match=r"Axis 0 .* 1 to 8"):
            module(np.concatenate([x, x]))
        with pytest.raises(UsageError, match=r"Axis 3 .* must be 16"):
            module(x[..., :8])
    with pytest.raises(UsageError, match="closed"):
        module(x)
    with pytest.raises(UsageError, match="threads"):
        load_module(made.artefact, threads=0)


def test_the_two_kinds_of_artefact_name_each_other(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="load_module"):
        load(made.artefact)
    (tmp_path / "manifest.json").write_text('{"format": "gqsa-artefact"}')
    with pytest.raises(ArtefactError, match="language model"):
        load_module(tmp_path)


def test_a_module_is_told_by_its_files(made: Made, tmp_path: Path) -> None:
    assert is_module(made.checkpoint)
    assert is_module(made.checkpoint / GRAPH_FILE)
    assert not is_module(made.artefact)
    assert not is_module(tmp_path / "none.onnx")


def test_the_public_names_take_modules(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no linear layer that is compressed"):
        gqsa_compiler.compress(nn.Sequential(nn.Linear(8, 8)), (torch.randn(1, 8),), "w4s30g16",
                               tmp_path / "c")  # fmt: skip
    with pytest.raises(UsageError, match="compress_onnx"):
        gqsa_compiler.compile(str(made.checkpoint), tmp_path / "a", recipe="w4s50g16")


def test_what_torch_cannot_export_is_named(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match=r"torch\.export cannot trace Branches"):
        compress_module(Branches(), (torch.ones(2, 16),), "w4s30g16", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_shared_weight_is_left_dense(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(32, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.inner(self.table(ids)))
            return result

    ids = torch.arange(24).reshape(4, 6)
    report = compress_module(Tied(), (ids,), "w4s30g16", tmp_path / "c", dynamic_shapes=None)
    assert [layer.name for layer in report.layers] == ["inner"]
    assert "read in another way too" in report.dense[0].reason


def test_recipes_for_decoders_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        compress_module(made.net, (made.x,), "w4s30g16", made.checkpoint)
    with pytest.raises(UsageError):
        compress_module(made.net, (made.x,), "w4s101g16", tmp_path / "c")
    with pytest.raises(UsageError, match="modules take recipes such as"):
        compress_module(made.net, (made.x,), "baseline/2of4-w4g128", tmp_path / "c")
