"""Exports of whole models, read back by their own ecosystem's readers and by ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gqsa_compiler.checkpoint import LayerScheme
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.export import ExportReport, export_model
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
TOKENS = torch.tensor([[5, 17, 40, 8, 99, 3, 250]])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def dense(place: Path) -> Path:
    return make_tiny("llama", place / "dense", num_hidden_layers=1)


@pytest.fixture(scope="module")
def checkpoint(place: Path, dense: Path) -> Path:
    return make_checkpoint(dense, place / "checkpoint")


def mixed(dense: Path, directory: Path, **schemes: tuple[int, int, bool]) -> Path:
    """Make a checkpoint whose up_proj and down_proj have schemes of their own."""
    names = {"up": UP, "down": DOWN}
    layers = {names[n]: LayerScheme(*scheme, 0.3) for n, scheme in schemes.items()}
    return make_checkpoint(dense, directory, group_size=32, per_layer=layers)


def weights(model: str | Path) -> dict[str, npt.NDArray[Any]]:
    """Return all tensors of a model."""
    source = resolve(str(model))
    return {name: source.tensor(name).astype(np.float32) for name in source.tensor_names()}


def same(found: str | Path, wanted: str | Path) -> None:
    """Every tensor of two models is the same, bit for bit."""
    a, b = weights(found), weights(wanted)
    assert a.keys() == b.keys()
    for name, array in b.items():
        np.testing.assert_array_equal(a[name], array, err_msg=name)


@torch.no_grad()
def logits(model: Any) -> npt.NDArray[Any]:
    return model(TOKENS).logits.float().numpy()


def test_dense(checkpoint: Path, tmp_path: Path) -> None:
    report = export_model(str(checkpoint), tmp_path / "out", "dense")
    assert (report.layers, report.exact, report.notes) == ({"float32": 7}, True, ())
    assert report.bytes == sum(a.nbytes for a in weights(tmp_path / "out").values())
    same(tmp_path / "out", checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    reference = load_checkpoint_dense(resolve(str(checkpoint)))
    np.testing.assert_array_equal(logits(model), logits(reference))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("The quick brown fox")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(checkpoint)("The quick brown fox")["input_ids"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dense_rounded(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    report = export_model(str(checkpoint), tmp_path / "out", "dense", dtype=dtype)
    assert report.layers == {dtype: 7}
    assert not report.exact
    assert report.to_dict()["exact"] is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)
    want = torch.from_numpy(weights(checkpoint)[f"{UP}.weight"]).to(model.dtype)
    assert torch.equal(model.get_parameter(f"{UP}.weight"), want)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits: int, dense: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(dense, tmp_path / "ckpt", bits=bits)
    report = export_model(str(checkpoint), tmp_path / "out", "gptq")
    assert report.layers == {f"{bits}-bit codes, groups of 16": 7}
    assert report.exact
    same(tmp_path / "out", checkpoint)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (said["bits"], said["group_size"], said["sym"]) == (bits, 16, False)
    # Groups that are absent are absent again.
    again = resolve(str(tmp_path / "out")).checkpoint
    before = resolve(str(checkpoint)).checkpoint
    assert again is not None
    assert before is not None
    assert all(again.layer(n).nnz <= before.layer(n).nnz for n in before.layer_names)


def test_gptq_versions(dense: Path, tmp_path: Path) -> None:
    """Version 1 cannot say the zero point 0, and is for symmetric layers only."""
    symmetric = LayerScheme(4, 32, True, 0.4)
    attention = [f"self_attn.{n}_proj" for n in "qkvo"]
    paths = (*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layers = {f"model.layers.0.{path}": symmetric for path in paths}
    even = make_checkpoint(dense, tmp_path / "even", per_layer=layers)
    report = export_model(str(even), tmp_path / "v1", "gptq")
    said = json.loads((tmp_path / "v1" / "config.json").read_text())["quantization_config"]
    assert (said["checkpoint_format"], said["sym"], report.notes) == ("gptq", True, ())
    same(tmp_path / "v1", even)
    odd = positive_model(tmp_path)
    report = export_model(str(odd), tmp_path / "v2", "gptq")
    said = json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]
    assert said["checkpoint_format"] == "gptq_v2"
    assert "Zero points differ" in report.notes[0]
    same(tmp_path / "v2", odd)


def positive_model(directory: Path) -> Path:
    """Make a checkpoint with groups of weights of one sign: their zero point is 0."""
    model = make_tiny("llama", directory / "positive", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    tensors[f"{UP}.weight"] = np.abs(tensors[f"{UP}.weight"])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return make_checkpoint(model, directory / "positive-ckpt", group_size=8)


def test_gptq_groups_are_cut_to_the_smallest(dense: Path, tmp_path: Path) -> None:
    checkpoint = mixed(dense, tmp_path / "ckpt", up=(4, 8, False))
    report = export_model(str(checkpoint), tmp_path / "out", "gptq")
    assert report.layers == {"4-bit codes, groups of 8": 7}
    assert "Groups of 8 are smaller" in report.notes[-1]
    same(tmp_path / "out", checkpoint)


def test_gptq_refuses_what_it_cannot_hold(dense: Path, tmp_path: Path) -> None:
    several = mixed(dense, tmp_path / "several", up=(8, 32, False))
    with pytest.raises(ModelError, match=r"layers of 4 and 8 bits.*--to compressed-tensors"):
        export_model(str(several), tmp_path / "out", "gptq")
    narrow = make_tiny("llama", tmp_path / "narrow", num_hidden_layers=1, intermediate_size=72)
    words = make_checkpoint(narrow, tmp_path / "words", group_size=8, bits=3)
    with pytest.raises(ModelError, match="64 x 72 weights of 3 bits does not fill whole words"):
        export_model(str(words), tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


def test_compressed_tensors(dense: Path, tmp_path: Path) -> None:
    checkpoint = mixed(dense, tmp_path / "ckpt", up=(3, 16, True), down=(8, 8, False))
    report = export_model(str(checkpoint), tmp_path / "out", "compressed-tensors")
    assert report.exact
    assert sorted(report.layers.values()) == [1, 1, 5]
    same(tmp_path / "out", checkpoint)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = said["config_groups"]
    assert sorted(len(group["targets"]) for group in groups.values()) == [1, 1, 5]
    assert said["ignore"] == ["lm_head"]
    alone = make_checkpoint(dense, tmp_path / "alone")
    export_model(str(alone), tmp_path / "one", "compressed-tensors")
    said = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["targets"] == ["Linear"]


@pytest.mark.slow
def test_compressed_tensors_reads_it(checkpoint: Path, tmp_path: Path) -> None:
    """With one scheme: transformers' own decompression takes the first for every layer."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import CompressedTensorsConfig

    export_model(str(checkpoint), tmp_path / "out", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.float16,
    )
    for name, want in weights(checkpoint).items():
        found = model.get_parameter(name).detach().float().numpy()
        np.testing.assert_array_equal(found, want.astype(np.float16).astype(np.float32))
    ours = load_checkpoint_dense(resolve(str(tmp_path / "out")))
    texts = [m.generate(TOKENS, max_new_tokens=16, do_sample=False) for m in (model.float(), ours)]
    assert torch.equal(texts[0], texts[1])


def test_another_quantisers_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """What comes in can go out in any other way, without a GQSA checkpoint between."""
    export_model(str(checkpoint), tmp_path / "gptq", "gptq")
    export_model(str(tmp_path / "gptq"), tmp_path / "packed", "compressed-tensors")
    same(tmp_path / "packed", checkpoint)


def test_what_cannot_be_exported(dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    def refused(message: str, model: Path = checkpoint, to: str = "dense", **fields: Any) -> None:
        with pytest.raises(UsageError, match=message):
            export_model(str(model), tmp_path / "out", to, **fields)

    refused("There is no export format 'x'; choose one of dense, gptq", to="x")
    refused("is not compressed, so there is nothing to export", dense)
    refused("--to gptq stores codes, so it takes no --dtype", to="gptq", dtype="float16")
    refused(
        "--to gguf takes the dtypes float32, float16, not 'bfloat16'", to="gguf", dtype="bfloat16"
    )
    (tmp_path / "out").mkdir()
    refused("exists; choose another name")
    for inside in (checkpoint, checkpoint / "out"):
        with pytest.raises(UsageError, match=r"(is|lies inside) the input .*checkpoint; choose a"):
            export_model(str(checkpoint), inside, "dense")


def test_report() -> None:
    report = ExportReport("out", "dense", {"float32": 1}, (), 4)
    assert report.to_dict() == {
        "output": "out",
        "format": "dense",
        "layers": {"float32": 1},
        "rounded": (),
        "bytes": 4,
        "notes": (),
        "exact": True,
    }
