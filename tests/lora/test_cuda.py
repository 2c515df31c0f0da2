"""Adapters in a model for a GPU, under the emulation, against the one for a CPU."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from tests.e2e.cuda_emulated import emulated_gpu
from tests.lora.adapters import make_adapter
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

TOKENS = np.random.default_rng(0).integers(3, 300, 20)
pytestmark = pytest.mark.slow


def _logits(artefact: Path) -> list[Any]:
    """Return logits after a prompt and of single tokens, with the adapter and without it, mixed."""
    with runtime.load(artefact) as model, closing(model.session()) as session:
        sequences = [session.add("a"), session.add()]
        found = [np.array(session.prefill(number, TOKENS)) for number in sequences]
        for step in range(2):
            found.append(np.array(session.decode(sequences, [step + 5, step + 9])))
    return found


def test_the_emulated_model_agrees_with_the_cpu(tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    checkpoint = make_checkpoint(dense, tmp_path / "checkpoint")
    options: dict[str, Any] = {"prefill_chunk": 16, "max_batch": 2, "context_length": 64}
    options["adapters"] = {"a": make_adapter(tmp_path / "a", checkpoint)}
    gqsa_compile(str(checkpoint), tmp_path / "cpu", activations="float32", **options)
    want = _logits(tmp_path / "cpu")
    assert np.abs(want[0] - want[1]).max() > 0.1
    with emulated_gpu():
        gqsa_compile(str(checkpoint), tmp_path / "gpu", target="cuda:sm_90", **options)
        got = _logits(tmp_path / "gpu")
    for mine, theirs in zip(got, want, strict=True):
        assert np.abs(mine - theirs).max() < 0.01 * np.abs(theirs).max()
