"""Stage one on blocks of every family: losses fall, masks keep their counts, errors are named."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gqsa_compiler.compress.blocks import linear_layers, run_block
from gqsa_compiler.compress.recipes.recipe import BlockStage, Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.solver.block_oneshot import BlockState
from gqsa_compiler.compress.training import block_stage
from gqsa_compiler.compress.training.block_stage import train_block
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.training.losses import mean_block_loss
from gqsa_compiler.errors import ModelError, UsageError
from tests.compress.training.conftest import Dense
from tests.compress.training.helpers import (
    RECIPE,
    is_storable,
    latent_of,
    one_shot,
    random_tokens,
    same_weight,
)
from tests.tiny_models import FAMILIES

STAGE = BlockStage(epochs=15, batch_tokens=64, weight_rate=0.1, scale_rate=0.02)
TOKENS = random_tokens(8, 16)


def check_consistent(state: BlockState) -> None:
    """Assert that weights, block and outputs say the same, and that a checkpoint can hold it."""
    for path, layer in linear_layers(state.block).items():
        is_storable(state.weights[path])
        assert torch.equal(layer.weight, state.weights[path].decode())
        assert not layer.weight.requires_grad
    assert set(linear_layers(state.block)) == set(state.weights)
    for hidden, output in zip(state.inputs, state.outputs, strict=True):
        with torch.no_grad():
            again = run_block(state.block, hidden, state.arguments)
        torch.testing.assert_close(output, again, rtol=1e-4, atol=1e-4)
        assert not output.requires_grad


def kept(state: BlockState) -> dict[str, Tensor]:
    return {path: weight.keep.clone() for path, weight in state.weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, dense: Dense) -> None:
    start = one_shot(dense(family), TOKENS, index=1)
    biases = {
        p: m.bias.clone() for p, m in linear_layers(start.block).items() if m.bias is not None
    }
    dropped = kept(start)
    state, losses = train_block(start, STAGE, dtype=torch.float32, seed=0)
    assert losses.before == pytest.approx(mean_block_loss(start.outputs, start.targets))
    assert losses.after == losses.trained < 0.7 * losses.before
    assert losses.swapped == 0
    assert losses.after == pytest.approx(mean_block_loss(state.outputs, state.targets))
    check_consistent(state)
    for path, keep in dropped.items():
        assert torch.equal(state.weights[path].keep, keep)
    for path, bias in biases.items():
        assert torch.equal(linear_layers(state.block)[path].bias, bias)
    assert bool(biases) == (family in ("qwen2", "opt"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_bfloat16(family: str, dense: Dense) -> None:
    start = one_shot(dense(family), TOKENS)
    state, losses = train_block(start, STAGE, dtype=torch.bfloat16, seed=0)
    assert losses.after < 0.7 * losses.before
    check_consistent(state)
    assert all(output.dtype == torch.float32 for output in state.outputs)


def test_same_seed_same_block(dense: Dense) -> None:
    found = []
    for seed in (0, 0, 1):
        state, _ = train_block(
            one_shot(dense("llama"), TOKENS), STAGE, dtype=torch.float32, seed=seed
        )
        found.append(state.weights)
    for path, weight in found[0].items():
        same_weight(found[1][path], weight)
    assert any(not torch.equal(found[2][p].decode(), w.decode()) for p, w in found[0].items())


@pytest.mark.parametrize("updates", [0, 3])
def test_never_worse(updates: int, dense: Dense) -> None:
    recipe = Recipe("easy", 8, 10, 16, solver="rtn", score="magnitude")
    start = one_shot(dense("llama"), TOKENS, recipe=recipe)
    masks, weights = kept(start), copy.deepcopy(start.weights)
    stage = dataclasses.replace(STAGE, weight_rate=5.0, scale_rate=1.0, mask_updates=updates)
    state, losses = train_block(start, stage, dtype=torch.float32, seed=0)
    assert losses.trained > losses.before == losses.after
    assert losses.swapped == 0
    for path, weight in weights.items():
        same_weight(state.weights[path], weight)
        assert torch.equal(state.weights[path].keep, masks[path])
    check_consistent(state)


@pytest.mark.parametrize("balance", ["matrix", "row"])
def test_mask_updates(balance: str, dense: Dense) -> None:
    recipe = dataclasses.replace(RECIPE, balance=balance)
    start = one_shot(dense("llama"), TOKENS, recipe=recipe)
    before = kept(start)
    stage = dataclasses.replace(STAGE, mask_updates=3)
    state, losses = train_block(start, stage, dtype=torch.float32, seed=0, balance=balance)
    assert losses.after < losses.before
    assert losses.swapped > 0
    for path, keep in before.items():
        now = state.weights[path].keep
        assert int(now.sum()) == int(keep.sum())
        if balance == "row":
            assert torch.equal(now.sum(1), keep.sum(1))
        assert torch.equal(start.weights[path].keep, keep), "the one-shot weights are left alone"
    assert any(not torch.equal(state.weights[path].keep, keep) for path, keep in before.items())
    check_consistent(state)


def test_two_of_four_stays_two_of_four(dense: Dense) -> None:
    recipe = Recipe("2:4", 4, 0, 16, structure="2:4", solver="rtn", score="magnitude")
    start = one_shot(dense("llama"), TOKENS, recipe=recipe)
    elements = {path: weight.elements for path, weight in start.weights.items()}
    state, losses = train_block(start, STAGE, dtype=torch.float32, seed=0)
    assert losses.after < losses.before
    for path, weight in state.weights.items():
        assert weight.elements is not None
        assert weight.elements is elements[path]
        decoded = weight.decode()
        assert float(decoded[~weight.elements].abs().sum()) == 0
        assert int((decoded != 0).view(-1, 4).sum(1).max()) <= 2
    check_consistent(state)


def test_layers_of_different_targets(dense: Dense) -> None:
    model = dense("llama")
    paths = list(linear_layers(model.model.layers[0]))
    choices = [
        LayerTarget(2, 8, 0.25),
        LayerTarget(3, 32, 0.0),
        LayerTarget(8, 16, 0.5),
        LayerTarget(4, 16, 0.75),
    ]
    targets = {path: choices[index % 4] for index, path in enumerate(paths)}
    start = one_shot(model, TOKENS, targets=targets)
    stage = dataclasses.replace(STAGE, mask_updates=2)
    state, losses = train_block(start, stage, dtype=torch.float32, seed=0)
    assert losses.after < losses.before
    for path, target in targets.items():
        weight = state.weights[path]
        assert (weight.bits, weight.codes.shape[2]) == (target.bits, target.group_size)
        assert int((~weight.keep).sum()) == int(weight.keep.numel() * target.sparsity)
    check_consistent(state)


@pytest.mark.parametrize(
    ("samples", "length", "batch_tokens", "epochs", "want"),
    [
        (8, 16, 64, 2, (4, 1, 4)),
        (8, 16, 128, 2, (4, 2, 2)),  # a step is two batches
        (8, 16, 10**6, 3, (4, 2, 3)),  # ... and at most all of them
        (7, 16, 64, 1, (1, 4, 2)),  # no batch divides 7; the last step begins a second epoch
        (8, 16, 1, 1, (4, 1, 2)),
        (8, 16, 64, 0.1, (4, 1, 1)),
        (8, 16, 64, 1.3, (4, 1, 3)),
    ],
)
def test_steps(
    samples: int,
    length: int,
    batch_tokens: int,
    epochs: float,
    want: tuple[int, int, int],
    dense: Dense,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, gather, steps = want
    start = one_shot(dense("llama"), random_tokens(samples, length))
    stage = BlockStage(epochs=epochs, batch_tokens=batch_tokens)
    seen: list[int] = []
    taken: list[int] = []

    def run(block: nn.Module, hidden: Tensor, arguments: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(len(hidden))
        return run_block(block, hidden, arguments)

    monkeypatch.setattr(block_stage, "run_block", run)
    monkeypatch.setattr(block_stage, "clamp_zeros", lambda _: taken.append(1))
    train_block(start, stage, dtype=torch.float32, seed=0)
    assert set(seen) == {batch}
    assert (len(seen), len(taken)) == (gather * steps, steps)


def test_gathered_gradients_are_those_of_one_batch(dense: Dense) -> None:
    """Two batches a step train like one batch of both."""
    stage = BlockStage(epochs=1, batch_tokens=128, weight_rate=1e-2)
    found = []
    for batch_tokens in (64, 128):
        start = one_shot(dense("llama"), TOKENS, batch_tokens=batch_tokens)
        state, _ = train_block(start, stage, dtype=torch.float32, seed=0)
        found.append((len(start.inputs), state))
    assert [batches for batches, _ in found] == [2, 1]
    for path, weight in found[0][1].weights.items():
        other = found[1][1].weights[path]
        assert float((weight.codes == other.codes).float().mean()) > 0.995
        torch.testing.assert_close(weight.scales, other.scales, rtol=2e-3, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dense_share(share: float, dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    start = one_shot(dense("llama"), TOKENS)
    start = dataclasses.replace(start, inputs=[x + 1 for x in start.inputs])
    of_dense = {tuple(x.tolist()) for hidden in start.dense_inputs for x in hidden[:, 0, :3]}
    seen: list[bool] = []

    def run(block: nn.Module, hidden: Tensor, arguments: Any) -> Tensor:
        if torch.is_grad_enabled():
            found = {tuple(x.tolist()) in of_dense for x in hidden[:, 0, :3]}
            assert len(found) == 1, "a batch is of one kind"
            seen.extend(found)
        return run_block(block, hidden, arguments)

    monkeypatch.setattr(block_stage, "run_block", run)
    stage = dataclasses.replace(STAGE, dense_share=share, epochs=20)
    train_block(start, stage, dtype=torch.float32, seed=0)
    assert len(seen) == 40
    assert sum(seen) / 40 == pytest.approx(share, abs=0.2 * (share == 0.5))


def test_nan_names_the_block(dense: Dense) -> None:
    start = one_shot(dense("llama"), TOKENS, index=2)
    start.inputs[0][0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"loss of model\.layers\.2 is not .* at step [12];"):
        train_block(start, STAGE, dtype=torch.float32, seed=0)


def test_nan_after_the_last_step_names_the_layer(
    dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(layers: Iterable[GroupedLinear]) -> None:
        latent_of(list(layers)[-1]).fill_(torch.nan)

    monkeypatch.setattr(block_stage, "clamp_zeros", damage)
    start = one_shot(dense("llama"), TOKENS, index=2)
    stage = dataclasses.replace(STAGE, epochs=0.1)
    with pytest.raises(ModelError, match=r"layer model\.layers\.2\.mlp\.down_proj infinite or NaN"):
        train_block(start, stage, dtype=torch.float32, seed=0)


def test_nothing_to_train(dense: Dense) -> None:
    stage = BlockStage(weight_rate=0, scale_rate=0, zero_rate=0)
    with pytest.raises(UsageError, match="trains nothing"):
        train_block(one_shot(dense("llama"), TOKENS), stage, dtype=torch.float32, seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, dense: Dense) -> None:
    start = one_shot(dense("llama").to("cuda"), TOKENS.to("cuda"))
    stage = dataclasses.replace(STAGE, mask_updates=2, dense_share=0.3)
    state, losses = train_block(start, stage, dtype=dtype, seed=0)
    assert losses.after < losses.before
    assert all(weight.codes.is_cuda for weight in state.weights.values())
    check_consistent(state)
