"""Random checkpoints: what they keep, that they run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_shapes import SHAPES, shape_config
from random_checkpoint import Scheme, random_layer, tensor_shapes, write_checkpoint

from gqsa_compiler.checkpoint import CheckpointReader, to_dense, validate
from gqsa_compiler.errors import UsageError
from gqsa_compiler.frontends.resolve import resolve
from tests.tiny_models import make_tiny


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_layer_keeps_its_share_and_the_size_of_signals(bits: int, sparsity: float) -> None:
    scheme = Scheme(sparsity, 16, bits)
    rng = np.random.default_rng(0)
    layer = random_layer("layer", (512, 1024), scheme, rng)
    assert layer.sparsity == pytest.approx(sparsity, abs=1e-4)
    outputs = to_dense(layer) @ rng.standard_normal((1024, 64), np.float32)
    assert 0.9 < outputs.std() < 1.1
    assert abs(outputs.mean()) < 0.05


def test_rows_keep_unequal_numbers_of_groups() -> None:
    layer = random_layer("layer", (2048, 2048), Scheme(), np.random.default_rng(0))
    kept = np.diff(layer.indptr) / 128
    assert 0.15 < kept.std() < 0.3
    assert kept.min() < 0.2
    assert kept.max() > 0.8


def test_checkpoint_is_whole_and_runs(tmp_path: Path, config: dict[str, Any]) -> None:
    import torch

    from gqsa_compiler.frontends.torch_model import load_checkpoint_dense

    directory = tmp_path / "random"
    write_checkpoint(config, directory, Scheme())
    with CheckpointReader(directory) as reader:
        validate(reader)
    source = resolve(str(directory))
    assert source.checkpoint is not None
    assert len(source.checkpoint.layer_names) == 3 * 7
    with torch.inference_mode():
        logits = load_checkpoint_dense(source)(torch.arange(32)[None]).logits
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3


def test_compressed_head(tmp_path: Path, config: dict[str, Any]) -> None:
    import torch

    from gqsa_compiler.frontends.torch_model import load_checkpoint_dense

    directory = tmp_path / "random"
    write_checkpoint({**config, "tie_word_embeddings": True}, directory, Scheme(),
                     head=Scheme(0.0, 32, 8))  # fmt: skip
    with CheckpointReader(directory) as reader:
        validate(reader)
        head = reader.layer("lm_head")
        assert (head.bits, head.group_size, head.sparsity) == (8, 32, 0.0)
        assert head.shape == (config["vocab_size"], config["hidden_size"])
        assert reader.config["tie_word_embeddings"] is False
        assert reader.quantization.ignore == ()
        assert "model.embed_tokens.weight" in reader.tensor_names
    with torch.inference_mode():
        logits = load_checkpoint_dense(resolve(str(directory)))(torch.arange(32)[None]).logits
    assert 0.3 < float(logits.std()) < 3
    with pytest.raises(UsageError, match=r"24 inputs of lm_head\.weight; .*--head-group"):
        write_checkpoint(
            {**config, "hidden_size": 24},
            tmp_path / "b",
            Scheme(group_size=8),
            head=Scheme(0.0, 16, 4),
        )


def test_seed_decides_the_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    name = "model.layers.2.mlp.down_proj"
    codes = []
    for seed in (0, 0, 1):
        directory = tmp_path / str(len(codes))
        write_checkpoint(config, directory, Scheme(), seed=seed)
        with CheckpointReader(directory) as reader:
            codes.append(reader.layer(name).qweight.copy())
    assert np.array_equal(codes[0], codes[1])
    assert not np.array_equal(codes[0], codes[2])


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "opt"])
def test_other_families(tmp_path: Path, family: str) -> None:
    model = make_tiny(family, tmp_path / "dense")
    write_checkpoint(
        shape_config(str(model / "config.json")),
        tmp_path / "random",
        Scheme(group_size=32),
        tokenizer=model,
    )
    with CheckpointReader(tmp_path / "random") as reader:
        validate(reader)
    copied = (tmp_path / "random" / "tokenizer.json").read_bytes()
    assert copied == (model / "tokenizer.json").read_bytes()


def test_made_up_tokenizer_has_every_id(tmp_path: Path, config: dict[str, Any]) -> None:
    from tokenizers import Tokenizer

    write_checkpoint(config, tmp_path / "random", Scheme())
    tokenizer = Tokenizer.from_file(str(tmp_path / "random" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    text = "Grüße, world"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.decode([319]) == " w319"


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama-3.2-1b", 1.236e9),
        ("llama-3.2-1b-32k", 1.04e9),
        ("llama-2-7b", 6.74e9),
        ("smollm2-135m", 134e6),
    ],
)
def test_named_shapes_have_their_sizes(name: str, weights: float) -> None:
    count = sum(int(np.prod(shape)) for _, shape in tensor_shapes(SHAPES[name]))
    assert count == pytest.approx(weights, rel=0.01)


def test_mistakes_are_named(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"nothing is neither a config\.json nor one of"):
        shape_config("nothing")
    with pytest.raises(UsageError, match="do not divide the 24 inputs of"):
        write_checkpoint({**config, "hidden_size": 24}, tmp_path / "a", Scheme())
    with pytest.raises(UsageError, match="has no room for 256 bytes"):
        write_checkpoint({**config, "vocab_size": 100}, tmp_path / "b", Scheme())
    assert not list(tmp_path.iterdir())


def test_config_of_a_checkpoint_is_a_shape(tmp_path: Path, config: dict[str, Any]) -> None:
    write_checkpoint(config, tmp_path / "random", Scheme())
    stored = json.loads((tmp_path / "random" / "config.json").read_text())
    assert stored["quantization_config"]["sparsity"]["ratio"] == 0.5
    assert "quantization_config" not in shape_config(str(tmp_path / "random"))
