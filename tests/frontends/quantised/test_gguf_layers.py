"""GGUF's blocks taken over code by code, against the gguf package's own decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from gqsa_compiler.checkpoint import to_dense
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.gguf import GGUFSource
from gqsa_compiler.frontends.quantised.blocks import read_blocks
from gqsa_compiler.frontends.quantised.codes import Misfit
from gqsa_compiler.frontends.quantised.gguf_layers import GGUFLayers
from gqsa_compiler.frontends.resolve import resolve
from tests.frontends.gguf_files import write_gguf
from tests.tiny_models import make_tiny


def blocks(kind: str, rows: int, columns: int, *, exact: bool = True) -> np.ndarray:
    """Draw a matrix in blocks; the minima of Q4_1 are those of zero points if `exact`."""
    rng = np.random.default_rng(0)
    size = {"Q4_0": 16, "Q4_1": 16, "Q8_0": 32}[kind]
    count = columns // 32
    codes = rng.integers(0, 256, (rows, count, size), dtype=np.uint8)
    scales = 2.0 ** rng.integers(-9, -5, (rows, count)) * rng.choice([-1, 1], (rows, count))
    heads = [scales.astype(np.float16)]
    if kind == "Q4_1":
        zeros = rng.integers(0, 16, (rows, count)) + (0 if exact else 0.3)
        heads.append((-zeros * scales).astype(np.float16))
    raw = [np.ascontiguousarray(head)[:, :, None].view(np.uint8) for head in heads]
    return np.concatenate([*raw, codes], axis=2).reshape(rows, -1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks(kind: str) -> None:
    data = blocks(kind, 5, 96)
    layer = read_blocks(data, kind, "p.weight", "m.gguf").layer("p", "m.gguf")
    assert (layer.group_size, layer.bits) == (32, 8 if kind == "Q8_0" else 4)
    assert layer.symmetric == (kind != "Q4_1")
    want = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(to_dense(layer), want)


def test_minima_that_are_no_zero_points() -> None:
    data = blocks("Q4_1", 5, 96, exact=False)
    with pytest.raises(Misfit, match="15 of 15 Q4_1 blocks of p have a minimum that is no whole"):
        read_blocks(data, "Q4_1", "p", "m.gguf")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp("gguf") / "dense", num_hidden_layers=1)


def open_gguf(path: Path) -> GGUFSource:
    source = resolve(str(path))
    assert isinstance(source, GGUFSource)
    return source


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_files(kind: str, model: Path, tmp_path: Path) -> None:
    """Rows of Llama's q and k are in another order in the file."""
    source = open_gguf(write_gguf(model, tmp_path / "m.gguf", quantization=kind))
    layers = GGUFLayers(source)
    assert layers.kinds() == {"GGUF": len(layers.layer_names)}
    has_head = "lm_head.weight" in source.tensor_names()
    assert ("lm_head" in layers.layer_names) == has_head
    assert len(layers.layer_names) == 7 + has_head
    for name in layers.layer_names:
        layer = layers.layer(name)
        np.testing.assert_array_equal(to_dense(layer), source.tensor(f"{name}.weight"))
        assert layers.shape(name) == layer.shape
    said = layers.quantization
    assert (said.group_size, said.symmetric) == (32, True)


def test_files_without_blocks(model: Path, tmp_path: Path) -> None:
    source = open_gguf(write_gguf(model, tmp_path / "m.gguf", quantization="F16"))
    with pytest.raises(ModelError, match=r"no layer stored as Q4_0, Q4_1, Q8_0.*gqsa compress"):
        GGUFLayers(source)


def test_other_types_beside_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer in another quantised type is a misfit; an output head stays as it is."""
    source = open_gguf(write_gguf(model, tmp_path / "m.gguf", quantization="Q8_0"))
    other: Mapping[str, str] = {
        "model.layers.0.mlp.up_proj.weight": "Q5_0",
        "lm_head.weight": "Q6_K",
        "model.layers.0.mlp.gate_proj.weight": "F16",
    }
    real = source.stored_type
    monkeypatch.setattr(source, "stored_type", lambda name: other.get(name) or real(name))
    layers = GGUFLayers(source)
    assert "lm_head" not in layers.layer_names
    assert "model.layers.0.mlp.gate_proj" not in layers.layer_names
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(Misfit, match=f"{name}.weight is stored as Q5_0"):
        layers.layer(name)
    assert set(layers.misfits()) == {name}
    assert set(layers.without([name]).quantization.ignore) >= {name}
