"""A block's compressed layers as a state of the work directory, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gqsa_compiler.compress.solver.grouped import GroupedWeight

Weights = dict[str, GroupedWeight]

INPUT_RMS = "input_rms"
"""The part of a state that `input_rms_tensors` adds."""

BLOCK_STATE = "block"
"""What states of blocks are named after: the one shot, and stage one if the recipe has it."""


def to_tensors(weights: Mapping[str, GroupedWeight]) -> dict[str, Tensor]:
    """Name a block's parts; what is lost in narrower dtypes is nothing that is stored."""
    tensors: dict[str, Tensor] = {}
    for path, weight in weights.items():
        tensors[f"{path}/keep"] = weight.keep
        tensors[f"{path}/codes"] = weight.codes.to(torch.uint8)
        tensors[f"{path}/scales"] = weight.scales.half()
        tensors[f"{path}/zeros"] = weight.zeros.to(torch.uint8)
        tensors[f"{path}/bits"] = torch.tensor(weight.bits)
        if weight.elements is not None:
            tensors[f"{path}/elements"] = weight.elements
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor], paths: list[str], device: torch.device | str = "cpu"
) -> Weights:
    """Inverse of `to_tensors`, for the layers of these paths."""
    weights = {}
    for path in paths:
        elements = tensors.get(f"{path}/elements")
        weights[path] = GroupedWeight(
            tensors[f"{path}/keep"].to(device),
            tensors[f"{path}/codes"].to(device).float(),
            tensors[f"{path}/scales"].to(device).float(),
            tensors[f"{path}/zeros"].to(device).float(),
            int(tensors[f"{path}/bits"]),
            None if elements is None else elements.to(device),
        )
    return weights


def input_rms_tensors(sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name what is known of the layers' inputs, beside what `to_tensors` names."""
    return {f"{path}/{INPUT_RMS}": size.cpu() for path, size in sizes.items()}


def block_state(stage: str, index: int) -> str:
    """Return the name of the state that holds what a stage made of a block."""
    return f"{stage}-{index:04}"
