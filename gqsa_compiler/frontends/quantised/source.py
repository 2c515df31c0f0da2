"""A directory of another quantiser as a model source: its layers are taken over when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import (
    BSRLayer,
    LayerScheme,
    QuantizationConfig,
    to_dense,
)
from gqsa_compiler.checkpoint.names import is_tied_head, natural_key
from gqsa_compiler.checkpoint.safetensors_file import DTYPES, FLOAT_DTYPES
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.hf_directory import SafetensorsFiles, canonical_name
from gqsa_compiler.frontends.quantised.codes import Misfit
from gqsa_compiler.frontends.quantised.layer_format import LayerFormat, Tensors
from gqsa_compiler.frontends.quantised.recognise import recognise
from gqsa_compiler.frontends.source import READS, ModelSource
from gqsa_compiler.frontends.tokenizer import save_directory_tokenizer
from gqsa_compiler.models.registry import architecture, parse_config, text_config


class QuantisedLayers:
    """The quantised layers of a model, by their module paths in transformers' model.

    What `CheckpointReader` is to a GQSA checkpoint; layers are converted each time they are asked
    for, and none is kept.

    Parameters
    ----------
    where : str
        The model, for messages.
    layers : mapping of str to (LayerFormat, str)
        Module path -> the format that reads it and its stored path.
    matrices : iterable of str
        Uncompressed tensors that are matrices.
    left_out : iterable of str
        Layers not to offer, such as those that do not fit.

    Attributes
    ----------
    layer_names : tuple of str
        In natural order.
    """

    def __init__(
        self,
        where: str,
        layers: Mapping[str, tuple[LayerFormat, str]],
        matrices: Iterable[str],
        left_out: Iterable[str] = (),
    ) -> None:
        self.where = where
        left = frozenset(left_out)
        self._layers = layers
        self._matrices = tuple(matrices)
        self._left_out = tuple(sorted(left))
        self.layer_names = tuple(sorted((n for n in layers if n not in left), key=natural_key))

    def layer(self, name: str) -> BSRLayer:
        """Convert one layer, exactly.

        Raises
        ------
        KeyError
            There is no such layer.
        Misfit
            A GQSA checkpoint cannot hold it without rounding.
        ModelError
            It is malformed.
        """
        found, stored = self._layers[name]
        return found.matrix(stored).layer(name, self.where)

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        """Decode a layer to float32 [N, K], those that do not fit too."""
        found, stored = self._layers[name]
        return found.matrix(stored).dense()

    def shape(self, name: str) -> tuple[int, int]:
        """Return N and K of a layer."""
        found, stored = self._layers[name]
        return found.shape(stored)

    def kinds(self) -> dict[str, int]:
        """Count the layers of each format."""
        return dict(Counter(self._layers[name][0].kind for name in self.layer_names))

    def without(self, names: Iterable[str]) -> QuantisedLayers:
        """Return the same without some layers."""
        return QuantisedLayers(self.where, self._layers, self._matrices, names)

    def misfits(self) -> dict[str, str]:
        """Try every layer; return those that do not fit and the reasons."""
        found = {}
        for name in self.layer_names:
            try:
                self.layer(name)
            except Misfit as error:
                found[name] = str(error)
        return found

    @cached_property
    def quantization(self) -> QuantizationConfig:
        """What a GQSA checkpoint of these layers says: the commonest scheme, and who differs.

        Raises
        ------
        Misfit
            A layer's groups fit none.
        """
        schemes: dict[str, LayerScheme] = {}
        for name in self.layer_names:
            found, stored = self._layers[name]
            schemes[name] = found.scheme(stored)
        usual = Counter(schemes.values()).most_common(1)[0][0]
        dense = (n.removesuffix(".weight") for n in self._matrices if "embed" not in n)
        return QuantizationConfig(
            bits=usual.bits,
            group_size=usual.group_size,
            symmetric=usual.symmetric,
            ignore=tuple(sorted({*dense, *self._left_out, "lm_head"} - schemes.keys())),
            per_layer={name: found for name, found in schemes.items() if found != usual},
            producer=f"gqsa-compiler {version('gqsa-compiler')}",
        )


class QuantisedSource(ModelSource):
    """A GPTQ, AWQ or compressed-tensors directory.

    Parameters
    ----------
    path : Path
    name : str
    config : dict
        The parsed ``config.json``.
    kind : str
        What `detect` calls its quantiser.

    Raises
    ------
    ModelError
        The architecture or the settings are not understood, or the weights cannot be read.
    """

    def __init__(self, path: Path, name: str, config: dict[str, Any], kind: str) -> None:
        self.path = path
        self.name = name
        plain = {k: v for k, v in config.items() if k != "compression_config"}
        self.config = text_config(plain, str(path / "config.json"))
        self._files = SafetensorsFiles(path)
        self._tensors, formats = recognise(kind, path, config, self._files)
        self._layers = _layers(path, formats)
        parts = {part for found, layer in self._layers.values() for part in found.parts(layer)}
        self._plain = self._plain_tensors(self._tensors, parts)
        self.kind = "quantised" if self._layers else "hf"
        self.checkpoint: QuantisedLayers | None = None
        if self._layers:
            matrices = [n for n, s in self._plain.items() if self._is_matrix(s)]
            self.checkpoint = QuantisedLayers(str(path), self._layers, matrices)

    def _plain_tensors(self, tensors: Tensors, parts: set[str]) -> dict[str, str]:
        """Map the names of all other tensors to their stored names."""
        where = str(self.path)
        config = parse_config(self.config, where)
        wanted = {name for name, _ in architecture(config.model_type, where).tensors(config)}
        found = {}
        for stored in tensors.names:
            name = canonical_name(stored)
            if name is None or stored in parts or is_tied_head(self.config, name):
                continue
            # AutoGPTQ gave every layer a bias, zero where the model has none.
            layer = name.removesuffix(".bias")
            padded = layer != name and layer in self._layers and name not in wanted
            if not padded or tensors.read(stored).any():
                found[name] = stored
        return found

    def _is_matrix(self, stored: str) -> bool:
        return stored.endswith(".weight") and len(self._tensors.shape_dtype(stored)[0]) == 2

    def tensor_names(self) -> tuple[str, ...]:
        """See `ModelSource.tensor_names`."""
        return (*self._plain, *(f"{layer}.weight" for layer in self._layers))

    def _layer_of(self, name: str) -> str | None:
        """Return the quantised layer whose weight a tensor is; None for a plain tensor."""
        layer = name.removesuffix(".weight")
        if layer != name and layer in self._layers:
            return layer
        if name not in self._plain:
            raise ModelError(f"{self.path} has no tensor {name!r}.")
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """See `ModelSource.shape`."""
        layer = self._layer_of(name)
        if layer is not None and self.checkpoint is not None:
            return self.checkpoint.shape(layer)
        return self._tensors.shape_dtype(self._plain[name])[0]

    def dtype(self, name: str) -> str:
        """See `ModelSource.dtype`."""
        if self._layer_of(name) is not None:
            return "float32"
        word = self._tensors.shape_dtype(self._plain[name])[1]
        dtype = DTYPES.get(word)
        if dtype not in FLOAT_DTYPES:
            raise ModelError(f"{self.path}: {self._plain[name]} is stored as {word}; {READS}.")
        return str(dtype)

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """See `ModelSource.tensor`."""
        layer = self._layer_of(name)
        if layer is not None and self.checkpoint is not None:
            return np.asarray(to_dense(self.checkpoint.layer(layer)))
        self.dtype(name)  # refuses what is no float
        return self._tensors.read(self._plain[name])

    @property
    def disk_bytes(self) -> int:
        """See `ModelSource.disk_bytes`."""
        return sum(path.stat().st_size for path in self._files.files)

    def save_tokenizer(self, directory: Path) -> None:
        """See `ModelSource.save_tokenizer`."""
        save_directory_tokenizer(self.path, directory, self.config)


def _layers(path: Path, formats: Iterable[LayerFormat]) -> dict[str, tuple[LayerFormat, str]]:
    """Map module paths to the format and the stored path."""
    found: dict[str, tuple[LayerFormat, str]] = {}
    for each in formats:
        for stored in each.layers:
            name = canonical_name(f"{stored}.weight")
            if name is None:
                continue
            layer = name.removesuffix(".weight")
            if layer in found:
                raise ModelError(f"{path} stores the layer {layer!r} in two formats; keep one.")
            found[layer] = (each, stored)
    return found
