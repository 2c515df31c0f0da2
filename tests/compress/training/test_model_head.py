"""A compressed head trains with the model: gradients, losses, and what stays as it is."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from gqsa_compiler.compress.blocks import HEAD
from gqsa_compiler.compress.recipes.recipe import ModelStage
from gqsa_compiler.compress.training.attach import attach
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.training.model_stage import ModelTrainer
from gqsa_compiler.compress.training.teacher import teacher_states
from tests.compress.training.conftest import Dense
from tests.compress.training.helpers import is_storable, round_linear, student
from tests.compress.training.trainers import (
    SCALES,
    TOKENS,
    WEIGHTS,
    parameters,
    run,
    step_and_autograd,
    trained_names,
)

BLOCKS_STAY = dataclasses.replace(SCALES, norm_rate=0.0, zero_rate=0.0, distillation=1.0)


def make(
    dense: Any, stage: ModelStage, *, blocks: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[ModelTrainer, Any, GroupedLinear]:
    """Return a trainer of a model with a head of 2 bits, the model and its head."""
    teacher = teacher_states(dense, TOKENS, dtype)
    train_weights = stage.weight_rate > 0
    pupil = (
        student(dense, dtype, train_weights=train_weights)[0] if blocks else copy.deepcopy(dense)
    )
    weight = round_linear(dense.get_output_embeddings(), bits=2, sparsity=0.0)
    latents = {HEAD: weight.decode()} if train_weights else None
    layer = attach(pupil, {HEAD: weight}, dtype, latents=latents)[HEAD]
    head = dense.get_output_embeddings().weight
    trainer = ModelTrainer(
        pupil, stage, TOKENS, teacher, seed=0, dtype=dtype, dense_head=head.detach()
    )
    return trainer, pupil, layer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", [BLOCKS_STAY, WEIGHTS], ids=["scales", "weights"])
def test_the_head_alone_makes_up_for_itself(stage: ModelStage, tied: bool, dense: Dense) -> None:
    model = dense("llama", tie_word_embeddings=tied)
    # All sequences in every step, so that losses can be compared.
    stage = dataclasses.replace(
        stage, distillation=1.0, norm_rate=0.0, batch_tokens=10**6, epochs=30
    )
    trainer, pupil, layer = make(model, stage, blocks=False)
    names = {f"{HEAD}.scale"}
    if stage.weight_rate:
        names |= {f"{HEAD}.latent", f"{HEAD}.zero"}
    assert trained_names(pupil) == names
    start = layer.result()
    steps = run(trainer)
    first, last = steps[0].losses, steps[-1].losses
    assert 0 < last.divergence < 0.95 * first.divergence
    done = layer.result()
    is_storable(done)
    assert torch.equal(done.codes, start.codes) == (not stage.weight_rate)
    assert not torch.equal(done.scales, start.scales)
    # The embedding, which the dense head may be, is that of the dense model.
    assert torch.equal(pupil.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradients_of_a_step(family: str, cap: float | None, dense: Dense) -> None:
    """Those of the head and of all before it, against autograd through the whole model."""
    model = dense(family)
    model.config.final_logit_softcapping = cap
    stage = dataclasses.replace(SCALES, batch_tokens=10**6, distillation=0.7)
    trainer, pupil, _ = make(model, stage)
    gradients = step_and_autograd(trainer, model, pupil)
    assert {f"{HEAD}.scale", f"{HEAD}.zero"} <= set(gradients)
    for name, (found, wanted) in gradients.items():
        if name.startswith(HEAD):
            wanted = wanted / wanted.square().mean().sqrt()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-3, name


def test_a_run_that_goes_on_is_the_same(dense: Dense) -> None:
    model = dense("llama")
    whole, want, _ = make(model, WEIGHTS)
    run(whole)
    first, _, _ = make(model, WEIGHTS)
    run(first, 5)
    saved = {name: value.clone() for name, value in first.state().items()}
    assert f"exp_avg/{HEAD}.latent" in saved
    second, have, _ = make(model, WEIGHTS)
    second.load_state(saved, 5)
    run(second)
    for name, value in parameters(want).items():
        assert torch.equal(value, have.get_parameter(name)), name


def test_a_head_that_is_not_trained_stays(dense: Dense) -> None:
    stage = dataclasses.replace(BLOCKS_STAY, scale_rate=0.0, norm_rate=1e-2)
    trainer, _, layer = make(dense("llama"), stage)
    before = layer.result()
    steps = run(trainer)
    assert steps[-1].losses.divergence < steps[0].losses.divergence
    assert torch.equal(layer.result().scales, before.scales)


def test_bfloat16(dense: Dense) -> None:
    stage = dataclasses.replace(WEIGHTS, distillation=1.0)
    trainer, _, layer = make(dense("llama"), stage, dtype=torch.bfloat16)
    steps = run(trainer)
    assert steps[-1].losses.divergence < 0.7 * steps[0].losses.divergence
    is_storable(layer.result())
