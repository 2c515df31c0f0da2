"""Rounding the language-model head to 8 bits."""

from __future__ import annotations

import numpy as np
import pytest

from gqsa_compiler.head import group_size, round_weight
from gqsa_compiler.schedules.reference import decode


@pytest.mark.parametrize(
    ("features", "size"), [(64, 64), (576, 64), (96, 32), (24, 8), (2048, 64), (36, None), (8, 8)]
)
def test_the_largest_group_that_divides(features: int, size: int | None) -> None:
    assert group_size(features) == size


def test_every_weight_is_within_half_a_step() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((5000, 128)) * np.exp(rng.normal(size=(5000, 1)))).astype(
        np.float16
    )
    weight[7] = 0
    layer = round_weight("lm_head", weight, 64)
    assert layer.symmetric
    assert layer.nnz == 10_000
    error = np.abs(decode(layer) - weight).reshape(5000, 2, 64)
    steps = layer.scales.astype(np.float64).reshape(5000, 2, 1)
    # float16 rounds the scale, by which the largest code is off by 127 * 2^-11 steps more.
    assert np.all(error <= steps * (0.5 + 127 * 2.0**-11))
    assert not decode(layer)[7].any()
