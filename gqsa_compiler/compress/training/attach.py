"""Put trainable grouped layers in the place of linear ones, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.errors import ModelError


def attach(
    module: nn.Module,
    weights: Mapping[str, GroupedWeight],
    dtype: torch.dtype,
    *,
    latents: Mapping[str, Tensor] | None = None,
) -> dict[str, GroupedLinear]:
    """Replace linear layers by grouped ones.

    Parameters
    ----------
    module : nn.Module
        Changed in place.
    weights : mapping of str to GroupedWeight
        The layers by their path inside the module.
    dtype : torch.dtype
        What products are computed in.
    latents : mapping of str to float32 [N, K], optional
        Weights to train; taken over, not copied. Without them the codes are frozen.

    Returns
    -------
    dict of str to GroupedLinear
        The layers by path.
    """
    layers = {}
    for path, weight in weights.items():
        old = module.get_submodule(path)
        assert isinstance(old, nn.Linear)
        layer = GroupedLinear(
            weight,
            None if old.bias is None else old.bias.detach(),
            latent=None if latents is None else latents[path],
            dtype=dtype,
        )
        module.set_submodule(path, layer.to(old.weight.device))
        layers[path] = layer
    return layers


@torch.no_grad()
def results(layers: Mapping[str, GroupedLinear], name: str = "") -> dict[str, GroupedWeight]:
    """Return layers' weights as they are stored.

    Parameters
    ----------
    layers : mapping of str to GroupedLinear
        By path inside a module.
    name : str, optional
        The module's path, for errors.

    Raises
    ------
    ModelError
        Training led to numbers that are not finite.
    """
    weights = {}
    for path, layer in layers.items():
        trained = layer.result()
        if not torch.isfinite(trained.scales).all() or not torch.isfinite(trained.codes).all():
            whole = f"{name}.{path}" if name else path
            raise ModelError(
                f"Training made layer {whole} infinite or NaN; lower the recipe's rates."
            )
        weights[path] = trained
    return weights


@torch.no_grad()
def detach(
    module: nn.Module, layers: Mapping[str, GroupedLinear], name: str = ""
) -> dict[str, GroupedWeight]:
    """Put linear layers with the decoded weights back; returns the trained weights.

    Raises
    ------
    ModelError
        Training led to numbers that are not finite. All layers are still grouped then.
    """
    weights = results(layers, name)
    for path, trained in weights.items():
        layer = layers[path]
        rows, groups, size = trained.codes.shape
        plain = nn.Linear(groups * size, rows, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(trained.decode(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias, requires_grad=False)
        module.set_submodule(path, plain)
    return weights
