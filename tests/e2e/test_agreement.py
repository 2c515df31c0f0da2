"""One checkpoint, three programs: transformers with the plug-in, ONNX Runtime, compiled code.

``GQSA_SMOLLM2`` may name a W4S30 checkpoint of SmolLM2-135M that `gqsa compress` has made; without
it groups of the demo model are dropped and rounded here.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gqsa_compiler.hf  # noqa: F401
from gqsa_compiler.compile import compile_model
from gqsa_compiler.compile_options import CompileOptions
from gqsa_compiler.evaluate import perplexity
from gqsa_compiler.export import export_model
from tests.tiny_checkpoints import make_checkpoint

pytestmark = pytest.mark.slow

CONTEXT, WINDOWS = 256, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("GQSA_SMOLLM2")
    if named:
        return Path(named)
    return make_checkpoint("smollm2-135m", tmp_path_factory.mktemp("demo") / "c", sparsity=0.3)


@pytest.fixture(scope="module")
def text(alice: Path) -> str:
    """WikiText-2 where it is, else the text of the tests."""
    return Path(os.environ.get("GQSA_WIKITEXT") or alice).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def windows(checkpoint: Path, text: str) -> npt.NDArray[np.int64]:
    """The tokens that are scored, [windows, context]."""
    tokens = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"][: WINDOWS * CONTEXT]
    return np.array(tokens, np.int64).reshape(WINDOWS, CONTEXT)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path, text: str) -> float:
    """What PyTorch computes with the decoded weights."""
    return perplexity(str(checkpoint), text, CONTEXT, limit=WINDOWS).perplexity


def score(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> float:
    """Mean negative log-likelihood of a window's tokens but the first; logits are [T, V]."""
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:-1]), torch.from_numpy(tokens[1:])
    )
    return float(losses)


def close(found: float, wanted: float, program: str) -> None:
    print(f"{program}: perplexity {found:.4f}, PyTorch on the decoded weights {wanted:.4f}")
    assert found == pytest.approx(wanted, rel=0.005)


def test_transformers(checkpoint: Path, windows: npt.NDArray[np.int64], wanted: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        found = [model(torch.from_numpy(row)[None]).logits[0].numpy() for row in windows]
    losses = [score(logits, row) for logits, row in zip(found, windows, strict=True)]
    close(math.exp(np.mean(losses)), wanted, "transformers")


def test_onnxruntime(
    checkpoint: Path, windows: npt.NDArray[np.int64], wanted: float, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    export_model(str(checkpoint), tmp_path / "onnx", "onnx")
    session = runtime.InferenceSession(
        str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    losses = [score(session.run(None, {"input_ids": row[None]})[0][0], row) for row in windows]
    close(math.exp(np.mean(losses)), wanted, "ONNX Runtime")


def test_artefact(checkpoint: Path, text: str, wanted: float, tmp_path: Path) -> None:
    options = CompileOptions(context_length=CONTEXT)
    compile_model(str(checkpoint), tmp_path / "artefact", options)
    found = perplexity(str(tmp_path / "artefact"), text, CONTEXT, limit=WINDOWS)
    close(found.perplexity, wanted, "compiled")
