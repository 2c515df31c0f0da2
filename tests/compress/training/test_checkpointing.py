"""Gradient checkpointing: same gradients, activations that are not kept."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gqsa_compiler.compress.training import checkpointing
from gqsa_compiler.compress.training.checkpointing import needs_checkpoints, use_checkpoints
from tests.compress.training.conftest import Dense
from tests.compress.training.helpers import decoder_blocks, random_tokens, student
from tests.tiny_models import FAMILIES

CPU = torch.device("cpu")


def saved_bytes(model: Any, tokens: Tensor, dtype: torch.dtype) -> tuple[int, Tensor]:
    """Return what a pass keeps for its gradients, and the hidden states."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return sum(kept.values()), hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_gradients_of_less(family: str, dtype: torch.dtype, dense: Dense) -> None:
    tokens = random_tokens(4, 32)
    plain, layers = student(dense(family), dtype, train_weights=True)
    thrifty = copy.deepcopy(plain)
    use_checkpoints(decoder_blocks(thrifty))
    found = []
    for model in (plain, thrifty):
        assert not model.training, "dropout would differ"
        size, hidden = saved_bytes(model, tokens, dtype)
        hidden.backward(torch.ones_like(hidden))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((size, hidden.detach(), gradients))
    (much, want, wanted), (little, have, got) = found
    assert torch.equal(have, want)
    assert len(got) == 3 * len(layers)
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name
    # Weights that are not trained are kept by both; nothing of the blocks is.
    assert little < 0.3 * much


@pytest.mark.parametrize("family", FAMILIES)
def test_needed_where_memory_is_short(
    family: str, dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dense(family).config
    tokens = 1000
    kept = checkpointing.ACTIVATION_BYTES * tokens * 3 * 96
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: 2 * kept - 1)
    assert needs_checkpoints(config, tokens, CPU)
    assert not needs_checkpoints(config, tokens - 1, CPU)
    monkeypatch.setattr(checkpointing, "available_bytes", lambda: 2 * kept)
    assert not needs_checkpoints(config, tokens, CPU)


def test_the_estimate_is_about_right(dense: Dense) -> None:
    """Of long sequences, where activations and not weights count."""
    model, _ = student(dense("llama"), torch.bfloat16)
    tokens = random_tokens(8, 256)
    size, _ = saved_bytes(model, tokens, torch.bfloat16)
    estimate = checkpointing.ACTIVATION_BYTES * tokens.numel() * 3 * 96
    assert 0.5 < size / estimate < 1.5


@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    config = SimpleNamespace(hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    free, _ = torch.cuda.mem_get_info(device)
    tokens = free // (checkpointing.ACTIVATION_BYTES * 3 * 96)
    assert needs_checkpoints(config, tokens, device)
    assert not needs_checkpoints(config, tokens // 4, device)
