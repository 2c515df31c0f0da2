"""Sharing out a budget: against every combination, to the byte, and what cannot be met."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler.compress.allocation.allocate import Allocation, allocate, balance_model
from gqsa_compiler.compress.allocation.costs import LayerCosts
from gqsa_compiler.compress.allocation.stored import stored_bytes, stored_groups
from gqsa_compiler.compress.recipes.budget import Budget
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.errors import ModelError, UsageError

W4 = LayerTarget(4, 16, 0.5)
POINTS = (0.0, 0.2, 0.4, 0.6, 0.8)


def layer(
    index: int,
    risk: float,
    *,
    shape: tuple[int, int] = (24, 64),
    bits: tuple[int, ...] = (4,),
    group_sizes: tuple[int, ...] = (16,),
    shape_of_curve: float = 3.0,
) -> LayerCosts:
    """Return a layer whose costs rise like a power of the sparsity; few bits add to them."""
    curves = {
        (width, size): tuple(
            risk * (s**shape_of_curve + 0.3 * 4.0**-width * size * (1 - s)) for s in POINTS
        )
        for width in bits
        for size in group_sizes
        if shape[1] % size == 0
    }
    return LayerCosts(f"layers.{index}", shape, POINTS, curves)


def random_layers(seed: int, count: int, **choices: tuple[int, ...]) -> list[LayerCosts]:
    rng = np.random.default_rng(seed)
    return [
        layer(
            index,
            float(rng.lognormal()),
            shape=(int(rng.integers(3, 40)), 64 * int(rng.integers(1, 4))),
            shape_of_curve=float(rng.uniform(0.7, 4)),
            **choices,
        )
        for index in range(count)
    ]


def options(layer: LayerCosts, budget: Budget) -> list[tuple[int, float]]:
    """List the (bytes, cost) of all that a layer may become."""
    found = []
    for bits, size in itertools.product(budget.bits or (4,), budget.group_sizes or (16,)):
        for s in budget.allowed_sparsities:
            stored = stored_bytes(layer.shape, LayerTarget(bits, size, s))
            found.append((stored, float(layer.at((bits, size), [s])[0])))
    return found


def optimum(layers: Sequence[LayerCosts], budget: Budget, limit: int) -> float:
    """Return the least cost within `limit` bytes, by trying everything."""
    return min(
        (
            sum(cost for _, cost in choice)
            for choice in itertools.product(*(options(layer, budget) for layer in layers))
            if sum(size for size, _ in choice) <= limit
        ),
        default=float("inf"),
    )


def total_bytes(layers: Sequence[LayerCosts], found: Allocation) -> int:
    return sum(stored_bytes(layer.shape, found.targets[layer.name]) for layer in layers)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), place=st.floats(0, 1))
def test_close_to_the_best_of_all_combinations(seed: int, place: float) -> None:
    layers = random_layers(seed, 3, bits=(2, 4), group_sizes=(16, 32))
    choices = {"bits": (2, 4), "group_sizes": (16, 32), "sparsities": (0.0, 0.3, 0.5, 0.7)}
    found = [options(layer, Budget(bytes=1, **choices)) for layer in layers]  # type: ignore[arg-type]
    least, most = (sum(pick(size for size, _ in o) for o in found) for pick in (min, max))
    limit = least + round(place * (most - least))
    budget = Budget(bytes=limit, **choices)  # type: ignore[arg-type]
    result = allocate(layers, budget, W4)
    assert total_bytes(layers, result) == result.bytes <= limit
    best = optimum(layers, budget, limit)
    assert result.predicted_loss >= best - 1e-12
    # One step of the convex hulls is all that can be lost.
    step = max(max(s for s, _ in o) - min(s for s, _ in o) for o in found)
    assert result.predicted_loss <= optimum(layers, budget, max(least, limit - step)) + 1e-12
    # And nothing that would still fit would help.
    for layer, choice in zip(layers, found, strict=True):
        now = result.targets[layer.name]
        cost = float(layer.at((now.bits, now.group_size), [now.sparsity])[0])
        spare = limit - result.bytes + stored_bytes(layer.shape, now)
        assert not any(size <= spare and other < cost - 1e-12 for size, other in choice)


def test_exact_where_every_step_is_small() -> None:
    layers = [layer(index, risk) for index, risk in enumerate((0.1, 1.0, 3.0))]
    budget = Budget(bits_per_weight=3.4, sparsities=tuple(s / 20 for s in range(17)))
    limit = budget.most_bytes(3 * 24 * 64)
    result = allocate(layers, budget, W4)
    assert result.predicted_loss <= 1.03 * optimum(layers, budget, limit)
    assert limit - result.bytes < 24 * 4 * 0.05 * 13 + 13


def test_sensitive_layers_keep_more() -> None:
    layers = [layer(index, risk) for index, risk in enumerate((4.0, 1.0, 0.25))]
    targets = allocate(layers, Budget(bits_per_weight=3.2), W4).targets
    first, second, third = (targets[layer.name].sparsity for layer in layers)
    assert first < second < third


def test_more_bytes_never_cost_more() -> None:
    layers = random_layers(3, 12, bits=(2, 3, 4, 8), group_sizes=(16, 32, 64))
    losses, sizes = [], []
    for size in np.linspace(1.9, 6.0, 30):
        budget = Budget(bits_per_weight=float(size), bits=(2, 3, 4, 8), group_sizes=(16, 32, 64))
        result = allocate(layers, budget, W4)
        losses.append(result.predicted_loss)
        sizes.append(result.bits_per_weight / size)
    assert losses == sorted(losses, reverse=True)
    assert 0.97 < min(sizes) <= max(sizes) <= 1


def test_an_allocation_beats_one_sparsity_for_all() -> None:
    layers = random_layers(5, 12)
    result = allocate(layers, Budget(bits_per_weight=3.5), W4)
    assert result.uniform_loss is not None
    assert result.predicted_loss < 0.95 * result.uniform_loss


def test_uniform_is_missing_where_it_cannot_be_had() -> None:
    layers = [layer(index, 1.0, bits=(2, 4), group_sizes=(16,)) for index in range(2)]
    tight = Budget(bits_per_weight=3.0, bits=(2, 4), most_sparsity=0.5)
    assert allocate(layers, tight, W4).uniform_loss is None
    unmeasured = allocate(layers, Budget(bits_per_weight=3.0, bits=(2,)), LayerTarget(3, 16, 0.5))
    assert unmeasured.uniform_loss is None


def test_deterministic_with_ties() -> None:
    layers = [layer(index, 1.0, bits=(3, 4), group_sizes=(16, 32)) for index in range(6)]
    budget = Budget(bits_per_weight=3.3, bits=(3, 4), group_sizes=(16, 32))
    first, second = allocate(layers, budget, W4), allocate(layers, budget, W4)
    assert first == second
    assert list(first.targets) == [layer.name for layer in layers]


def test_limits_hold_for_every_layer() -> None:
    layers = [layer(index, 100.0**index) for index in range(4)]
    budget = Budget(bits_per_weight=3.6, least_sparsity=0.25, most_sparsity=0.63)
    sparsities = [target.sparsity for target in allocate(layers, budget, W4).targets.values()]
    assert min(sparsities) == 0.25
    assert max(sparsities) == 0.63
    whole = balance_model(layers, W4, least_sparsity=0.25, most_sparsity=0.63)
    sparsities = [target.sparsity for target in whole.targets.values()]
    assert (min(sparsities), max(sparsities)) == (0.25, 0.63)


def test_without_a_choice_the_recipe_decides() -> None:
    layers = [layer(index, 1.0, bits=(3, 4), group_sizes=(16, 32)) for index in range(2)]
    result = allocate(layers, Budget(bits_per_weight=3.0), LayerTarget(3, 32, 0.0))
    assert {(t.bits, t.group_size) for t in result.targets.values()} == {(3, 32)}


def test_a_group_size_that_does_not_divide_is_left_out() -> None:
    layers = [
        layer(0, 1.0, shape=(24, 48), group_sizes=(16, 32)),
        layer(1, 1.0, shape=(24, 64), group_sizes=(16, 32)),
    ]
    result = allocate(layers, Budget(bits_per_weight=3.0, group_sizes=(16, 32)), W4)
    assert result.targets["layers.0"].group_size == 16
    with pytest.raises(ModelError, match="Groups of 32 do not divide the 48 inputs"):
        allocate(layers, Budget(bits_per_weight=3.0, group_sizes=(32,)), W4)


@pytest.mark.parametrize("balance", ["matrix", "row"])
def test_budgets_that_cannot_be_met(balance: str) -> None:
    layers = [layer(index, 1.0) for index in range(3)]
    least, most = (
        sum(stored_bytes(one.shape, LayerTarget(4, 16, s), balance) for one in layers)
        for s in (0.8, 0.0)
    )
    message = rf"The budget {least - 1}B is .* take {least} \(.* and {most} \("
    with pytest.raises(UsageError, match=message):
        allocate(layers, Budget(bytes=least - 1), W4, balance=balance)
    result = allocate(layers, Budget(bytes=least), W4, balance=balance)
    assert result.bytes == least
    assert allocate(layers, Budget(bytes=most), W4, balance=balance).bytes == most


def test_a_budget_with_room_to_spare_takes_the_best() -> None:
    layers = random_layers(2, 4, bits=(2, 4, 8), group_sizes=(16, 64))
    budget = Budget(bits_per_weight=16, bits=(2, 4, 8), group_sizes=(16, 64))
    result = allocate(layers, budget, W4)
    assert set(result.targets.values()) == {LayerTarget(8, 16, 0.0)}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.55, 0.8])
def test_model_balance_drops_as_much_as_asked(sparsity: float) -> None:
    layers = random_layers(7, 10)
    recipe = LayerTarget(4, 16, sparsity)
    result = balance_model(layers, recipe)
    wanted = sum(stored_groups(one.shape, recipe) for one in layers)
    kept = sum(stored_groups(one.shape, result.targets[one.name]) for one in layers)
    assert wanted - 4 <= kept <= wanted
    assert {(t.bits, t.group_size) for t in result.targets.values()} == {(4, 16)}
    assert result.uniform_loss is not None
    assert result.predicted_loss <= result.uniform_loss + 1e-12
    assert result.bytes == total_bytes(layers, result)


def test_model_balance_outside_its_limits() -> None:
    layers = [layer(0, 1.0)]
    with pytest.raises(UsageError, match=r"0.5 of the whole model cannot be had with 0.6 to 0.8"):
        balance_model(layers, W4, least_sparsity=0.6)
    with pytest.raises(UsageError, match="is above the most"):
        balance_model(layers, W4, least_sparsity=0.6, most_sparsity=0.5)


def test_costs_must_be_numbers() -> None:
    with pytest.raises(ModelError, match=r"layer model.layers.3.fc1 are not finite"):
        LayerCosts("model.layers.3.fc1", (4, 16), (0.0, 0.5), {(4, 16): (0.0, float("nan"))})


def test_costs_are_read_between_the_measured_points() -> None:
    costs = layer(0, 2.0)
    measured = costs.at((4, 16), POINTS)
    np.testing.assert_allclose(measured, costs.curves[4, 16])
    between = costs.at((4, 16), np.linspace(0, 0.8, 81).tolist())
    assert (np.diff(between) >= -1e-12).all()
    for scheme, sparsity in (((3, 16), 0.5), ((4, 16), 0.81), ((4, 16), -0.01)):
        with pytest.raises(ValueError, match="was not measured"):
            costs.at(scheme, [sparsity])
    alone = LayerCosts("one", (4, 16), (0.0,), {(4, 16): (0.25,)})
    assert alone.at((4, 16), [0.0]).tolist() == [0.25]
