"""One-shot compression of any linear layer from the inputs that it was seen to get."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from textwrap import shorten

import numpy as np
from torch import Tensor

from gqsa_compiler.checkpoint import BSRLayer, from_codes
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.request import PathText, choose_recipe
from gqsa_compiler.compress.result import LayerReport
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.errors import ModelError, UsageError

ON_PURPOSE = "left dense on purpose (`ignore`)"
SHARED = "its weight is read in another way too (a tied embedding)"


def module_recipe(recipe: PathText | Recipe) -> Recipe:
    """Return a recipe as it is used for modules: one shot, a group's worth by its own layer.

    Raises
    ------
    UsageError
        There is no such recipe, or it needs what a decoder has (a budget, 2:4 sparsity).
    """
    chosen = choose_recipe(recipe, stages="none")
    if chosen.budget is not None or chosen.structure != "group":
        raise UsageError(
            f"Recipe {chosen.name} chooses sizes for a whole decoder or is a 2:4 baseline; modules "
            "take recipes such as w4s30g16."
        )
    # What an error costs the whole model is learnt from a language model's loss.
    return replace(chosen, score="obs") if chosen.score == "fisher" else chosen


def misfit(name: str, features: int, recipe: Recipe, ignore: Sequence[str]) -> str | None:
    """Say why a layer is not compressed; None if it is."""
    if any(fnmatchcase(name, pattern) for pattern in ignore):
        return ON_PURPOSE
    if features % recipe.group_size:
        return f"groups of {recipe.group_size} do not divide its {features} inputs"
    if features // recipe.group_size > 65536:
        return f"its {features} inputs have more groups than an index counts"
    return None


def check_ignored(ignore: Sequence[str], names: Collection[str]) -> None:
    """Check that every pattern of `ignore` names a layer.

    Raises
    ------
    UsageError
        One names none.
    """
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"No linear layer is called {pattern!r}, which is to be left dense; there are "
                f"{shorten(', '.join(names), 200, placeholder=' ...')}."
            )


def nothing_compressed(what: str, dense: Mapping[str, str], otherwise: str) -> ModelError:
    """Return the error of a module none of whose layers is compressed.

    Parameters
    ----------
    what : str
        The module, or its file.
    dense : mapping of str to str
        Why each of its layers is not.
    otherwise : str
        Why, where it has none.
    """
    reasons = "; ".join(f"{name}: {reason}" for name, reason in dense.items())
    why = shorten(reasons, 300, placeholder=" ...") or otherwise
    return ModelError(f"{what} has no linear layer that is compressed ({why}).")


def block_diagonal(name: str, parts: Sequence[GroupedWeight]) -> BSRLayer:
    """Join the weights of a grouped convolution: part i reads the i-th share of the columns.

    Everything off the diagonal blocks is absent groups, which cost nothing.

    Parameters
    ----------
    name : str
    parts : sequence of GroupedWeight
        All of one shape [N / parts, K / parts].
    """
    rows, columns, size = parts[0].codes.shape
    count = len(parts)
    keep = np.zeros((count * rows, count * columns), bool)
    codes = np.zeros((count * rows, count * columns, size), np.uint8)
    scales = np.ones(keep.shape, np.float16)
    zeros = np.zeros(keep.shape, np.uint8)
    for index, part in enumerate(parts):
        place = np.s_[index * rows : (index + 1) * rows, index * columns : (index + 1) * columns]
        keep[place] = _numpy(part.keep)
        codes[place] = _numpy(part.codes)
        scales[place] = _numpy(part.scales)
        zeros[place] = _numpy(part.zeros)
    shape = (count * rows, count * columns * size)
    return from_codes(name, shape, size, keep, codes, scales, zeros, parts[0].bits)


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu())


def layer_report(layer: BSRLayer) -> LayerReport:
    """Describe a layer."""
    n, k = layer.shape
    return LayerReport(layer.name, n, k, layer.bits, layer.group_size, layer.sparsity, layer.nbytes)


def bits_per_weight(layers: Sequence[BSRLayer]) -> float:
    """Stored bits over all weights of layers; 0 if there are none."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return 8 * sum(layer.nbytes for layer in layers) / weights if weights else 0.0
