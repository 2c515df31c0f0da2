"""4-bit asymmetric quantisation of groups, exactly as a checkpoint stores them."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CODE = 15
"""Codes and zero points are integers 0 .. MAX_CODE."""

MIN_SCALE = 2.0**-24
"""The smallest positive float16: the scale of a group of zeros."""

MAX_SCALE = 65504.0
"""The largest finite float16."""

SHRINKS = (1.0, 1.05, 0.975, 0.95, 0.925, 0.9, 0.86)
"""Shares of a group's range tried as the range of its codes.

Near 1 they matter for where the integer zero point falls, below 1 for clipping. On SmolLM2 with
G = 16 these seven save 19% of the squared error; 26 finer ones save one percent more.
"""


def stored_scale(scale: Tensor) -> Tensor:
    """Round scales to the positive float16 values that are stored; float32, same shape."""
    return scale.clamp(MIN_SCALE, MAX_SCALE).half().float()


def encode(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Nearest codes (float32 integers 0..15) of `weight`; shapes broadcast."""
    return (torch.round(weight / scale) + zero).clamp_(0, MAX_CODE)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Weights (float32) that codes stand for: ``(codes - zero) * scale``; shapes broadcast."""
    return (codes - zero) * scale


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Nearest representable weights (float32); shapes broadcast."""
    return decode(encode(weight, scale, zero), scale, zero)


def fit_grid(
    weight: Tensor, importance: Tensor | None = None, shrinks: tuple[float, ...] = SHRINKS
) -> tuple[Tensor, Tensor]:
    """Choose each group's scale and zero point for the least weighted squared error.

    The range always holds 0, so that the integer zero point fits in four bits even when all
    weights of a group have one sign.

    Parameters
    ----------
    weight : float32 [..., G]
        The groups.
    importance : float32 [G], optional
        Weight of each column's squared error; equal ones by default.
    shrinks : tuple of float
        Shares of the group's range to try. The first is used where none is better.

    Returns
    -------
    scale : float32 [...]
        Positive, each exactly a float16.
    zero : float32 [...]
        Integers 0..15.
    """
    low = weight.amin(-1).clamp(max=0)
    span = weight.amax(-1).clamp(min=0) - low
    best_scale, best_zero, best_error = span, low, torch.full_like(low, torch.inf)
    for shrink in shrinks:
        scale = stored_scale(span * (shrink / MAX_CODE))
        zero = torch.round(-low * shrink / scale).clamp_(0, MAX_CODE)
        error = (round_to_grid(weight, scale[..., None], zero[..., None]) - weight).square_()
        if importance is not None:
            error *= importance
        total = error.sum(-1)
        better = total < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, total, best_error)
    return best_scale, best_zero
