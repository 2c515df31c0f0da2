"""Grids are exactly what the checkpoint stores, and fit their groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gqsa_compiler.compress.solver.quantizer import (
    MAX_SCALE,
    MIN_SCALE,
    SHRINKS,
    decode,
    encode,
    fit_grid,
    max_code,
    round_to_grid,
)
from gqsa_compiler.limits import BITS


def groups(kind: str) -> Tensor:
    values = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    return {
        "mixed": values,
        "positive": values.abs() + 0.5,
        "negative": -values.abs() - 0.5,
        "tiny": values * 1e-7,
        "zero": values * 0,
        "large": values * 2e4,
        "huge": values * 1e5,
        "outlier": values + 20 * (torch.arange(16) == 3),
    }[kind]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "kind", ["mixed", "positive", "negative", "tiny", "zero", "huge", "outlier"]
)
def test_grid_is_storable(kind: str, bits: int) -> None:
    weight = groups(kind)
    scale, zero = fit_grid(weight, bits)
    assert torch.equal(scale, scale.half().float())
    assert scale.min() >= MIN_SCALE
    assert scale.max() <= MAX_SCALE
    assert torch.equal(zero, zero.round())
    assert zero.min() >= 0
    assert zero.max() <= 2**bits - 1
    codes = encode(weight, scale[:, None], zero[:, None], bits)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["mixed", "positive", "negative", "large", "outlier"])
def test_full_range_has_at_most_a_step_of_error(kind: str, bits: int) -> None:
    weight = groups(kind)
    scale, zero = fit_grid(weight, bits, shrinks=(1.0,))
    error = (round_to_grid(weight, scale[:, None], zero[:, None], bits) - weight).abs()
    # A full step at the ends: rounding the zero point moves the grid by up to half a step.
    # Float16 scales add a share of the range, which is many steps of 8 bits.
    assert (error <= (1 + 2**-10 * max_code(bits)) * scale[:, None]).all()


@pytest.mark.parametrize("bits", BITS)
def test_zero_weights_stay_zero(bits: int) -> None:
    nothing = torch.zeros(3, 16)
    scale, zero = fit_grid(nothing, bits)
    assert torch.equal(round_to_grid(nothing, scale[:, None], zero[:, None], bits), nothing)


@pytest.mark.parametrize("bits", BITS)
def test_search_never_loses_to_the_full_range(bits: int) -> None:
    weight = groups("mixed")

    def error(shrinks: tuple[float, ...] | None) -> Tensor:
        scale, zero = fit_grid(weight, bits, shrinks=shrinks)
        error = round_to_grid(weight, scale[:, None], zero[:, None], bits) - weight
        return error.square().sum(1)

    assert set(SHRINKS) == set(BITS)
    assert (error(None) <= error((1.0,))).all()
    assert error(None).sum() < 0.97 * error((1.0,)).sum()


def test_fewer_codes_clip_more() -> None:
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    span = weight.amax(1) - weight.amin(1)
    share = {bits: fit_grid(weight, bits)[0] * max_code(bits) / span for bits in BITS}
    assert share[2].mean() < share[3].mean() < share[4].mean() < share[8].mean()


def test_search_heeds_column_importance() -> None:
    weight = groups("outlier")
    importance = torch.ones(16)
    importance[3] = 0  # the outlier does not matter
    scale, _ = fit_grid(weight, 4, importance, shrinks=(1.0, 0.5, 0.3))
    plain, _ = fit_grid(weight, 4, shrinks=(1.0, 0.5, 0.3))
    assert scale.mean() < 0.7 * plain.mean()


@pytest.mark.parametrize("bits", BITS)
def test_grid_points_survive_a_round_trip(bits: int) -> None:
    scale = torch.tensor([[0.5], [0.012]]).half().float()
    zero = torch.tensor([[0.0], [2.0**bits // 2 - 1]])
    codes = torch.arange(2.0**bits).expand(2, -1)
    assert torch.equal(encode(decode(codes, scale, zero), scale, zero, bits), codes)
