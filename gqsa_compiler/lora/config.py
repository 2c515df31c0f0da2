"""`adapter_config.json`: what PEFT's LoRA adapter is, as far as a low-rank path can say it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.json_file import read_json

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 1024
"""Far above any rank in use; a low-rank path of more would not be one."""

_MAX_PATTERNS = 10_000
_MOST_ALPHA = 1e6
_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.){1,256}")
"""Names, of which a pattern is the end; other regular expressions of a stranger are not run."""

_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
    }
)
"""Say how it was trained, or which layers it has, which its tensors say."""
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
_UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "alora_invocation_tokens": "is switched on by tokens (aLoRA)",
        "arrow_config": "chooses among adapters for each token (Arrow)",
        "fan_in_fan_out": "is for layers that store their weights transposed (fan_in_fan_out)",
        "layer_replication": "repeats layers of the model (layer_replication)",
        "lora_bias": "has biases (lora_bias)",
        "megatron_config": "is for Megatron's layers",
        "modules_to_save": "brings whole modules along (modules_to_save)",
        "target_parameters": "changes parameters that are no linear layer's (target_parameters)",
        "trainable_token_indices": "changes rows of the embedding (trainable_token_indices)",
        "use_dora": "is a DoRA adapter, which rescales the weights (use_dora)",
        "use_qalora": "is a QALoRA adapter (use_qalora)",
    }
)
_PLAIN_STARTS = (None, "gaussian", "eva", "orthogonal")
"""Initialisations that, as the usual one, leave the model's own weights as they are."""


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter's configuration: ``W x`` becomes ``W x + scale * B (A x)``.

    Parameters
    ----------
    rank : int
        Rows of A.
    alpha : float
    rslora : bool
        The scale is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
    ranks, alphas : mapping of str to number
        Those of the layers whose names end so, for PEFT's ``rank_pattern`` and ``alpha_pattern``:
        the first that fits, at whole parts of a name.
    """

    rank: int
    alpha: float
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer's matrices."""
        return _matching(self.ranks, layer, self.rank)

    def scale_of(self, layer: str) -> float:
        """Return what a layer's ``B (A x)`` is multiplied with."""
        rank, alpha = self.rank_of(layer), _matching(self.alphas, layer, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def read_config(directory: Path) -> AdapterConfig:
    """Read an adapter's configuration.

    Parameters
    ----------
    directory : Path
        Of the adapter.

    Raises
    ------
    ModelError
        There is none, it is damaged, or it asks for what a low-rank path is not.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ModelError(
            f"{directory} is no PEFT adapter: it has no {CONFIG_FILE}. Name the directory that "
            "save_pretrained of the PEFT model has written."
        )
    fields = read_json(path)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{path}: the adapter is of the type {kind!r}; only LORA is read.")
    _refuse_other_methods(fields, path)
    return AdapterConfig(
        rank=_rank(fields.get("r"), "r", path),
        alpha=_alpha(fields.get("lora_alpha"), "lora_alpha", path),
        rslora=_flag(fields.get("use_rslora", False), "use_rslora", path),
        ranks=_patterns(fields.get("rank_pattern"), "rank_pattern", _rank, path),
        alphas=_patterns(fields.get("alpha_pattern"), "alpha_pattern", _alpha, path),
    )


def _refuse_other_methods(fields: Mapping[str, Any], path: Path) -> None:
    bias = fields.get("bias", "none")
    if bias != "none":
        raise ModelError(f"{path}: the adapter changes biases (bias {bias!r}); only 'none' fits.")
    start = fields.get("init_lora_weights")
    if not isinstance(start, bool) and start not in _PLAIN_STARTS:
        raise ModelError(
            f"{path}: the adapter began with init_lora_weights {start!r}, which changes the "
            "model's own weights; save it with PEFT's path_initial_model_for_weight_conversion."
        )
    task = fields.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(f"{path}: the adapter's task is {task!r}; only CAUSAL_LM is compiled.")
    for name, value in fields.items():
        if value is None or value is False or value in ({}, []):
            continue
        if name in _UNSUPPORTED:
            raise ModelError(
                f"{path}: the adapter {_UNSUPPORTED[name]}; only plain LoRA of linear layers is "
                "compiled."
            )
        if name == "loftq_config" or name in ("bias", "init_lora_weights", "task_type"):
            continue  # checked above; LoftQ is an initialisation
        if name not in _NO_EFFECT | _READ:
            raise ModelError(
                f"{path} has the setting {name!r}, which is not known here; merge the adapter into "
                "the model with PEFT before it is compressed."
            )


def _rank(value: Any, name: str, path: Path) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise ModelError(
            f"{path}: {name} is {value!r} and must be a whole number, 1 to {MAX_RANK}."
        )
    return value


def _alpha(value: Any, name: str, path: Path) -> float:
    if type(value) not in (int, float) or not abs(value) <= _MOST_ALPHA:
        raise ModelError(
            f"{path}: {name} is {value!r} and must be a number of at most {_MOST_ALPHA:g}."
        )
    return float(value)


def _flag(value: Any, name: str, path: Path) -> bool:
    if type(value) is not bool:
        raise ModelError(f"{path}: {name} is {value!r} and must be true or false.")
    return value


def _patterns(
    value: Any, name: str, number: Callable[[Any, str, Path], Any], path: Path
) -> Mapping[str, Any]:
    found = {} if value is None else value
    if not isinstance(found, dict) or len(found) > _MAX_PATTERNS:
        raise ModelError(f"{path}: {name} must be an object of layers' names and numbers.")
    for key in found:
        if not _PATTERN.fullmatch(key):
            raise ModelError(
                f"{path}: {name} has the key {key[:80]!r}; layers' names are read, and no other "
                "regular expressions."
            )
    return MappingProxyType({key: number(v, f"{name}[{key!r}]", path) for key, v in found.items()})


def _matching(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Look a layer up as PEFT does: a key is a name's end, whole with ``^``."""
    for key, value in patterns.items():
        name = key.replace("\\", "").removeprefix("^")
        if layer == name or (not key.startswith("^") and layer.endswith(f".{name}")):
            return value
    return default
