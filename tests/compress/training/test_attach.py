"""Grouped layers in the place of linear ones and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gqsa_compiler.compress.training.attach import attach, detach, results
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.errors import ModelError
from tests.compress.training.helpers import (
    COLUMNS,
    ROWS,
    random_inputs,
    random_weight,
    same_weight,
)


class Block(nn.Module):
    """Two linear layers, one of them nested, the other one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False))
        self.outer = nn.Linear(COLUMNS, ROWS)
        self.requires_grad_(False)


@pytest.mark.parametrize("train", [True, False])
def test_there_and_back(train: bool) -> None:
    module = Block()
    bias = module.outer.bias.clone()
    weights = {"inner.0": random_weight(2), "outer": random_weight(8, seed=1)}
    latents = {path: weight.decode() for path, weight in weights.items()}
    layers = attach(module, weights, torch.float32, latents=latents if train else None)
    assert list(layers) == list(weights)
    assert module.inner[0] is layers["inner.0"]
    assert module.outer is layers["outer"]
    assert all(isinstance(layer, GroupedLinear) for layer in layers.values())
    assert all((layer.latent is not None) == train for layer in layers.values())
    found = detach(module, layers)
    assert list(found) == list(weights)
    for path, weight in weights.items():
        same_weight(found[path], weight)
        plain = module.get_submodule(path)
        assert type(plain) is nn.Linear
        assert torch.equal(plain.weight, weight.decode())
        assert (plain.in_features, plain.out_features) == (COLUMNS, ROWS)
        assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert module.inner[0].bias is None
    assert torch.equal(module.outer.bias, bias)
    inputs = random_inputs(3)
    want = nn.functional.linear(inputs, weights["outer"].decode(), bias)
    torch.testing.assert_close(module.outer(inputs), want)


@pytest.mark.parametrize("part", ["scale", "zero", "latent"])
def test_nan_is_an_error_that_names_the_layer(part: str) -> None:
    module = Block()
    weights = {"inner.0": random_weight(), "outer": random_weight()}
    latents = {path: weight.decode() for path, weight in weights.items()}
    layers = attach(module, weights, torch.float32, latents=latents)
    place = tuple(random_weight().keep.nonzero()[0].tolist())
    with torch.no_grad():
        parameter = layers["outer"].get_parameter(part)
        parameter[(place[0], 16 * place[1]) if part == "latent" else place] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.3\.outer infinite or NaN"):
        detach(module, layers, "model.layers.3")
    assert isinstance(module.inner[0], GroupedLinear)
    with pytest.raises(ModelError, match="layer outer infinite"):
        results(layers)
