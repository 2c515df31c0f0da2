"""What the writer writes, the reader, the safetensors library and a naive reader all read."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gqsa_compiler.checkpoint import (
    BSRLayer,
    CheckpointReader,
    CheckpointWriter,
    LayerScheme,
    QuantizationConfig,
    is_checkpoint,
    to_dense,
    validate,
)
from gqsa_compiler.checkpoint.names import natural_key
from gqsa_compiler.errors import CheckpointError, GqsaError, UsageError
from gqsa_compiler.limits import BITS
from tests.checkpoint.helpers import (
    CONFIG,
    LAYER,
    layers,
    make_checkpoint,
    naive_dense,
    parse_raw,
    random_layer,
    raw_bytes,
    same_layer,
)

Q16 = QuantizationConfig(group_size=16, producer="test 1")


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(layer=layers(), shard_bytes=st.sampled_from([1, 200, 1 << 30]), bias=st.booleans())
def test_layers_survive_bit_for_bit(
    tmp_path: Path, layer: BSRLayer, shard_bytes: int, bias: bool
) -> None:
    config = QuantizationConfig(
        bits=layer.bits,
        group_size=layer.group_size,
        symmetric=layer.symmetric,
        producer="test 1",
    )
    extra = np.linspace(-1, 1, layer.shape[0]).astype(ml_dtypes.bfloat16)
    path = tmp_path / "c"
    with CheckpointWriter(path, CONFIG, config, shard_bytes, overwrite=True) as writer:
        writer.add_tensor("embed.weight", np.zeros((3, 0), np.float32))
        writer.add_layer(layer)
        if bias:
            writer.add_tensor(f"{layer.name}.bias", extra)
    with CheckpointReader(path) as reader:
        validate(reader)
        assert same_layer(reader.layer(layer.name), layer)
        assert reader.quantization == config
        if bias:
            read = reader.tensor(f"{layer.name}.bias")
            assert read.dtype == extra.dtype
            assert read.tobytes() == extra.tobytes()


def test_reader_tells_what_is_there(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", ignore=("lm_head",))
    assert is_checkpoint(path)
    with CheckpointReader(path) as reader:
        assert reader.layer_names == (LAYER,)
        assert reader.tensor_names == ("model.embed_tokens.weight", f"{LAYER}.bias")
        assert reader.config["hidden_size"] == 32
        assert reader.quantization.ignore == ("lm_head",)
        assert reader.shape_dtype("model.embed_tokens.weight") == ((7, 64), np.float16)
        assert reader.shape_dtype(f"{LAYER}.shape") == ((2,), np.int64)
        assert reader.disk_bytes == (path / "model.safetensors").stat().st_size
        layer = reader.layer(LAYER)
        assert (layer.shape, layer.group_size, layer.bits) == ((5, 64), 16, 4)
        assert not layer.qweight.flags.writeable
    for call in (reader.layer, reader.tensor, reader.shape_dtype):
        with pytest.raises(KeyError):
            call("nothing")
    with pytest.raises(KeyError):
        reader.tensor(f"{LAYER}.qweight")


def test_a_marker_stands_for_the_weight_and_is_not_needed(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    with CheckpointReader(path) as reader:
        assert reader.shape_dtype(f"{LAYER}.weight") == ((0,), np.uint8)
        assert f"{LAYER}.weight" not in reader.tensor_names
        with pytest.raises(KeyError):
            reader.tensor(f"{LAYER}.weight")
        weight = to_dense(reader.layer(LAYER))
    raw = parse_raw(path / "model.safetensors")
    del raw[f"{LAYER}.weight"]
    (path / "model.safetensors").write_bytes(raw_bytes(raw))
    with CheckpointReader(path) as reader:  # of an earlier build
        validate(reader)
        assert np.array_equal(to_dense(reader.layer(LAYER)), weight)


def test_layers_of_different_bits_and_group_sizes_share_a_checkpoint(tmp_path: Path) -> None:
    made = [
        random_layer(f"l.{bits}.{g}", (6, 256), g, bits=bits, symmetric=symmetric, seed=bits + g)
        for bits, g, symmetric in [(2, 32, False), (3, 16, True), (4, 8, False), (8, 64, False)]
    ]
    made.append(random_layer("l.last", (6, 256), 16, bits=3, seed=1))
    config = QuantizationConfig(
        bits=3,
        group_size=16,
        balance="model",
        per_layer={m.name: LayerScheme(m.bits, m.group_size, m.symmetric, 0.5) for m in made[:-1]},
    )
    with CheckpointWriter(tmp_path / "c", CONFIG, config) as writer:
        for layer in made:
            writer.add_layer(layer)
    with CheckpointReader(tmp_path / "c") as reader:
        validate(reader)
        for layer in made:
            assert same_layer(reader.layer(layer.name), layer)
            assert np.array_equal(to_dense(reader.layer(layer.name)), naive_dense(layer))


def test_names_come_in_natural_order() -> None:
    names = ["b.10.x", "b.2.x", "a", "b.2", "b." + "9" * 5000]
    assert sorted(names, key=natural_key) == ["a", "b.2", "b.2.x", "b.10.x", "b." + "9" * 5000]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_reader_without_our_code_gets_the_same_weights(
    tmp_path: Path, symmetric: bool, bits: int
) -> None:
    path = make_checkpoint(tmp_path / "c", symmetric=symmetric, bits=bits)
    with safe_open(path / "model.safetensors", "numpy") as file:
        parts = {k.removeprefix(f"{LAYER}."): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    n, k = parts["shape"]
    plain = BSRLayer(
        name=LAYER,
        shape=(int(n), int(k)),
        group_size=16,
        indptr=parts["indptr"],
        indices=parts["indices"],
        qweight=parts["qweight"],
        scales=parts["scales"],
        qzeros=parts.get("qzeros"),
        bits=bits,
    )
    assert ("qzeros" in parts) is not symmetric
    with CheckpointReader(path) as reader:
        assert np.array_equal(to_dense(reader.layer(LAYER)), naive_dense(plain))


def test_every_tensor_lies_aligned(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    content = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0
    sizes = {"I64": 8, "I32": 4, "F32": 4, "U16": 2, "F16": 2, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0, name


def write_layers(path: Path, count: int, shard_bytes: int) -> list[BSRLayer]:
    made = [random_layer(f"l.{i}", (8, 64), 16, seed=i) for i in range(count)]
    with CheckpointWriter(path, CONFIG, Q16, shard_bytes) as writer:
        for layer in made:
            writer.add_layer(layer)
    return made


def test_shards_and_index(tmp_path: Path) -> None:
    made = write_layers(tmp_path / "c", 12, 1000)
    files = sorted(p.name for p in (tmp_path / "c").iterdir())
    shards = [name for name in files if name.startswith("model-")]
    total = len(shards)
    assert total > 3
    assert shards == [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    assert set(files) == {"config.json", "model.safetensors.index.json", *shards}
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    stored = {shard: parse_raw(tmp_path / "c" / shard) for shard in shards}
    sizes = {shard: sum(len(data) for _, _, data in raw.values()) for shard, raw in stored.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert max(sizes.values()) <= 1000
    assert index["weight_map"] == {name: s for s, raw in stored.items() for name in raw}
    for layer in made:  # a layer stays together
        assert len({index["weight_map"][f"{layer.name}.{p}"] for p in ("shape", "qzeros")}) == 1
    with CheckpointReader(tmp_path / "c") as reader:
        assert reader.layer_names == tuple(f"l.{i}" for i in range(12))
        assert all(same_layer(reader.layer(layer.name), layer) for layer in made)


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_layers(tmp_path / "c", 3, 1 << 30)
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"config.json", "model.safetensors"}


def test_writing_is_deterministic(tmp_path: Path) -> None:
    one, two = make_checkpoint(tmp_path / "1"), make_checkpoint(tmp_path / "2")
    for file in ("config.json", "model.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_writer_holds_one_tensor_at_most(tmp_path: Path) -> None:
    size = 4 << 20
    tracemalloc.start()
    try:
        with CheckpointWriter(tmp_path / "c", CONFIG, Q16) as writer:
            for i in range(8):
                writer.add_tensor(f"t.{i}", np.full(size // 4, i, np.float32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The tensor, the copy buffer, and no second tensor.
    assert peak < size + (8 << 20) + (1 << 20) + size
    with CheckpointReader(tmp_path / "c") as reader:
        assert reader.tensor("t.7")[-1] == 7


def test_progress_counts_the_layers(tmp_path: Path) -> None:
    write_layers(tmp_path / "c", 3, 1 << 30)
    seen: list[tuple[str, int, int]] = []
    with CheckpointReader(tmp_path / "c") as reader:
        validate(reader, lambda *step: seen.append(step))
    assert [(done, total) for _, done, total in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_strided_and_scalar_tensors_are_stored_whole(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    with CheckpointWriter(tmp_path / "c", CONFIG, Q16) as writer:
        writer.add_tensor("t", array[::2, ::3].T)
        writer.add_tensor("s", np.array(2.5, np.float16))
    with CheckpointReader(tmp_path / "c") as reader:
        assert np.array_equal(reader.tensor("t"), array[::2, ::3].T)
        assert reader.tensor("s").shape == ()
        assert reader.tensor("s") == 2.5


def test_an_old_quantization_config_is_replaced(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    with CheckpointWriter(tmp_path / "c", config, Q16):
        pass
    with CheckpointReader(tmp_path / "c") as reader:
        assert reader.quantization == Q16
        assert reader.layer_names == ()
    assert config["quantization_config"] == {"quant_method": "gptq"}


def test_a_tied_head_is_not_stored(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "c", {**CONFIG, "tie_word_embeddings": True}, Q16) as writer:
        with pytest.raises(CheckpointError, match=r"'lm_head' cannot be compressed.*tie_word"):
            writer.add_layer(random_layer("lm_head", (8, 64), 16))
        with pytest.raises(CheckpointError, match=r"'lm_head.weight' cannot be stored"):
            writer.add_tensor("lm_head.weight", np.zeros((8, 64), np.float32))
    untied = {**CONFIG, "tie_word_embeddings": False}
    with CheckpointWriter(tmp_path / "u", untied, Q16) as writer:
        writer.add_layer(random_layer("lm_head", (8, 64), 16))


def test_the_writer_refuses_what_the_format_forbids(tmp_path: Path) -> None:
    layer = random_layer("a.b", (8, 64), 16)
    zeros = np.zeros(4, np.float32)
    with CheckpointWriter(tmp_path / "c", CONFIG, Q16) as writer:
        writer.add_layer(layer)
        writer.add_tensor("n.weight", zeros)
        for call, says in (
            (lambda: writer.add_layer(layer), r"'a.b.shape' is already stored"),
            (lambda: writer.add_tensor("n.weight", zeros), "'n.weight' is already stored"),
            (lambda: writer.add_tensor("a.b.weight", zeros), "'a.b' is already stored compressed"),
            (lambda: writer.add_layer(replace(layer, name="n")), "'n' is already .* uncompressed"),
            (lambda: writer.add_tensor("x.scales", zeros), "'x.scales' is reserved"),
            (lambda: writer.add_tensor("__metadata__", zeros), "'__metadata__' is reserved"),
            (lambda: writer.add_tensor("", zeros), "'' is reserved"),
            (lambda: writer.add_tensor("y", zeros.astype(np.float64)), "'y' has dtype float64"),
            (lambda: writer.add_tensor("y", zeros.astype(">f4")), "'y' has dtype >f4"),
            (
                lambda: writer.add_layer(random_layer("z", (8, 64), 32)),
                "tensors say group_size 32",
            ),
        ):
            with pytest.raises(CheckpointError, match=says):
                call()
    with CheckpointReader(tmp_path / "c") as reader:
        assert (reader.layer_names, reader.tensor_names) == (("a.b",), ("n.weight",))


def test_the_writer_checks_the_whole_at_the_end(tmp_path: Path) -> None:
    own = replace(Q16, per_layer={"gone": LayerScheme(4, 16, False, 0.5)})
    with (
        pytest.raises(CheckpointError, match="per_layer names 'gone'"),
        CheckpointWriter(tmp_path / "c", CONFIG, own),
    ):
        pass

    def wrong_bias() -> None:
        with CheckpointWriter(tmp_path / "c", CONFIG, Q16) as writer:
            writer.add_tensor("a.bias", np.zeros(7, np.float32))
            writer.add_layer(random_layer("a", (8, 64), 16))

    with pytest.raises(CheckpointError, match=r"'a.bias' has shape \[7\], not \[8\]"):
        wrong_bias()
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_an_error(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "c", CONFIG, Q16)
    with pytest.raises(CheckpointError, match="only inside its `with`"):
        writer.add_tensor("x", np.zeros(1, np.float32))
    with pytest.raises(CheckpointError, match="0 bytes"):
        CheckpointWriter(tmp_path / "c", CONFIG, Q16, 0)
    with pytest.raises(CheckpointError, match="config cannot be stored"):
        CheckpointWriter(tmp_path / "c", {"dtype": np.float32}, Q16)


def test_an_existing_checkpoint_is_kept_or_replaced(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    before = (path / "model.safetensors").read_bytes()
    with (
        pytest.raises(UsageError, match="exists"),
        CheckpointWriter(path, CONFIG, Q16),
    ):
        pass
    assert (path / "model.safetensors").read_bytes() == before
    with CheckpointWriter(path, CONFIG, Q16, overwrite=True) as writer:
        writer.add_layer(random_layer("new", (8, 64), 16))
    with CheckpointReader(path) as reader:
        assert reader.layer_names == ("new",)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), SystemExit(1)])
def test_nothing_is_left_of_an_interrupted_run(tmp_path: Path, error: BaseException) -> None:
    def run() -> None:
        with CheckpointWriter(tmp_path / "c", CONFIG, Q16, 100) as writer:
            for i in range(4):
                writer.add_layer(random_layer(f"l.{i}", (8, 64), 16))
            raise error

    with pytest.raises(type(error)):
        run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("during", ["fsync", "write_text"])
def test_a_full_disk_names_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if during == "fsync" else (Path, during, full)))
    with (
        pytest.raises(GqsaError, match=f"No space left on the disk of {tmp_path}"),
        CheckpointWriter(tmp_path / "c", CONFIG, Q16) as writer,
    ):
        writer.add_layer(random_layer("l", (8, 64), 16))
    assert list(tmp_path.iterdir()) == []
