"""Models and texts on which numbers go wrong: a clear error, never a silently worse checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gqsa_compiler.checkpoint import CheckpointReader, to_dense, validate
from gqsa_compiler.compress import compress_model
from gqsa_compiler.errors import ModelError
from tests.tiny_models import make_tiny

SETTINGS: dict[str, Any] = {"samples": 4, "sequence_length": 32}
RECIPES = ("w4s50g16", "baseline/rtn-w4g32", "baseline/wanda-w4s50g16")


def damaged(path: Path, change: Callable[[dict[str, Tensor]], None], **fields: Any) -> Path:
    """Write a tiny model whose tensors were changed."""
    make_tiny("llama", path, num_hidden_layers=2, **fields)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.embed_tokens.weight", "not finite|NaN"),
        ("model.layers.1.input_layernorm.weight", r"layer model\.layers\.1\.self_attn\.q_proj"),
        ("model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.up_proj"),
        ("model.norm.weight", r"last norm|model\.norm"),
    ],
)
def test_weights_that_are_not_numbers(
    name: str, message: str, value: float, recipe: str, text: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if "embed" in name:
            tensors[name][:, 0] = value  # of any token
        else:
            tensors[name].view(-1)[0] = value

    model = damaged(tmp_path / "model", change)
    with pytest.raises(ModelError, match=message):
        compress_model(model, tmp_path / "out", recipe, calibration=text, **SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_too_small_for_any_scale(recipe: str, text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[name] *= 1e-9

    model = damaged(tmp_path / "model", shrink)
    with pytest.raises(ModelError, match=r"layer model\.layers\.1\.mlp\.up_proj are at most"):
        compress_model(model, tmp_path / "out", recipe, calibration=text, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_some_weights_too_small_for_any_scale(text: Path, tmp_path: Path) -> None:
    """Beside larger ones they count nothing."""
    name = "model.layers.1.mlp.up_proj.weight"

    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[name][1:] *= 1e-9

    model = damaged(tmp_path / "model", shrink)
    compress_model(model, tmp_path / "out", "baseline/rtn-w4g32", calibration=text, **SETTINGS)
    with CheckpointReader(tmp_path / "out") as reader:
        weight = to_dense(reader.layer(name.removesuffix(".weight")))
    assert weight[0].any()
    assert not weight[1:].any()


def test_a_token_that_the_text_does_not_have(text: Path, tmp_path: Path) -> None:
    """Its embedding is damaged: nothing computes with it, but it would be saved."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][3, 3] = torch.nan  # "!"

    model = damaged(tmp_path / "model", change, tie_word_embeddings=False, dtype="bfloat16")
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight has values"):
        compress_model(
            model, tmp_path / "out", "w4s50g16", stages="none", calibration=text, **SETTINGS
        )


def test_sampling_from_a_damaged_model(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][0] = torch.nan

    model = damaged(tmp_path / "model", change)
    with pytest.raises(ModelError, match="logits are not finite"):
        compress_model(model, tmp_path / "out", "w4s50g16", **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("recipe", ["w4s50g16", "baseline/gptq-w4g32", "baseline/2of4-w4g32"])
@pytest.mark.parametrize("kind", ["dead layer", "one token"])
def test_inputs_of_a_singular_hessian(kind: str, recipe: str, tmp_path: Path) -> None:
    """No inputs at all, or always the same: damping makes what is singular solvable."""

    def change(tensors: dict[str, Tensor]) -> None:
        if kind == "dead layer":
            tensors["model.layers.0.post_attention_layernorm.weight"].zero_()

    model = damaged(tmp_path / "model", change)
    text = tmp_path / "text.txt"
    text.write_text("dog " * 400 if kind == "one token" else "The quick brown fox. " * 100)
    compress_model(model, tmp_path / "out", recipe, calibration=text, **SETTINGS)
    with CheckpointReader(tmp_path / "out") as reader:
        validate(reader)
        for name in reader.layer_names:
            weight = torch.from_numpy(to_dense(reader.layer(name)))
            assert torch.isfinite(weight).all()
            assert weight.any(), name


def test_a_hessian_that_cannot_be_inverted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gqsa_compiler.compress.solver import compensate

    def fails(_matrix: Tensor) -> Tensor:
        return torch.linalg.cholesky(-torch.eye(3, dtype=torch.float64))

    monkeypatch.setattr(compensate, "inverse", fails)
    model = make_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"inverted .*; calibrate on more or other text"):
        compress_model(
            model, tmp_path / "out", "w4s0g16", stages="none", calibration=text, **SETTINGS
        )
