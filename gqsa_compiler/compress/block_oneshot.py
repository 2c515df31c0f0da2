"""One decoder block in one shot: layer after layer, on inputs from what is compressed already."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.blocks import (
    Arguments,
    adds_to_output,
    input_groups,
    layer_input,
    linear_layers,
    run_block,
    run_watched,
    watch_inputs,
)
from gqsa_compiler.compress.hessian import MomentAccumulator
from gqsa_compiler.compress.oneshot import GroupedWeight, compress_rows
from gqsa_compiler.compress.recipe import Recipe

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
    """

    name: str
    dense: nn.Module
    block: nn.Module
    weights: dict[str, GroupedWeight]
    arguments: Arguments
    inputs: list[Tensor]
    dense_inputs: list[Tensor]
    targets: list[Tensor]


@torch.no_grad()
def compress_block(
    name: str,
    dense: nn.Module,
    arguments: Arguments,
    inputs: list[Tensor],
    dense_inputs: list[Tensor],
    recipe: Recipe,
    *,
    balance: str,
) -> BlockState:
    """Compress every linear layer of a block.

    Parameters
    ----------
    name : str
        The block's module path.
    dense : nn.Module
        The block, float32. It is left as it is.
    arguments, inputs, dense_inputs
        See `BlockState`.
    recipe : Recipe
    balance : str
        ``matrix`` or ``row``.
    """
    block = copy.deepcopy(dense)
    layers = linear_layers(block)
    groups = input_groups(dense, dense_inputs[0], arguments)
    last = groups[-1] if adds_to_output(dense, groups[-1], dense_inputs[0], arguments) else None
    watched = {members[0]: list[Tensor]() for members in groups if members != last}
    with watch_inputs(dense, tuple(watched), lambda layer, x: watched[layer].append(x)):
        targets = [run_block(dense, hidden, arguments) for hidden in dense_inputs]
    weights: dict[str, GroupedWeight] = {}
    for members in groups:
        moments = MomentAccumulator()
        wanted = targets if members == last else watched.pop(members[0])
        for hidden, want in zip(inputs, wanted, strict=True):
            if members == last:
                # The only layer that can also make up for errors on the residual path.
                seen, output = run_watched(block, members[0], hidden, arguments)
                # The next norm divides a token's error by the token's size: so is it weighed here,
                # or the few tokens of huge activations would be all that counts.
                size = want.square().mean(-1).add(TINY).rsqrt().reshape(-1, 1)
                missing = (want - output).flatten(0, 1)
                # Some models (OPT) flatten the tokens themselves.
                moments.add(seen.reshape(len(missing), -1) * size, missing=missing * size)
            else:
                moments.add(layer_input(block, members[0], hidden, arguments), dense=want)
        done = compress_rows(
            [layers[member].weight for member in members],
            moments.finish(f"{name}.{members[0]}"),
            recipe,
            balance,
        )
        for member, weight in zip(members, done, strict=True):
            layers[member].weight.copy_(weight.decode())
            weights[member] = weight
    return BlockState(name, dense, block, weights, arguments, inputs, dense_inputs, targets)
