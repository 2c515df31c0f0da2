"""One layer in one shot: prune groups, quantise the rest, make up for both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqsa_compiler.compress.hessian import Moments, inverse
from gqsa_compiler.compress.importance import choose_mask, group_blocks, obs_scores
from gqsa_compiler.compress.quantizer import (
    decode,
    encode,
    fit_grid,
    round_to_grid,
    stored_scale,
)
from gqsa_compiler.compress.recipe import Recipe

PRUNE_STEPS = 3
"""Groups are dropped in this many equal steps; the rest is refitted and scored again after each."""

REFIT_STEPS = 12
"""Conjugate gradient steps of one refit."""

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
        return GroupedWeight(
            self.keep[part], self.codes[part], self.scales[part], self.zeros[part]
        )


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
    target = (dense.double() @ (moments.hessian + moments.drift)).float()
    blocks = torch.linalg.inv(group_blocks(inverse_hessian, group)).float()
    solver = MaskedSolver(hessian, target, group)

    full = torch.ones(dense.shape[0], dense.shape[1] // group, dtype=torch.bool)
    mask, fitted = full, solver.refit(dense, full)
    for step in range(1, PRUNE_STEPS + 1 if recipe.sparsity else 1):
        scores = obs_scores(fitted, blocks)
        share = recipe.sparsity * step / PRUNE_STEPS
        mask = torch.cat([choose_mask(s, share, balance) for s in scores.split(sizes)])
        fitted = solver.refit(fitted, mask)
    factor = torch.linalg.cholesky(inverse_hessian, upper=True).float()
    result = polish(sweep(fitted, mask, factor, group), hessian, target)
    bounds = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [result.rows(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


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
        self._inverse = torch.linalg.inv(group_blocks(hessian.double(), group_size)).float()

    def _precondition(self, residual: Tensor) -> Tensor:
        groups, size, _ = self._inverse.shape
        parts = residual.reshape(-1, groups, size).transpose(0, 1)
        return (parts @ self._inverse).transpose(0, 1).reshape(residual.shape)

    def refit(self, start: Tensor, mask: Tensor, steps: int = REFIT_STEPS) -> Tensor:
        """Return better weights float32 [N, K] on `mask` bool [N, K/G], beginning at `start`."""
        keep = mask.repeat_interleave(self._inverse.shape[1], dim=1).float()
        weight = start * keep
        residual = (self._target - weight @ self._hessian) * keep
        ahead = self._precondition(residual)
        direction = ahead
        energy = (residual * ahead).sum(1, keepdim=True)
        for _ in range(steps):
            image = (direction @ self._hessian) * keep
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
    weight = weight.clone()
    rows, features = weight.shape
    codes = torch.zeros(rows, features // group_size, group_size)
    scales = torch.empty(rows, features // group_size)
    zeros = torch.empty_like(scales)
    chunk = max(SWEEP_COLUMNS, group_size)
    for begin in range(0, features, chunk):
        end = min(begin + chunk, features)
        errors = torch.empty(rows, end - begin)
        for column in range(begin, end):
            index, place = divmod(column, group_size)
            if place == 0:
                part = slice(column, column + group_size)
                importance = factor.diagonal()[part] ** -2
                scale, zero = fit_grid(weight[:, part], importance)
                scales[:, index], zeros[:, index] = scale, zero
            code = encode(weight[:, column], scale, zero)
            codes[:, index, place] = code
            value = torch.where(mask[:, index], decode(code, scale, zero), 0.0)
            error = (weight[:, column] - value) / factor[column, column]
            weight[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return GroupedWeight(mask, codes, scales, zeros)


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
    weight = start.decode()
    codes = start.codes.clone()
    features, group = weight.shape[1], codes.shape[2]
    chunk = max(SWEEP_COLUMNS, group)
    for begin in range(0, features, chunk):
        end = min(begin + chunk, features)
        pull = target[:, begin:end] - weight @ hessian[:, begin:end]
        for column in range(begin, end):
            index, place = divmod(column, group)
            scale, zero = start.scales[:, index], start.zeros[:, index]
            best = weight[:, column] + pull[:, column - begin] / hessian[column, column]
            code = encode(best, scale, zero)
            codes[:, index, place] = code
            value = torch.where(start.keep[:, index], decode(code, scale, zero), 0.0)
            change = value - weight[:, column]
            weight[:, column] = value
            pull -= change[:, None] * hessian[column, begin:end]
    return GroupedWeight(start.keep, codes, start.scales, start.zeros)


def _polish_scales(start: GroupedWeight, hessian: Tensor, target: Tensor) -> GroupedWeight:
    weight = start.decode()
    scales = start.scales.clone()
    group = start.codes.shape[2]
    for index in range(scales.shape[1]):
        part = slice(index * group, (index + 1) * group)
        keep, scale = start.keep[:, index], scales[:, index]
        unit = start.codes[:, index] - start.zeros[:, index, None]
        pull = target[:, part] - weight @ hessian[:, part]
        curvature = ((unit @ hessian[part, part]) * unit).sum(1)
        best = scale + (pull * unit).sum(1) / curvature.clamp(min=torch.finfo().tiny)
        scales[:, index] = torch.where((curvature > 0) & (best > 0), stored_scale(best), scale)
        weight[:, part] = torch.where(keep[:, None], unit * scales[:, index, None], 0.0)
    return GroupedWeight(start.keep, start.codes, scales, start.zeros)


def round_weight(weight: Tensor, group_size: int) -> Tensor:
    """Return `weight` rounded to the nearest on 4-bit grids, without any compensation."""
    parts = weight.reshape(weight.shape[0], -1, group_size)
    scale, zero = fit_grid(parts)
    return round_to_grid(parts, scale[..., None], zero[..., None]).reshape(weight.shape)
