"""One layer in one shot: prune groups, quantise the rest, make up for both."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from gqsa_compiler.compress.gemm import linear
from gqsa_compiler.compress.hessian import Moments, inverse
from gqsa_compiler.compress.importance import choose_mask, group_blocks, obs_scores
from gqsa_compiler.compress.quantizer import (
    decode,
    encode,
    fit_grid,
    stored_scale,
)
from gqsa_compiler.compress.recipe import Recipe

PRUNE_STEPS = 3
"""Groups are dropped in this many equal steps; the rest is refitted and scored again after each."""

REFIT_STEPS = 12
"""Conjugate gradient steps of the last refit; those between pruning steps take half of them."""

SWEEP_COLUMNS = 128
"""Columns whose errors are gathered before they are passed on to the columns behind them."""


@dataclass(frozen=True, eq=False)
class GroupedWeight:
    """A compressed weight [N, K], decoded into its parts.

    Parameters
    ----------
    keep : bool [N, K/G]
        Groups that are stored.
    codes : float32 [N, K/G, G]
        Integers 0..15; those of dropped groups mean nothing.
    scales : float32 [N, K/G]
        Positive, exactly representable in float16.
    zeros : float32 [N, K/G]
        Integers 0..15.
    """

    keep: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def decode(self) -> Tensor:
        """Return the float32 [N, K] weight that a reader of the checkpoint sees."""
        weight = decode(self.codes, self.scales[..., None], self.zeros[..., None])
        return torch.where(self.keep[..., None], weight, 0.0).flatten(1)

    def rows(self, start: int, stop: int) -> GroupedWeight:
        """Return a slice of the rows."""
        part = slice(start, stop)
        return GroupedWeight(self.keep[part], self.codes[part], self.scales[part], self.zeros[part])


def compress_rows(
    weights: list[Tensor], moments: Moments, recipe: Recipe, balance: str
) -> list[GroupedWeight]:
    """Compress linear layers that read the same input.

    Minimises the squared difference between the dense layers' outputs on the dense model's
    inputs and the compressed layers' on the inputs they really get.

    Parameters
    ----------
    weights : list of float32 [N_i, K]
        Each is pruned to the recipe's sparsity on its own.
    moments : Moments
        Of the K inputs.
    recipe : Recipe
    balance : str
        ``matrix`` or ``row``; see `choose_mask`.

    Returns
    -------
    list of GroupedWeight
        One for each weight.
    """
    sizes = [weight.shape[0] for weight in weights]
    dense = torch.cat(weights)
    group = recipe.group_size
    hessian = moments.hessian.float()
    inverse_hessian = inverse(moments.hessian)
    target = moments.target(dense)
    blocks = torch.linalg.inv(group_blocks(inverse_hessian, group)).float()
    solver = MaskedSolver(hessian, target, group)

    mask = torch.ones(dense.shape[0], dense.shape[1] // group, dtype=torch.bool)
    # In float64: the float32 product leaves up to a tenth more error in a block's outputs.
    fitted = (target.double() @ inverse_hessian).float()
    if recipe.sparsity:
        for step in range(1, PRUNE_STEPS + 1):
            scores = obs_scores(fitted, blocks)
            share = recipe.sparsity * step / PRUNE_STEPS
            mask = torch.cat([choose_mask(s, share, balance) for s in scores.split(sizes)])
            last = step == PRUNE_STEPS
            fitted = solver.refit(fitted, mask, REFIT_STEPS if last else REFIT_STEPS // 2)
    factor = torch.linalg.cholesky(inverse_hessian, upper=True).float()
    result = polish(sweep(fitted, mask, factor, group), hessian, target)
    bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [result.rows(a, b) for a, b in itertools.pairwise(bounds)]


class MaskedSolver:
    """Least squares on each row's kept groups, for all rows at once.

    Minimises ``w H w^T - 2 w b^T`` a row, with w zero outside the mask: conjugate gradients,
    preconditioned with H's diagonal blocks.

    Parameters
    ----------
    hessian : float32 [K, K]
        H.
    target : float32 [N, K]
        b.
    group_size : int
        G.
    """

    def __init__(self, hessian: Tensor, target: Tensor, group_size: int) -> None:
        self._hessian = hessian
        self._target = target
        self._inverse = torch.linalg.inv(group_blocks(hessian, group_size).double()).float()

    def _precondition(self, residual: Tensor) -> Tensor:
        groups, size, _ = self._inverse.shape
        parts = residual.reshape(-1, groups, size).transpose(0, 1)
        return (parts @ self._inverse).transpose(0, 1).reshape(residual.shape)

    def refit(self, start: Tensor, mask: Tensor, steps: int) -> Tensor:
        """Return better weights float32 [N, K] on `mask` bool [N, K/G], beginning at `start`."""
        keep = mask.repeat_interleave(self._inverse.shape[1], dim=1).float()
        weight = start * keep
        residual = (self._target - linear(weight, self._hessian)) * keep
        ahead = self._precondition(residual)
        direction = ahead
        energy = (residual * ahead).sum(1, keepdim=True)
        for _ in range(steps):
            image = linear(direction, self._hessian) * keep
            curvature = (direction * image).sum(1, keepdim=True)
            # A row that is solved already has no direction left: its step is 0, not 0 / 0.
            length = torch.where(curvature > 0, energy / curvature, 0.0)
            weight = weight + length * direction
            residual = residual - length * image
            ahead = self._precondition(residual)
            before, energy = energy, (residual * ahead).sum(1, keepdim=True)
            direction = ahead + torch.where(before > 0, energy / before, 0.0) * direction
        return weight


def sweep(weight: Tensor, mask: Tensor, factor: Tensor, group_size: int) -> GroupedWeight:
    """Quantise column after column, each error made up for by the columns behind it (GPTQ).

    Parameters
    ----------
    weight : float32 [N, K]
    mask : bool [N, K/G]
        Groups outside become 0; what earlier columns pushed into them is passed on.
    factor : float32 [K, K]
        Upper Cholesky factor of the inverse Hessian.
    group_size : int
        G.
    """
    # Transposed, so that a column of the weight is contiguous.
    columns = weight.T.contiguous()
    features, rows = columns.shape
    codes = torch.empty_like(columns)
    scales = torch.empty(features // group_size, rows)
    zeros = torch.empty_like(scales)
    keep = mask.T.contiguous()
    chunk = max(SWEEP_COLUMNS, group_size)
    for begin in range(0, features, chunk):
        end = min(begin + chunk, features)
        errors = torch.empty(end - begin, rows)
        for column in range(begin, end):
            index, place = divmod(column, group_size)
            if place == 0:
                part = slice(column, column + group_size)
                importance = factor.diagonal()[part] ** -2
                grid = fit_grid(columns[part].T.contiguous(), importance)
                scales[index], zeros[index] = grid
            scale, zero = scales[index], zeros[index]
            codes[column] = encode(columns[column], scale, zero)
            value = torch.where(keep[index], decode(codes[column], scale, zero), 0.0)
            error = (columns[column] - value) / factor[column, column]
            columns[column:end].addr_(factor[column, column:end], error, alpha=-1)
            errors[column - begin] = error
        columns[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return GroupedWeight(
        mask, codes.T.reshape(rows, -1, group_size), scales.T.contiguous(), zeros.T.contiguous()
    )


def polish(start: GroupedWeight, hessian: Tensor, target: Tensor) -> GroupedWeight:
    """Move codes, then scales, then codes again, each to its best value given all the others.

    Parameters
    ----------
    start : GroupedWeight
    hessian : float32 [K, K]
    target : float32 [N, K]
        Minimised is ``w H w^T - 2 w target^T`` a row.
    """
    result = _polish_codes(start, hessian, target)
    result = _polish_scales(result, hessian, target)
    return _polish_codes(result, hessian, target)


def _polish_codes(start: GroupedWeight, hessian: Tensor, target: Tensor) -> GroupedWeight:
    columns, wanted = start.decode().T.contiguous(), target.T.contiguous()
    codes = start.codes.flatten(1).T.contiguous()
    scales, zeros, keep = (x.T.contiguous() for x in (start.scales, start.zeros, start.keep))
    features, group = columns.shape[0], start.codes.shape[2]
    chunk = max(SWEEP_COLUMNS, group)
    for begin in range(0, features, chunk):
        end = min(begin + chunk, features)
        pull = wanted[begin:end] - hessian[begin:end] @ columns
        for column in range(begin, end):
            index = column // group
            best = columns[column] + pull[column - begin] / hessian[column, column]
            codes[column] = encode(best, scales[index], zeros[index])
            value = decode(codes[column], scales[index], zeros[index])
            value = torch.where(keep[index], value, 0.0)
            pull.addr_(hessian[column, begin:end], value - columns[column], alpha=-1)
            columns[column] = value
    codes = codes.T.reshape(start.codes.shape)
    return GroupedWeight(start.keep, codes, start.scales, start.zeros)


def _polish_scales(start: GroupedWeight, hessian: Tensor, target: Tensor) -> GroupedWeight:
    columns, wanted = start.decode().T.contiguous(), target.T.contiguous()
    units = (start.codes - start.zeros[..., None]).flatten(1).T.contiguous()
    scales, keep = start.scales.T.contiguous(), start.keep.T.contiguous()
    group = start.codes.shape[2]
    for index in range(scales.shape[0]):
        part = slice(index * group, (index + 1) * group)
        unit, scale = units[part], scales[index]
        pull = wanted[part] - hessian[part] @ columns
        curvature = ((hessian[part, part] @ unit) * unit).sum(0)
        best = scale + (pull * unit).sum(0) / curvature.clamp(min=torch.finfo().tiny)
        scales[index] = torch.where((curvature > 0) & (best > 0), stored_scale(best), scale)
        columns[part] = torch.where(keep[index], unit * scales[index], 0.0)
    return GroupedWeight(start.keep, start.codes, scales.T.contiguous(), start.zeros)
