"""A transformers decoder as a row of blocks, found by structure, run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.gemm import quick_linears
from gqsa_compiler.errors import ModelError

HEAD = "lm_head"
"""Module path of the language-model head, in every family."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """What the decoder blocks are called with.

    Parameters
    ----------
    hidden : list of float32 [B, T, H]
        The first block's input, batch by batch.
    arguments : list
        For each block, what follows the hidden states: the rest of the positional arguments and
        the keyword arguments (masks, rotary tables), the same for every batch.
    """

    hidden: list[Tensor]
    arguments: list[Arguments]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the decoder blocks and their module path.

    They are the longest list of modules of one class that hold linear layers.

    Raises
    ------
    ModelError
        There is no such list.
    """
    found: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len({type(item) for item in module}) == 1
            and any(isinstance(part, nn.Linear) for part in module[0].modules())
            and (found is None or len(module) > len(found[1]))
        ):
            found = name, module
    if found is None:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks to compress.")
    return found


def linear_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """List a block's linear layers by their path inside it."""
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def release(module: nn.Module) -> None:
    """Free the parameters' memory; they keep their shapes, which is what reading them checks."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(()).expand(parameter.shape)


def to_float32(value: Any) -> Any:
    """Copy a block's arguments with their floating tensors as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(to_float32(item) for item in value)
    if isinstance(value, dict):
        return {key: to_float32(item) for key, item in value.items()}
    return value


@torch.no_grad()
def capture_inputs(model: nn.Module, blocks: nn.ModuleList, batches: list[Tensor]) -> BlockInputs:
    """Learn the blocks' inputs; no block runs, so their weights need not be there.

    Parameters
    ----------
    model : nn.Module
        A transformers causal language model.
    blocks : nn.ModuleList
        Its blocks.
    batches : list of int64 [B, T]
        All of one shape.
    """
    hidden: list[Tensor] = []
    arguments: list[Arguments] = []

    def stand_in(first: bool) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if first:
                hidden.append(hidden_states.float())
            if len(hidden) == 1:
                arguments.append(to_float32((args, kwargs)))
            return hidden_states

        return forward

    for index, block in enumerate(blocks):
        block.forward = stand_in(index == 0)
    try:
        for batch in batches:
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
    finally:
        for block in blocks:
            del block.forward  # the class's own comes back
    return BlockInputs(hidden, arguments)


@torch.no_grad()
def final_states(model: Any, blocks: nn.ModuleList, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Return what the head gets: the last norm's outputs. No block runs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    blocks : nn.ModuleList
        Its blocks.
    tokens : int64 [B, T]
    hidden : float32 [B, T, H]
        The last block's outputs.

    Returns
    -------
    float32 [B, T, H]
    """

    def stand_in(*_args: Any, **_keywords: Any) -> Tensor:
        return hidden

    for block in blocks:
        block.forward = stand_in
    try:
        states: Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for block in blocks:
            del block.forward  # the class's own comes back
    return states


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Run one block; float32 [B, T, H] in and out."""
    rest, keywords = arguments
    with quick_linears(block):
        result = block(hidden, *rest, **keywords)
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def watch_inputs(
    block: nn.Module, names: tuple[str, ...], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, input)`` whenever one of the named linear layers is about to run."""
    layers = linear_layers(block)

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, args[0])

        return before

    handles = [layers[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_groups(
    block: nn.Module, hidden: Tensor, arguments: Arguments
) -> tuple[tuple[str, ...], ...]:
    """Order a block's linear layers as they run, those with one input together.

    Returns
    -------
    tuple of tuple of str
        For a Llama: (q, k, v), (o,), (gate, up), (down,), as paths inside the block.
    """
    groups: list[tuple[Tensor, list[str]]] = []

    def see(name: str, tensor: Tensor) -> None:
        for known, members in groups:
            if known is tensor:
                members.append(name)
                return
        groups.append((tensor, [name]))

    with watch_inputs(block, tuple(linear_layers(block)), see):
        run_block(block, hidden, arguments)
    return tuple(tuple(members) for _, members in groups)


def adds_to_output(
    block: nn.Module, members: tuple[str, ...], hidden: Tensor, arguments: Arguments
) -> bool:
    """Whether a block's output is something plus the output of its last linear layer.

    Found by adding a number to that layer's output. It is so in pre-norm blocks, not where a norm
    follows (Gemma 3).
    """
    layer = linear_layers(block)[members[-1]]
    shift = 0.25 * float(hidden.std())

    def after(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
        return result + shift

    plain = run_block(block, hidden, arguments)
    handle = layer.register_forward_hook(after)
    try:
        moved = run_block(block, hidden, arguments)
    finally:
        handle.remove()
    error = (moved - plain - shift).abs().max()
    return len(members) == 1 and bool(error <= 1e-3 * shift + 1e-5 * plain.abs().max())


def place_rest(model: nn.Module, blocks: nn.ModuleList, device: torch.device | str) -> None:
    """Move all but the blocks' parameters, which are not there yet, to a device."""
    inside = {id(item) for item in blocks.parameters()}
    for module in model.modules():
        for item in module.parameters(recurse=False):
            if id(item) not in inside:
                item.data = item.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
