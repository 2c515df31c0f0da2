"""Losses and the closed form of the distillation's gradient, against PyTorch's autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gqsa_compiler.compress.training.losses import (
    CHUNK_TOKENS,
    block_loss,
    distill,
    mean_block_loss,
)

HIDDEN, VOCAB = 12, 50


def test_block_loss_is_relative_for_every_token() -> None:
    targets = torch.randn(2, 5, 8) * torch.tensor([1.0, 10, 0.1, 3, 1])[:, None]
    outputs = targets + 0.1 * torch.randn(2, 5, 8) * targets.norm(dim=-1, keepdim=True)
    wrong = (outputs - targets).norm(dim=-1) / targets.norm(dim=-1)
    assert float(block_loss(outputs, targets)) == pytest.approx(
        float(wrong.square().mean()), rel=0.01
    )
    scaled = block_loss(1000 * outputs, 1000 * targets)
    assert float(scaled) == pytest.approx(float(block_loss(outputs, targets)), rel=1e-5)


def test_block_loss_of_a_huge_token_weighs_as_much_as_any_other() -> None:
    targets = torch.ones(4, 8)
    targets[0] *= 1e3
    losses = []
    for token in (0, 1):
        outputs = targets.clone()
        outputs[token] *= 1.5
        losses.append(float(block_loss(outputs, targets)))
    assert losses[0] == pytest.approx(0.25 / 4, rel=1e-3)
    # The small one sees TINY times the mean size.
    assert losses[1] == pytest.approx(losses[0] / 1.25, rel=0.01)


def test_block_loss_of_a_token_of_zeros_is_finite() -> None:
    targets = torch.randn(3, 8)
    targets[1] = 0
    outputs = targets.clone()
    assert float(block_loss(outputs, targets)) == 0
    outputs = (outputs + 1e-4).requires_grad_()
    block_loss(outputs, targets).backward()
    assert outputs.grad is not None
    assert bool(outputs.grad.isfinite().all())


def test_block_loss_of_bfloat16_outputs_is_float32() -> None:
    targets = torch.randn(3, 8)
    assert block_loss(targets.bfloat16(), targets).dtype == torch.float32


def test_mean_block_loss() -> None:
    targets = list(torch.randn(3, 2, 4, 8))
    outputs = list(torch.randn(3, 2, 4, 8))
    want = sum(float(block_loss(o, t)) for o, t in zip(outputs, targets, strict=True)) / 3
    assert mean_block_loss(outputs, targets) == pytest.approx(want)
    with pytest.raises(ValueError, match="zip"):
        mean_block_loss(outputs[:2], targets)


def problem(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states of both models, next tokens and a head."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=random)
    teacher = hidden + 0.5 * torch.randn(tokens, HIDDEN, generator=random)
    answers = torch.randint(0, VOCAB, (tokens,), generator=random)
    return hidden, teacher, answers, torch.randn(VOCAB, HIDDEN, generator=random)


def slow(
    hidden: Tensor,
    teacher: Tensor,
    answers: Tensor,
    head: Tensor,
    share: float,
    cap: float | None,
    dense_head: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return total, divergence and cross-entropy, differentiable."""

    def logits(states: Tensor, matrix: Tensor) -> Tensor:
        plain = states @ matrix.T
        return plain if cap is None else cap * torch.tanh(plain / cap)

    ours, theirs = logits(hidden, head), logits(teacher, head if dense_head is None else dense_head)
    divergence = functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    entropy = functional.cross_entropy(ours, answers)
    return share * divergence + (1 - share) * entropy, divergence, entropy


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "tokens", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS]
)
def test_distill(tokens: int, share: float, cap: float | None) -> None:
    hidden, teacher, answers, head = problem(tokens)
    parts, gradient = distill(hidden, teacher, answers, head, share, cap)
    hidden.requires_grad_()
    wanted = slow(hidden, teacher, answers, head, share, cap)
    wanted[0].backward()
    have = (parts.total, parts.divergence, parts.cross_entropy)
    assert have == pytest.approx([float(want.detach()) for want in wanted], rel=1e-4)
    assert hidden.grad is not None
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [CHUNK_TOKENS - 1, 2 * CHUNK_TOKENS + 1])
def test_distill_through_two_heads(tokens: int, share: float, cap: float | None) -> None:
    hidden, teacher, answers, dense_head = problem(tokens)
    noise = torch.randn(dense_head.shape, generator=torch.Generator().manual_seed(1))
    head = (dense_head + 0.2 * noise).requires_grad_()
    slope = torch.ones(head.shape)
    parts, gradient = distill(
        hidden, teacher, answers, head.detach(), share, cap,
        dense_head=dense_head, head_gradient=slope,
    )  # fmt: skip
    hidden.requires_grad_()
    wanted = slow(hidden, teacher, answers, head, share, cap, dense_head)
    wanted[0].backward()
    have = (parts.total, parts.divergence, parts.cross_entropy)
    assert have == pytest.approx([float(want.detach()) for want in wanted], rel=1e-4)
    assert head.grad is not None
    assert hidden.grad is not None
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-6)
    # It is added to what is there.
    torch.testing.assert_close(slope - 1, head.grad, rtol=1e-3, atol=1e-6)


def test_distill_of_equal_models() -> None:
    hidden, _, answers, head = problem(9)
    parts, gradient = distill(hidden, hidden, answers, head, 1.0)
    assert parts.divergence == pytest.approx(0, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-6


def test_distill_in_bfloat16() -> None:
    hidden, teacher, answers, head = problem(200)
    exact, want = distill(hidden, teacher, answers, head, 0.5)
    parts, have = distill(hidden, teacher.bfloat16(), answers, head.bfloat16(), 0.5)
    assert have.dtype == torch.float32
    assert parts.total == pytest.approx(exact.total, rel=0.02)
    assert float((have - want).norm() / want.norm()) < 0.02


def test_distill_leaves_its_arguments_alone() -> None:
    tensors = problem(20)
    copies = [tensor.clone() for tensor in tensors]
    distill(*tensors, 0.5, 2.0)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_distill_passes_nan_on() -> None:
    hidden, teacher, answers, head = problem(5)
    hidden[2, 3] = torch.nan
    assert math.isnan(distill(hidden, teacher, answers, head, 0.5)[0].total)
