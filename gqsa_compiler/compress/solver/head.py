"""The language-model head in one shot: many rows on one input, of which no group is dropped.

An error dl in the logits costs, to second order, half the variance of dl under the probabilities p
of the next token. With products of different tokens' logits left out that is
``sum_v p_v (1 - p_v) dl_v^2 / 2``. All rows have to share one Hessian, so every state is weighed by
the mean of p_v (1 - p_v) over the rows, which is the `uncertainty` divided by V: where the model is
sure of the next token, errors hardly matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gqsa_compiler.compress.gemm import linear
from gqsa_compiler.compress.recipes.recipe import Head, Recipe, Solver
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.hessian import Moments
from gqsa_compiler.compress.solver.oneshot import check_not_lost, compress_rows

ROWS = 1 << 15
"""Rows that are solved together: the solver takes some 30 bytes for each of their weights."""


CHUNK_TOKENS = 128
"""Tokens whose logits are in memory at once."""


@torch.no_grad()
def uncertainty(states: Tensor, weight: Tensor, cap: float | None = None) -> Tensor:
    """Return how unsure the model is of the next token: 1 minus the sum of squared probabilities.

    Parameters
    ----------
    states : float32 [T, H]
        The last norm's outputs.
    weight : float32 [V, H]
        The head.
    cap : float, optional
        The logits are ``cap * tanh(product / cap)``.

    Returns
    -------
    float32 [T]
        0 to 1.
    """
    parts = []
    for some in states.split(CHUNK_TOKENS):
        logits = linear(some, weight)
        if cap is not None:
            logits = logits.div_(cap).tanh_().mul_(cap)
        parts.append(1 - logits.softmax(-1).square_().sum(-1))
    return torch.cat(parts).clamp_(min=0)


def compress_head(
    name: str, weight: Tensor, moments: Moments, head: Head, solver: Solver
) -> GroupedWeight:
    """Quantise the head.

    With the solver ``compensated`` the mean squared error of the logits is what is minimised. Rows
    do not depend on each other, so weighing them by how often their tokens occur changes nothing.
    What was lost before the head is not made up for here: that would fit the logits of few tokens.

    Parameters
    ----------
    name : str
        Module path, for errors.
    weight : float32 [V, H]
    moments : Moments
        Of the last norm's outputs, weighed.
    head : Head
    solver : str
        The recipe's.

    Returns
    -------
    GroupedWeight

    Raises
    ------
    ModelError
        A weight is NaN or infinite, all are too small, or the Hessian cannot be inverted.
    """
    # Neither what the recipe drops nor how it chooses it has a meaning here.
    recipe = Recipe("head", head.bits, 0, head.group_size, solver=solver)
    check_not_lost(name, weight)
    parts = [
        compress_rows([rows], moments, [head.target], recipe, [name])[0]
        for rows in weight.split(ROWS)
    ]
    return GroupedWeight(
        torch.cat([part.keep for part in parts]),
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        head.bits,
    )
