"""Bits a weight of a format made for a recipe, for comparisons."""

from __future__ import annotations

from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget

SCALE_BITS = 16
"""A group's scale, float16."""

GROUP_INDEX_BITS = 16
"""The column index of a kept group."""

PLACE_BITS = 2
"""Which of four weights one is."""


def nominal_bits_per_weight(recipe: Recipe, target: LayerTarget | None = None) -> float:
    """Bits a weight that a format made for this recipe stores, without row pointers and padding.

    A group has a scale of 16 bits and a zero point. With groups dropped, each kept one also has a
    column index of 16 bits; with none dropped there is no index, as in the formats of GPTQ. 2:4
    stores two codes and two places of 2 bits for every four weights, and a scale and a zero point
    for every group, as 2:4 tensor cores want it.

    A checkpoint of this project stores indices always, and the dropped weights of 2:4 too: its
    size is in the report of the compression. These are the numbers that comparisons between methods
    should use.

    Parameters
    ----------
    recipe : Recipe
    target : LayerTarget, optional
        What a layer becomes that differs from the recipe.

    Returns
    -------
    float
    """
    layer = target or recipe.target
    grid = (SCALE_BITS + layer.bits) / layer.group_size
    if recipe.structure == "2:4":
        return (2 * layer.bits + 2 * PLACE_BITS) / 4 + grid
    if not layer.sparsity:
        return layer.bits + grid
    return (1 - layer.sparsity) * (layer.bits + grid + GROUP_INDEX_BITS / layer.group_size)
