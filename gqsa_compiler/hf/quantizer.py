"""How transformers loads and saves a GQSA checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer

from gqsa_compiler.checkpoint import SafetensorsFile, validate_layer
from gqsa_compiler.checkpoint.names import LAYER_TENSORS, MARKER, OPTIONAL_TENSORS, layer_of
from gqsa_compiler.errors import CheckpointError, UsageError
from gqsa_compiler.hf.config import GQSAConfig
from gqsa_compiler.hf.linear import GQSALinear


class GQSAQuantizer(HfQuantizer):
    """Replaces the linear layers that a checkpoint holds compressed, and checks them when loaded.

    Parameters
    ----------
    quantization_config : GQSAConfig
    **kwargs : Any
        Of `HfQuantizer`.
    """

    requires_calibration = True
    quantization_config: GQSAConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **_kwargs: Any
    ) -> None:
        stored = stored_layers(checkpoint_files or ())
        if not stored:
            raise CheckpointError(
                "The model's config.json says that it is a GQSA checkpoint, but its files hold no "
                "compressed layer; copy or download it again."
            )
        said = self.quantization_config.quantization
        missing = sorted(set(said.per_layer) - stored.keys())
        if missing:
            raise CheckpointError(
                f"quantization_config names the layer {missing[0]!r}, which the model's files do "
                "not hold compressed."
            )
        modules = dict(model.named_modules())
        for name, layer in stored.items():
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise CheckpointError(
                    f"The checkpoint has the compressed layer {name!r}, which is no linear layer "
                    f"of {type(model).__name__}."
                )
            replacement = GQSALinear(
                linear.in_features,
                linear.out_features,
                layer.kept,
                said.scheme(name),
                bias=linear.bias is not None,
                dtype=linear.weight.dtype,
                device=linear.weight.device,
                measured=layer.measured,
            )
            model.set_submodule(name, replacement)
            # Checkpoints of earlier builds have no markers.
            model._keys_to_ignore_on_load_missing.add(rf"^{re.escape(name)}\.{MARKER}$")

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        said = self.quantization_config.quantization
        for name, module in compressed(model):
            if any(buffer.is_meta for buffer in module.buffers()):
                raise UsageError(
                    f"Layer {name!r} was offloaded to disk, which a GQSA checkpoint does not "
                    "support; load it with another device_map."
                )
            layer = module.layer(name)
            if layer.shape != (module.out_features, module.in_features):
                raise CheckpointError(
                    f"Layer {name!r} is {list(layer.shape)} in the checkpoint, but config.json "
                    f"asks for {[module.out_features, module.in_features]}."
                )
            validate_layer(layer, said)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in compressed(model):
            linear = nn.Linear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                dtype=dtype,
                device="meta",
            )
            linear.weight = nn.Parameter(module.dense().to(dtype), requires_grad=False)
            if module.bias is not None:
                linear.bias = module.bias
            model.set_submodule(name, linear)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` writes a checkpoint that can be read again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether transformers' Trainer may train it (only with adapters, which it decides)."""
        return False


def compressed(model: nn.Module) -> list[tuple[str, GQSALinear]]:
    """List the compressed layers of a model with their paths."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, GQSALinear)]


@dataclass(frozen=True)
class StoredLayer:
    """What files' headers say of a compressed layer: its kept groups, and if it has `input_rms`."""

    kept: int
    measured: bool


def stored_layers(files: Iterable[str]) -> dict[str, StoredLayer]:
    """Find the compressed layers, from the files' headers alone.

    Raises
    ------
    CheckpointError
        A file is no safetensors file, or a layer is incomplete.
    """
    parts: dict[str, set[str]] = {}
    kept: dict[str, int] = {}
    for path in files:
        with SafetensorsFile(path) as file:
            for name, info in file.tensors.items():
                owner = layer_of(name)
                if owner is None:
                    continue
                parts.setdefault(owner[0], set()).add(owner[1])
                if owner[1] == "indices" and len(info.shape) == 1:
                    kept[owner[0]] = info.shape[0]
    for layer, found in parts.items():
        lacking = sorted(set(LAYER_TENSORS) - set(OPTIONAL_TENSORS) - found)
        if lacking or layer not in kept:
            part = lacking[0] if lacking else "indices"
            raise CheckpointError(f"Layer {layer!r} has no usable tensor {layer}.{part}.")
    return {name: StoredLayer(kept[name], "input_rms" in found) for name, found in parts.items()}
