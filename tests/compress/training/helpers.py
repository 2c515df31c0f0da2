"""Compressed weights, blocks and models for tests of training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.blocks import capture_inputs, find_blocks, linear_layers
from gqsa_compiler.compress.phases.block import equal_batches
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.solver.block_oneshot import BlockState, compress_block
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.importance import (
    choose_mask,
    choose_of_four,
    magnitude_scores,
)
from gqsa_compiler.compress.solver.quantizer import stored_scale
from gqsa_compiler.compress.solver.rtn import round_weight
from gqsa_compiler.compress.training.attach import attach
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from tests.tiny_models import VOCAB_SIZE

ROWS, COLUMNS, GROUP = 6, 64, 16
RECIPE = Recipe("test", 4, 50, 16, solver="rtn", score="magnitude")


def random_weight(
    bits: int = 4, *, dropped: float = 0.4, two_of_four: bool = False, seed: int = 0
) -> GroupedWeight:
    """Return a weight of random codes, scales and zero points; what is dropped is garbage."""
    random = torch.Generator().manual_seed(seed)
    groups = COLUMNS // GROUP
    codes = torch.randint(0, 2**bits, (ROWS, groups, GROUP), generator=random).float()
    zeros = torch.randint(0, 2**bits, (ROWS, groups), generator=random).float()
    scales = stored_scale(0.01 + 0.1 * torch.rand(ROWS, groups, generator=random))
    keep = torch.rand(ROWS, groups, generator=random) >= dropped
    elements = None
    if two_of_four:
        elements = choose_of_four(torch.rand(ROWS, COLUMNS, generator=random))
        codes = torch.where(elements.view_as(codes), codes, zeros[..., None])
    return GroupedWeight(keep, codes, scales, zeros, bits, elements)


def random_inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(seed))


def grad(tensor: Tensor | None) -> Tensor:
    """Return the gradient, which must be there."""
    assert tensor is not None
    assert tensor.grad is not None
    return tensor.grad


def latent_of(layer: GroupedLinear) -> Tensor:
    """Return the trained weights [N, K], without gradients: a view."""
    assert layer.latent is not None
    return layer.latent.detach()


def same_weight(have: GroupedWeight, want: GroupedWeight) -> None:
    """Assert that all that is stored of two weights is the same, bit for bit."""
    assert have.bits == want.bits
    assert torch.equal(have.keep, want.keep)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(have, name)[want.keep], getattr(want, name)[want.keep]), name
    assert (have.elements is None) == (want.elements is None)
    if have.elements is not None and want.elements is not None:
        assert torch.equal(have.elements, want.elements)
    assert torch.equal(have.decode(), want.decode())


def element_mask(weight: GroupedWeight) -> Tensor:
    """Return the weights that may differ from 0, bool [N, K]: all others stay dropped."""
    mask = weight.keep.repeat_interleave(weight.codes.shape[2], dim=1)
    return mask if weight.elements is None else mask & weight.elements


def is_storable(weight: GroupedWeight) -> None:
    """Assert that a checkpoint can hold a weight exactly."""
    assert torch.equal(weight.scales.half().float(), weight.scales)
    assert bool((weight.scales > 0).all())
    for values in (weight.codes, weight.zeros):
        assert torch.equal(values, values.round())
        assert float(values.min()) >= 0
        assert float(values.max()) < 2**weight.bits


def random_tokens(samples: int, length: int, seed: int = 0) -> Tensor:
    """Return int64 [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (samples, length), generator=generator)


def one_shot(
    model: Any,
    tokens: Tensor,
    *,
    recipe: Recipe = RECIPE,
    index: int = 0,
    batch_tokens: int = 64,
    targets: Mapping[str, LayerTarget] | None = None,
) -> BlockState:
    """Compress a block of a dense model as `BlockPhase` does."""
    prefix, blocks = find_blocks(model)
    captured = capture_inputs(model, blocks, equal_batches(tokens, batch_tokens))
    whole = capture_inputs(model, blocks, [tokens])
    paths = list(linear_layers(blocks[index]))
    return compress_block(
        f"{prefix}.{index}",
        blocks[index],
        captured.arguments[index],
        whole.arguments[index],
        captured.hidden,
        captured.hidden,
        recipe,
        targets or dict.fromkeys(paths, recipe.target),
    )


def decoder_blocks(model: Any) -> nn.ModuleList:
    """Return the decoder blocks, also of a model whose layers are grouped."""
    blocks = getattr(model.model, "decoder", model.model).layers
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def round_linear(layer: nn.Linear, *, bits: int = 4, sparsity: float = 0.3) -> GroupedWeight:
    """Round a layer to the nearest, without its smallest groups."""
    weight = layer.weight.detach()
    mask = choose_mask(magnitude_scores(weight, GROUP), sparsity, "matrix")
    return round_weight(weight, mask, GROUP, bits)


def student(
    dense: Any, dtype: torch.dtype = torch.float32, *, train_weights: bool = False
) -> tuple[Any, dict[str, GroupedLinear]]:
    """Copy a dense model with every layer of its blocks compressed; also returns the layers."""
    model = copy.deepcopy(dense)
    prefix, blocks = find_blocks(model)
    layers = {}
    for index, block in enumerate(blocks):
        weights = {path: round_linear(layer) for path, layer in linear_layers(block).items()}
        latents = {path: weight.decode() for path, weight in weights.items()}
        attached = attach(block, weights, dtype, latents=latents if train_weights else None)
        layers.update({f"{prefix}.{index}.{path}": layer for path, layer in attached.items()})
    return model, layers
