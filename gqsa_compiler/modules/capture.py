"""The linear layers of a PyTorch module in the order that they run, and what they get to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Batch = tuple[tuple[Any, ...], dict[str, Any]]


def find_layers(module: nn.Module) -> dict[str, Layer]:
    """List linear layers and convolutions by their path; a shared one once."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {name: part for name, part in module.named_modules() if isinstance(part, kinds)}


def by_weight(layers: Mapping[str, Layer]) -> list[tuple[str, ...]]:
    """Group the linear layers that share a weight, in order; every other layer is alone."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        key = id(layer.weight) if isinstance(layer, nn.Linear) else id(layer)
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def read_elsewhere(module: nn.Module, layer: Layer, names: Sequence[str]) -> bool:
    """Whether a layer's weight is a parameter of another module than the layers `names` too."""
    parts = dict(module.named_modules(remove_duplicate=False))
    known = {id(parts[name]) for name in names}
    return any(
        tensor is layer.weight and id(parts[path.rpartition(".")[0]]) not in known
        for path, tensor in module.named_parameters(remove_duplicate=False)
    )


def columns(layer: Layer) -> int:
    """Inputs that one output of a layer reads."""
    return layer.weight[0].numel()


def parts(layer: Layer) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def overlaps(layer: Layer) -> bool:
    """Whether a convolution's windows overlap or leave gaps: it is no product of patches then."""
    if isinstance(layer, nn.Linear):
        return False
    ones = (1,) * len(layer.kernel_size)
    whole = layer.padding in ("valid", (0,) * len(ones)) and layer.dilation == ones
    return not (whole and tuple(layer.stride) == tuple(layer.kernel_size))


def rows(layer: Layer, inputs: Tensor) -> list[Tensor]:
    """Return what a layer multiplies its weights with: a matrix [tokens, K] for each group."""
    if isinstance(layer, nn.Linear):
        return [inputs.reshape(-1, inputs.shape[-1])]
    x = inputs[..., None] if isinstance(layer, nn.Conv1d) else inputs
    kernel = (*layer.kernel_size, 1)[:2]
    patches = nn.functional.unfold(x, kernel, stride=kernel)  # [B, C * k, patches]
    matrix = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return list(matrix.split(matrix.shape[1] // layer.groups, dim=1))


@contextmanager
def watched(
    layers: Mapping[str, Layer], names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, input)`` whenever one of the named layers is about to run."""

    def hook(name: str) -> Any:
        return lambda _module, arguments: see(name, arguments[0])

    handles = [layers[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_groups(
    module: nn.Module, layers: Mapping[str, Layer], batch: Batch, alone: Set[str] = frozenset()
) -> list[tuple[str, ...]]:
    """Order layers as they run for the first time, those with one input together.

    Layers that do not run are not listed; those of `alone` do not join others.
    """
    groups: list[tuple[Tensor, list[str]]] = []
    known = set()

    def see(name: str, tensor: Tensor) -> None:
        if name in known:
            return
        known.add(name)
        linear = isinstance(layers[name], nn.Linear)
        for other, members in groups:
            joined = linear and isinstance(layers[members[0]], nn.Linear)
            if other is tensor and joined and alone.isdisjoint((name, members[0])):
                members.append(name)
                return
        groups.append((tensor, [name]))

    arguments, keywords = batch
    with watched(layers, tuple(layers), see):
        module(*arguments, **keywords)
    return [tuple(members) for _, members in groups]
