"""Trainers of tiny compressed models."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gqsa_compiler.compress.recipes.recipe import ModelStage
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.training.model_stage import ModelTrainer, Step
from gqsa_compiler.compress.training.teacher import teacher_states
from tests.compress.training.helpers import grad, random_tokens, student

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


def step_and_autograd(
    trainer: ModelTrainer, model: Any, pupil: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Take a step of all sequences, and do the same by autograd through the model and its head.

    The losses of both agree.

    Parameters
    ----------
    trainer : ModelTrainer
    model : Any
        The dense model, which teaches.
    pupil : Any
        What the trainer trains.

    Returns
    -------
    dict of str to (Tensor, Tensor)
        The gradients that the step had, and those of autograd.
    """
    stage, cap = trainer._stage, model.config.final_logit_softcapping
    reference = copy.deepcopy(pupil)

    def logits(plain: Tensor) -> Tensor:
        plain = plain[:, :-1].flatten(0, 1)
        return plain if cap is None else cap * torch.tanh(plain / cap)

    hidden = reference.base_model(input_ids=TOKENS, use_cache=False).last_hidden_state
    ours = logits(reference.get_output_embeddings()(hidden))
    teacher = teacher_states(model, TOKENS, torch.float32)
    theirs = logits(teacher @ model.get_output_embeddings().weight.T).detach()
    divergence = functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    entropy = functional.cross_entropy(ours, TOKENS[:, 1:].flatten())
    (stage.distillation * divergence + (1 - stage.distillation) * entropy).backward()
    found: dict[str, Tensor] = {}

    def keep(optimizer: Any, args: Any, keywords: Any) -> None:
        for name, parameter in pupil.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    trainer._optimizer.register_step_pre_hook(keep)
    losses = trainer.train_step().losses
    assert losses.divergence == pytest.approx(float(divergence.detach()), rel=1e-4)
    assert losses.cross_entropy == pytest.approx(float(entropy.detach()), rel=1e-4)
    return {name: (value, grad(reference.get_parameter(name))) for name, value in found.items()}
