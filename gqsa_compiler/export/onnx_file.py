"""A decoder as ONNX: token ids in, logits out, its compressed layers as they are stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from gqsa_compiler.errors import ModelError
from gqsa_compiler.export.model import CompressedModel
from gqsa_compiler.export.onnx_module import relax_to_onnx
from gqsa_compiler.export.report import ExportReport
from gqsa_compiler.frontends.torch_export import import_module
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense, to_numpy
from gqsa_compiler.models.registry import parse_config

GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
_LARGEST_BATCH, _LONGEST = 64, 4096
_PREFIX = "model."


class _Logits(nn.Module):
    """A causal language model without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        # A mask of ones: without one, transformers looks for several texts in the positions.
        mask = torch.ones_like(input_ids)
        result: Tensor = self.model(
            input_ids=input_ids, attention_mask=mask, use_cache=False
        ).logits
        return result


def write_onnx(
    model: CompressedModel, directory: Path, output: str, _dtype: str | None
) -> ExportReport:
    """Write ``input_ids`` int64 [batch, length] -> ``logits`` float32 [batch, length, V].

    There is no key/value cache in it: for evaluation and for other tools, not for fast text. What
    is not compressed is float32.

    Raises
    ------
    ModelError
        The architecture cannot be traced, or has an operator that is not written.
    """
    config = parse_config(model.source.config, model.where)
    layers = {f"{layer.name}.weight": layer for layer in model.each_layer("reading layers")}
    network = load_checkpoint_dense(model.source).float().eval().requires_grad_(False)
    longest = min(config.max_position_embeddings, _LONGEST)
    shapes = {
        0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH),
        1: torch.export.Dim("length", min=2, max=longest),
    }
    tokens = torch.zeros(2, min(8, longest), dtype=torch.int64)
    graph = import_module(_Logits(network), (tokens,), (shapes,))
    arrays = {n.removeprefix(_PREFIX): to_numpy(t) for n, t in graph.parameters.items()}
    made, used = relax_to_onnx(
        graph.mod, arrays, layers, "gqsa-compiler", sizes=graph.names, outputs=("logits",)
    )
    missing = sorted(set(model.names) - {layer.name for layer in used})
    if missing:
        raise ModelError(
            f"{model.where}: layer {missing[0]!r} does not show as a linear layer in the graph "
            "that torch.export gives, so the model cannot be written as ONNX."
        )
    path = directory / GRAPH_FILE
    onnx.save(made, str(path), save_as_external_data=True, location=DATA_FILE, size_threshold=1024)
    onnx.checker.check_model(str(path))
    model.source.save_tokenizer(directory)
    counts = Counter(f"{layer.bits}-bit codes, groups of {layer.group_size}" for layer in used)
    size = path.stat().st_size + (directory / DATA_FILE).stat().st_size
    note = "The graph has no key/value cache: every call computes all of its tokens."
    return ExportReport(output, "onnx", dict(counts), (), size, (note,))
