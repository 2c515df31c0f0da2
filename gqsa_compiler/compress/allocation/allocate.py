"""Share a budget out over the layers, so that the model loses the least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gqsa_compiler.compress.allocation.costs import LayerCosts
from gqsa_compiler.compress.allocation.stored import stored_bytes, stored_groups
from gqsa_compiler.compress.recipes.budget import Budget, allowed_sparsities, check_limits
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.errors import ModelError, UsageError


@dataclass(frozen=True)
class Allocation:
    """What every layer becomes, and what that is predicted to give.

    Parameters
    ----------
    targets : dict of str to LayerTarget
        By module path.
    bytes : int
        Stored bytes of these layers, to the byte.
    bits_per_weight : float
        The same, for each weight.
    predicted_loss : float
        The layers' costs added up: KL divergence from the dense model, nats a token, before any
        training. It ranks allocations; the figure itself is too low where it is not small.
    uniform_loss : float or None
        The same where every layer gets one sparsity, with the recipe's bits and group size, in at
        most the same size; None if no sparsity within the limits is enough, or the recipe's bits
        and group size were not measured.
    """

    targets: dict[str, LayerTarget]
    bytes: int
    bits_per_weight: float
    predicted_loss: float
    uniform_loss: float | None


@dataclass(frozen=True, eq=False)
class _Options:
    """A layer's choices: `sizes` int64 [n] (bytes or groups) and `costs` float64 [n]."""

    targets: tuple[LayerTarget, ...]
    sizes: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]

    def hull(self) -> list[int]:
        """List the choices on the lower convex hull of cost against size, smallest size first."""
        order = np.lexsort((self.costs, self.sizes))
        hull: list[int] = []
        for index in order.tolist():
            if hull and self.costs[index] >= self.costs[hull[-1]]:
                continue  # larger, and no better
            while len(hull) > 1 and self.gain(hull[-2], index) >= self.gain(*hull[-2:]):
                hull.pop()
            hull.append(index)
        return hull

    def gain(self, small: int, large: int) -> float:
        """Cost saved for each unit of size, from a choice to a larger one."""
        saved = self.costs[small] - self.costs[large]
        return float(saved / (self.sizes[large] - self.sizes[small]))


def allocate(
    layers: Sequence[LayerCosts],
    budget: Budget,
    recipe: LayerTarget,
    *,
    balance: str = "matrix",
) -> Allocation:
    """Choose each layer's sparsity, and what else the budget leaves open, for the least loss.

    Parameters
    ----------
    layers : sequence of LayerCosts
        Measured for all that the budget lets choose from.
    budget : Budget
    recipe : LayerTarget
        Gives the bits and the group size where the budget leaves no choice.
    balance : str
        How a layer's groups are dropped: ``row`` or anything else; see `stored_groups`.

    Returns
    -------
    Allocation
        Never above the budget, and below it by less than the smallest step that would still help.

    Raises
    ------
    UsageError
        The budget is less than the choices can reach.
    ModelError
        No group size divides a layer.
    """
    schemes = list(itertools.product(*budget.choices(recipe)))
    options = [
        _options(layer, schemes, budget.allowed_sparsities, balance, groups=False)
        for layer in layers
    ]
    weights = sum(layer.weights for layer in layers)
    limit = budget.most_bytes(weights)
    least = sum(int(option.sizes.min()) for option in options)
    most = sum(int(option.sizes.max()) for option in options)
    _check_limit(budget, limit, least, most, weights)
    chosen = _choose(options, limit)
    uniform = _uniform(layers, recipe, budget.allowed_sparsities, limit, balance)
    return _allocation(layers, options, chosen, uniform, balance)


def check_budget(
    shapes: Sequence[tuple[int, int]], budget: Budget, recipe: LayerTarget, balance: str
) -> None:
    """Check that layers of these shapes can be had within a budget, before they are measured.

    Raises
    ------
    UsageError
        The budget is less than the choices can reach.
    """
    least = most = 0
    for shape in shapes:
        sizes = [
            stored_bytes(shape, LayerTarget(bits, group_size, sparsity), balance)
            for bits, group_size in itertools.product(*budget.choices(recipe))
            if shape[1] % group_size == 0
            for sparsity in budget.allowed_sparsities
        ]
        least, most = least + min(sizes, default=0), most + max(sizes, default=0)
    weights = sum(n * k for n, k in shapes)
    _check_limit(budget, budget.most_bytes(weights), least, most, weights)


def _check_limit(budget: Budget, limit: int, least: int, most: int, weights: int) -> None:
    if least > limit:
        raise UsageError(
            f"The budget {budget} is {limit} bytes for the compressed layers, but their choices "
            f"take {least} ({8 * least / weights:.3f} bits a weight) at least and {most} "
            f"({8 * most / weights:.3f}) at most; raise it or allow more sparsity, fewer bits or "
            "larger groups."
        )


def balance_model(
    layers: Sequence[LayerCosts],
    recipe: LayerTarget,
    *,
    least_sparsity: float = 0.0,
    most_sparsity: float = 0.8,
) -> Allocation:
    """Drop the recipe's share of all the layers' groups together, where it costs the least.

    Parameters
    ----------
    layers : sequence of LayerCosts
        Measured at the recipe's bits and group size.
    recipe : LayerTarget
        Its sparsity is that of all layers together.
    least_sparsity, most_sparsity : float
        Limits for every layer.

    Returns
    -------
    Allocation
        It keeps at most as many groups as that sparsity in every layer would, and fewer by less
        than the smallest step that would still help.

    Raises
    ------
    UsageError
        The sparsity lies outside the limits.
    ModelError
        The group size does not divide a layer.
    """
    check_limits(least_sparsity, most_sparsity)
    if not least_sparsity <= recipe.sparsity <= most_sparsity:
        raise UsageError(
            f"A sparsity of {recipe.sparsity:g} of the whole model cannot be had with "
            f"{least_sparsity:g} to {most_sparsity:g} in each layer."
        )
    sparsities = (*allowed_sparsities(least_sparsity, most_sparsity), recipe.sparsity)
    scheme = (recipe.bits, recipe.group_size)
    options = [_options(layer, [scheme], sparsities, "matrix", groups=True) for layer in layers]
    limit = sum(stored_groups(layer.shape, recipe) for layer in layers)
    chosen = _choose(options, limit)
    uniform = sum(float(layer.at(scheme, [recipe.sparsity])[0]) for layer in layers)
    return _allocation(layers, options, chosen, uniform, "matrix")


def _options(
    layer: LayerCosts,
    schemes: Sequence[tuple[int, int]],
    sparsities: Sequence[float],
    balance: str,
    *,
    groups: bool,
) -> _Options:
    """List a layer's choices; their size is counted in groups or in bytes."""
    size = stored_groups if groups else stored_bytes
    targets: list[LayerTarget] = []
    costs: list[npt.NDArray[np.float64]] = []
    for bits, group_size in schemes:
        if layer.shape[1] % group_size == 0:
            targets += [LayerTarget(bits, group_size, sparsity) for sparsity in sparsities]
            costs.append(layer.at((bits, group_size), sparsities))
    if not targets:
        wanted = " or ".join(str(group_size) for group_size in sorted({g for _, g in schemes}))
        raise ModelError(
            f"Groups of {wanted} do not divide the {layer.shape[1]} inputs of layer {layer.name}; "
            "use a smaller group size."
        )
    sizes = np.array([size(layer.shape, target, balance) for target in targets], np.int64)
    return _Options(tuple(targets), sizes, np.concatenate(costs))


def _choose(options: Sequence[_Options], limit: int) -> list[int]:
    """Choose one of each layer's options, for the least cost in all, within `limit`.

    Up the convex hulls, the best saving for its size first: that is the optimum for the size where
    it stops. What is left over then goes to the single steps that save the most for their size.
    """
    hulls = [option.hull() for option in options]
    chosen = [hull[0] for hull in hulls]
    left = limit - sum(int(o.sizes[c]) for o, c in zip(options, chosen, strict=True))
    assert left >= 0, "the limit was checked"
    # Along a hull gains only fall, so sorting keeps every layer's steps in order.
    steps = sorted(
        (-option.gain(small, large), layer, large)
        for layer, (option, hull) in enumerate(zip(options, hulls, strict=True))
        for small, large in itertools.pairwise(hull)
    )
    for _, layer, large in steps:
        need = int(options[layer].sizes[large] - options[layer].sizes[chosen[layer]])
        if need > left:
            break
        chosen[layer] = large
        left -= need
    waiting = {
        layer: _best_step(option, chosen[layer], left) for layer, option in enumerate(options)
    }
    while True:
        fitting = [(-gain, layer, large) for layer, (gain, large) in waiting.items() if gain > 0]
        if not fitting:
            return chosen
        _, layer, large = min(fitting)
        left -= int(options[layer].sizes[large] - options[layer].sizes[chosen[layer]])
        chosen[layer] = large
        waiting = {
            other: _best_step(options[other], chosen[other], left)
            for other, (gain, _) in waiting.items()
            if gain > 0  # with less left over, what found nothing finds nothing
        }


def _best_step(option: _Options, now: int, left: int) -> tuple[float, int]:
    """Return gain and index of the best choice that takes at most `left` more; 0: there is none."""
    more = option.sizes - option.sizes[now]
    saved = option.costs[now] - option.costs
    fits = (more <= left) & (saved > 0)
    if not fits.any():
        return 0.0, now
    gains = np.where(fits, saved / np.maximum(more, 1), 0.0)
    best = int(gains.argmax())
    return float(gains[best]), best


def _uniform(
    layers: Sequence[LayerCosts],
    recipe: LayerTarget,
    sparsities: Sequence[float],
    limit: int,
    balance: str,
) -> float | None:
    """Return the cost of the least sparsity that, in every layer, meets the limit."""
    scheme = (recipe.bits, recipe.group_size)
    if any(scheme not in layer.curves for layer in layers):
        return None
    for sparsity in sparsities:
        target = LayerTarget(*scheme, sparsity)
        if sum(stored_bytes(layer.shape, target, balance) for layer in layers) <= limit:
            return sum(float(layer.at(scheme, [sparsity])[0]) for layer in layers)
    return None


def _allocation(
    layers: Sequence[LayerCosts],
    options: Sequence[_Options],
    chosen: Sequence[int],
    uniform: float | None,
    balance: str,
) -> Allocation:
    picked = list(zip(layers, options, chosen, strict=True))
    targets = {layer.name: option.targets[index] for layer, option, index in picked}
    size = sum(stored_bytes(layer.shape, targets[layer.name], balance) for layer in layers)
    return Allocation(
        targets=targets,
        bytes=size,
        bits_per_weight=8 * size / sum(layer.weights for layer in layers),
        predicted_loss=sum(float(option.costs[index]) for _, option, index in picked),
        uniform_loss=uniform,
    )
