"""Recipes refuse numbers and settings that cannot be."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from gqsa_compiler.compress.recipes.budget import Budget
from gqsa_compiler.compress.recipes.nominal import nominal_bits_per_weight
from gqsa_compiler.compress.recipes.recipe import BlockStage, ModelStage, Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.errors import UsageError

RECIPE = Recipe("r", 4, 50, 16)
TWO_OF_FOUR = Recipe("t", 4, 0, 128, structure="2:4")


def test_shares_and_targets() -> None:
    assert RECIPE.sparsity == 0.5
    assert RECIPE.target == LayerTarget(4, 16, 0.5)
    assert RECIPE.stages == ()
    trained = replace(RECIPE, scales=ModelStage(), block=BlockStage())
    assert trained.stages == ("block", "scales")
    assert trained.one_shot() == RECIPE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits is 5; it must be one of 2, 3, 4, 8"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"sparsity_percent": 96}, "sparsity_percent is 96; it must be 0 to 95"),
        ({"sparsity_percent": -1}, "it must be 0 to 95"),
        ({"sparsity_percent": True}, "sparsity_percent is True"),
        ({"group_size": 12}, "group_size is 12; it must be one of 8, 16"),
        ({"structure": "4:8"}, "structure is 4:8; it must be one of group, 2:4"),
        ({"score": "x"}, "score is x; it must be one of fisher, obs, wanda, magnitude"),
        ({"solver": "x"}, "solver is x; it must be one of compensated, rtn"),
        ({"balance": "x"}, "balance is x; it must be one of matrix, row, model"),
        ({"weights": ModelStage()}, "its weight_rate is above 0"),
        ({"scales": ModelStage(weight_rate=1e-3)}, "its weight_rate is 0"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"Recipe r: .*{message}"):
        replace(RECIPE, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity_percent": 50}, "2:4 drops half of the weights by itself"),
        ({"balance": "row"}, "balance row cannot be had"),
        ({"budget": Budget(bits_per_weight=3)}, "2:4 has one size"),
        ({"block": BlockStage(mask_updates=2)}, "mask of 2:4 stays"),
    ],
)
def test_two_of_four_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(TWO_OF_FOUR, **settings)


WRONG: dict[str, tuple[Any, ...]] = {
    "epochs": (0, -1.0, math.nan, math.inf, True, "2"),
    "most_tokens": (0, -1, 1.5, True),
    "samples": (0, 1.5, True),
    "batch_tokens": (0, -3, 2.0),
    "weight_rate": (-1e-9, math.nan, 11.0),
    "scale_rate": (-1.0, math.inf),
    "zero_rate": (-1.0, False),
    "norm_rate": (-1.0, 1e9),
    "mask_updates": (-1, 0.5),
    "dense_share": (-0.1, 1.1),
    "distillation": (-0.1, 1.1, math.nan),
    "warmup": (-0.1, 1.01),
}


@pytest.mark.parametrize(
    ("stage", "name"),
    [(stage, field.name) for stage in (BlockStage(), ModelStage()) for field in fields(stage)],
    ids=str,
)
def test_stages_refuse(stage: BlockStage | ModelStage, name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(UsageError, match=f"{name} is "):
            replace(stage, **{name: value})


@pytest.mark.parametrize("numbers", [(5, 16, 0.5), (4, 20, 0.5), (4, 16, 0.96), (4, 16, math.nan)])
def test_targets_refuse(numbers: tuple[int, int, float]) -> None:
    with pytest.raises(UsageError, match="it must be"):
        LayerTarget(*numbers)


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        # Codes, scale, zero point and index of a group: 64 + 16 + 4 + 16 bits, of half of them.
        (RECIPE, 0.5 * 100 / 16),
        (Recipe("r", 4, 0, 128), (512 + 16 + 4) / 128),
        (Recipe("r", 2, 0, 64), (128 + 16 + 2) / 64),
        (Recipe("r", 3, 0, 128), (384 + 16 + 3) / 128),
        # 32 times four: two codes of 4 bits and two places of 2.
        (TWO_OF_FOUR, (32 * (8 + 4) + 16 + 4) / 128),
    ],
)
def test_nominal_bits(recipe: Recipe, bits: float) -> None:
    assert nominal_bits_per_weight(recipe) == pytest.approx(bits)
    assert nominal_bits_per_weight(recipe, recipe.target) == pytest.approx(bits)


def test_nominal_bits_of_another_target() -> None:
    assert nominal_bits_per_weight(RECIPE, LayerTarget(8, 32, 0.25)) == pytest.approx(
        0.75 * (256 + 16 + 8 + 16) / 32
    )
