"""Trainers of tiny compressed models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.recipes.recipe import ModelStage
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.training.model_stage import ModelTrainer, Step
from gqsa_compiler.compress.training.teacher import teacher_states
from tests.compress.training.helpers import random_tokens, student

SCALES = ModelStage(
    epochs=4, batch_tokens=48, scale_rate=2e-2, zero_rate=5e-2, norm_rate=1e-2, warmup=0.1
)
WEIGHTS = dataclasses.replace(SCALES, weight_rate=5e-2)
TOKENS = random_tokens(10, 16)
"""Three sequences make a batch: ten do not fill four."""


def make_trainer(
    model: Any, stage: ModelStage = SCALES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[ModelTrainer, Any, dict[str, GroupedLinear]]:
    """Return a trainer of a compressed copy of a dense model, the copy and its layers."""
    teacher = teacher_states(model, TOKENS, dtype)
    pupil, layers = student(model, dtype, train_weights=stage.weight_rate > 0)
    return ModelTrainer(pupil, stage, TOKENS, teacher, seed=seed, dtype=dtype), pupil, layers


def run(trainer: ModelTrainer, steps: int | None = None) -> list[Step]:
    end = trainer.steps if steps is None else trainer.step + steps
    done = []
    while trainer.step < end:
        done.append(trainer.train_step())
    return done


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
