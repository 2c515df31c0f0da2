"""Which groups of a layer to keep."""

from __future__ import annotations

import torch
from torch import Tensor


def group_blocks(matrix: Tensor, group_size: int) -> Tensor:
    """Diagonal blocks [K/G, G, G] of a [K, K] matrix."""
    groups = matrix.shape[0] // group_size
    blocks = matrix.reshape(groups, group_size, groups, group_size)
    index = torch.arange(groups)
    return blocks[index, :, index, :]


def obs_scores(weight: Tensor, inverse_blocks: Tensor) -> Tensor:
    """What removing each group costs when the rest of its row makes up for it (OBS).

    Parameters
    ----------
    weight : float32 [N, K]
    inverse_blocks : float32 [K/G, G, G]
        ``([H^-1]_gg)^-1`` of each column group.

    Returns
    -------
    float32 [N, K/G]
        ``w_g^T ([H^-1]_gg)^-1 w_g / 2``.
    """
    groups, size, _ = inverse_blocks.shape
    w = weight.reshape(-1, groups, size).transpose(0, 1)
    return ((w @ inverse_blocks) * w).sum(-1).T * 0.5


def kept_groups(total: int, sparsity: float) -> int:
    """Count the groups left of `total`: halves round up, and a layer never loses all."""
    return max(1, total - int(total * sparsity + 1e-9))


def choose_mask(scores: Tensor, sparsity: float, balance: str) -> Tensor:
    """Keep the groups of the highest scores.

    Parameters
    ----------
    scores : float [N, K/G]
    sparsity : float
        Share of groups to drop, 0 <= sparsity < 1.
    balance : str
        ``matrix``: the best of the whole matrix; ``row``: as many in every row.

    Returns
    -------
    bool [N, K/G]
        True where a group is kept. Ties keep the earlier group.
    """
    pool = scores if balance == "row" else scores.reshape(1, -1)
    keep = kept_groups(pool.shape[1], sparsity)
    order = pool.argsort(dim=1, descending=True, stable=True)[:, :keep]
    mask = torch.zeros_like(pool, dtype=torch.bool).scatter_(1, order, True)
    return mask.reshape(scores.shape)
