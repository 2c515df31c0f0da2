"""What a compilation reads of a model's weights, and how much of it at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler.checkpoint import BSRLayer, to_dense
from gqsa_compiler.frontends.hf import import_model
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.model_weights import ModelWeights
from tests.frontends.quantised.packers import (
    Arrays,
    pack_gptq,
    quantise_directory,
    random_matrix,
)
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FIELDS = {"num_key_value_heads": 4, "intermediate_size": 128, "num_hidden_layers": 1}
LAYERS = 7


def pack(layer: str, shape: tuple[int, int]) -> tuple[Arrays, npt.NDArray[Any]]:
    m = random_matrix(*shape, low=1, seed=sum(map(ord, layer)))
    return pack_gptq(m), m.dense


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", **FIELDS)


def test_another_quantisers_layers_are_there_one_at_a_time(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = quantise_directory(llama, tmp_path / "q", pack, GPTQ)
    source = resolve(str(tmp_path / "q"))
    assert source.checkpoint is not None
    convert = source.checkpoint.layer
    alive, counts = weakref.WeakSet[BSRLayer](), list[int]()

    def watched(name: str) -> BSRLayer:
        layer = convert(name)
        gc.collect()
        alive.add(layer)
        counts.append(len(alive))
        return layer

    monkeypatch.setattr(source.checkpoint, "layer", watched)
    gc.freeze()  # what other tests have left would be looked through for every layer
    weights = ModelWeights(source, import_model(source, context_length=64))
    records = [record for record in weights.records() if record.storage == "bsr"]
    assert {record.name for record in records} == set(want)
    for record in records:
        layer = weights.layer(record.name)
        assert (layer.shape, layer.nnz, layer.group_size) == (
            record.shape,
            record.nnz,
            record.group_size,
        )
        assert (f"int{layer.bits}", layer.symmetric) == (record.dtype, record.symmetric)
        np.testing.assert_array_equal(to_dense(layer), want[record.name])
    gc.unfreeze()
    # One that the caller holds, and the next one.
    assert (len(counts), max(counts)) == (2 * LAYERS, 2)


def test_a_checkpoints_layers_are_mapped_once(llama: Path, tmp_path: Path) -> None:
    source = resolve(str(make_checkpoint(llama, tmp_path / "ckpt")))
    weights = ModelWeights(source, import_model(source, context_length=64))
    name = "model.layers.0.mlp.up_proj.weight"
    layer = weights.layer(name)
    assert weights.layer(name) is layer
    assert not layer.qweight.flags.owndata
    with pytest.raises(KeyError):
        weights.layer("model.norm.weight")
