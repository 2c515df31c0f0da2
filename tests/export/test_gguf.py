"""GGUF files, read by the gguf package, by transformers and by our own reader."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gqsa_compiler.checkpoint import BSRLayer, LayerScheme, to_dense
from gqsa_compiler.errors import ModelError
from gqsa_compiler.export import export_model
from gqsa_compiler.export.gguf_file import block_type, pack_blocks
from gqsa_compiler.export.gguf_tokenizer import split_name
from gqsa_compiler.frontends.hf import import_model
from gqsa_compiler.frontends.resolve import resolve
from tests.checkpoint.helpers import random_layer
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny


def with_zeros(layer: BSRLayer, scale: float | None = None) -> BSRLayer:
    """Give every kept group the scale 2^-5, or another one."""
    scales = np.full_like(layer.scales, 2.0**-5 if scale is None else scale)
    return replace(layer, scales=scales)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (random_layer("p", (6, 96), 32, symmetric=True), "Q4_0"),
        (random_layer("p", (6, 128), 64, symmetric=True, bits=3), "Q4_0"),
        (random_layer("p", (6, 128), 64, bits=2), "Q4_0"),
        (with_zeros(random_layer("p", (6, 96), 32)), "Q4_1"),
        (random_layer("p", (6, 256), 128), "Q8_0"),
        (random_layer("p", (6, 96), 32, symmetric=True, bits=8), "Q8_0"),
        (random_layer("p", (6, 96), 32, bits=8), None),
        (random_layer("p", (6, 96), 16, symmetric=True), None),
        (random_layer("p", (6, 96), 32, density=0), "Q4_0"),
    ],
)
def test_block_types_are_exact(layer: BSRLayer, kind: str | None) -> None:
    assert block_type(layer) == kind
    if kind is not None:
        packed = pack_blocks(layer, kind)
        found = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(found, to_dense(layer))


SYMMETRIC = LayerScheme(4, 32, True, 0.3)
HALVES = LayerScheme(4, 16, False, 0.3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_files(family: str, tmp_path: Path) -> None:
    dense = make_tiny(family, tmp_path / "dense", num_hidden_layers=1, **fields_of(family))
    layer = "model.layers.0.self_attn.q_proj"
    schemes = {layer: SYMMETRIC, "model.layers.0.mlp.up_proj": HALVES}
    checkpoint = make_checkpoint(dense, tmp_path / "ckpt", group_size=32, per_layer=schemes)
    report = export_model(str(checkpoint), tmp_path / "out", "gguf", dtype="float32")
    assert report.exact
    assert report.layers == {"Q4_0": 1, "F32": 1, "Q8_0": 5}
    assert "1 of 7 layers fit no block type" in report.notes[0]
    path = tmp_path / "out" / "model.gguf"
    assert report.bytes == path.stat().st_size
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    found, want = resolve(str(path)), resolve(str(checkpoint))
    assert set(found.tensor_names()) == set(want.tensor_names())
    for name in want.tensor_names():
        expected = want.tensor(name).astype(np.float32)
        # Gemma's norms are stored plus 1, which rounds.
        exact = not (family == "gemma3" and name.endswith("norm.weight"))
        np.testing.assert_allclose(found.tensor(name), expected, atol=0 if exact else 1e-6, rtol=0)
    import_model(found, context_length=16)
    assert found.config["rope_parameters"] == want.config["rope_parameters"]
    (tmp_path / "tokens").mkdir()
    found.save_tokenizer(tmp_path / "tokens")
    for text in ("The quick brown fox 1000", "a<|im_end|>b"):
        assert ids(tmp_path / "tokens", text) == ids(dense, text)


def fields_of(family: str) -> dict[str, Any]:
    return {"layer_types": ["full_attention"]} if family == "gemma3" else {}


def ids(directory: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids)


def test_layers_of_small_groups_are_rounded_and_it_is_said(tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    checkpoint = make_checkpoint(dense, tmp_path / "ckpt")
    report = export_model(str(checkpoint), tmp_path / "out", "gguf")
    assert report.layers == {"F16": 7}
    assert len(report.rounded) == 7
    assert "stored as float16" in report.notes[0]


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    ],
)
def test_scaled_rotary_embeddings(scaling: dict[str, Any], tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1, rope_parameters=scaling)
    checkpoint = make_checkpoint(dense, tmp_path / "ckpt")
    export_model(str(checkpoint), tmp_path / "out", "gguf")
    found = resolve(str(tmp_path / "out" / "model.gguf")).config["rope_parameters"]
    assert found.pop("rope_type") == scaling["rope_type"]
    assert found == pytest.approx({k: v for k, v in scaling.items() if k != "rope_type"})


def test_models_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    for family, fields, message in (
        ("opt", {}, "has the architecture 'opt', which gqsa does not export"),
        ("mistral", {}, "has a sliding window"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
             "original_max_position_embeddings": 128}},
            "rotary embedding of kind 'yarn'",
        ),
    ):  # fmt: skip
        dense = make_tiny(family, tmp_path / family, num_hidden_layers=1, **fields)
        checkpoint = make_checkpoint(dense, tmp_path / f"{family}-ckpt")
        with pytest.raises(ModelError, match=message):
            export_model(str(checkpoint), tmp_path / "out", "gguf")
        assert not (tmp_path / "out").exists()


def test_ways_of_cutting_text() -> None:
    split = {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}

    def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
        return {"type": "Sequence", "pretokenizers": list(steps)}

    assert split_name({"type": "ByteLevel"}, "m") == "gpt-2"
    assert split_name(sequence(digits, {"type": "ByteLevel"}), "m") == "smollm"
    from gqsa_compiler.frontends._transformers import gguf_tokenizer_splits

    for name in ("llama-bpe", "qwen2"):
        split["pattern"] = {"Regex": gguf_tokenizer_splits()[name]}
        assert split_name(sequence(split, level), "m") == name
    split["pattern"] = {"Regex": "x"}
    for way in (sequence(split, level), {"type": "Metaspace"}, None):
        with pytest.raises(ModelError, match="cuts text in a way that GGUF has no known name for"):
            split_name(way, "m")


def test_tokenizers_of_other_kinds(tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    checkpoint = make_checkpoint(dense, tmp_path / "ckpt")
    path = checkpoint / "tokenizer.json"
    parsed = json.loads(path.read_text())
    parsed["model"]["byte_fallback"] = True
    path.write_text(json.dumps(parsed))
    with pytest.raises(ModelError, match=r"no byte-level BPE \(BPE\).*llama\.cpp's converter"):
        export_model(str(checkpoint), tmp_path / "out", "gguf")
