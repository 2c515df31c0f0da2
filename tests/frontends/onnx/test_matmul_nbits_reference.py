"""A decoder that ONNX Runtime's own quantiser has made of MatMulNBits: its text there and here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gqsa_compiler.checkpoint import to_dense
from gqsa_compiler.frontends.onnx.graph import import_onnx
from gqsa_compiler.modules import ModuleOptions, compile_module
from gqsa_compiler.runtime import load_module
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

BLOCK, LENGTH, PROMPT = 32, 32, [5, 17, 40, 8]


class Logits(nn.Module):
    """A decoder without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(input_ids)
        result: torch.Tensor = self.model(input_ids, attention_mask=mask, use_cache=False).logits
        return result


@torch.no_grad()
def to_blocks(model: nn.Module, *, symmetric: bool) -> None:
    """Move weights onto grids whose scales float16 holds, so that a quantiser finds just these."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        blocks = module.weight.view(module.out_features, -1, BLOCK)
        scales = (blocks.abs().amax(-1, keepdim=True) / 8).half().float()
        codes = torch.randint(-8, 8, blocks.shape, generator=generator)
        codes[..., 0] = -8
        if not symmetric:  # from 0 to 15 around a zero point of 7
            codes = torch.randint(0, 16, blocks.shape, generator=generator)
            codes[..., :2] = torch.tensor([0, 15])
            codes -= 7
        blocks.copy_(codes * scales)


def exported(model: nn.Module, path: Path) -> onnx.ModelProto:
    """Export with PyTorch's own exporter."""
    sizes = {0: torch.export.Dim("batch", max=2), 1: torch.export.Dim("length", max=LENGTH)}
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    torch.onnx.export(
        Logits(model), (tokens,), str(path), dynamo=True, input_names=["input_ids"],
        output_names=["logits"], dynamic_shapes=(sizes,), external_data=False, verbose=False,
    )  # fmt: skip
    return onnx.load(str(path))


def greedy(logits: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> list[int]:
    """Generate up to `LENGTH` tokens, the likeliest each time."""
    tokens = list(PROMPT)
    while len(tokens) < LENGTH:
        found = logits(np.array([tokens], np.int64))
        tokens.append(int(found[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize(
    ("symmetric", "exact"), [(True, True), (False, True), (True, False)], ids=str
)
def test_text(symmetric: bool, exact: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx needs, is not installed")
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=2)
    network = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    if exact:
        to_blocks(network, symmetric=symmetric)
    quantiser = MatMulNBitsQuantizer(
        exported(network, tmp_path / "dense.onnx"), block_size=BLOCK, is_symmetric=symmetric,
        nodes_to_exclude=["node_linear_14", "node_lm_head"],
    )  # fmt: skip
    quantiser.process()
    path = tmp_path / "model.onnx"
    quantiser.model.save_model_to_file(str(path))
    nodes = [n for n in onnx.load(str(path)).graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) in (14, 15)

    shapes = {"batch": 1, "length": (2, LENGTH)}
    graph = import_onnx(path, shapes=shapes)
    layers = [item.layer for item in graph.parameters if item.layer is not None]
    if exact:
        wanted = {
            name: module.weight.detach().numpy()
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        decoded = [to_dense(layer) for layer in layers]
        for name, weight in wanted.items():
            assert any(np.array_equal(weight, one) for one in decoded), name
        assert all(layer.symmetric == symmetric for layer in layers if layer.symmetric)
    else:
        assert layers == []
        assert len(graph.dense) == len(nodes)

    options = ModuleOptions(shapes=shapes, activations="float32")
    report = compile_module(path, tmp_path / "a", options)
    said = {item.layer: item.reason for item in report.fallbacks}
    assert all("more digits than float16" in said[name] for name, _ in graph.dense)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    reference = greedy(lambda ids: session.run(None, {"input_ids": ids})[0])
    with load_module(tmp_path / "a") as module:
        ours = greedy(lambda ids: module(input_ids=ids))
    print(reference)
    assert ours == reference
    assert len(set(ours[len(PROMPT) :])) > 4  # not one token over and over
