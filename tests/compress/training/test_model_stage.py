"""End-to-end training: losses fall, what is frozen stays, and a run that goes on is the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gqsa_compiler.compress.recipes.recipe import ModelStage
from gqsa_compiler.compress.training.checkpointing import use_checkpoints
from gqsa_compiler.compress.training.model_stage import ModelTrainer, norm_parameters
from gqsa_compiler.compress.training.optimizer import rate_share
from gqsa_compiler.compress.training.teacher import teacher_states
from gqsa_compiler.errors import ModelError, UsageError
from tests.compress.training.conftest import Dense
from tests.compress.training.helpers import (
    decoder_blocks,
    is_storable,
    student,
)
from tests.compress.training.trainers import (
    SCALES,
    TOKENS,
    WEIGHTS,
    make_trainer,
    parameters,
    run,
    step_and_autograd,
    trained_names,
)
from tests.tiny_models import FAMILIES


def build(dense: Dense, family: str) -> Any:
    """Return a dense model whose output head is not its embedding.

    Those of random weights would only repeat their inputs, Gemma's above all.
    """
    return dense(family, tie_word_embeddings=False)


@pytest.mark.parametrize("stage", [SCALES, WEIGHTS], ids=["scales", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, stage: ModelStage, dense: Dense) -> None:
    model = build(dense, family)
    stage = dataclasses.replace(stage, distillation=1.0)
    trainer, pupil, layers = make_trainer(model, stage)
    start = {path: layer.result() for path, layer in layers.items()}
    before = parameters(pupil)
    steps = run(trainer)
    assert len(steps) == trainer.steps == -(-10 * 4 // 3)
    first, last = steps[0].losses, steps[-1].losses
    assert last.divergence < (0.6 if stage.weight_rate else 0.95) * first.divergence
    norms = {name for name, _ in norm_parameters(pupil)}
    moved = {
        name for name, value in parameters(pupil).items() if not torch.equal(value, before[name])
    }
    assert norms <= moved == trained_names(pupil)
    for path, layer in layers.items():
        result = layer.result()
        is_storable(result)
        assert torch.equal(result.keep, start[path].keep)
        if not stage.weight_rate:
            kept = result.keep
            assert torch.equal(result.codes[kept], start[path].codes[kept])
            assert not torch.equal(result.scales[kept], start[path].scales[kept])
        else:
            assert not torch.equal(result.codes, start[path].codes)
    # What is evaluated is what is stored.
    ids = TOKENS[:2]
    with torch.no_grad():
        have = pupil(input_ids=ids, use_cache=False).logits
        for path, layer in layers.items():
            model.get_submodule(path).weight.copy_(layer.result().decode())
        for name, norm in norm_parameters(pupil):
            model.get_parameter(name).copy_(norm)
        want = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_norms_of_every_family(dense: Dense) -> None:
    counts = {family: len(norm_parameters(dense(family))) for family in FAMILIES}
    assert counts == {
        "llama": 7,
        "mistral": 7,
        "qwen2": 7,
        "qwen3": 13,  # with those of queries and keys
        "gemma3": 19,  # ... and those after attention and MLP
        "opt": 7,
    }
    pupil, _ = student(dense("opt"))
    names = [name for name, _ in norm_parameters(pupil)]
    assert len(names) == 7
    assert all("norm" in name and name.endswith(".weight") for name in names)


def test_what_is_frozen(dense: Dense) -> None:
    stage = dataclasses.replace(SCALES, zero_rate=0.0, norm_rate=0.0)
    trainer, pupil, layers = make_trainer(dense("qwen2"), stage)
    assert trained_names(pupil) == {f"{path}.scale" for path in layers}
    before = parameters(pupil)
    run(trainer, 3)
    for name, value in parameters(pupil).items():
        assert torch.equal(value, before[name]) == (not name.endswith(".scale")), name


def test_unwanted_gradients_are_not_computed(dense: Dense) -> None:
    """Also those of a model that was not built for inference."""
    model = dense("llama")
    teacher = teacher_states(model, TOKENS, torch.float32)
    pupil, layers = student(model)
    pupil.requires_grad_(True)
    trainer = ModelTrainer(pupil, SCALES, TOKENS, teacher, seed=0, dtype=torch.float32)
    wanted = {f"{path}.{part}" for path in layers for part in ("scale", "zero")}
    assert trained_names(pupil) == wanted | {name for name, _ in norm_parameters(pupil)}
    run(trainer, 1)
    other, _, _ = make_trainer(model)
    run(other, 1)
    for name, value in trainer.state().items():
        assert torch.equal(value, other.state()[name])


def test_nothing_to_train(dense: Dense) -> None:
    with pytest.raises(UsageError, match="trains nothing"):
        make_trainer(dense("llama"), ModelStage(scale_rate=0, norm_rate=0))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradients_of_a_step(family: str, cap: float | None, dense: Dense) -> None:
    """All at once, against autograd through the whole model and its head."""
    model = dense(family)
    model.config.final_logit_softcapping = cap
    stage = dataclasses.replace(SCALES, batch_tokens=10**6, distillation=0.7)
    trainer, pupil, layers = make_trainer(model, stage)
    assert trainer.steps == 4, "all sequences at once"
    gradients = step_and_autograd(trainer, model, pupil)
    assert len(gradients) == 2 * len(layers) + len(norm_parameters(pupil))
    for name, (found, wanted) in gradients.items():
        assert float((found - wanted).norm() / wanted.norm()) < 1e-3, name


def test_steps_say_what_they_did(dense: Dense) -> None:
    trainer, _, _ = make_trainer(dense("llama"))
    steps = run(trainer)
    assert [step.step for step in steps] == list(range(1, trainer.steps + 1))
    assert {step.steps for step in steps} == {trainer.steps}
    assert [step.tokens for step in steps] == [48 * step.step for step in steps]
    shares = [rate_share(step, trainer.steps, 0.1) for step in range(trainer.steps)]
    assert [step.rate for step in steps] == shares
    for step in steps:
        parts = step.losses
        total = 0.8 * parts.divergence + 0.2 * parts.cross_entropy
        assert parts.total == pytest.approx(total)
        assert step.seconds > 0


@pytest.mark.parametrize(
    ("batch_tokens", "epochs", "most_tokens", "steps"),
    [
        (48, 1, None, 4),
        (1, 1, None, 10),
        (10**6, 2, None, 2),
        (48, 0.01, None, 1),
        (1, 3, 100, 7),
        (1, 1, 10**6, 10),
        (1, 1, 1, 1),
    ],
)
def test_number_of_steps(
    batch_tokens: int, epochs: float, most_tokens: int | None, steps: int, dense: Dense
) -> None:
    stage = dataclasses.replace(
        SCALES, batch_tokens=batch_tokens, epochs=epochs, most_tokens=most_tokens
    )
    trainer, _, _ = make_trainer(dense("llama"), stage)
    assert trainer.steps == len(run(trainer)) == steps


@pytest.mark.parametrize("tied", [True, False])
def test_heads(tied: bool, dense: Dense) -> None:
    model = dense("llama", tie_word_embeddings=tied)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == tied
    trainer, pupil, _ = make_trainer(model)
    steps = run(trainer)
    assert steps[-1].losses.divergence < steps[0].losses.divergence
    assert torch.equal(pupil.get_output_embeddings().weight, head)
    assert torch.equal(pupil.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_bfloat16(family: str, dense: Dense) -> None:
    stage = dataclasses.replace(WEIGHTS, distillation=1.0)
    trainer, pupil, layers = make_trainer(build(dense, family), stage, torch.bfloat16)
    steps = run(trainer)
    assert steps[-1].losses.divergence < 0.7 * steps[0].losses.divergence
    assert all(value.dtype == torch.float32 for value in parameters(pupil).values())
    for layer in layers.values():
        is_storable(layer.result())


def test_seed_decides_the_order(dense: Dense) -> None:
    model = dense("llama")
    losses = [
        [step.losses.total for step in run(make_trainer(model, seed=seed)[0], 2)]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_checkpoints_change_nothing(dense: Dense) -> None:
    model = dense("gemma3")
    plain, want, _ = make_trainer(model, WEIGHTS)
    thrifty, have, _ = make_trainer(model, WEIGHTS)
    use_checkpoints(decoder_blocks(have))
    assert [s.losses for s in run(plain, 4)] == [s.losses for s in run(thrifty, 4)]
    for name, value in parameters(want).items():
        assert torch.equal(value, have.get_parameter(name)), name


def test_nan_is_an_error(dense: Dense) -> None:
    trainer, pupil, _ = make_trainer(dense("llama"))
    run(trainer, 2)
    before = trainer.state()
    with torch.no_grad():
        next(parameter for _, parameter in norm_parameters(pupil))[0] = torch.nan
    with pytest.raises(ModelError, match="not a finite number at step 3; lower"):
        trainer.train_step()
    assert trainer.step == 2
    assert all(bool(torch.isfinite(v).all()) for k, v in before.items() if k.endswith(".scale"))
