"""A compressed head, compiled as any other layer and compared with PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.checkpoint import LayerScheme
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from tests.e2e.test_parity import TOLERANCE, X86, relative_error
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import VOCAB_SIZE, make_tiny

CHUNK = 16
HEAD = LayerScheme(4, 32, False, 0.0)


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a compressed tiny model: Llama's head was its embedding, Qwen 3's was not."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = make_tiny(request.param, folder / "dense", gain=1.0, num_hidden_layers=2)
    return make_checkpoint(dense, folder / "checkpoint", head=HEAD)


@pytest.mark.parametrize(
    ("checkpoint", "activations", "head"),
    [
        pytest.param("qwen3", "float32", "stored", marks=pytest.mark.slow),
        pytest.param("llama", "int16", "int8", marks=X86),
        pytest.param("llama", "float32", "stored", marks=pytest.mark.slow),
        pytest.param("qwen3", "int16", "int8", marks=[X86, pytest.mark.slow]),
    ],
    indirect=["checkpoint"],
)
def test_it_runs_in_its_own_bits(checkpoint: Path, activations: str, head: str) -> None:
    output = checkpoint.parent / f"{activations}-{head}"
    report = gqsa_compile(
        str(checkpoint),
        output,
        activations=activations,
        head=head,
        no_fallback=True,
        prefill_chunk=CHUNK,
        context_length=128,
    )
    last = report.kernels[-1]
    assert (last.layer, last.weight, last.group_size, last.sparsity) == (
        "lm_head",
        "bsr-int4",
        32,
        0.0,
    )
    # The kernel of the blocks' layers, which are of 4 bits too.
    assert last.kernel == report.kernels[-2].kernel
    # Nothing is rounded, whatever was asked for: it counts as a compressed layer.
    assert report.bytes_by_kind["head"] == 0
    assert last.bytes < 0.7 * VOCAB_SIZE * last.k
    assert not report.fallbacks
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, 2 * CHUNK)
    reference = load_checkpoint_dense(resolve(str(checkpoint)))
    with torch.inference_mode():
        expected = reference(torch.tensor(tokens)[None]).logits[0].numpy()
    with runtime.load(output) as model:
        logits = np.concatenate([block.copy() for block in model.score(tokens)])
    assert relative_error(logits, expected) < TOLERANCE[activations]
