"""One adapter: its configuration, and the matrices A and B of every layer that it changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint.safetensors_file import FLOAT_DTYPES, SafetensorsFile
from gqsa_compiler.errors import ModelError
from gqsa_compiler.lora.config import AdapterConfig, read_config

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<layer>[^/]+)\.lora_(?P<which>[AB])\.weight")
_OTHERS = (
    (".lora_magnitude_vector", "a DoRA magnitude"),
    (".lora_embedding_", "an adapter of an embedding"),
    (".bias", "a bias"),
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class AdapterLayer:
    """A layer's matrices.

    Parameters
    ----------
    layer : str
        The layer's name in the model, e.g. ``model.layers.0.self_attn.q_proj``.
    rank : int
    scale : float
        Of ``B (A x)``.
    """

    layer: str
    rank: int
    scale: float


class Adapter:
    """A PEFT adapter's directory, checked against the model that it is for.

    Parameters
    ----------
    directory : path
        With ``adapter_config.json`` and ``adapter_model.safetensors``.
    linears : mapping of str to (int, int)
        The model's linear layers: N and K of each.

    Attributes
    ----------
    config : AdapterConfig
    layers : mapping of str to AdapterLayer
        By the layer's name, in the file's order.

    Raises
    ------
    ModelError
        The directory or a file is missing or damaged, the adapter is of a kind that is not
        compiled, or it does not fit the model.
    CheckpointError
        The weights' file is no safetensors file.
    """

    def __init__(self, directory: str | Path, linears: Mapping[str, tuple[int, int]]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ModelError(f"There is no adapter at {directory}: no such directory.")
        self.config: AdapterConfig = read_config(self.directory)
        path = self.directory / WEIGHTS_FILE
        if not path.is_file():
            pickled = (self.directory / PICKLE_FILE).exists()
            raise ModelError(
                f"{directory} has no {WEIGHTS_FILE}"
                + (
                    f", only {PICKLE_FILE}, a pickle, which could run anything and is not read; "
                    "save it with safe_serialization=True."
                    if pickled
                    else "; name the directory that save_pretrained of the PEFT model has written."
                )
            )
        self._path = path
        with SafetensorsFile(path) as file:
            self.layers = self._check(file, linears)

    def matrices(self, layer: str) -> tuple[Array, Array]:
        """Read a layer's A and B, the scale multiplied into B.

        Parameters
        ----------
        layer : str
            One of `layers`.

        Returns
        -------
        A : float32 [rank, K]
        B : float32 [N, rank]

        Raises
        ------
        ModelError
            They hold what is no finite number.
        """
        found = []
        with SafetensorsFile(self._path) as file:
            for which in "AB":
                name = f"{_PREFIX}{layer}.lora_{which}.weight"
                array = file.tensor(name).astype(np.float32)
                if not np.isfinite(array).all():
                    raise ModelError(f"{name} in {self._path} holds values that are no numbers.")
                found.append(array)
        a, b = found
        with np.errstate(over="ignore"):  # what becomes infinite is refused when it is stored
            return a, b * np.float32(self.layers[layer].scale)

    def _check(
        self, file: SafetensorsFile, linears: Mapping[str, tuple[int, int]]
    ) -> dict[str, AdapterLayer]:
        pairs: dict[str, set[str]] = {}
        for name, info in file.tensors.items():
            matrix = _MATRIX.fullmatch(name.removeprefix(_PREFIX))
            if not name.startswith(_PREFIX) or matrix is None:
                raise self._unknown(name)
            if info.dtype not in FLOAT_DTYPES:
                raise ModelError(
                    f"{name} in {file.path} is {info.dtype}, not a float of 2 or 4 bytes."
                )
            layer, which = matrix["layer"], matrix["which"]
            if layer not in linears:
                raise ModelError(
                    f"{file.path} changes {layer[:80]!r}, and the model has no linear layer of "
                    f"that name{_tied(layer)}; the adapter is for another model."
                )
            n, k = linears[layer]
            rank = self.config.rank_of(layer)
            wanted = (rank, k) if which == "A" else (n, rank)
            if info.shape != wanted:
                raise ModelError(
                    f"{name} in {file.path} has the shape {list(info.shape)} and must be "
                    f"{list(wanted)} for rank {rank} and a layer of {n} x {k}."
                )
            pairs.setdefault(layer, set()).add(which)
        if not pairs:
            raise ModelError(f"{file.path} has no LoRA matrices.")
        for layer, found in pairs.items():
            if found != {"A", "B"}:
                missing = ({"A", "B"} - found).pop()
                raise ModelError(f"{file.path} lacks lora_{missing} of {layer}.")
        return {
            layer: AdapterLayer(layer, self.config.rank_of(layer), self.config.scale_of(layer))
            for layer in pairs
        }

    def _unknown(self, name: str) -> ModelError:
        what = next((what for part, what in _OTHERS if part in name), "no LoRA matrix")
        return ModelError(
            f"{self._path} has the tensor {name!r}, {what}; only lora_A and lora_B of linear "
            "layers are compiled."
        )


def _tied(layer: str) -> str:
    return " (its head may be its embedding)" if layer == "lm_head" else ""
