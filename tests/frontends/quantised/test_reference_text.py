"""Greedy text of quantised models, by the packages whose formats they are and by us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from gqsa_compiler.export import export_model
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from tests.frontends.quantised.packers import (
    Arrays,
    Matrix,
    pack_awq,
    pack_gptq,
    quantise_directory,
)
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[5, 17, 40, 8, 99, 3, 250]])
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "desc_act": False,
    "checkpoint_format": "gptq",
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:7.7.0"]},
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A model whose sizes are multiples of what the packages' layers take."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return make_tiny("llama", tmp_path / "dense", **sizes)


def text_of(model: Any) -> list[int]:
    """Generate greedily; the prompt is left out."""
    with torch.no_grad():
        found = model.generate(
            input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=24,
            min_new_tokens=24, do_sample=False,
        )  # fmt: skip
    return [int(token) for token in found[0, TOKENS.shape[1] :]]


def by_gptqmodel(directory: Path, backend: str) -> list[int]:
    """Generate with GPTQModel's layers on the CPU."""
    package = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    model = package.GPTQModel.load(
        str(directory), device="cpu", backend=package.BACKEND(backend), dtype=torch.float16
    )
    kinds = {type(module).__module__ for module in model.model.modules()}
    assert any(kind.startswith("gptqmodel.nn_modules.qlinear") for kind in kinds)
    return text_of(model.model.float())


def by_us(directory: Path) -> list[int]:
    """Generate with the weights that we decode."""
    return text_of(load_checkpoint_dense(resolve(str(directory))).float().eval())


def check(found: list[int], wanted: list[int]) -> None:
    print(found)
    assert found == wanted
    assert len(set(found)) > 2  # not one token over and over


def rounded(weight: npt.NDArray[Any], low: int) -> Matrix:
    """Round a matrix [N, K] to 4 bits in groups of 32, its zero points at least `low`."""
    n, k = weight.shape
    groups = weight.reshape(n, -1, 32)
    least, most = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = ((most - least) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-least / scales), low, 15).astype(np.int64)
    codes = np.clip(np.rint(groups / scales[..., None]) + zeros[..., None], 0, 15)
    return Matrix(codes.reshape(n, k).astype(np.int64), scales, zeros, 4, np.arange(k) // 32)


def quantised(dense: Path, directory: Path, pack: Any, settings: dict[str, Any]) -> Path:
    """Quantise a model; GPTQ's version 1 cannot say the zero point 0."""
    weights = load_file(dense / "model.safetensors")

    def packed(layer: str, _shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
        m = rounded(weights[f"{layer}.weight"], 1 if pack is pack_gptq else 0)
        return pack(m), m.dense

    quantise_directory(dense, directory, packed, settings)
    return directory


def test_gptq(dense: Path, tmp_path: Path) -> None:
    model = quantised(dense, tmp_path / "q", pack_gptq, GPTQ)
    check(by_us(model), by_gptqmodel(model, "gptq_torch"))


def test_awq(dense: Path, tmp_path: Path) -> None:
    model = quantised(dense, tmp_path / "q", pack_awq, AWQ)
    check(by_us(model), by_gptqmodel(model, "awq_torch"))


@pytest.mark.parametrize("group_size", [16, 32])
def test_exported_gptq(group_size: int, dense: Path, tmp_path: Path) -> None:
    """What `gqsa export --to gptq` writes, in the format's own package."""
    checkpoint = make_checkpoint(dense, tmp_path / "ckpt", group_size=group_size)
    export_model(str(checkpoint), tmp_path / "out", "gptq")
    check(by_us(checkpoint), by_gptqmodel(tmp_path / "out", "gptq_torch"))
