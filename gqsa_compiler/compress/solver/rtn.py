"""Round to nearest: what stays is rounded as it is, and nothing makes up for the error."""

from __future__ import annotations

import torch
from torch import Tensor

from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.quantizer import encode, fit_grid


def round_weight(weight: Tensor, mask: Tensor, group_size: int, bits: int) -> GroupedWeight:
    """Quantise what a mask keeps.

    Parameters
    ----------
    weight : float32 [N, K]
    mask : bool [N, K/G] or [N, K]
        The groups, or the single weights, that are kept.
    group_size : int
        G.
    bits : int
        Of a code.
    """
    rows, features = weight.shape
    kept = mask.repeat_interleave(features // mask.shape[1], dim=1)
    groups = torch.where(kept, weight, 0.0).reshape(rows, -1, group_size)
    scales, zeros = fit_grid(groups, bits)
    codes = encode(groups, scales[..., None], zeros[..., None], bits)
    if mask.shape == scales.shape:
        return GroupedWeight(mask, codes, scales, zeros, bits)
    return GroupedWeight(torch.ones_like(zeros, dtype=torch.bool), codes, scales, zeros, bits, mask)
