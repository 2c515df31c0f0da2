"""Conversions of whole models: the checkpoint has the source's weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler.checkpoint import CheckpointReader, validate
from gqsa_compiler.convert import convert_model
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.quantised.codes import Misfit
from gqsa_compiler.frontends.resolve import resolve
from tests.frontends.gguf_files import write_gguf
from tests.frontends.quantised.packers import (
    Arrays,
    Matrix,
    pack_compressed,
    pack_gptq,
    quantise_directory,
    random_matrix,
)
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=1)


def gptq(layer: str, shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
    m = random_matrix(*shape, seed=len(layer), low=1)
    return pack_gptq(m), m.dense


def scattered(layer: str, shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
    """One layer has an activation order."""
    m = random_matrix(*shape, seed=len(layer), low=1)
    if layer == UP:
        order = np.random.default_rng(0).permutation(m.columns)
        m = Matrix(m.codes, m.scales, m.zeros, m.bits, order)
    return pack_gptq(m), m.dense


def same(source: str, checkpoint: Path, want: dict[str, npt.NDArray[Any]]) -> None:
    """Every tensor of a checkpoint is the source's, or as expected."""
    with CheckpointReader(checkpoint) as reader:
        validate(reader)
    found, given = resolve(str(checkpoint)), resolve(source)
    assert set(found.tensor_names()) == set(given.tensor_names())
    for name in given.tensor_names():
        expected = want[name] if name in want else given.tensor(name)
        np.testing.assert_array_equal(found.tensor(name).astype(np.float32), expected)


def test_gptq(llama: Path, tmp_path: Path) -> None:
    want = quantise_directory(llama, tmp_path / "q", gptq, GPTQ)
    report = convert_model(str(tmp_path / "q"), tmp_path / "ckpt")
    same(str(tmp_path / "q"), tmp_path / "ckpt", want)
    assert (report.formats, report.layers, report.dense) == ({"GPTQ": 7}, 7, {})
    assert 0.1 < report.absent_groups < 0.3
    assert 0 < report.bits_per_weight < 5
    assert report.weights == sum(array.size for array in want.values())
    assert report.to_dict()["bits_per_weight"] == report.bits_per_weight
    assert (tmp_path / "ckpt" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gqsa"
    with pytest.raises(UsageError, match="exists; choose another name"):
        convert_model(str(tmp_path / "q"), tmp_path / "ckpt")
    convert_model(str(tmp_path / "q"), tmp_path / "ckpt", overwrite=True)
    with pytest.raises(UsageError, match=r"ckpt lies inside the input .*q; choose a directory out"):
        convert_model(str(tmp_path / "q"), tmp_path / "q" / "ckpt")


def test_a_layer_that_does_not_fit(llama: Path, tmp_path: Path) -> None:
    want = quantise_directory(llama, tmp_path / "q", scattered, GPTQ)
    with pytest.raises(Misfit, match=r"up_proj' are scattered"):
        convert_model(str(tmp_path / "q"), tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
    stages = []
    report = convert_model(
        str(tmp_path / "q"),
        tmp_path / "ckpt",
        keep_dense=True,
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert set(report.dense) == {UP}
    assert report.layers == 6
    assert set(stages) == {"trying the layers", "converting layers"}
    found = resolve(str(tmp_path / "ckpt"))
    assert found.checkpoint is not None
    assert UP in found.checkpoint.quantization.ignore
    for name, array in want.items():
        np.testing.assert_array_equal(found.tensor(name).astype(np.float32), array)


def test_no_layer_fits(llama: Path, tmp_path: Path) -> None:
    def pack(layer: str, shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
        m = random_matrix(*shape)
        tiny = (m.scales.astype(np.float32) * 1e-6).astype(ml_dtypes.bfloat16)
        m = Matrix(m.codes, tiny.astype(np.float32), m.zeros, m.bits, m.columns)
        return pack_compressed(m), m.dense

    quantise_directory(llama, tmp_path / "q", pack, PACKED)
    with pytest.raises(Misfit, match=r"are no float16 numbers.*gqsa compress"):
        convert_model(str(tmp_path / "q"), tmp_path / "ckpt")
    with pytest.raises(ModelError, match=r"No layer of .* fits\. .*are no float16 numbers"):
        convert_model(str(tmp_path / "q"), tmp_path / "ckpt", keep_dense=True)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_gguf(kind: str, llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "m.gguf", quantization=kind)
    report = convert_model(str(path), tmp_path / "ckpt")
    same(str(path), tmp_path / "ckpt", {})
    assert report.formats == {"GGUF": 7}


def test_uncompressed_tensors_are_as_narrow_as_is_exact(llama: Path, tmp_path: Path) -> None:
    """A matrix that GGUF gives in float32 is stored in 16 bits where they hold it."""
    half = make_tiny("llama", tmp_path / "half", num_hidden_layers=1, dtype="float16")
    path = write_gguf(half, tmp_path / "m.gguf", quantization="Q8_0")
    convert_model(str(path), tmp_path / "ckpt")
    with CheckpointReader(tmp_path / "ckpt") as reader:
        embedding = reader.tensor("model.embed_tokens.weight")
        assert embedding.dtype == np.float32  # a scale times a code
        assert reader.tensor("model.norm.weight").dtype == np.float32
    same(str(path), tmp_path / "ckpt", {})


def test_models_that_are_not_quantised(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not quantised.*gqsa compress"):
        convert_model(str(llama), tmp_path / "out")
    checkpoint = make_checkpoint(llama, tmp_path / "ckpt")
    with pytest.raises(UsageError, match="is a GQSA checkpoint already"):
        convert_model(str(checkpoint), tmp_path / "out")
    with pytest.raises(ModelError, match="no layer stored as Q4_0"):
        convert_model(str(write_gguf(llama, tmp_path / "m.gguf")), tmp_path / "out")


@pytest.mark.slow
def test_the_demo_models_minima_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(Misfit, match=r"Q4_1 blocks of .* have a minimum that is no whole number"):
        convert_model("smollm2-135m", tmp_path / "out")
