"""End-to-end training that is saved and goes on in another process: the same, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gqsa_compiler.compress.recipes.recipe import ModelStage
from gqsa_compiler.compress.work.statefile import read_state, write_state
from tests.compress.training.conftest import Dense
from tests.compress.training.helpers import same_weight
from tests.compress.training.trainers import (
    SCALES,
    WEIGHTS,
    make_trainer,
    parameters,
    run,
    trained_names,
)


@pytest.mark.parametrize("stage", [SCALES, WEIGHTS], ids=["scales", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_is_the_same(
    dtype: torch.dtype, stage: ModelStage, dense: Dense, tmp_path: Path
) -> None:
    model = dense("llama")
    whole, undisturbed, want = make_trainer(model, stage, dtype)
    run(whole)
    first, _, _ = make_trainer(model, stage, dtype)
    run(first, 4)
    write_state(tmp_path / "state", first.state(), {})
    second, resumed, have = make_trainer(model, stage, dtype)
    second.load_state(read_state(tmp_path / "state")[0], 4)
    assert second.step == 4
    steps = run(second)
    assert steps[0].step == 5
    assert steps[-1].tokens == 48 * whole.steps
    for name, value in parameters(undisturbed).items():
        assert torch.equal(value, resumed.get_parameter(name)), name
    for path, layer in want.items():
        same_weight(have[path].result(), layer.result())
    for name, value in whole.state().items():
        assert torch.equal(value, second.state()[name]), name


def test_loaded_moments_are_as_the_optimiser_makes_them(dense: Dense) -> None:
    model = dense("llama")
    first, _, _ = make_trainer(model)
    run(first, 3)
    second, _, _ = make_trainer(model)
    second.load_state(first.state(), 3)
    assert len(first._optimizer.state) == len(second._optimizer.state) == len(first._trained)
    for name, parameter in first._trained.items():
        a = first._optimizer.state[parameter]
        b = second._optimizer.state[second._trained[name]]
        assert list(a) == list(b) == ["step", "exp_avg", "exp_avg_sq"]
        for key, tensor in a.items():
            assert torch.equal(tensor, b[key])
            assert (tensor.dtype, tensor.device) == (b[key].dtype, b[key].device)


def test_state_before_the_first_step(dense: Dense) -> None:
    model = dense("llama")
    first, untouched, _ = make_trainer(model)
    second, pupil, _ = make_trainer(model)
    with torch.no_grad():
        for name in trained_names(pupil):
            pupil.get_parameter(name).zero_()
    second.load_state(first.state(), 0)
    run(first, 2)
    run(second, 2)
    for name, value in parameters(untouched).items():
        assert torch.equal(value, pupil.get_parameter(name))


def test_state_holds_only_what_is_trained(dense: Dense) -> None:
    trainer, pupil, _ = make_trainer(dense("llama"))
    names = trained_names(pupil)
    assert set(trainer.state()) == names
    run(trainer, 1)
    assert set(trainer.state()) == names | {
        f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in names
    }


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [SCALES, WEIGHTS], ids=["scales", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, stage: ModelStage, dense: Dense, tmp_path: Path) -> None:
    model = dense("llama").to("cuda")
    trainer, _, layers = make_trainer(model, stage, dtype)
    steps = run(trainer, 4)
    write_state(tmp_path / "state", trainer.state(), {})
    again, _, _ = make_trainer(model, stage, dtype)
    again.load_state(read_state(tmp_path / "state")[0], 4)
    steps += run(again)
    run(trainer)
    assert steps[-1].losses.divergence < steps[0].losses.divergence
    for name, value in trainer.state().items():
        assert value.is_cuda
        torch.testing.assert_close(value, again.state()[name], rtol=1e-2, atol=1e-4)
    assert all(layer.result().codes.is_cuda for layer in layers.values())
