"""An encoder and a vision model of transformers, small and random, from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from gqsa_compiler.checkpoint import CheckpointReader, to_dense
from gqsa_compiler.modules import ModuleOptions, compile_module, compress_module
from gqsa_compiler.runtime import load_module

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Last(nn.Module):
    """A model's last hidden state, by the names of its inputs."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model.eval(), names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return float32 [batch, length, 64]."""
        result: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state
        return result


def _bert() -> tuple[nn.Module, tuple[Tensor, ...], Any]:
    config = BertConfig(**SIZES, intermediate_size=128, vocab_size=100, max_position_embeddings=40)
    ids = torch.randint(0, 100, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch, length = (
        torch.export.Dim("batch", min=1, max=4),
        torch.export.Dim("length", min=2, max=32),
    )
    shapes = (({0: batch, 1: length},) * 2,)
    module = Last(BertModel(config, add_pooling_layer=False), "input_ids", "attention_mask")
    return module, (ids, mask), shapes


def _vit() -> tuple[nn.Module, tuple[Tensor, ...], Any]:
    config = ViTConfig(**SIZES, intermediate_size=128, image_size=32, patch_size=8)
    module = Last(ViTModel(config, add_pooling_layer=False), "pixel_values")
    return module, (torch.randn(4, 3, 32, 32),), (({0: torch.export.Dim("batch", min=1, max=4)},),)


@pytest.mark.parametrize("make", [_bert, _vit])
def test_a_model_of_transformers(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs, shapes = make()
    report = compress_module(module, inputs, "w4s30g16", tmp_path / "c", dynamic_shapes=shapes)
    assert len(report.layers) >= 12
    assert report.dense == ()
    compiled = compile_module(
        tmp_path / "c", tmp_path / "a", ModuleOptions(activations="float32", no_fallback=True)
    )
    assert all("bsr" in use.kernel for use in compiled.kernels)
    with CheckpointReader(tmp_path / "c") as reader, torch.no_grad():
        for name in reader.layer_names:
            weight = module.get_submodule(name).weight
            weight.copy_(torch.from_numpy(to_dense(reader.layer(name))).reshape(weight.shape))
        wanted = module(*inputs).numpy()
    with load_module(tmp_path / "a") as loaded:
        result = loaded(*(tensor.numpy() for tensor in inputs))
    np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=1e-4)
