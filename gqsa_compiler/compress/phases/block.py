"""Block after block: one shot, then stage one, each result saved when it is there."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.blocks import (
    Arguments,
    capture_inputs,
    linear_layers,
    place_rest,
    release,
    run_block,
)
from gqsa_compiler.compress.phases import head
from gqsa_compiler.compress.phases.plan import Plan
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.solver.block_oneshot import BlockState, compress_block
from gqsa_compiler.compress.training.block_stage import train_block
from gqsa_compiler.compress.training.losses import mean_block_loss
from gqsa_compiler.compress.work.reader import WorkReader
from gqsa_compiler.compress.work.results import (
    BLOCK_STATE,
    INPUT_RMS,
    Weights,
    block_state,
    from_tensors,
    input_rms_tensors,
    to_tensors,
)
from gqsa_compiler.compress.work.runevents import Block
from gqsa_compiler.compress.work.runlog import RunLog
from gqsa_compiler.compress.work.workdir import WorkDirectory
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import build_model, load_parameters
from gqsa_compiler.progress import Progress

BATCH_TOKENS = 2048
"""About so many tokens run through a block at once."""

STAGE = "compressing blocks"


@dataclass(frozen=True, eq=False)
class BlockPhase:
    """What all blocks share.

    Parameters
    ----------
    source : ModelSource
        The dense model.
    prefix : str
        Module path of the list of blocks.
    recipe : Recipe
    plan : Plan
    seed : int
    device : torch.device
    dtype : torch.dtype
        What products are computed in while training.
    """

    source: ModelSource
    prefix: str
    recipe: Recipe
    plan: Plan
    seed: int
    device: torch.device
    dtype: torch.dtype

    def run(
        self, tokens: Tensor, work: WorkDirectory, log: RunLog, progress: Progress
    ) -> list[float]:
        """Compress every block that the work directory does not have, and then the head.

        Parameters
        ----------
        tokens : int64 [S, T]
            Calibration sequences.
        work : WorkDirectory
            Gets a state a block, named by `block_state`, and the head's if the recipe has one.
        log : RunLog
        progress : callable
            Called with (stage, done, total).

        Returns
        -------
        list of float
            Each block's mean loss, as it was kept.
        """
        model = build_model(self.source)
        blocks = model.get_submodule(self.prefix)
        count = len(blocks)
        heads = self.recipe.head is not None and not work.has(head.STATE)
        if work.has(block_state(BLOCK_STATE, count - 1)) and not heads:
            return [_loss(work, index) for index in range(count)]
        load_parameters(model, "", self.source, skip=f"{self.prefix}.")
        place_rest(model, blocks, self.device)
        stage = self.recipe.block
        most = BATCH_TOKENS if stage is None else min(BATCH_TOKENS, stage.batch_tokens)
        batches = [batch.to(self.device) for batch in equal_batches(tokens, most)]
        captured = capture_inputs(model, blocks, batches)
        whole = capture_inputs(model, blocks, [tokens.to(self.device)]).arguments
        inputs, calls = captured.hidden, captured.arguments
        dense_inputs = inputs
        del captured  # would keep the first block's inputs in memory
        losses = []
        for index, (block, arguments) in enumerate(zip(blocks, calls, strict=True)):
            progress(STAGE, index, count)
            began = time.monotonic()
            name = f"{self.prefix}.{index}"
            load_parameters(block, name, self.source)
            block.to(self.device)
            if work.has(block_state(BLOCK_STATE, index)):
                inputs, dense_inputs, loss = _run_saved(
                    block, work, index, inputs, dense_inputs, arguments
                )
                losses.append(loss)
                release(block)
                continue
            paths = list(linear_layers(block))
            one_shot = compress_block(
                name,
                block,
                arguments,
                whole[index],
                inputs,
                dense_inputs,
                self.recipe,
                self.plan.block_targets(name, paths, self.recipe.target),
                self.plan.block_rows(name, paths, self.device),
            )
            state, after = one_shot, None
            if stage is None:
                before = mean_block_loss(one_shot.outputs, one_shot.targets)
            else:
                state, trained = train_block(
                    state,
                    stage,
                    dtype=self.dtype,
                    seed=self.seed + index,
                    balance=self.recipe.balance,
                )
                before, after = trained.before, trained.after
            losses.append(before if after is None else after)
            tensors = to_tensors(state.weights) | input_rms_tensors(state.input_rms)
            work.save(block_state(BLOCK_STATE, index), tensors, {"loss": losses[-1]})
            log.write(_event(state, index, count, before, after, time.monotonic() - began))
            outputs = state.outputs
            if outputs is one_shot.outputs:
                # Those are summed up in another order. What a run that goes on has are these.
                outputs = _run(state.block, inputs, arguments)
            inputs, dense_inputs = outputs, state.targets
            del state, one_shot, outputs  # the block and its inputs are done with
            release(block)
        progress(STAGE, count, count)
        if heads:
            head.one_shot_head(model, blocks, batches, inputs, self.recipe, work, log, progress)
        return losses


def load_block(
    work: WorkReader,
    stage: str,
    index: int,
    paths: list[str],
    device: torch.device | str = "cpu",
) -> Weights:
    """Read a block's layers as a stage has left them.

    Raises
    ------
    GqsaError
        The state is damaged.
    """
    return from_tensors(_saved(work, stage, index)[0], paths, device)


def load_input_rms(work: WorkReader, index: int, paths: list[str]) -> dict[str, Tensor]:
    """Read how large the inputs of a block's layers are, float32 [K] by their paths."""
    tensors = _saved(work, BLOCK_STATE, index)[0]
    return {path: tensors[f"{path}/{INPUT_RMS}"] for path in paths}


def evenly(tokens: Tensor, count: int) -> Tensor:
    """Choose at most `count` sequences, evenly spread: a text's beginning is not all of it."""
    samples = len(tokens)
    count = min(count, samples)
    return tokens[[index * samples // count for index in range(count)]]


def equal_batches(tokens: Tensor, most_tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Split into equal batches, so that one set of masks serves all."""
    samples, length = tokens.shape
    most = max(1, most_tokens // length)
    size = max(n for n in range(1, min(most, samples) + 1) if samples % n == 0)
    return list(tokens.split(size))


def _saved(work: WorkReader, stage: str, index: int) -> tuple[dict[str, Tensor], float]:
    found = work.load(block_state(stage, index))
    assert found is not None, "the stage is done"
    return found[0], float(found[1].get("loss", math.nan))


def _loss(work: WorkDirectory, index: int) -> float:
    return _saved(work, BLOCK_STATE, index)[1]


def _run_saved(
    block: nn.Module,
    work: WorkDirectory,
    index: int,
    inputs: list[Tensor],
    dense_inputs: list[Tensor],
    arguments: Arguments,
) -> tuple[list[Tensor], list[Tensor], float]:
    """Run a block that an earlier process has compressed: its outputs, the dense ones, its loss."""
    targets = _run(block, dense_inputs, arguments)
    layers = linear_layers(block)
    tensors, loss = _saved(work, BLOCK_STATE, index)
    weights = from_tensors(tensors, list(layers), targets[0].device)
    for path, layer in layers.items():
        layer.weight = nn.Parameter(weights[path].decode(), requires_grad=False)
    return _run(block, inputs, arguments), targets, loss


@torch.no_grad()
def _run(block: nn.Module, inputs: list[Tensor], arguments: Arguments) -> list[Tensor]:
    return [run_block(block, hidden, arguments) for hidden in inputs]


def _event(
    state: BlockState, index: int, count: int, before: float, after: float | None, seconds: float
) -> Block:
    sparsity = {
        path: 1 - float(weight.keep.float().mean()) for path, weight in state.weights.items()
    }
    return Block(index, count, state.name, before, after, sparsity, seconds)
