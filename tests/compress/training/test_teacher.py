"""The dense model's hidden states."""

from __future__ import annotations

import pytest
import torch

from gqsa_compiler.compress.training import teacher
from gqsa_compiler.compress.training.teacher import STAGE, teacher_states
from gqsa_compiler.errors import ModelError
from tests.compress.training.conftest import Dense
from tests.compress.training.helpers import random_tokens
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_makes_the_logits_from_them(family: str, dense: Dense) -> None:
    model, tokens = dense(family), random_tokens(3, 12)
    states = teacher_states(model, tokens, torch.float32)
    assert states.shape == (3, 12, 64)
    assert states.dtype == torch.float32
    with torch.no_grad():
        want = model(input_ids=tokens).logits
    have = states @ model.get_output_embeddings().weight.T
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_batches(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = dense("llama"), random_tokens(7, 8)
    whole = teacher_states(model, tokens, torch.float32)
    monkeypatch.setattr(teacher, "BATCH_TOKENS", 17)
    calls: list[tuple[str, int, int]] = []
    parts = teacher_states(
        model, tokens, torch.float32, lambda stage, done, total: calls.append((stage, done, total))
    )
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert calls == [(STAGE, done, 7) for done in (0, 2, 4, 6, 7)]
    monkeypatch.setattr(teacher, "BATCH_TOKENS", 1)
    single = teacher_states(model, tokens, torch.float32)
    torch.testing.assert_close(single, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_bfloat16(stored: torch.dtype, dense: Dense) -> None:
    model, tokens = dense("llama"), random_tokens(2, 8)
    exact = teacher_states(model, tokens, torch.float32)
    states = teacher_states(model.to(stored), tokens, torch.bfloat16)
    assert states.dtype == torch.bfloat16
    assert float((states.float() - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite(bad: float, dense: Dense) -> None:
    model = dense("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = bad
    with pytest.raises(ModelError, match="dense model's hidden states are not finite"):
        teacher_states(model, random_tokens(2, 8), torch.float32)
