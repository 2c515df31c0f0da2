"""Write what a compression has made as a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gqsa_compiler.checkpoint import (
    BSRLayer,
    CheckpointWriter,
    LayerScheme,
    QuantizationConfig,
    from_codes,
)
from gqsa_compiler.compress.blocks import HEAD
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.result import LayerReport
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import stored_dtype, to_numpy

PRODUCER = "gqsa-compiler"


@dataclass(frozen=True)
class Written:
    """What a checkpoint has on the disk.

    Parameters
    ----------
    layers : tuple of LayerReport
        The blocks' compressed layers.
    bytes : dict of str to int
        Theirs by kind (codes, scales, zeros, indices).
    other_bytes : int
        Of all other tensors.
    dense_bytes : int
        What all tensors took in the source, 16 bits a value.
    head : LayerReport or None
        The head, if it is compressed.
    """

    layers: tuple[LayerReport, ...]
    bytes: dict[str, int]
    other_bytes: int
    dense_bytes: int
    head: LayerReport | None = None

    @property
    def weights(self) -> int:
        """Weights of the blocks' compressed layers, dropped ones too."""
        return sum(layer.n * layer.k for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight of the blocks' compressed layers, all extras counted."""
        return 8 * sum(self.bytes.values()) / self.weights


def producer() -> str:
    """Return program and version."""
    try:
        return f"{PRODUCER} {version(PRODUCER)}"
    except PackageNotFoundError:  # run from a source tree that is not installed
        return PRODUCER


def model_config(source: ModelSource, *, tied: bool) -> dict[str, Any]:
    """Return the checkpoint's config.json; readers of it know no family's default."""
    bfloat = stored_dtype(source) == torch.bfloat16
    dtype = "bfloat16" if bfloat else "float16"
    return {**source.config, "tie_word_embeddings": tied, "dtype": dtype}


def quantization(recipe: Recipe, targets: Mapping[str, LayerTarget]) -> QuantizationConfig:
    """Return what config.json says of the compression.

    Parameters
    ----------
    recipe : Recipe
    targets : mapping of str to LayerTarget
        Layers (module paths) of the blocks that become something else than ``recipe.target``.
    """
    if recipe.head is not None:
        targets = {**targets, HEAD: recipe.head.target}
    return QuantizationConfig(
        bits=recipe.bits,
        group_size=recipe.group_size,
        ratio=recipe.sparsity,
        balance=recipe.balance,
        ignore=(HEAD,) if recipe.head is None else (),
        per_layer={
            name: LayerScheme(target.bits, target.group_size, False, target.sparsity)
            for name, target in targets.items()
            if target != recipe.target
        },
        producer=producer(),
    )


class ModelStore:
    """Writes a model's tensors and adds up what they take.

    Parameters
    ----------
    writer : CheckpointWriter
        Open.
    source : ModelSource
        The dense model.
    """

    def __init__(self, writer: CheckpointWriter, source: ModelSource) -> None:
        self._writer = writer
        self._source = source
        self._layers: list[LayerReport] = []
        self._head: LayerReport | None = None
        self._kinds: Counter[str] = Counter()
        self._other = 0
        self._dense = 0

    def add_layers(
        self, block: str, weights: Mapping[str, GroupedWeight], input_rms: Mapping[str, Tensor]
    ) -> None:
        """Write a block's compressed layers, by their path inside it, and how large inputs are."""
        for path, weight in weights.items():
            layer = replace(to_layer(f"{block}.{path}", weight), input_rms=input_rms[path].numpy())
            self._layers.append(self._add(layer))
            self._kinds["codes"] += layer.qweight.nbytes
            self._kinds["scales"] += layer.scales.nbytes
            self._kinds["zeros"] += 0 if layer.qzeros is None else layer.qzeros.nbytes
            self._kinds["indices"] += layer.indices.nbytes + layer.indptr.nbytes
            self._other += input_rms[path].nbytes
            self._dense += 2 * layer.shape[0] * layer.shape[1]

    def add_head(self, weight: GroupedWeight, *, tied: bool) -> None:
        """Write the compressed head; a tied one is the embedding in the dense model."""
        self._head = self._add(to_layer(HEAD, weight))
        self._dense += 0 if tied else 2 * self._head.n * self._head.k

    def _add(self, layer: BSRLayer) -> LayerReport:
        self._writer.add_layer(layer)
        rows, columns = layer.shape
        scheme = (layer.bits, layer.group_size, layer.sparsity)
        return LayerReport(layer.name, rows, columns, *scheme, layer.nbytes)

    def add_rest(self, skip: frozenset[str], trained: Mapping[str, Tensor]) -> None:
        """Write all other tensors: matrices in 16 bits, vectors as they are.

        Parameters
        ----------
        skip : frozenset of str
            Tensors that are not written.
        trained : mapping of str to Tensor
            Vectors that training has changed.

        Raises
        ------
        ModelError
            A tensor has values that are not finite, or a matrix such that 16 bits cannot hold.
        """
        for name in self._source.tensor_names():
            if name in skip:
                continue
            array = self._source.tensor(name)
            if name in trained:
                # As wide as it was trained: what was evaluated is what is saved.
                array = to_numpy(trained[name].float().cpu())
            elif array.ndim > 1 and array.dtype == np.float32:
                array = array.astype(np.float16)
            if not np.isfinite(array).all():
                raise _not_finite(self._source, name)
            self._writer.add_tensor(name, array)
            self._other += array.nbytes
            self._dense += 2 * array.size

    def written(self) -> Written:
        """Return what was written so far."""
        layers = tuple(self._layers)
        return Written(layers, dict(self._kinds), self._other, self._dense, self._head)


@torch.no_grad()
def round_as_stored(model: nn.Module, source: ModelSource, *, skip: str) -> None:
    """Round the matrices that `ModelStore.add_rest` narrows: what is trained is what is saved.

    Parameters
    ----------
    model : nn.Module
        Float32, its parameters read from the source.
    source : ModelSource
    skip : str
        Parameters whose names begin so are left alone.

    Raises
    ------
    ModelError
        A matrix has values that 16 bits cannot hold.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.startswith(skip) or source.dtype(name) != "float32":
            continue
        parameter.copy_(parameter.half())
        if not torch.isfinite(parameter).all():
            raise _not_finite(source, name)


def _not_finite(source: ModelSource, name: str) -> ModelError:
    return ModelError(f"{source.path}: {name} has values that float16 cannot hold (or NaN).")


def to_layer(name: str, weight: GroupedWeight) -> BSRLayer:
    """Encode a compressed weight as a layer of a checkpoint."""
    rows, groups, size = weight.codes.shape
    return from_codes(
        name,
        (rows, groups * size),
        size,
        weight.keep.cpu().numpy(),
        weight.codes.to("cpu", torch.uint8).numpy(),
        weight.scales.to("cpu", torch.float16).numpy(),
        weight.zeros.to("cpu", torch.uint8).numpy(),
        weight.bits,
    )
