"""Sensitivities: the traces, the costs' terms against plain references, and the whole path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from gqsa_compiler.compress.allocation import sensitivity, traces
from gqsa_compiler.compress.allocation.allocate import balance_model
from gqsa_compiler.compress.allocation.costs import LayerCosts
from gqsa_compiler.compress.allocation.sensitivity import (
    Sensitivities,
    choose_tokens,
    measure,
    measured_sparsities,
)
from gqsa_compiler.compress.allocation.traces import LayerTrace, trace_layers
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.solver.compensate import Curvature, sweep
from gqsa_compiler.compress.solver.hessian import DAMPING, SHRINKAGE, MomentAccumulator
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import load_dense
from tests.tiny_models import make_tiny

VOCABULARY = 320


def sequences(samples: int = 6, length: int = 48, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def sensitivities(source: ModelSource, tokens: Tensor, **others: Any) -> Sensitivities:
    arguments = {"bits": (4,), "group_sizes": (16,), "most_sparsity": 0.8, **others}
    return measure(source, tokens, **arguments)


def costs_of(source: ModelSource, tokens: Tensor, **others: Any) -> dict[str, LayerCosts]:
    return {layer.name: layer for layer in sensitivities(source, tokens, **others).costs}


def layer_costs(
    trace: LayerTrace,
    bits: int,
    sparsities: tuple[float, ...],
    balance: str = "matrix",
    *,
    weigh_rows: bool = False,
) -> tuple[float, ...]:
    found = sensitivity._layer_costs(trace, (bits,), (16,), sparsities, balance, weigh_rows)
    assert found.sparsities == sparsities
    return found.curves[bits, 16]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", gain=1.0)


@pytest.fixture(scope="module")
def measured(llama: Path) -> dict[str, LayerCosts]:
    return costs_of(resolve(str(llama)), sequences())


def edit(source: Path, target: Path, change: dict[str, float]) -> ModelSource:
    """Copy a model, its weights whose names contain a key multiplied with the value."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    for part, factor in change.items():
        found = [name for name in weights if part in name]
        assert found
        for name in found:
            weights[name] = weights[name] * factor
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(target))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_traces_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    source = resolve(str(make_tiny(family, tmp_path / family)))
    tokens = sequences(3, 20)
    found = {trace.name: trace for trace in trace_layers(source, tokens, seed=5)}
    model, _ = load_dense(source, torch.float32)
    generator = torch.Generator().manual_seed(5)
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    slopes: dict[str, list[Tensor]] = {name: [] for name in found}

    def watch(name: str) -> Any:
        def after(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name].append(args[0].detach().flatten(0, -2))
            output.register_hook(lambda slope: slopes[name].append(slope.flatten(0, -2).clone()))

        return after

    modules = dict(model.named_modules())
    for name in found:
        modules[name].register_forward_hook(watch(name))
    model.get_input_embeddings().weight.requires_grad_()
    for batch in tokens.split(1):
        logits = model(input_ids=batch, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        functional.cross_entropy(logits, drawn, reduction="sum").backward()
    assert len(found) == sum(
        isinstance(m, torch.nn.Linear) for n, m in modules.items() if "lm_head" not in n
    )
    for name, trace in found.items():
        torch.testing.assert_close(trace.weight, modules[name].weight, rtol=0, atol=0)
        torch.testing.assert_close(trace.inputs, torch.cat(seen[name]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trace.gradients, torch.cat(slopes[name]), rtol=1e-3, atol=1e-5)


def random_trace(n: int = 40, k: int = 96, tokens: int = 600) -> LayerTrace:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + 0.2
    inputs = torch.randn(tokens, k, generator=generator) @ mixing
    gradients = torch.randn(tokens, n, generator=generator) * torch.rand(n, generator=generator)
    gradients[: tokens // 10] *= 10
    weight = torch.randn(n, k, generator=generator)
    return LayerTrace("layer", weight, inputs, gradients)


def reference_cost(trace: LayerTrace, weight: Tensor) -> float:
    """Return the cost of a changed weight by the equation, output by output."""
    change = (weight - trace.weight).double()
    slopes = trace.gradients.double().square()
    size = slopes.sum(1) / slopes.sum(1).mean()
    moment = sum(
        share * torch.outer(x, x) for share, x in zip(size, trace.inputs.double(), strict=True)
    )
    assert isinstance(moment, Tensor)
    moment /= len(size)
    own = torch.diag(moment.diagonal())
    shrunk = (1 - SHRINKAGE) * moment + SHRINKAGE * own
    shrunk += DAMPING * own.diagonal().mean() * torch.eye(len(own))
    each = [slope * (row @ shrunk @ row) for slope, row in zip(slopes.mean(0), change, strict=True)]
    return 0.5 * float(sum(each))


def test_cost_of_dropping_is_that_of_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace()
    kept: list[Tensor] = []
    refit = sensitivity.MaskedSolver.refit

    def watch(self: Any, *args: Any) -> Tensor:
        kept.append(refit(self, *args))
        return kept[-1]

    monkeypatch.setattr(sensitivity.MaskedSolver, "refit", watch)
    points = (0.0, 0.25, 0.5, 0.75)
    found = layer_costs(trace, 8, points)
    assert len(kept) == 3
    wanted = [0.0, *(reference_cost(trace, weight) for weight in kept)]
    # 8 bits: rounding adds next to nothing.
    np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=1e-3 * wanted[-1])
    for weight, sparsity in zip(kept, points[1:], strict=True):
        groups = weight.reshape(len(weight), -1, 16).abs().amax(-1)
        assert int((groups == 0).sum()) == round(sparsity * groups.numel())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_cost_of_rounding_is_about_what_the_sweep_leaves(bits: int) -> None:
    trace = random_trace()
    (cost,) = layer_costs(trace, bits, (0.0,))
    moments = MomentAccumulator()
    moments.add(trace.inputs)
    curvature = Curvature(moments.finish("layer").hessian)
    mask = torch.ones(40, 6, dtype=torch.bool)
    swept = sweep(trace.weight, mask, curvature.factor, 16, bits).decode()
    assert cost == pytest.approx(reference_cost(trace, swept), rel=0.25)


def test_a_sample_of_the_rows_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace(n=200)
    points = (0.0, 0.3, 0.6)
    every = layer_costs(trace, 4, points)
    monkeypatch.setattr(sensitivity, "ROWS", 70)
    np.testing.assert_allclose(layer_costs(trace, 4, points), every, rtol=0.25)


def test_a_layer_that_nothing_depends_on_costs_nothing() -> None:
    trace = random_trace()
    still = LayerTrace("layer", trace.weight, trace.inputs, torch.zeros_like(trace.gradients))
    assert layer_costs(still, 4, (0.0, 0.5)) == (0.0, 0.0)


def test_row_balance_costs_more() -> None:
    trace = random_trace()
    trace.weight[:8] *= 6  # rows that matter more
    matrix, row = (layer_costs(trace, 4, (0.0, 0.5), balance) for balance in ("matrix", "row"))
    assert matrix[0] == row[0]
    assert matrix[1] < 0.9 * row[1]


def test_weighing_rows_costs_less() -> None:
    trace = random_trace()
    trace.gradients[:, ::4] *= 5
    plain = layer_costs(trace, 4, (0.0, 0.25, 0.5))
    weighed = layer_costs(trace, 4, (0.0, 0.25, 0.5), weigh_rows=True)
    assert plain[0] == weighed[0]
    assert weighed[1] < 0.5 * plain[1]
    assert weighed[2] < 0.8 * plain[2]


def test_rows_are_the_mean_square_of_the_gradients(llama: Path) -> None:
    source = resolve(str(llama))
    rows = sensitivities(source, sequences()).rows
    for trace in trace_layers(source, sequences()):
        wanted = trace.gradients.double().square().mean(0).float()
        torch.testing.assert_close(rows[trace.name], wanted)


def test_curves_rise_with_sparsity_and_fall_with_bits(llama: Path) -> None:
    source = resolve(str(llama))
    layers = costs_of(source, sequences(), bits=(2, 3, 4, 8), group_sizes=(16, 32, 64))
    for layer in layers.values():
        for curve in layer.curves.values():
            assert list(curve) == sorted(curve)
        for size in (16, 32):
            two, three, four, eight = (layer.curves[bits, size][0] for bits in (2, 3, 4, 8))
            assert two > three > four > eight
        # 96 inputs are no groups of 64.
        assert ((4, 64) in layer.curves) == (layer.shape[1] == 64)


def test_layers_are_named_in_the_models_order(measured: dict[str, LayerCosts]) -> None:
    names = list(measured)
    assert names[:3] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    assert names[-1] == "model.layers.2.mlp.down_proj"
    assert len(names) == 21
    assert measured[names[-1]].shape == (64, 96)


def test_same_seed_same_costs(llama: Path, measured: dict[str, LayerCosts]) -> None:
    source = resolve(str(llama))
    assert costs_of(source, sequences()) == measured
    assert costs_of(source, sequences(), seed=1) != measured


def test_costs_predict_the_measured_divergence(
    llama: Path, measured: dict[str, LayerCosts]
) -> None:
    """Each layer alone loses groups, on other text: the costs rank what the model loses."""
    model, _ = load_dense(resolve(str(llama)), torch.float32)
    modules = dict(model.named_modules())
    tokens = sequences(seed=9)

    @torch.no_grad()
    def predictions() -> Tensor:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits.log_softmax(-1)

    dense = predictions()
    pairs = []
    for trace in trace_layers(resolve(str(llama)), sequences()):
        layer = modules[trace.name]
        moments = MomentAccumulator()
        moments.add(trace.inputs)
        curvature = Curvature(moments.finish(trace.name).hessian)
        solver = sensitivity.MaskedSolver(curvature.single, trace.weight @ curvature.single, 16)
        scorer = sensitivity.Scorer("obs", curvature.exact, curvature.inverse, 16)
        mask = sensitivity.choose_mask(scorer(trace.weight), 0.2, "matrix")
        before = layer.weight.clone()
        layer.weight.copy_(solver.refit(trace.weight, mask, 12))
        divergence = float((dense.exp() * (dense - predictions())).sum(-1).mean())
        layer.weight.copy_(before)
        pairs.append((float(measured[trace.name].at((4, 16), [0.2])[0]), divergence))
    predicted, found = np.log(np.array(pairs)).T
    assert np.corrcoef(predicted, found)[0, 1] > 0.8
    assert abs(np.mean(predicted - found)) < np.log(2)


def test_an_unimportant_layer_loses_more(llama: Path, tmp_path: Path) -> None:
    quiet = edit(llama, tmp_path / "quiet", {"layers.1.mlp.down_proj.weight": 0.01})
    layers = costs_of(quiet, sequences())
    found = balance_model(list(layers.values()), LayerTarget(4, 16, 0.5))
    for part in ("gate_proj", "up_proj", "down_proj"):
        first, second, third = (
            found.targets[f"model.layers.{index}.mlp.{part}"].sparsity for index in range(3)
        )
        assert second == 0.8
        assert max(first, third) < 0.8


@pytest.mark.parametrize("part", ["layers.1.self_attn.v_proj", "layers.2.mlp.down_proj"])
def test_damaged_weights_name_their_layer(part: str, llama: Path, tmp_path: Path) -> None:
    broken = edit(llama, tmp_path / "broken", {f"{part}.weight": float("nan")})
    with pytest.raises(ModelError, match=f"outputs of layer model.{part} are not finite"):
        costs_of(broken, sequences())


def test_a_damaged_norm_is_found_at_the_logits(llama: Path, tmp_path: Path) -> None:
    broken = edit(llama, tmp_path / "broken", {"model.norm.weight": float("inf")})
    with pytest.raises(ModelError, match=r"The logits of .*broken are not finite"):
        costs_of(broken, sequences())


def test_gradients_that_are_no_numbers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = traces._head_gradients

    def broken(*args: Any) -> list[Tensor]:
        return [gradient * float("nan") for gradient in real(*args)]

    monkeypatch.setattr(traces, "_head_gradients", broken)
    message = r"gradients of layer model.layers.2\S+ are not finite"
    with pytest.raises(ModelError, match=message):
        costs_of(resolve(str(llama)), sequences())


def test_progress_counts_to_the_end(llama: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    costs_of(resolve(str(llama)), sequences(2), progress=lambda *step: seen.append(step))
    assert seen == [("measuring sensitivities", done, 6) for done in range(7)]


def test_tokens_are_spread_over_the_text() -> None:
    tokens = torch.arange(40 * 1000).reshape(40, 1000)
    chosen = choose_tokens(tokens)
    assert chosen.shape == (8, 512)
    assert (chosen[:, 0] // 1000).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert choose_tokens(tokens[:3, :9]).tolist() == tokens[:3, :9].tolist()


def test_measured_sparsities_end_at_the_limit() -> None:
    assert measured_sparsities(0.0) == (0.0,)
    assert measured_sparsities(0.3) == (0.0, 0.1, 0.2, 0.3)
    assert measured_sparsities(0.35) == (0.0, 0.1, 0.2, 0.3, 0.35)
