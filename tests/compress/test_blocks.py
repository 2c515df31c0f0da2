"""Decoder blocks are found and taken apart by structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gqsa_compiler.compress.blocks import (
    adds_to_output,
    capture_inputs,
    find_blocks,
    input_groups,
    run_block,
)
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_dense
from tests.tiny_models import FAMILIES, make_tiny

TOKENS = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(0))
ATTENTION = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v"))


def tiny(family: str, directory: Path) -> Any:
    return load_dense(resolve(str(make_tiny(family, directory / "m"))))[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_blocks_one_by_one_are_the_model(family: str, tmp_path: Path) -> None:
    model = tiny(family, tmp_path)
    prefix, blocks = find_blocks(model)
    assert prefix == ("model.decoder.layers" if family == "opt" else "model.layers")
    captured = capture_inputs(model, blocks, list(TOKENS.split(2)))
    hidden = list(captured.hidden)
    for block, arguments in zip(blocks, captured.arguments, strict=True):
        hidden = [run_block(block, x, arguments) for x in hidden]
    norm = model.model.decoder.final_layer_norm if family == "opt" else model.model.norm
    expected = model.model(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(norm(torch.cat(hidden)), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_layers_with_one_input_are_together(family: str, tmp_path: Path) -> None:
    model = tiny(family, tmp_path)
    _, blocks = find_blocks(model)
    captured = capture_inputs(model, blocks, [TOKENS])
    groups = input_groups(blocks[0], captured.hidden[0], captured.arguments[0])
    if family == "opt":
        expected = [set(ATTENTION), {"self_attn.out_proj"}, {"fc1"}, {"fc2"}]
    else:
        expected = [
            set(ATTENTION),
            {"self_attn.o_proj"},
            {"mlp.gate_proj", "mlp.up_proj"},
            {"mlp.down_proj"},
        ]
    assert [set(group) for group in groups] == expected
    # Gemma 3 normalises what its last layer gives.
    adds = adds_to_output(blocks[0], groups[-1], captured.hidden[0], captured.arguments[0])
    assert adds == (family != "gemma3")
    assert not adds_to_output(blocks[0], groups[0], captured.hidden[0], captured.arguments[0])


@torch.inference_mode()
def test_quick_products_are_the_block(tmp_path: Path) -> None:
    model = tiny("opt", tmp_path)  # its linear layers have biases
    _, blocks = find_blocks(model)
    captured = capture_inputs(model, blocks, [TOKENS])
    hidden, (rest, keywords) = captured.hidden[0], captured.arguments[0]
    plain = blocks[0](hidden, *rest, **keywords)
    plain = plain[0] if isinstance(plain, tuple) else plain
    torch.testing.assert_close(run_block(blocks[0], hidden, (rest, keywords)), plain)
    assert not any("forward" in vars(module) for module in blocks.modules())


def test_a_model_without_blocks() -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))
