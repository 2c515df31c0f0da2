"""Stage one (BQPO): train one decoder block at a time against the dense block's outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gqsa_compiler.compress.blocks import run_block
from gqsa_compiler.compress.recipes.recipe import BlockStage
from gqsa_compiler.compress.solver.block_oneshot import BlockState
from gqsa_compiler.compress.training.attach import attach, detach
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.training.losses import block_loss, mean_block_loss
from gqsa_compiler.compress.training.masks import MaskSchedule
from gqsa_compiler.compress.training.optimizer import (
    clamp_zeros,
    epoch_order,
    make_optimizer,
    parameter_groups,
    set_rates,
)
from gqsa_compiler.errors import ModelError

WARMUP = 0.05
"""Share of a block's steps in which the rates rise."""


@dataclass(frozen=True)
class BlockLosses:
    """What stage one did to a block, as mean `block_loss` over the stage's tokens.

    Parameters
    ----------
    before, trained : float
        Of the one-shot block and of the trained one.
    after : float
        Of the better of the two, which is kept.
    swapped : int
        Groups that mask updates revived, each in the place of another one.
    """

    before: float
    trained: float
    after: float
    swapped: int


def train_block(
    state: BlockState,
    stage: BlockStage,
    *,
    dtype: torch.dtype,
    seed: int,
    balance: str = "matrix",
) -> tuple[BlockState, BlockLosses]:
    """Train a block's weights, scales and zero points through the quantiser.

    Parameters
    ----------
    state : BlockState
        After the one-shot compression. Its block is changed in place.
    stage : BlockStage
    dtype : torch.dtype
        What products are computed in; the rest of the block is float32.
    seed : int
        Of the order of the sequences.
    balance : str
        ``row`` keeps the number of groups of every row when masks are updated.

    Returns
    -------
    state : BlockState
        With the better one of the trained and the one-shot block, and its outputs.
    losses : BlockLosses

    Raises
    ------
    ModelError
        The loss, or a layer, became infinite or NaN.
    UsageError
        All rates are 0.
    """
    block, original = state.block, state.weights
    before = mean_block_loss(state.outputs, state.targets)
    layers = attach(
        block,
        original,
        dtype,
        latents={path: weight.decode() for path, weight in original.items()},
    )
    plan = _Plan.of(state, stage)
    masks = MaskSchedule(layers, stage.mask_updates, plan.steps, rows=balance == "row")
    _train(state, stage, plan, layers, masks, dtype=dtype, seed=seed)
    weights = detach(block, layers, state.name)
    with torch.no_grad():
        outputs = [run_block(block, hidden, state.arguments) for hidden in state.inputs]
        trained = mean_block_loss(outputs, state.targets)
        if trained <= before:
            done = replace(state, weights=weights, outputs=outputs)
            return done, BlockLosses(before, trained, trained, masks.swapped)
        for path, weight in original.items():
            block.get_parameter(f"{path}.weight").copy_(weight.decode())
    return state, BlockLosses(before, trained, before, 0)


@dataclass(frozen=True)
class _Plan:
    """How a block's steps are cut: `gather` batches of `batch` sequences make a step."""

    samples: int
    batch: int
    gather: int
    steps: int

    @classmethod
    def of(cls, state: BlockState, stage: BlockStage) -> _Plan:
        # The masks among the block's arguments are for batches of one size.
        batch, length = state.inputs[0].shape[:2]
        samples = batch * len(state.inputs)
        # With few sequences, more would only have each of them several times in a step.
        gather = min(len(state.inputs), max(1, round(stage.batch_tokens / (batch * length))))
        steps = max(1, math.ceil(samples * stage.epochs / (batch * gather)))
        return cls(samples, batch, gather, steps)


def _train(
    state: BlockState,
    stage: BlockStage,
    plan: _Plan,
    layers: dict[str, GroupedLinear],
    masks: MaskSchedule,
    *,
    dtype: torch.dtype,
    seed: int,
) -> None:
    turns = plan.steps * plan.gather
    order = epoch_order(plan.samples, turns * plan.batch, seed).split(plan.batch)
    draws = torch.rand(turns, generator=torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(parameter_groups(layers.values(), stage))
    for step in range(plan.steps):
        for turn in range(step * plan.gather, (step + 1) * plan.gather):
            chosen = order[turn]
            dense = bool(draws[turn] < stage.dense_share)
            x = _pick(state.dense_inputs if dense else state.inputs, chosen)
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                outputs = run_block(state.block, x, state.arguments)
            loss = block_loss(outputs, _pick(state.targets, chosen)) / plan.gather
            if not bool(torch.isfinite(loss.detach())):
                raise ModelError(
                    f"Stage one's loss of {state.name} is not a finite number at step {step + 1}; "
                    "lower the recipe's rates."
                )
            loss.backward()
        set_rates(optimizer, step, plan.steps, WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clamp_zeros(layers.values())
        masks.update(step + 1)


def _pick(batches: list[Tensor], chosen: Tensor) -> Tensor:
    """Collect sequences of equal batches, [B, T, H]; `chosen` is int64 [B], 0 to all of them."""
    size = len(batches[0])
    return torch.stack([batches[index // size][index % size] for index in chosen.tolist()])
