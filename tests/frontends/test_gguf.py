"""GGUF files: tensors, configuration, tokenizer, and what must not be ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.hf import import_model
from gqsa_compiler.frontends.resolve import DEMO_MODEL, resolve
from gqsa_compiler.models.registry import parse_config
from gqsa_compiler.models.rope import RopeParameters
from tests.frontends.gguf_files import write_gguf
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_tensors_and_configuration_come_back(family: str, tmp_path: Path) -> None:
    # GGUF has no field for Gemma's pattern of layers: all files have windows in 5 of 6.
    extra = {"layer_types": None} if family == "gemma3" else {}
    directory = make_tiny(family, tmp_path / "hf", **extra)
    hf = resolve(str(directory))
    source = resolve(str(write_gguf(directory, tmp_path / "tiny.gguf")))
    assert (source.kind, source.name, source.checkpoint) == ("gguf", "tiny", None)
    assert set(source.tensor_names()) == set(hf.tensor_names())
    for name in hf.tensor_names():
        assert source.shape(name) == hf.shape(name)
        # Gemma's norms are stored plus one.
        np.testing.assert_allclose(source.tensor(name), hf.tensor(name), atol=1e-6)
    mine, theirs = (parse_config(s.config, "") for s in (source, hf))
    assert mine.norm_eps == pytest.approx(theirs.norm_eps)
    for field in ("rope", "rope_local", "layer_kinds", "sliding_window", "head_dim", "qkv_bias",
                  "tie_word_embeddings", "max_position_embeddings", "bos_token_id"):  # fmt: skip
        assert getattr(mine, field) == getattr(theirs, field), field
    # The end of a turn (eot) is an end, too.
    assert mine.eos_token_ids == (0, 2)
    imported = import_model(source, context_length=32)
    assert imported.load("model.norm.weight").dtype == np.float32


def test_quantised_and_half_tensors(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    dense = resolve(str(llama)).tensor(name)
    half = resolve(str(write_gguf(llama, tmp_path / "half.gguf", quantization="F16")))
    assert half.tensor(name).dtype == np.float16
    np.testing.assert_array_equal(half.tensor(name), dense.astype(np.float16))
    brain = resolve(str(write_gguf(llama, tmp_path / "brain.gguf", quantization="BF16")))
    assert brain.tensor(name).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(brain.tensor(name), dense.astype(ml_dtypes.bfloat16))
    q8 = resolve(str(write_gguf(llama, tmp_path / "q8.gguf", quantization="Q8_0")))
    assert q8.shape(name) == dense.shape
    assert q8.tensor(name).dtype == np.float32
    np.testing.assert_allclose(q8.tensor(name), dense, atol=float(np.abs(dense).max()) / 100)
    assert q8.disk_bytes == (tmp_path / "q8.gguf").stat().st_size


def test_tokenizer_is_converted(llama: Path, tmp_path: Path) -> None:
    source = resolve(str(write_gguf(llama, tmp_path / "tiny.gguf")))
    out = tmp_path / "out"
    out.mkdir()
    source.save_tokenizer(out)
    text = "<|im_start|>user\nThe quick fox, 123 + naïve<|im_end|>\n"
    mine = Tokenizer.from_file(str(out / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(llama / "tokenizer.json"))
    assert mine.encode(text).ids == theirs.encode(text).ids
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert (out / "chat_template.jinja").read_text() == (llama / "chat_template.jinja").read_text()


def test_text_is_split_as_the_vocabulary_was_trained(llama: Path, tmp_path: Path) -> None:
    for split, first in (("smollm", ["a", "ĠĠ", "1", "2"]), ("gpt-2", ["a", "Ġ", "Ġ12"])):
        source = resolve(str(write_gguf(llama, tmp_path / f"{split}.gguf", split=split)))
        out = tmp_path / split
        out.mkdir()
        source.save_tokenizer(out)
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
        assert [piece for piece, _ in pieces] == first
    source = resolve(str(write_gguf(llama, tmp_path / "odd.gguf", split="odd")))
    with pytest.raises(ModelError, match=r"in the way 'odd' \(tokenizer\.ggml\.pre\)"):
        source.save_tokenizer(tmp_path)


def rope_of(path: Path) -> RopeParameters:
    rope = parse_config(resolve(str(path)).config, "").rope
    assert rope is not None
    return rope


def test_rope_scaling_fields(llama: Path, tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    rope = rope_of(write_gguf(llama, tmp_path / "linear.gguf", fields=linear))
    assert (rope.kind, rope.factor) == ("linear", 4.0)
    yarn: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    rope = rope_of(write_gguf(llama, tmp_path / "yarn.gguf", fields=yarn))
    assert (rope.kind, rope.original_max_position_embeddings) == ("yarn", 64)
    none = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}
    assert rope_of(write_gguf(llama, tmp_path / "none.gguf", fields=none)).kind == "default"


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path: Path) -> None:
    # Llama 3's theta: with a smaller one no wavelength would be long enough to be divided.
    plain = RopeParameters("default", 5e5).inverse_frequencies(16)
    scaled = RopeParameters("llama3", 5e5, 32.0, 8192, 1.0, 4.0).inverse_frequencies(16)
    factors = {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    model = make_tiny("llama", tmp_path / "hf",
                      rope_parameters={"rope_type": "default", "rope_theta": 5e5})  # fmt: skip
    path = write_gguf(model, tmp_path / "llama3.gguf", tensors=factors)
    rope = rope_of(path)
    assert (rope.kind, rope.factor, rope.theta) == ("llama3", 32.0, 5e5)
    assert "rope_freqs.weight" not in resolve(str(path)).tensor_names()


def test_other_divisors_are_an_error(llama: Path, tmp_path: Path) -> None:
    odd = {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    path = write_gguf(llama, tmp_path / "odd.gguf", tensors=odd)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        resolve(str(path))
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path = write_gguf(llama, tmp_path / "both.gguf", tensors=odd, fields=fields)
    with pytest.raises(ModelError, match=r"both rope_freqs and rope\.scaling"):
        resolve(str(path))


def test_unknown_things_are_named(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "field.gguf", fields={"logit_scale": 0.5})
    with pytest.raises(ModelError, match=r"the field 'llama\.logit_scale' is not understood"):
        resolve(str(path))
    path = write_gguf(llama, tmp_path / "arch.gguf", architecture="mamba")
    with pytest.raises(ModelError, match="GGUF architecture 'mamba'; supported are llama"):
        resolve(str(path))
    extra = {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    path = write_gguf(llama, tmp_path / "tensor.gguf", tensors=extra)
    with pytest.raises(ModelError, match=r"tensor 'blk\.0\.attn_sinks\.weight' is not understood"):
        resolve(str(path)).tensor_names()
    experts = {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}
    path = write_gguf(llama, tmp_path / "experts.gguf", tensors=experts)
    with pytest.raises(ModelError, match="mixture of experts"):
        resolve(str(path))
    with pytest.raises(ModelError, match="has no tensor 'nope'"):
        resolve(str(write_gguf(llama, tmp_path / "good.gguf"))).tensor("nope")


def test_sizes_that_do_not_agree(llama: Path, tmp_path: Path) -> None:
    source = resolve(str(write_gguf(llama, tmp_path / "tiny.gguf")))
    source.config.update(num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ModelError, match=r"(?s)refuses its configuration: .*not a multiple"):
        source.tensor_names()


def test_damaged_files(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "whole.gguf")
    data = path.read_bytes()
    for share in (0.001, 0.1, 0.9):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(data[: max(8, int(len(data) * share))])
        with pytest.raises(ModelError, match=r"cut\.gguf is truncated or damaged"):
            resolve(str(cut))
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"fake\.gguf is not a GGUF file"):
        resolve(str(fake))


def test_demo_model() -> None:
    source = resolve(DEMO_MODEL)
    assert (source.kind, source.name) == ("gguf", DEMO_MODEL)
    config = parse_config(source.config, "")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.tie_word_embeddings


@pytest.mark.slow
def test_demo_model_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = resolve(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(source.path.parent, gguf_file=source.path.name)
    state = model.state_dict()
    assert set(state) - set(source.tensor_names()) == {"lm_head.weight"}
    for name in source.tensor_names():
        np.testing.assert_array_equal(source.tensor(name), state[name].float().numpy())
    source.save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # As the model's own tokenizer does it: an empty line before a digit is one token.
    assert tokenizer.encode("Hi\n\n1. A").tokens == ["Hi", "ĊĊ", "1", ".", "ĠA"]
