"""Whole directories of other quantisers, opened as models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from gqsa_compiler.checkpoint import to_dense
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.fit import check_tensors
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.models.registry import parse_config
from tests.frontends.quantised.packers import (
    Arrays,
    Matrix,
    make_two_four,
    pack_awq,
    pack_bitmask,
    pack_compressed,
    pack_gptq,
    pack_marlin24,
    quantise_directory,
    random_matrix,
)
from tests.tiny_models import make_tiny

Pack = Callable[[str, tuple[int, int]], tuple[Arrays, npt.NDArray[Any]]]


def packer(write: Callable[[Matrix], Arrays], **fields: Any) -> Pack:
    """Make every layer a random matrix; each layer has a seed of its own."""

    def pack(layer: str, shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
        seed = sum(map(ord, layer))
        m = random_matrix(*shape, seed=seed, **{"group": 32, **fields})
        return write(m), m.dense

    return pack


def two_four(layer: str, shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
    """A layer of `marlin-24`."""
    m = random_matrix(*shape, group=shape[1], symmetric=True, seed=len(layer))
    m = make_two_four(m)
    return pack_marlin24(m, grouped=False), m.dense


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def packed_config(bits: int = 4, layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    """Return a compressed-tensors configuration."""
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"num_key_value_heads": 4, "intermediate_size": 128, "num_hidden_layers": 1}
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", **fields)


CASES: dict[str, tuple[Pack, dict[str, Any], bool]] = {
    "gptq": (packer(pack_gptq, low=1), GPTQ, False),
    "gptq-sym": (packer(pack_gptq, symmetric=True), {**GPTQ, "sym": True}, True),
    "awq": (packer(pack_awq), AWQ, False),
    "packed": (packer(pack_compressed), packed_config(symmetric=False, group_size=32), False),
    "packed-8": (packer(pack_compressed, bits=8), packed_config(8), False),
    "marlin-24": (two_four, packed_config(layout="marlin-24"), True),
}


@pytest.mark.parametrize("case", CASES)
def test_directories(case: str, llama: Path, tmp_path: Path) -> None:
    pack, quantization, symmetric = CASES[case]
    want = quantise_directory(llama, tmp_path / "q", pack, quantization)
    source, dense = resolve(str(tmp_path / "q")), resolve(str(llama))
    assert (source.kind, source.name) == ("quantised", "q")
    assert source.checkpoint is not None
    assert set(source.checkpoint.layer_names) == {name.removesuffix(".weight") for name in want}
    assert source.checkpoint.quantization.symmetric == symmetric
    check_tensors(source, parse_config(source.config, "q"))
    assert set(source.tensor_names()) == set(dense.tensor_names())
    for name in dense.tensor_names():
        assert source.shape(name) == dense.shape(name)
        expected = want[name] if name in want else dense.tensor(name)
        np.testing.assert_array_equal(source.tensor(name), expected)
        assert source.dtype(name) == "float32"
    assert source.disk_bytes == (tmp_path / "q" / "model.safetensors").stat().st_size
    with pytest.raises(ModelError, match="has no tensor 'nope'"):
        source.tensor("nope")
    out = tmp_path / "out"
    out.mkdir()
    source.save_tokenizer(out)
    assert (out / "tokenizer.json").is_file()


def test_schemes_of_layers_that_differ(llama: Path, tmp_path: Path) -> None:
    def pack(layer: str, shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
        wide = layer.endswith("down_proj")
        m = random_matrix(*shape, bits=8 if wide else 4, group=16 if wide else 32, symmetric=wide)
        return pack_compressed(m, symmetric=wide), m.dense

    config = packed_config()
    config["config_groups"]["group_1"] = {"targets": ["re:.*down"], "weights": {"num_bits": 8}}
    want = quantise_directory(llama, tmp_path / "q", pack, config)
    source = resolve(str(tmp_path / "q"))
    assert source.checkpoint is not None
    said = source.checkpoint.quantization
    assert (said.bits, said.group_size, said.symmetric) == (4, 32, False)
    name = "model.layers.0.mlp.down_proj"
    assert set(said.per_layer) == {name}
    assert (said.scheme(name).bits, said.scheme(name).symmetric) == (8, True)
    np.testing.assert_array_equal(to_dense(source.checkpoint.layer(name)), want[f"{name}.weight"])


def test_sparse_without_codes_is_a_dense_model(llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "sparse"
    shutil.copytree(llama, directory)
    tensors = load_file(llama / "model.safetensors")
    rng = np.random.default_rng(0)
    want, stored = {}, {}
    for name, array in tensors.items():
        if ".layers." in name and array.ndim == 2:
            n, k = array.shape
            mask = np.argsort(rng.random((n, k // 4, 4)), axis=2).reshape(n, k) < 2
            half = array.astype(ml_dtypes.bfloat16)
            want[name] = np.where(mask, half, 0).astype(ml_dtypes.bfloat16)
            parts = pack_bitmask(half, mask)
            layer = name.removesuffix(".weight")
            stored.update({f"{layer}.{part}": value for part, value in parts.items()})
        else:
            stored[name] = array
    save_file(stored, directory / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config["compression_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": sparsity,
    }
    (directory / "config.json").write_text(json.dumps(config))
    source = resolve(str(directory))
    assert (source.kind, source.checkpoint) == ("hf", None)
    assert set(source.tensor_names()) == set(tensors)
    for name, array in want.items():
        assert source.dtype(name) == "bfloat16"
        np.testing.assert_array_equal(source.tensor(name), array)


def test_settings_in_a_file_of_their_own(llama: Path, tmp_path: Path) -> None:
    directory = tmp_path / "q"
    want = quantise_directory(llama, directory, packer(pack_gptq, low=1), GPTQ)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="nothing says whether its zero points are stored minus"):
        resolve(str(directory))
    settings = {"bits": 4, "group_size": 32, "desc_act": False}
    (directory / "quantize_config.json").write_text(json.dumps(settings))
    name = next(iter(want))
    np.testing.assert_array_equal(resolve(str(directory)).tensor(name), want[name])
    (directory / "quantize_config.json").unlink()
    settings = {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    (directory / "quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"of an? AWQ layer|AWQ layer .* sizes that do not"):
        resolve(str(directory)).tensor(name)


def test_biases_of_zeros_that_the_model_has_not(llama: Path, tmp_path: Path) -> None:
    """Older AutoGPTQ stored a bias with every layer."""

    def pack(layer: str, shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
        parts, want = packer(pack_gptq, low=1)(layer, shape)
        return {**parts, "bias": np.full(shape[0], bias, np.float16)}, want

    bias = 0.0
    quantise_directory(llama, tmp_path / "zero", pack, GPTQ)
    source = resolve(str(tmp_path / "zero"))
    check_tensors(source, parse_config(source.config, "zero"))
    bias = 0.5
    quantise_directory(llama, tmp_path / "real", pack, GPTQ)
    source = resolve(str(tmp_path / "real"))
    with pytest.raises(ModelError, match="bias', which a llama model"):
        check_tensors(source, parse_config(source.config, "real"))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (GPTQ, "is marked as quantised by GPTQ, but it has no quantised layer"),
        (AWQ, "is marked as quantised by AWQ, but it has no quantised layer"),
        (packed_config(), "is marked as quantised by compressed-tensors, but it has no"),
        ({**AWQ, "version": "gemv"}, "AWQ checkpoint in the layout 'gemv'; gqsa reads 'gemm'"),
        ({**AWQ, "bits": 8}, "AWQ checkpoint of 8 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "packed for 'marlin' kernels"),
        (packed_config(layout="float-quantized"), "in the format 'float-quantized'; gqsa reads"),
        (packed_config(type="float"), "with 4-bit float weights"),
        (packed_config(bits=16), "group_0 of its quantization_config has num_bits 16"),
        ({**packed_config(), "config_groups": [1]}, "config_groups .* are no objects"),
        ({**packed_config(), "transform_config": {"a": 1}}, "with transforms"),
        (packed_config(strategy="block"), "of the strategy 'block'; gqsa reads group"),
    ],
)
def test_directories_that_are_refused(
    quantization: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "q")
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path / "q"))
