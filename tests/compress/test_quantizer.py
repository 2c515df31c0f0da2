"""Grids are exactly what the checkpoint stores, and fit their groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gqsa_compiler.compress.quantizer import (
    MAX_SCALE,
    MIN_SCALE,
    SHRINKS,
    decode,
    encode,
    fit_grid,
    round_to_grid,
)


def groups(kind: str) -> Tensor:
    values = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    return {
        "mixed": values,
        "positive": values.abs() + 0.5,
        "negative": -values.abs() - 0.5,
        "tiny": values * 1e-7,
        "zero": values * 0,
        "huge": values * 1e5,
        "outlier": values + 20 * (torch.arange(16) == 3),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["mixed", "positive", "negative", "tiny", "zero", "huge", "outlier"]
)
def test_grid_is_storable(kind: str) -> None:
    weight = groups(kind)
    scale, zero = fit_grid(weight)
    assert torch.equal(scale, scale.half().float())
    assert scale.min() >= MIN_SCALE
    assert scale.max() <= MAX_SCALE
    assert torch.equal(zero, zero.round())
    assert zero.min() >= 0
    assert zero.max() <= 15
    codes = encode(weight, scale[:, None], zero[:, None])
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 15


@pytest.mark.parametrize("kind", ["mixed", "positive", "negative", "huge", "outlier"])
def test_full_range_has_at_most_about_half_a_step_of_error(kind: str) -> None:
    weight = groups(kind)
    scale, zero = fit_grid(weight, shrinks=(1.0,))
    error = (round_to_grid(weight, scale[:, None], zero[:, None]) - weight).abs()
    # A full step at the ends: rounding the zero point moves the grid by up to half a step.
    assert (error <= 1.02 * scale[:, None]).all()


def test_zero_weights_stay_zero() -> None:
    scale, zero = fit_grid(torch.zeros(3, 16))
    assert torch.equal(
        round_to_grid(torch.zeros(3, 16), scale[:, None], zero[:, None]), torch.zeros(3, 16)
    )


def test_search_never_loses_to_the_full_range() -> None:
    weight = groups("mixed")

    def error(shrinks: tuple[float, ...]) -> Tensor:
        scale, zero = fit_grid(weight, shrinks=shrinks)
        return (round_to_grid(weight, scale[:, None], zero[:, None]) - weight).square().sum(1)

    assert (error(SHRINKS) <= error((1.0,))).all()
    assert error(SHRINKS).sum() < 0.95 * error((1.0,)).sum()


def test_search_heeds_column_importance() -> None:
    weight = groups("outlier")
    importance = torch.ones(16)
    importance[3] = 0  # the outlier does not matter
    scale, _ = fit_grid(weight, importance, shrinks=(1.0, 0.5, 0.3))
    plain, _ = fit_grid(weight, shrinks=(1.0, 0.5, 0.3))
    assert scale.mean() < 0.7 * plain.mean()


def test_grid_points_survive_a_round_trip() -> None:
    scale = torch.tensor([[0.5], [0.012]]).half().float()
    zero = torch.tensor([[0.0], [7.0]])
    codes = torch.arange(16.0).expand(2, 16)
    assert torch.equal(encode(decode(codes, scale, zero), scale, zero), codes)
