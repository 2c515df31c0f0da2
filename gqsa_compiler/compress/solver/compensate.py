"""One-shot compression with compensation: what stays makes up for what is dropped and rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gqsa_compiler.compress.gemm import linear
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.hessian import inverse
from gqsa_compiler.compress.solver.importance import Scorer, choose_mask, group_blocks
from gqsa_compiler.compress.solver.quantizer import decode, encode, fit_grid, stored_scale
from gqsa_compiler.compress.solver.two_of_four import SWEEP_COLUMNS, column_values, sweep_mask

PRUNE_STEPS = 3
"""Groups are dropped in this many equal steps; the rest is refitted and scored again after each."""

REFIT_STEPS = 12
"""Conjugate gradient steps of the last refit; those between pruning steps take half of them."""


@dataclass(frozen=True)
class Curvature:
    """A Hessian and what is made of it, each once.

    Parameters
    ----------
    exact : float64 [K, K]
        Symmetric, positive definite.
    """

    exact: Tensor

    @cached_property
    def single(self) -> Tensor:
        """The Hessian, float32 [K, K]."""
        return self.exact.float()

    @cached_property
    def inverse(self) -> Tensor:
        """Its inverse, float64 [K, K]."""
        return inverse(self.exact)

    @cached_property
    def factor(self) -> Tensor:
        """Upper Cholesky factor of the inverse, float32 [K, K]."""
        return torch.linalg.cholesky(self.inverse, upper=True).float()


def compensate(
    target: Tensor,
    curvature: Curvature,
    sizes: Sequence[int],
    layers: Sequence[LayerTarget],
    recipe: Recipe,
    row_weights: Tensor | None = None,
) -> GroupedWeight:
    """Compress layers of one group size and one number of bits.

    Parameters
    ----------
    target : float32 [N, K]
        Minimised is ``w H w^T - 2 w target^T`` a row.
    curvature : Curvature
        Of the K inputs.
    sizes : sequence of int
        Rows of each layer, N together.
    layers : sequence of LayerTarget
        What each layer becomes.
    recipe : Recipe
        Its structure, score and balance.
    row_weights : float32 [N], optional
        What the scores of each row's groups are multiplied with.
    """
    group, bits = layers[0].group_size, layers[0].bits
    # In float64: the float32 product leaves up to a tenth more error in a block's outputs.
    fitted = (target.double() @ curvature.inverse).float()
    if recipe.structure == "2:4":
        fitted, mask = _drop_two_of_four(fitted, target, curvature, recipe)
    else:
        fitted, mask = _drop_groups(fitted, target, curvature, sizes, layers, recipe, row_weights)
    result = sweep(fitted, mask, curvature.factor, group, bits)
    return polish(result, curvature.single, target)


def _drop_groups(
    fitted: Tensor,
    target: Tensor,
    curvature: Curvature,
    sizes: Sequence[int],
    layers: Sequence[LayerTarget],
    recipe: Recipe,
    row_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    group = layers[0].group_size
    mask = torch.ones(len(fitted), fitted.shape[1] // group, dtype=torch.bool, device=fitted.device)
    if not any(layer.sparsity for layer in layers):
        return fitted, mask
    solver = MaskedSolver(curvature.single, target, group)
    scorer = Scorer(recipe.score, curvature.exact, curvature.inverse, group)
    balance = "row" if recipe.balance == "row" else "matrix"
    for step in range(1, PRUNE_STEPS + 1):
        scores = scorer(fitted)
        if row_weights is not None:
            scores = scores * row_weights[:, None]
        pairs = zip(scores.split(list(sizes)), layers, strict=True)
        mask = torch.cat(
            [choose_mask(s, layer.sparsity * step / PRUNE_STEPS, balance) for s, layer in pairs]
        )
        last = step == PRUNE_STEPS
        fitted = solver.refit(fitted, mask, REFIT_STEPS if last else REFIT_STEPS // 2)
    return fitted, mask


def _drop_two_of_four(
    fitted: Tensor, target: Tensor, curvature: Curvature, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    values = column_values(recipe.score, curvature.exact, curvature.factor)
    mask = sweep_mask(fitted, curvature.factor, values)
    return MaskedSolver(curvature.single, target, 1).refit(fitted, mask, REFIT_STEPS), mask


class MaskedSolver:
    """Least squares on each row's kept weights, for all rows at once.

    Minimises ``w H w^T - 2 w b^T`` a row, with w zero outside the mask: conjugate gradients,
    preconditioned with H's diagonal blocks.

    Parameters
    ----------
    hessian : float32 [K, K]
        H.
    target : float32 [N, K]
        b.
    block : int
        Columns of a block of the preconditioner. Masks keep or drop whole blocks.
    """

    def __init__(self, hessian: Tensor, target: Tensor, block: int) -> None:
        self._hessian = hessian
        self._target = target
        self._inverse = torch.linalg.inv(group_blocks(hessian, block).double()).float()

    def _precondition(self, residual: Tensor) -> Tensor:
        groups, size, _ = self._inverse.shape
        parts = residual.reshape(-1, groups, size).transpose(0, 1)
        return (parts @ self._inverse).transpose(0, 1).reshape(residual.shape)

    def refit(self, start: Tensor, mask: Tensor, steps: int) -> Tensor:
        """Return better weights float32 [N, K], beginning at `start`.

        `mask` is bool [N, K/G]; G is a multiple of the preconditioner's block.
        """
        keep = mask.repeat_interleave(start.shape[1] // mask.shape[1], dim=1).float()
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


def sweep(
    weight: Tensor, mask: Tensor, factor: Tensor, group_size: int, bits: int
) -> GroupedWeight:
    """Quantise column after column, each error made up for by the columns behind it (GPTQ).

    Parameters
    ----------
    weight : float32 [N, K]
    mask : bool [N, K/G] or [N, K]
        Groups, or single weights, outside become 0; what earlier columns pushed into them is
        passed on.
    factor : float32 [K, K]
        Upper Cholesky factor of the inverse Hessian.
    group_size : int
        G.
    bits : int
        Of a code.
    """
    # Transposed, so that a column of the weight is contiguous.
    columns = weight.T.contiguous()
    features, rows = columns.shape
    codes = torch.empty_like(columns)
    scales = columns.new_empty(features // group_size, rows)
    zeros = torch.empty_like(scales)
    keep, width = mask.T.contiguous(), features // mask.shape[1]
    chunk = max(SWEEP_COLUMNS, group_size)
    for begin in range(0, features, chunk):
        end = min(begin + chunk, features)
        errors = columns.new_empty(end - begin, rows)
        for column in range(begin, end):
            index, place = divmod(column, group_size)
            if place == 0:
                part = slice(column, column + group_size)
                importance = factor.diagonal()[part] ** -2
                stays = keep[column // width : (column + group_size) // width]
                group = torch.where(stays, columns[part], 0.0).T.contiguous()
                scales[index], zeros[index] = fit_grid(group, bits, importance)
            scale, zero = scales[index], zeros[index]
            code = encode(columns[column], scale, zero, bits)
            codes[column] = torch.where(keep[column // width], code, zero)
            value = decode(codes[column], scale, zero)
            error = (columns[column] - value) / factor[column, column]
            columns[column:end].addr_(factor[column, column:end], error, alpha=-1)
            errors[column - begin] = error
        columns[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    groups = mask if width == group_size else torch.ones_like(scales.T, dtype=torch.bool)
    return GroupedWeight(
        groups,
        codes.T.reshape(rows, -1, group_size),
        scales.T.contiguous(),
        zeros.T.contiguous(),
        bits,
        None if width == group_size else mask,
    )


def polish(start: GroupedWeight, hessian: Tensor, target: Tensor) -> GroupedWeight:
    """Move codes, then scales, then codes again, each to its best value given all the others.

    Parameters
    ----------
    start : GroupedWeight
        The codes of dropped groups are their zero points, as `sweep` leaves them.
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
    scales, zeros = start.scales.T.contiguous(), start.zeros.T.contiguous()
    mask = start.keep if start.elements is None else start.elements
    features, group = columns.shape[0], start.codes.shape[2]
    keep, width = mask.T.contiguous(), features // mask.shape[1]
    chunk = max(SWEEP_COLUMNS, group)
    for begin in range(0, features, chunk):
        end = min(begin + chunk, features)
        pull = wanted[begin:end] - hessian[begin:end] @ columns
        for column in range(begin, end):
            scale, zero = scales[column // group], zeros[column // group]
            best = columns[column] + pull[column - begin] / hessian[column, column]
            code = encode(best, scale, zero, start.bits)
            codes[column] = torch.where(keep[column // width], code, zero)
            value = decode(codes[column], scale, zero)
            pull.addr_(hessian[column, begin:end], value - columns[column], alpha=-1)
            columns[column] = value
    return replace(start, codes=codes.T.reshape(start.codes.shape))


def _polish_scales(start: GroupedWeight, hessian: Tensor, target: Tensor) -> GroupedWeight:
    columns, wanted = start.decode().T.contiguous(), target.T.contiguous()
    units = (start.codes - start.zeros[..., None]).flatten(1).T.contiguous()
    scales = start.scales.T.contiguous()
    group = start.codes.shape[2]
    for index in range(scales.shape[0]):
        part = slice(index * group, (index + 1) * group)
        unit, scale = units[part], scales[index]
        pull = wanted[part] - hessian[part] @ columns
        curvature = ((hessian[part, part] @ unit) * unit).sum(0)
        best = scale + (pull * unit).sum(0) / curvature.clamp(min=torch.finfo().tiny)
        scales[index] = torch.where((curvature > 0) & (best > 0), stored_scale(best), scale)
        columns[part] = unit * scales[index]
    return replace(start, scales=scales.T.contiguous())
