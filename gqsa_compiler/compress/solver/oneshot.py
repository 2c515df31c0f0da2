"""The linear layers that read one input, in one shot, by any of a recipe's methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.solver.compensate import Curvature, compensate
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.hessian import Moments
from gqsa_compiler.compress.solver.importance import Scorer, choose_mask, choose_of_four
from gqsa_compiler.compress.solver.quantizer import MIN_SCALE
from gqsa_compiler.compress.solver.rtn import round_weight
from gqsa_compiler.errors import ModelError


def compress_rows(
    weights: Sequence[Tensor],
    moments: Moments,
    targets: Sequence[LayerTarget],
    recipe: Recipe,
    names: Sequence[str] = (),
    row_weights: Sequence[Tensor] = (),
) -> list[GroupedWeight]:
    """Compress linear layers that read the same input.

    With the solver ``compensated``, minimises the squared difference between the dense layers'
    outputs on the dense model's inputs and the compressed layers' on the inputs they really get.

    Parameters
    ----------
    weights : sequence of float32 [N_i, K]
        Each is pruned on its own.
    moments : Moments
        Of the K inputs.
    targets : sequence of LayerTarget
        What each layer becomes. Every group size divides K.
    recipe : Recipe
        How: its structure, score, solver and balance. Balance ``model`` is ``matrix`` here; how
        much each layer loses for it is in `targets`.
    names : sequence of str, optional
        The layers' names for errors.
    row_weights : sequence of float32 [N_i], optional
        What an error in each output costs the model; the score ``fisher`` needs them to drop
        groups.

    Returns
    -------
    list of GroupedWeight
        One for each weight.

    Raises
    ------
    ModelError
        A weight is NaN or infinite, or so large that the arithmetic overflows.
    """
    drops = any(target.sparsity for target in targets)
    assert recipe.structure == "group" or not drops
    assert recipe.score != "fisher" or not drops or len(row_weights) == len(weights)
    names = names or [f"number {index}" for index in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        _check_finite(name, "weights", weight)
    curvature = Curvature(moments.hessian)
    if recipe.solver == "rtn":
        pairs = zip(weights, targets, strict=True)
        results = [_round(weight, curvature, target, recipe) for weight, target in pairs]
    else:
        try:
            results = _compensate(weights, moments, curvature, targets, recipe, row_weights)
        except torch.linalg.LinAlgError as error:
            raise ModelError(
                f"The inputs of layer {names[0]} give no matrix that can be inverted ({error}); "
                "calibrate on more or other text."
            ) from error
    for name, result in zip(names, results, strict=True):
        _check_finite(name, "compressed weights", result.decode())
    return results


def check_not_lost(name: str, weight: Tensor) -> None:
    """Check that a layer has a weight that some scale of a checkpoint does not round to 0.

    Single groups, rows or parts of a layer may be lost beside larger ones.

    Raises
    ------
    ModelError
        All would become 0, and they are not.
    """
    if not weight.numel():
        return
    low, high = torch.aminmax(weight)  # a head is large: no copy of it
    largest = max(-float(low), float(high))
    if 0 < largest <= MIN_SCALE / 2:
        raise ModelError(
            f"The weights of layer {name} are at most {largest:.2g} in size, and scales in float16 "
            f"make 0 of all below {MIN_SCALE / 2:.2g}; multiply them by something, or leave the "
            "layer dense."
        )


def _compensate(
    weights: Sequence[Tensor],
    moments: Moments,
    curvature: Curvature,
    targets: Sequence[LayerTarget],
    recipe: Recipe,
    row_weights: Sequence[Tensor],
) -> list[GroupedWeight]:
    """Solve the layers of one group size and width together: rows do not depend on each other."""
    target = moments.target(torch.cat(list(weights)))
    rows = target.split([len(weight) for weight in weights])
    # Layers of which nothing is dropped are apart, since they need no refit.
    kinds = [(layer.group_size, layer.bits, layer.sparsity > 0) for layer in targets]
    results: dict[int, GroupedWeight] = {}
    for kind in dict.fromkeys(kinds):
        members = [index for index, other in enumerate(kinds) if other == kind]
        whole = len(members) == len(weights)
        done = compensate(
            target if whole else torch.cat([rows[index] for index in members]),
            curvature,
            [len(weights[index]) for index in members],
            [targets[index] for index in members],
            recipe,
            torch.cat([row_weights[index] for index in members]) if row_weights else None,
        )
        start = 0
        for index in members:
            stop = start + len(weights[index])
            results[index] = done.rows(start, stop)
            start = stop
    return [results[index] for index in range(len(weights))]


def _round(
    weight: Tensor, curvature: Curvature, target: LayerTarget, recipe: Recipe
) -> GroupedWeight:
    width = 1 if recipe.structure == "2:4" else target.group_size
    if width > 1 and not target.sparsity:
        mask = torch.ones(len(weight), weight.shape[1] // width, dtype=torch.bool)
        return round_weight(weight, mask.to(weight.device), width, target.bits)
    inverse = curvature.inverse if recipe.score in ("obs", "fisher") else None
    scores = Scorer(recipe.score, curvature.exact, inverse, width)(weight)
    if recipe.structure == "2:4":
        mask = choose_of_four(scores)
    else:
        balance = "row" if recipe.balance == "row" else "matrix"
        mask = choose_mask(scores, target.sparsity, balance)
    return round_weight(weight, mask, target.group_size, target.bits)


def _check_finite(name: str, what: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ModelError(
            f"The {what} of layer {name} are not finite numbers: the model's weights are damaged, "
            "or its numbers are too large or too small to compute with."
        )
