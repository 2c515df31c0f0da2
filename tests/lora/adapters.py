"""Random adapters as PEFT writes them, and the model that they make, in PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What PEFT 0.18 writes for a plain LoRA adapter, without what a test changes.
CONFIG: Mapping[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def make_adapter(
    directory: Path,
    model: Path,
    targets: Sequence[str] = ALL,
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    gain: float = 0.3,
    ranks: Mapping[str, int] | None = None,
    dtype: Any = np.float32,
    **fields: Any,
) -> Path:
    """Write an adapter whose changes are about `gain` of what the layers compute.

    Parameters
    ----------
    directory : Path
        Created.
    model : Path
        The model that it is for.
    targets : sequence of str
        Last parts of the layers' names.
    ranks : mapping, optional
        Other ranks, by a name's end; they become the configuration's ``rank_pattern``.
    **fields : Any
        Of the configuration.
    """
    rng = np.random.default_rng(seed)
    source = resolve(str(model))
    tensors = {}
    for name in source.tensor_names():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in targets or not name.endswith(".weight"):
            continue
        n, k = source.shape(name)
        r = next((r for end, r in (ranks or {}).items() if layer.endswith(end)), rank)
        a = rng.standard_normal((r, k)) * k**-0.5
        b = rng.standard_normal((n, r)) * gain * r**-0.5
        tensors[f"base_model.model.{layer}.lora_A.weight"] = a.astype(dtype)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = b.astype(dtype)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {**CONFIG, "r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
    config.update(rank_pattern=dict(ranks or {}), **fields)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def reference(checkpoint: Path, adapter: Path | None = None) -> torch.nn.Module:
    """Return transformers' model with the decoded weights, the adapter's products added to them."""
    model = load_checkpoint_dense(resolve(str(checkpoint)))
    if adapter is None:
        return model
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, a in tensors.items():
            if not name.endswith(".lora_A.weight"):
                continue
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            alpha = next(
                (v for k, v in config["alpha_pattern"].items() if layer.endswith(k)),
                config["lora_alpha"],
            )
            scale = alpha / (len(a) ** 0.5 if config["use_rslora"] else len(a))
            modules[layer].weight += scale * (b.double() @ a.double()).float()
    return model
