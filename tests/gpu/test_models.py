"""Whole models on a GPU against PyTorch running the same decoded weights."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from tests.e2e.test_parity import relative_error
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-2
CHUNK = 16


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a compressed tiny model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = make_tiny(request.param, folder / "dense", gain=1.0)
    return make_checkpoint(dense, folder / "checkpoint")


def reference_logits(checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    """Return PyTorch's logits [tokens, V] with the decoded weights, in float32."""
    reference = load_checkpoint_dense(resolve(str(checkpoint)))
    with torch.inference_mode():
        return np.asarray(reference(torch.tensor(tokens)[None]).logits[0].float().numpy())


def test_logits_agree_with_pytorch(checkpoint: Path, arch: str) -> None:
    """Prefill in chunks, then the same tokens one by one."""
    output = checkpoint.parent / "compiled"
    gqsa_compile(
        str(checkpoint),
        output,
        target=f"cuda:{arch}",
        prefill_chunk=CHUNK,
        context_length=128,
    )
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, 3 * CHUNK + 5)
    expected = reference_logits(checkpoint, tokens)
    with runtime.load(output) as model:
        logits = np.concatenate([block.copy() for block in model.score(tokens)])
        assert relative_error(logits, expected) < TOLERANCE
        with closing(model.session()) as session:
            sequence = session.add()
            first = session.prefill(sequence, tokens[:CHUNK])
            rows = [np.array(first).reshape(-1)]
            rows += [np.array(session.decode([sequence], [int(t)]))[0] for t in tokens[CHUNK:]]
        assert relative_error(np.stack(rows), expected[CHUNK - 1 :]) < TOLERANCE


def test_greedy_text_is_the_same_twice(checkpoint: Path, arch: str) -> None:
    output = checkpoint.parent / "greedy"
    gqsa_compile(str(checkpoint), output, target=f"cuda:{arch}", context_length=128)
    prompt = [int(t) for t in np.random.default_rng(1).integers(3, VOCAB_SIZE, 9)]
    with runtime.load(output) as model:
        texts = [
            model.generate(prompt, max_tokens=48, temperature=0.0, ignore_eos=True).token_ids
            for _ in range(2)
        ]
    assert len(texts[0]) == 48
    assert texts[0] == texts[1]


def test_graphs_give_what_plain_passes_give(checkpoint: Path, arch: str) -> None:
    """Two sequences over several pages, prompts between them, which take scratch of their own."""
    output = checkpoint.parent / "graphs"
    options = {"prefill_chunk": CHUNK, "context_length": 256, "max_batch": 2}
    gqsa_compile(str(checkpoint), output, target=f"cuda:{arch}", **options)
    tokens = np.random.default_rng(3).integers(3, VOCAB_SIZE, 150)
    found: list[list[np.ndarray]] = []
    with runtime.load(output) as model:
        for captured in (True, False):
            with closing(model.session()) as session:
                if not captured:
                    session._machine.graphs = None
                assert session.can_choose([0]) == captured
                one, rows = session.add(), []
                session.prefill(one, tokens[:5])
                rows += [session.decode([one], [int(t)])[0].copy() for t in tokens[5:90]]
                two = session.add()
                session.prefill(two, tokens)
                rows += list(session.decode([one, two], tokens[:2]).copy())
                session.remove(one)
                rows += [session.decode([two], [int(t)])[0].copy() for t in tokens[:20]]
                found.append(rows)
                if captured:  # the next token, chosen there and here
                    draws = np.array([[0, 0, 1, 0, 0]], np.float32)
                    chosen = session.decode([two], [7], draws)
                    session.rewind(two, session.length(two) - 1)
                    assert chosen[0] == session.decode([two], [7])[0].argmax()
    assert relative_error(np.stack(found[0]), np.stack(found[1])) < 1e-3


@pytest.mark.slow
def test_smollm2_agrees_with_pytorch(arch: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("smollm2-135m", tmp_path / "checkpoint", sparsity=0.3)
    gqsa_compile(str(checkpoint), tmp_path / "compiled", target=f"cuda:{arch}", context_length=512)
    tokens = np.random.default_rng(2).integers(3, 49_000, 300)
    expected = reference_logits(checkpoint, tokens)
    with runtime.load(tmp_path / "compiled") as model:
        logits = np.concatenate([block.copy() for block in model.score(tokens)])
    assert relative_error(logits, expected) < TOLERANCE
