"""One decoder block in one shot: layer after layer, on inputs from what is compressed already."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.blocks import (
    Arguments,
    adds_to_output,
    input_groups,
    linear_layers,
    run_block,
    watch_inputs,
)
from gqsa_compiler.compress.gemm import linear
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.hessian import MomentAccumulator
from gqsa_compiler.compress.solver.oneshot import check_not_lost, compress_rows

TINY = 1e-12
"""Keeps the weight of a token of zeros finite."""


@dataclass(frozen=True, eq=False)
class BlockState:
    """A block that was just compressed in one shot, and all that recovering it further needs.

    Parameters
    ----------
    name : str
        Module path, e.g. ``model.layers.0``.
    dense : nn.Module
        The block with its original weights, float32.
    block : nn.Module
        The same with the decoded compressed weights.
    weights : dict of str to GroupedWeight
        The compressed layers, by their path inside the block.
    arguments
        What the block is called with after the hidden states.
    inputs, dense_inputs : list of float32 [B, T, H]
        The block's inputs from the compressed and from the dense model.
    targets : list of float32 [B, T, H]
        The dense block's outputs on `dense_inputs`.
    outputs : list of float32 [B, T, H]
        The compressed block's outputs on `inputs`.
    input_rms : dict of str to float32 [K]
        How large each layer's inputs are beside each other, positive.
    """

    name: str
    dense: nn.Module
    block: nn.Module
    weights: dict[str, GroupedWeight]
    arguments: Arguments
    inputs: list[Tensor]
    dense_inputs: list[Tensor]
    targets: list[Tensor]
    outputs: list[Tensor]
    input_rms: dict[str, Tensor]


@torch.no_grad()
def compress_block(
    name: str,
    dense: nn.Module,
    arguments: Arguments,
    whole: Arguments,
    inputs: list[Tensor],
    dense_inputs: list[Tensor],
    recipe: Recipe,
    targets: Mapping[str, LayerTarget],
    row_weights: Mapping[str, Tensor] | None = None,
) -> BlockState:
    """Compress every linear layer of a block.

    The dense block runs once. So does the compressed one, all tokens together: each layer is
    compressed when it is about to run, on what the layers before it gave.

    Parameters
    ----------
    name : str
        The block's module path.
    dense : nn.Module
        The block, float32. It is left as it is.
    arguments, inputs, dense_inputs
        See `BlockState`.
    whole
        The arguments for all batches as one.
    recipe : Recipe
        The method.
    targets : mapping of str to LayerTarget
        What each layer becomes, by its path inside the block.
    row_weights : mapping of str to float32 [N], optional
        What an error in each of a layer's outputs costs the model, by the layer's path.
    """
    block = copy.deepcopy(dense)
    layers = linear_layers(block)
    groups = input_groups(dense, dense_inputs[0], arguments)
    last = groups[-1] if adds_to_output(dense, groups[-1], dense_inputs[0], arguments) else None
    leaders = {members[0]: members for members in groups}
    watched = {members[0]: list[Tensor]() for members in groups if members != last}
    with watch_inputs(dense, tuple(watched), lambda layer, x: watched[layer].append(x)):
        wanted = [run_block(dense, hidden, arguments) for hidden in dense_inputs]
    weights: dict[str, GroupedWeight] = {}
    sizes: dict[str, Tensor] = {}
    final: list[Tensor] = []

    def compress(members: tuple[str, ...], accumulated: MomentAccumulator) -> None:
        for member in members:
            check_not_lost(f"{name}.{member}", layers[member].weight)
        moments = accumulated.finish(f"{name}.{members[0]}")
        done = compress_rows(
            [layers[member].weight for member in members],
            moments,
            [targets[member] for member in members],
            recipe,
            [f"{name}.{member}" for member in members],
            [row_weights[member] for member in members] if row_weights else (),
        )
        for member, weight in zip(members, done, strict=True):
            layers[member].weight.copy_(weight.decode())
            weights[member] = weight
            sizes[member] = moments.input_rms()

    def about_to_run(leader: str, seen: Tensor) -> None:
        members = leaders[leader]
        if members == last:
            final.append(seen)
            return
        moments = MomentAccumulator()
        for part, want in zip(_split(seen, inputs), watched.pop(leader), strict=True):
            moments.add(part, dense=want)
        compress(members, moments)

    with watch_inputs(block, tuple(leaders), about_to_run):
        output = run_block(block, torch.cat(inputs), whole)
    outputs = list(output.split([len(hidden) for hidden in inputs]))
    if last is not None:
        # The only layer that can also make up for errors on the residual path.
        moments = MomentAccumulator()
        parts = _split(final[0], inputs)
        for part, have, want in zip(parts, outputs, wanted, strict=True):
            # The next norm divides a token's error by the token's size: so is it weighed here,
            # or the few tokens of huge activations would be all that counts.
            size = want.square().mean(-1).add(TINY).rsqrt().reshape(-1, 1)
            missing = (want - have).flatten(0, 1)
            moments.add(part * size, missing=missing * size)
        layer = layers[last[0]]
        before = layer.weight.clone()
        compress(last, moments)
        change = layer.weight - before
        for part, have in zip(parts, outputs, strict=True):
            have += linear(part, change).reshape(have.shape)
    return BlockState(
        name, dense, block, weights, arguments, inputs, dense_inputs, wanted, outputs, sizes
    )


def _split(tensor: Tensor, batches: list[Tensor]) -> list[Tensor]:
    """Split a layer's inputs at all tokens into those of each batch, [B * T, K]."""
    # Some models (OPT) flatten the tokens themselves.
    tokens = tensor.reshape(-1, tensor.shape[-1])
    return list(tokens.split([hidden.shape[0] * hidden.shape[1] for hidden in batches]))
