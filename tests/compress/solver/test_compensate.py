"""The sweep and the polish do what slow versions of them do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gqsa_compiler.compress.solver.compensate import Curvature, polish, sweep
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.quantizer import fit_grid, round_to_grid
from tests.compress.training.helpers import element_mask

N, K, G = 4, 160, 16  # more columns than are gathered before errors are passed on


def problem() -> tuple[Tensor, Curvature]:
    """Return a weight float32 [N, K] and a Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(500, K, generator=generator, dtype=torch.float64)
    inputs += 0.7 * inputs[:, :1]
    return torch.randn(N, K, generator=generator), Curvature(inputs.T @ inputs / 500)


def masks(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    if kind == "all":
        return torch.ones(N, K // G, dtype=torch.bool)
    width = G if kind == "groups" else 1
    return torch.rand(N, K // width, generator=generator) < 0.5


def slow_sweep(weight: Tensor, keep: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """GPTQ from its definition: after each column, the best of what is left to choose.

    Float64 [N, K]; `keep` is bool [N, K].
    """
    w = weight.double()
    scale = zero = torch.zeros(N)
    # [H_jj^-1]_00 is what a column's error costs while the columns behind it make up for it.
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(K)]
    for column in range(K):
        if column % G == 0:
            part = slice(column, column + G)
            cost = torch.stack([1 / left[0, 0] for left in inverses[part]]).float()
            scale, zero = fit_grid((w[:, part] * keep[:, part]).float(), bits, cost)
        value = round_to_grid(w[:, column].float(), scale, zero, bits).double()
        value = value * keep[:, column]
        left = inverses[column]
        w[:, column + 1 :] -= ((w[:, column] - value) / left[0, 0])[:, None] * left[0, 1:]
        w[:, column] = value
    return w


def loss(weight: GroupedWeight, target: Tensor, hessian: Tensor) -> Tensor:
    """What polishing minimises, a row; float64 [N]."""
    w = weight.decode().double()
    return ((w @ hessian - 2 * target.double()) * w).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["all", "groups", "elements"])
def test_sweep_is_gptq(kind: str, bits: int) -> None:
    weight, curvature = problem()
    mask = masks(kind)
    keep = mask.repeat_interleave(K // mask.shape[1], 1)
    result = sweep(weight, mask, curvature.factor, G, bits)
    expected = slow_sweep(weight, keep, curvature.exact, bits)
    # Codes on the edge between two may fall to either side in single precision, which moves some
    # of those behind them: so are the errors compared, and nearly all of the weights.
    same = (result.decode().double() - expected).abs() < 1e-3
    assert same.double().mean() > 0.9
    assert torch.equal(element_mask(result), keep)
    assert not result.decode()[~keep].any()

    def error(value: Tensor) -> float:
        wrong = value - weight.double()
        return float(((wrong @ curvature.exact) * wrong).sum())

    assert error(result.decode().double()) == pytest.approx(error(expected), rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["all", "groups", "elements"])
def test_polishing_never_makes_it_worse(kind: str, bits: int) -> None:
    weight, curvature = problem()
    target = weight @ curvature.single
    start = sweep(weight, masks(kind), curvature.factor, G, bits)
    result = polish(start, curvature.single, target)
    before, after = (loss(w, target, curvature.exact) for w in (start, result))
    assert (after <= before + 1e-4).all()
    assert after.sum() < before.sum()
    assert torch.equal(element_mask(result), element_mask(start))
    assert not result.decode()[~element_mask(start)].any()
    assert torch.equal(result.scales, result.scales.half().float())
    assert result.bits == bits
