"""Masks that are chosen anew while a block trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gqsa_compiler.compress.recipes.recipe import BlockStage
from gqsa_compiler.compress.solver.importance import choose_mask, magnitude_scores
from gqsa_compiler.compress.solver.quantizer import fit_grid
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.training.masks import MaskSchedule, best_groups
from gqsa_compiler.compress.training.optimizer import make_optimizer, parameter_groups
from tests.compress.training.helpers import (
    COLUMNS,
    GROUP,
    is_storable,
    latent_of,
    random_inputs,
    random_weight,
)


def grouped(dropped: float = 0.5, seed: int = 0) -> GroupedLinear:
    weight = random_weight(dropped=dropped, seed=seed)
    return GroupedLinear(weight, None, latent=weight.decode())


def grow(layer: GroupedLinear, group: tuple[int, int], values: Tensor | float) -> None:
    """Set the latent weights of a group."""
    latent_of(layer).view(layer.grid_shape)[group] = values


def first_dropped(layer: GroupedLinear) -> tuple[int, int]:
    row, group = (~layer.keep).nonzero()[0].tolist()
    return row, group


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("balance", ["row", "matrix"])
def test_best_groups_are_those_of_the_one_shot(balance: str, sparsity: float) -> None:
    before, scores = torch.rand(2, 12, 8)
    scores[3] = scores[4]  # ties
    keep = choose_mask(before, sparsity, balance)
    found = best_groups(scores, keep, rows=balance == "row")
    assert torch.equal(found, choose_mask(scores, sparsity, balance))


def test_best_groups_keep_uneven_counts() -> None:
    keep = torch.rand(9, 7) < torch.linspace(0, 1, 9)[:, None]
    keep[0], keep[8] = False, True
    scores = torch.rand(9, 7)
    assert torch.equal(best_groups(scores, keep, rows=True).sum(1), keep.sum(1))
    assert int(best_groups(scores, keep, rows=False).sum()) == int(keep.sum())


@pytest.mark.parametrize("rows", [True, False])
def test_a_group_that_has_grown_is_revived(rows: bool) -> None:
    layer = grouped()
    schedule = MaskSchedule({"layer": layer}, 1, 10, rows=rows)
    layer(random_inputs(20))
    before = layer.keep
    group = first_dropped(layer)
    values = torch.linspace(-9, 5, GROUP)
    grow(layer, group, values)
    schedule.update(5)
    keep = layer.keep
    assert schedule.swapped == 1
    assert bool(keep[group])
    assert int(keep.sum()) == int(before.sum())
    if rows:
        assert torch.equal(keep.sum(1), before.sum(1))
    assert not bool(before[group]), "the mask before is left alone"
    scale, zero = fit_grid(values[None], 4)
    assert float(layer.scale.detach()[group]) == float(scale)
    assert float(layer.zero.detach()[group]) == float(zero)
    unchanged = keep & before
    assert torch.equal(layer.scale[unchanged], random_weight(dropped=0.5).scales[unchanged])
    result = layer.result()
    is_storable(result)
    decoded = result.decode().view(layer.grid_shape)
    assert float((decoded[group] - values).abs().max()) < float(scale)
    assert float(decoded[~keep].abs().sum()) == 0


def test_training_revives_the_group_that_helps() -> None:
    """A dropped group is all that is missing, and a kept one is of no use."""
    layer = grouped()
    missing, useless = first_dropped(layer), tuple(layer.keep.nonzero()[0].tolist())
    wanted = layer.result().decode()
    wanted.view(layer.grid_shape)[missing] = 0.5
    wanted.view(layer.grid_shape)[useless] = 0.0
    before = layer.keep
    stage = BlockStage(weight_rate=0.05, scale_rate=0.01, zero_rate=0.01)
    optimizer = make_optimizer(parameter_groups([layer], stage))
    steps = 80
    schedule = MaskSchedule({"layer": layer}, 2, steps)
    inputs = random_inputs(200)
    errors = []
    for step in range(steps):
        error = (layer(inputs) - inputs @ wanted.T).square().mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.update(step + 1)
        errors.append(float(error.detach()))
    assert bool(layer.keep[missing])
    assert not bool(layer.keep[useless])
    assert int(layer.keep.sum()) == int(before.sum())
    assert schedule.swapped >= 1
    assert errors[-1] < 0.5 * errors[0]


def test_inputs_weigh() -> None:
    layer = grouped()
    schedule = MaskSchedule({"layer": layer}, 1, 10)
    before = layer.keep
    latent_of(layer).normal_()
    inputs = random_inputs(20) * torch.logspace(-1, 1, COLUMNS)
    layer(inputs)
    schedule.update(5)
    power = inputs.square().mean(0)
    scores = magnitude_scores(latent_of(layer), GROUP, power)
    assert torch.equal(layer.keep, best_groups(scores, before, rows=False))
    plain = magnitude_scores(latent_of(layer), GROUP)
    assert not torch.equal(layer.keep, best_groups(plain, before, rows=False))


def test_nothing_better_changes_nothing() -> None:
    layer = grouped()
    schedule = MaskSchedule({"layer": layer}, 1, 10)
    latent_of(layer).view(layer.grid_shape)[layer.keep] += 1.0
    layer(random_inputs(20))
    keep, scale = layer.keep.clone(), layer.scale.detach().clone()
    schedule.update(5)
    assert schedule.swapped == 0
    assert torch.equal(layer.keep, keep)
    assert torch.equal(layer.scale.detach(), scale)
    assert not layer.exploring


@pytest.mark.parametrize(
    ("updates", "steps", "due"),
    [(1, 10, [5]), (5, 10, [1, 2, 3, 4, 5]), (2, 9, [2, 4]), (3, 40, [6, 13, 20]), (9, 4, [1, 2])],
)
def test_updates_are_spread_over_the_first_half(updates: int, steps: int, due: list[int]) -> None:
    layer = grouped()
    schedule = MaskSchedule({"layer": layer}, updates, steps)
    changed = []
    for done in range(1, steps + 1):
        layer(torch.ones(1, COLUMNS))
        assert layer.exploring == (done <= due[-1])
        before = layer.keep
        grow(layer, first_dropped(layer), 10.0 * done)
        schedule.update(done)
        if not torch.equal(layer.keep, before):
            changed.append(done)
    assert changed == due
    assert not layer.exploring
    assert schedule.swapped == len(due)


def test_no_updates_freeze_from_the_start() -> None:
    layer = grouped()
    schedule = MaskSchedule({"layer": layer}, 0, 10)
    assert not layer.exploring
    keep = layer.keep
    grow(layer, first_dropped(layer), 100.0)
    for done in range(1, 11):
        schedule.update(done)
    assert layer.keep is keep
    assert schedule.swapped == 0


def test_layers_of_which_nothing_is_dropped_are_left_out() -> None:
    full, pruned = grouped(0.0), grouped(seed=1)
    schedule = MaskSchedule({"full": full, "pruned": pruned}, 1, 2)
    assert not full.exploring
    assert pruned.exploring
    pruned(random_inputs(4))
    schedule.update(1)
    assert bool(full.keep.all())
    alone = MaskSchedule({"full": full}, 3, 10)
    for done in range(1, 11):
        alone.update(done)
    assert alone.swapped == 0
