"""What flows through each linear layer of the dense model, forwards and backwards, block by block.

Never more than one block's weights are there, besides the embedding and the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gqsa_compiler.compress.blocks import (
    BlockInputs,
    capture_inputs,
    find_blocks,
    linear_layers,
    place_rest,
    release,
    run_block,
)
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import build_model, load_parameters
from gqsa_compiler.progress import Progress


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """A linear layer of the dense model, and what was seen there for every token.

    Parameters
    ----------
    name : str
        Module path.
    weight : float32 [N, K]
    inputs : float32 [tokens, K]
    gradients : float32 [tokens, N]
        Of the negative log-likelihood, summed over its sequence, of tokens drawn from the model's
        own predictions, with respect to the layer's output.
    """

    name: str
    weight: Tensor
    inputs: Tensor
    gradients: Tensor


def trace_layers(
    source: ModelSource,
    tokens: Tensor,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[LayerTrace]:
    """Run the dense model forwards and backwards; yield its linear layers, the last one first.

    Memory holds the embedding, the head, one block in float32, every block's input for all tokens,
    and for one block the inputs and gradients of its layers.

    Parameters
    ----------
    source : ModelSource
        A dense model.
    tokens : int64 [S, T]
    seed : int
        Of the tokens drawn from the model's predictions.
    device : torch.device or str
    progress : callable, optional
        Called with (stage, done, total).

    Raises
    ------
    ModelError
        A layer's output or gradient is NaN or infinite, or the model cannot be read.
    """
    report = progress or (lambda _stage, _done, _total: None)
    skeleton = build_model(source)
    prefix, blocks = find_blocks(skeleton)
    load_parameters(skeleton, "", source, skip=f"{prefix}.")
    place_rest(skeleton, blocks, device)
    batches = list(tokens.to(device).split(1))
    captured = capture_inputs(skeleton, blocks, batches)
    names = [f"{prefix}.{index}" for index in range(len(blocks))]
    steps = 2 * len(blocks)
    stack: list[list[Tensor]] = []
    hidden = captured.hidden
    for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
        report("measuring sensitivities", index, steps)
        load_parameters(block, name, source)
        block.to(device)
        stack.append(hidden)
        hidden = _forward(name, block, captured, index, hidden)
        release(block)
    gradients = _head_gradients(source, skeleton, blocks, batches, hidden, seed, device)
    del hidden
    for index in reversed(range(len(blocks))):
        report("measuring sensitivities", steps - 1 - index, steps)
        load_parameters(blocks[index], names[index], source)
        blocks[index].to(device)
        inputs = stack.pop()
        traces, gradients = _backward(
            names[index], blocks[index], captured, index, inputs, gradients
        )
        yield from reversed(traces)
        release(blocks[index])
    report("measuring sensitivities", steps, steps)


@torch.no_grad()
def _forward(
    name: str, block: nn.Module, captured: BlockInputs, index: int, hidden: list[Tensor]
) -> list[Tensor]:
    """Run a block; a layer that gives no numbers is named."""

    def check(path: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not torch.isfinite(output).all():
                raise ModelError(
                    f"The outputs of layer {name}.{path} are not finite numbers on the calibration "
                    "text: the model's weights are damaged or it overflows."
                )

        return after

    with ExitStack() as hooks:
        for path, layer in linear_layers(block).items():
            hooks.callback(layer.register_forward_hook(check(path)).remove)
        return [run_block(block, batch, captured.arguments[index]) for batch in hidden]


def _head_gradients(
    source: ModelSource,
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: list[Tensor],
    hidden: list[Tensor],
    seed: int,
    device: torch.device | str,
) -> list[Tensor]:
    """Return the gradients float32 [1, T, H] at the last block's outputs."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    entry: Tensor

    def stand_in(*_args: Any, **_keywords: Any) -> Tensor:
        return entry

    for block in blocks:
        block.forward = stand_in
    try:
        for batch, last in zip(batches, hidden, strict=True):
            entry = last.requires_grad_()
            with torch.enable_grad():
                logits = model(input_ids=batch, use_cache=False).logits[0].float()
                if not torch.isfinite(logits).all():
                    raise ModelError(
                        f"The logits of {source.path} are not finite numbers on the calibration "
                        "text: the weights of its last norm or its head are damaged."
                    )
                # On the CPU, so that a seed gives the same tokens on every device.
                chances = logits.detach().softmax(-1).cpu()
                drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
                loss = functional.cross_entropy(logits, drawn.to(device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, entry)
            gradients.append(gradient)
    finally:
        for block in blocks:
            del block.forward  # the class's own comes back
    return gradients


def _backward(
    name: str,
    block: nn.Module,
    captured: BlockInputs,
    index: int,
    inputs: list[Tensor],
    gradients: list[Tensor],
) -> tuple[list[LayerTrace], list[Tensor]]:
    """Run a block again and backwards: its layers' traces, and the gradients at its inputs."""
    layers = linear_layers(block)
    seen: dict[str, list[Tensor]] = {path: [] for path in layers}
    outputs: dict[str, Tensor] = {}
    slopes: dict[str, list[Tensor]] = {path: [] for path in layers}

    def watch(path: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[path].append(args[0].detach().flatten(0, -2))
            outputs[path] = output

        return after

    before = []
    with ExitStack() as hooks, torch.enable_grad():
        for path, layer in layers.items():
            hooks.callback(layer.register_forward_hook(watch(path)).remove)
        for batch, gradient in zip(inputs, gradients, strict=True):
            entry = batch.detach().requires_grad_()
            result = run_block(block, entry, captured.arguments[index])
            first, *rest = torch.autograd.grad(result, [entry, *outputs.values()], gradient)
            before.append(first)
            for path, slope in zip(outputs, rest, strict=True):
                slopes[path].append(slope.flatten(0, -2))
    traces = []
    for path, layer in layers.items():
        trace = LayerTrace(
            name=f"{name}.{path}",
            weight=layer.weight.detach(),
            inputs=torch.cat(seen.pop(path)),
            gradients=torch.cat(slopes.pop(path)),
        )
        if not torch.isfinite(trace.gradients).all():
            raise ModelError(
                f"The gradients of layer {trace.name} are not finite numbers on the calibration "
                "text: the model's weights are damaged or it overflows."
            )
        traces.append(trace)
    return traces, before
