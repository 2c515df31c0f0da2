"""Compiled models against PyTorch running the same decoded weights, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from gqsa_compiler.schedules.activations import default_activations
from gqsa_compiler.targets import parse_target
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny

# The x86 kernels for int16 pack scales in 8 bits, too; short rows, as here, average little out.
TOLERANCE = {"float32": 2e-3, "int16": 1e-2, "int8": 2e-2}
# Keys and values are each off by at most 2**-11 of themselves, hence attention by little more.
HALF_CACHE = 2.0**-10
CHUNK = 16
X86 = pytest.mark.skipif(
    default_activations(parse_target("cpu")) != "int16", reason="int16 needs an x86-64 with AVX2"
)
PLAIN = {"activations": "float32", "head": "stored"}
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "exact": ({**PLAIN, "kv_cache": "float32"}, TOLERANCE["float32"]),
    "half": ({**PLAIN, "kv_cache": "float16"}, HALF_CACHE),
    "default": ({}, TOLERANCE["int16"]),
    "int8": ({"activations": "int8", "head": "stored"}, TOLERANCE["int8"]),
}
"""Options of the compilation, and how far the logits may be off."""

QUICK = {
    "llama": ("exact", "default"),
    "mistral": ("half",),
    "qwen2": ("default",),
    "qwen3": ("exact",),
    "gemma3": ("exact",),
    "opt": ("default",),
}
"""Every family, every setting, and with every setting a family of each kind; the rest is slow."""


CASES = [
    pytest.param(family, name, marks=() if name in QUICK[family] else pytest.mark.slow)
    for family in FAMILIES
    for name in SETTINGS
]


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a compressed tiny model of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(
        make_tiny(request.param, folder / "dense", gain=1.0), folder / "checkpoint"
    )


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> torch.nn.Module:
    """Return transformers' model with the decoded weights, in float32."""
    return load_checkpoint_dense(resolve(str(checkpoint)))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("checkpoint", "name"), CASES, indirect=["checkpoint"])
def test_logits_and_greedy_text_agree_with_pytorch(
    checkpoint: Path, reference: torch.nn.Module, name: str
) -> None:
    output = checkpoint.parent / name
    options, tolerance = SETTINGS[name]
    report = gqsa_compile(
        str(checkpoint), output, prefill_chunk=CHUNK, context_length=128, **options
    )
    assert all(fallback.by_choice for fallback in report.fallbacks)
    if name == "default":  # the head is rounded, tied or not
        assert not report.fallbacks
        assert report.kernels[-1].weight == "bsr-int8"
        assert report.bytes_by_kind["head"] == report.kernels[-1].bytes
    # Longer than a chunk and than every family's window.
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, 3 * CHUNK + 5)
    with torch.inference_mode():
        expected = reference(torch.tensor(tokens)[None]).logits[0].numpy()
    with runtime.load(output) as model:
        logits = np.concatenate([block.copy() for block in model.score(tokens)])
        assert logits.shape == expected.shape
        error = relative_error(logits, expected)
        assert error < tolerance
        if name == "half":
            assert error > 1e-5
        ratio = perplexity(logits, tokens) / perplexity(expected, tokens)
        # A rounded head moves it, too.
        assert abs(ratio - 1) < (1e-2 if name == "default" else 5e-3) or name == "int8"
        if name == "exact":
            for first in range(4):
                prompt = [int(t) for t in tokens[first : 5 * first + 2]]
                ours = model.generate(
                    prompt, max_tokens=48, temperature=0.0, ignore_eos=True
                ).token_ids
                assert len(ours) == 48
                assert list(ours) == greedy(reference, prompt, 48)


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Of every token but the first."""
    scores = torch.log_softmax(torch.from_numpy(logits[:-1]).double(), -1)
    return float(torch.exp(-scores[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].mean()))


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Choose tokens greedily, without a cache: the simplest thing that is right."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor(tokens)[None]).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
