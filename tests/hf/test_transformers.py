"""Checkpoints in transformers: the weights of our own decoder, packed in memory, saved as read."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

import gqsa_compiler.hf
from gqsa_compiler.checkpoint import CheckpointReader, LayerScheme, to_dense, validate
from gqsa_compiler.errors import CheckpointError, UsageError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from gqsa_compiler.hf import GQSAConfig, GQSALinear, GQSAQuantizer
from gqsa_compiler.hf.linear import unpack_codes
from tests.checkpoint.helpers import random_layer
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.tensor([[5, 17, 40, 8, 99, 3, 250]])


@pytest.fixture(scope="module", params=["llama", "qwen2", "opt"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with layers of several schemes; Qwen 2 and OPT have biases."""
    place = tmp_path_factory.mktemp("hf")
    dense = make_tiny(request.param, place / "dense", num_hidden_layers=2)
    other = "model.decoder.layers.1.fc1" if request.param == "opt" else "model.layers.1.mlp.up_proj"
    first = "model.decoder.layers.0.fc2" if request.param == "opt" else UP
    layers = {other: LayerScheme(3, 32, True, 0.2), first: LayerScheme(8, 8, False, 0.6)}
    return make_checkpoint(dense, place / "ckpt", per_layer=layers)


def load(path: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **fields})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


def test_it_computes_what_our_own_model_does(checkpoint: Path) -> None:
    model = load(checkpoint)
    source = resolve(str(checkpoint))
    assert source.checkpoint is not None
    packed = {name: m for name, m in model.named_modules() if isinstance(m, GQSALinear)}
    assert set(packed) == set(source.checkpoint.layer_names)
    for name, module in packed.items():
        want = to_dense(source.checkpoint.layer(name))
        np.testing.assert_array_equal(module.dense().numpy(), want)
    assert torch.equal(logits(model), logits(load_checkpoint_dense(source)))
    ours = load_checkpoint_dense(source).generate(TOKENS, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=8, do_sample=False), ours)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_compressed_head_beside_its_embedding(family: str, tmp_path: Path) -> None:
    """Both families tie the two; the checkpoint says that they are not tied any more."""
    dense = make_tiny(family, tmp_path / "dense")
    path = make_checkpoint(dense, tmp_path / "ckpt", head=LayerScheme(4, 32, False, 0.0))
    model = load(path)
    assert isinstance(model.lm_head, GQSALinear)
    assert model.lm_head.nnz == model.lm_head.out_features * model.lm_head.in_features // 32
    source = resolve(str(path))
    assert torch.equal(logits(model), logits(load_checkpoint_dense(source)))
    table = torch.from_numpy(source.tensor("model.embed_tokens.weight").astype(np.float32))
    assert torch.equal(model.get_input_embeddings().weight, table)
    model.save_pretrained(tmp_path / "saved")
    with CheckpointReader(tmp_path / "saved") as saved:
        validate(saved)
        assert "lm_head" in saved.layer_names
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_memory_is_that_of_the_codes(checkpoint: Path) -> None:
    model = load(checkpoint)
    module = next(m for m in model.modules() if isinstance(m, GQSALinear))
    buffers = sum(b.numel() * b.element_size() for b in module.buffers())
    assert buffers < 4 * module.in_features * module.out_features / 3
    assert f"bits={module.bits}, group_size={module.group_size}, sparsity=0." in repr(module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_leave_the_scales_alone(dtype: torch.dtype, checkpoint: Path) -> None:
    wide, narrow = load(checkpoint), load(checkpoint, dtype=dtype)
    assert narrow.dtype == dtype
    for (name, a), (_, b) in zip(wide.named_buffers(), narrow.named_buffers(), strict=True):
        if name.endswith(("scales", "qweight", "indices", "input_rms")):
            assert torch.equal(a, b)
    assert torch.isfinite(logits(narrow)).all()


def test_save_and_load_again(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    with CheckpointReader(tmp_path / "saved") as saved, CheckpointReader(checkpoint) as before:
        validate(saved)
        assert saved.quantization == before.quantization
        assert saved.layer_names == before.layer_names
    first = load_file(checkpoint / "model.safetensors")
    second = load_file(tmp_path / "saved" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert second[name].dtype == array.dtype
        np.testing.assert_array_equal(second[name], array)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_dequantize(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    want = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(m, GQSALinear) for m in dense.modules())
    assert torch.equal(logits(dense), want)
    dense.save_pretrained(tmp_path / "dense")
    assert resolve(str(tmp_path / "dense")).kind == "hf"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_linear(bits: int, density: float, symmetric: bool) -> None:
    layer = random_layer("p", (12, 64), 8, density=density, symmetric=symmetric, bits=bits)
    scheme = LayerScheme(bits, 8, symmetric, 0.0)
    module = GQSALinear(64, 12, layer.nnz, scheme, bias=True, dtype=torch.float32)
    parts = ["indptr", "indices", "qweight", "scales", *([] if symmetric else ["qzeros"])]
    state = {part: torch.from_numpy(np.array(getattr(layer, part))) for part in parts}
    bias = torch.arange(12.0)
    marker = torch.zeros(0, dtype=torch.uint8)
    shape = torch.tensor(layer.shape)
    module.load_state_dict({**state, "shape": shape, "weight": marker, "bias": bias})
    weight = torch.from_numpy(to_dense(layer))
    assert torch.equal(module.dense(), weight)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), torch.nn.functional.linear(x, weight, bias))
    assert module.layer("p").nnz == layer.nnz


def test_codes_are_unpacked_as_the_checkpoint_package_does() -> None:
    from gqsa_compiler.checkpoint import pack_codes

    rng = np.random.default_rng(0)
    for bits in (2, 3, 4, 8):
        codes = rng.integers(0, 1 << bits, (3, 13), dtype=np.uint8)
        packed = torch.from_numpy(pack_codes(codes, bits))
        np.testing.assert_array_equal(unpack_codes(packed, bits, 13).numpy(), codes)


def test_the_quantiser_is_registered_once() -> None:
    assert gqsa_compiler.hf.GQSAConfig is GQSAConfig
    assert AUTO_QUANTIZER_MAPPING["gqsa"] is GQSAQuantizer
    said = {**_config(), "ignore": ["lm_head"]}
    assert GQSAConfig(**said).to_dict() == said
    assert GQSAConfig.from_dict(said).to_diff_dict() == said
    assert GQSAQuantizer(GQSAConfig(**said)).is_serializable()
    assert not GQSAQuantizer(GQSAConfig(**said)).is_trainable
    with pytest.raises(CheckpointError, match="format_version 2"):
        GQSAConfig(**{**said, "format_version": 2})


def _config() -> dict[str, Any]:
    return {
        "quant_method": "gqsa",
        "format_version": 1,
        "bits": 4,
        "group_size": 16,
        "symmetric": False,
        "sparsity": {"structure": "group", "ratio": 0.0, "balance": "matrix"},
        "ignore": [],
        "producer": "test",
    }


Edit = Callable[[dict[str, Any]], None]


def _drop(part: str) -> Edit:
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def _drop_all(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if ".layers." in name and not name.endswith("norm.weight"):
            del tensors[name]


def _replace(part: str, change: Callable[[Any], Any]) -> Edit:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"])

    return edit


def _rename(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith(f"{UP}.")]:
        tensors[name.replace("up_proj", "sideways")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop("scales"), "has no usable tensor .*up_proj.scales"),
        (_drop_all, "its files hold no compressed layer"),
        (_rename, "sideways', which is no linear layer of LlamaForCausalLM"),
        (_replace("indices", lambda a: a + 1), "is not valid: indices"),
        (_replace("indptr", lambda a: a[::-1].copy()), "is not valid: indptr"),
        (_replace("shape", lambda a: a[::-1].copy()), r"is \[64, 96\] in the checkpoint"),
        (_replace("scales", lambda a: a * np.float16(np.inf)), "is not a finite number"),
    ],
)
def test_damaged_checkpoints(edit: Edit, message: str, tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    path = make_checkpoint(dense, tmp_path / "ckpt") / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "ckpt")


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    path = make_checkpoint(dense, tmp_path / "ckpt") / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["per_layer"] = {"nope": {"bits": 8}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names the layer 'nope', which the model's files"):
        load(tmp_path / "ckpt")


def test_layers_on_disk_are_refused() -> None:
    scheme = LayerScheme(4, 16, False, 0.0)
    model = torch.nn.Sequential(GQSALinear(64, 8, 5, scheme, device="meta"))
    with pytest.raises(UsageError, match="Layer '0' was offloaded to disk"):
        GQSAQuantizer(GQSAConfig(**_config()))._process_model_after_weight_loading(model)


def test_without_the_import_it_is_an_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantiser that is not known is a warning; a weight of the wrong size is an error."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "gqsa")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "gqsa")
    with pytest.raises(RuntimeError, match="`ignore_mismatched_sizes` to `False`"):
        load(checkpoint)


def test_checkpoints_of_earlier_builds_have_no_markers(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(checkpoint, tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    markers = [name for name, array in tensors.items() if array.shape == (0,)]
    assert markers
    assert all(f"{name.removesuffix('weight')}qweight" in tensors for name in markers)
    save_file({n: a for n, a in tensors.items() if n not in markers}, file, {"format": "pt"})
    old = load(tmp_path / "old")
    assert torch.equal(logits(old), logits(load(checkpoint)))
    assert not caplog.records
    old.save_pretrained(tmp_path / "saved")
    assert set(markers) <= load_file(tmp_path / "saved" / "model.safetensors").keys()


def test_tvm_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['tvm'] = sys.modules['tvm_ffi'] = None; "
        "import gqsa_compiler.hf; print('loaded', *(n for n in sys.modules if 'schedules' in n))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True)
    assert done.stdout.split() == ["loaded"]


@pytest.mark.slow
def test_perplexity_of_the_demo_model(alice: Path, tmp_path: Path) -> None:
    """One shot W4S30 of SmolLM2: the same perplexity as our own evaluation gives, to rounding."""
    from transformers import AutoTokenizer

    from gqsa_compiler.evaluate import perplexity

    checkpoint = make_checkpoint("smollm2-135m", tmp_path / "ckpt", sparsity=0.1)
    text = alice.read_text(encoding="utf-8")
    want = perplexity(str(checkpoint), text, 256, limit=4)
    model, tokenizer = load(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0, : 4 * 256].reshape(4, 256)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in tokens]
    assert math.exp(np.mean(losses)) == pytest.approx(want.perplexity, rel=1e-4)
