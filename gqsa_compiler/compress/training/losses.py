"""What training minimises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_TOKENS = 128
"""Tokens whose logits are in memory at once."""

TINY = 1e-6
"""Keeps the weight of a token of zeros finite, as a share of the mean token."""


def block_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over tokens of ``|output - target|^2 / |target|^2``.

    The next norm divides a token's error by the token's size: weighed alike, the few tokens with
    huge activations would be all that counts.

    Parameters
    ----------
    outputs, targets : float32 [..., H]

    Returns
    -------
    float32 []
    """
    size = targets.square().sum(-1)
    wrong = (outputs.float() - targets).square().sum(-1)
    return (wrong / (size + TINY * size.mean())).mean()


@torch.no_grad()
def mean_block_loss(outputs: list[Tensor], targets: list[Tensor]) -> float:
    """Return the mean `block_loss` of equal batches."""
    pairs = zip(outputs, targets, strict=True)
    return sum(float(block_loss(have, want)) for have, want in pairs) / len(targets)


@dataclass(frozen=True)
class LossParts:
    """A step's losses, in nats a token.

    Parameters
    ----------
    total : float
        ``share * divergence + (1 - share) * cross_entropy``.
    divergence : float
        Mean of KL(dense || compressed).
    cross_entropy : float
        Mean negative log-likelihood of the next token.
    """

    total: float
    divergence: float
    cross_entropy: float


def distill(
    hidden: Tensor,
    teacher: Tensor,
    next_tokens: Tensor,
    head: Tensor,
    share: float,
    cap: float | None = None,
    *,
    dense_head: Tensor | None = None,
    head_gradient: Tensor | None = None,
) -> tuple[LossParts, Tensor]:
    """Compare two models' final hidden states through their output heads.

    The logits of `CHUNK_TOKENS` tokens are there at once, and the gradient is the closed form
    ``share (p - t) + (1 - share) (p - y)`` for the model's probabilities p, the dense model's t
    and the one-hot next token y: a vocabulary of 150 000 fits in little memory.

    Parameters
    ----------
    hidden : float [T, H]
        Of the compressed model, after its last norm.
    teacher : float [T, H]
        Of the dense model.
    next_tokens : int64 [T]
        What follows each token.
    head : float [V, H]
        The compressed model's. Its dtype is what products are computed in.
    share : float
        Weight of the divergence, 0 to 1.
    cap : float, optional
        The logits are ``cap * tanh(product / cap)`` (Gemma's soft cap).
    dense_head : float [V, H], optional
        The dense model's, of the same dtype; without it both models have one head.
    head_gradient : float32 [V, H], optional
        The gradient of the total with respect to `head` is added to it. It is the one large
        tensor here: as large as the head in float32.

    Returns
    -------
    parts : LossParts
    gradient : float32 [T, H]
        Of the total with respect to `hidden`.
    """
    tokens = len(hidden)
    dense_head = head if dense_head is None else dense_head
    gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    divergence = cross_entropy = 0.0
    for start in range(0, tokens, CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        logits = _logits(hidden[rows], head, cap)
        slope = None if cap is None else 1 - (logits / cap).square_()
        ours = logits.log_softmax(-1)
        theirs = _logits(teacher[rows], dense_head, cap).log_softmax(-1)
        chances = theirs.exp()
        divergence += float((chances * (theirs - ours)).sum())
        answer = next_tokens[rows, None]
        cross_entropy -= float(ours.gather(-1, answer).sum())
        slopes = ours.exp_().sub_(chances.mul_(share))
        slopes.scatter_add_(-1, answer, torch.full_like(answer, share - 1, dtype=slopes.dtype))
        if slope is not None:
            slopes *= slope
        steep = slopes.to(head.dtype)
        gradient[rows] = (steep @ head).float() / tokens
        if head_gradient is not None:
            head_gradient.add_(steep.T @ hidden[rows].to(head.dtype), alpha=1 / tokens)
    divergence, cross_entropy = divergence / tokens, cross_entropy / tokens
    total = share * divergence + (1 - share) * cross_entropy
    return LossParts(total, divergence, cross_entropy), gradient


def _logits(hidden: Tensor, head: Tensor, cap: float | None) -> Tensor:
    logits = (hidden.to(head.dtype) @ head.T).float()
    return logits if cap is None else (logits / cap).tanh_().mul_(cap)
