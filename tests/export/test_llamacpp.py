"""Exported GGUF files in llama.cpp itself, where its Python package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gqsa_compiler.checkpoint import LayerScheme
from gqsa_compiler.export import export_model
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

TOKENS = [5, 17, 40, 8, 99, 3, 250, 11]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_logits(family: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits in its products: logits are close, not equal."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    fields: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 128, "gain": 1.0}
    if family == "gemma3":
        fields["layer_types"] = ["sliding_attention", "full_attention"]
        fields["sliding_window"] = 512
    dense = make_tiny(family, tmp_path / "dense", **fields)
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    schemes = {q: LayerScheme(4, 32, True, 0.2), up: LayerScheme(4, 16, False, 0.2)}
    checkpoint = make_checkpoint(dense, tmp_path / "ckpt", group_size=32, per_layer=schemes)
    report = export_model(str(checkpoint), tmp_path / "out", "gguf", dtype="float32")
    assert set(report.layers) == {"Q4_0", "F32", "Q8_0"}
    model = llama_cpp.Llama(
        str(tmp_path / "out" / "model.gguf"), n_ctx=64, logits_all=True, verbose=False
    )
    model.eval(TOKENS)
    found = np.array(model.scores[: len(TOKENS)])
    with torch.no_grad():
        reference = load_checkpoint_dense(resolve(str(checkpoint)))
        want = reference(torch.tensor([TOKENS])).logits[0].numpy()
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert error < 0.03, error
    assert (found.argmax(axis=1) == want.argmax(axis=1)).mean() >= 0.75
