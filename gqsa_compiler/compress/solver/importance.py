"""What groups, or single weights, of a layer are worth, and which of them to keep.

A group of one column is a single weight: the same scores serve 2:4 sparsity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gqsa_compiler.compress.counts import kept_groups
from gqsa_compiler.compress.recipes.recipe import Score

FOUR = 4
"""Consecutive weights of which 2:4 sparsity keeps two."""


def group_blocks(matrix: Tensor, group_size: int) -> Tensor:
    """Diagonal blocks [K/G, G, G] of a [K, K] matrix."""
    groups = matrix.shape[0] // group_size
    blocks = matrix.reshape(groups, group_size, groups, group_size)
    index = torch.arange(groups, device=matrix.device)
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
        ``w_g^T ([H^-1]_gg)^-1 w_g / 2``: half of what the mean squared output error grows by.
    """
    groups, size, _ = inverse_blocks.shape
    if size == 1:
        return weight.square() * (0.5 * inverse_blocks.flatten())
    w = weight.reshape(-1, groups, size).transpose(0, 1)
    return ((w @ inverse_blocks) * w).sum(-1).T * 0.5


def magnitude_scores(weight: Tensor, group_size: int, power: Tensor | None = None) -> Tensor:
    """Squared norm of each group, each column weighed with the power of its input.

    Parameters
    ----------
    weight : float32 [N, K]
    group_size : int
        G.
    power : float32 [K], optional
        Mean square of each input, the Hessian's diagonal (Wanda); by default all are 1.

    Returns
    -------
    float32 [N, K/G]
        ``sum(w_j^2 power_j)``.
    """
    square = weight.square()
    if power is not None:
        square *= power
    return square.reshape(len(weight), -1, group_size).sum(-1)


class Scorer:
    """Scores of one kind for weights that read the same inputs.

    Parameters
    ----------
    score : str
        ``obs`` or ``fisher`` (whose row weights come on top), ``wanda`` or ``magnitude``.
    hessian, inverse : float64 [K, K]
        Of the inputs. `inverse` is needed for ``obs`` and ``fisher`` only.
    group_size : int
        Columns that are kept or dropped together; 1 for single weights.
    """

    def __init__(
        self, score: Score, hessian: Tensor, inverse: Tensor | None, group_size: int
    ) -> None:
        self._group_size = group_size
        self._power = hessian.diagonal().float() if score == "wanda" else None
        self._blocks = None
        if score in ("obs", "fisher"):
            assert inverse is not None, "OBS scores need the inverse Hessian"
            self._blocks = torch.linalg.inv(group_blocks(inverse, group_size)).float()

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the scores float32 [N, K/G] of `weight` float32 [N, K]."""
        if self._blocks is not None:
            return obs_scores(weight, self._blocks)
        return magnitude_scores(weight, self._group_size, self._power)


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
    return best(pool, kept_groups(pool.shape[1], sparsity)).reshape(scores.shape)


def choose_of_four(scores: Tensor, keep: int = 2) -> Tensor:
    """Keep the `keep` best weights of every four consecutive ones of a row.

    Parameters
    ----------
    scores : float [N, K]
        Of single weights.
    keep : int
        2 for 2:4 sparsity.

    Returns
    -------
    bool [N, K]
        True where a weight is kept. Ties keep the earlier weight.
    """
    return best(scores.reshape(-1, FOUR), keep).reshape(scores.shape)


def best(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Mark the highest scores of every row; ties keep the earlier one.

    Parameters
    ----------
    scores : float [R, C]
    counts : int or int64 [R, 1]
        How many of each row.

    Returns
    -------
    bool [R, C]
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = (torch.arange(scores.shape[1], device=scores.device) < counts).expand_as(scores)
    return torch.zeros_like(first).scatter_(1, order, first)
