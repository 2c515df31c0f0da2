"""Sources as transformers models."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from gqsa_compiler.checkpoint import CheckpointReader, to_dense
from gqsa_compiler.compress import compress_model
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import (
    load_checkpoint_dense,
    load_dense,
    load_parameters,
    stored_dtype,
    to_numpy,
    to_torch,
)
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import FAMILIES, make_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = make_tiny(family, tmp_path / "m")
    model, tokenizer = load_dense(resolve(str(path)))
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer("The quick brown fox")["input_ids"]])
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dtype_is_the_stored_one_or_the_one_asked_for(tmp_path: Path) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "m", dtype="bfloat16")))
    assert load_dense(source)[0].dtype == torch.bfloat16
    assert load_dense(source, torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_learning_the_dtype_reads_no_weights(dtype: str, tmp_path: Path) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "m", dtype=dtype)))
    with mock.patch.object(source, "tensor", side_effect=AssertionError("read")):
        assert stored_dtype(source) == getattr(torch, dtype)


def test_weights_without_an_embedding(tmp_path: Path) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "m", num_hidden_layers=1)))
    names = ("model.norm.weight",)
    with (
        mock.patch.object(source, "tensor_names", return_value=names),
        pytest.raises(ModelError, match="has no embedding"),
    ):
        stored_dtype(source)


def test_checkpoint_is_decoded_exactly(tmp_path: Path) -> None:
    dense = make_tiny("qwen2", tmp_path / "m")
    compress_model(
        str(dense), tmp_path / "c", "w4s30g16", stages="none", samples=4, sequence_length=16
    )
    model = load_checkpoint_dense(resolve(str(tmp_path / "c")))
    with CheckpointReader(tmp_path / "c") as reader:
        name = "model.layers.1.self_attn.k_proj"
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.float32
        np.testing.assert_array_equal(weight.numpy(), to_dense(reader.layer(name)))
        again = load_checkpoint_dense(reader)
        head = to_dense(reader.layer("lm_head"))
    assert torch.equal(again.get_submodule(name).weight, weight)
    np.testing.assert_array_equal(model.lm_head.weight.numpy(), head)


def test_a_dense_source_is_no_checkpoint(tmp_path: Path) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "m")))
    with pytest.raises(ModelError, match="is not a GQSA checkpoint"):
        load_checkpoint_dense(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"lacks the tensor 'model\.norm\.weight'"),
        (
            {"model.norm.weight": torch.ones(63)},
            r"model\.norm\.weight has the shape \[63\], but config\.json asks for \[64\]",
        ),
        ({"foo.bar": torch.ones(2)}, r"has the tensor 'foo\.bar', which a llama model"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(96, 64)}, r"has .*layers\.3\.mlp"),
        ({"model.layers.1.mlp.up_proj.bias": torch.ones(96)}, r"has .*up_proj\.bias"),
    ],
)
def test_weights_that_do_not_fit(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    from safetensors.torch import load_file, save_file

    path = make_tiny("llama", tmp_path / "m")
    tensors = {**load_file(path / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_dense(resolve(str(path)))
    checkpoint = make_checkpoint(path, tmp_path / "c")
    with pytest.raises(ModelError, match=message):
        load_checkpoint_dense(resolve(str(checkpoint)))


def test_a_module_that_is_not_the_stored_one(tmp_path: Path) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "m", num_hidden_layers=1)))
    with pytest.raises(
        ModelError, match=r"has no tensor 'model\.norm\.bias', which the model needs"
    ):
        load_parameters(torch.nn.LayerNorm(64), "model.norm", source)
    with pytest.raises(ModelError, match=r"has shape \[64\], but config\.json asks for \[63\]"):
        load_parameters(torch.nn.LayerNorm(63, bias=False), "model.norm", source)


def test_fields_that_the_compiler_does_not_read_do_not_matter(tmp_path: Path) -> None:
    """Transformers checks their types, and refuses a padding token outside the vocabulary."""
    path = make_tiny("opt", tmp_path / "m", num_hidden_layers=1)
    config = json.loads((path / "config.json").read_text())
    odd = {"pad_token_id": 10**6, "initializer_range": "x", "id2label": 5, "architectures": 3}
    (path / "config.json").write_text(json.dumps({**config, **odd}))
    model, _ = load_dense(resolve(str(path)))
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arrays_and_tensors_round_trip(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    array = to_numpy(tensor)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    assert torch.equal(to_torch(array), tensor)
