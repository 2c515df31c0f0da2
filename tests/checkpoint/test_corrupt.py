"""Damaged and hostile checkpoints on disk: one clear sentence that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.checkpoint import CheckpointReader, is_checkpoint, validate
from gqsa_compiler.errors import CheckpointError, UsageError
from tests.checkpoint.helpers import (
    LAYER,
    Raw,
    array_of,
    make_checkpoint,
    parse_raw,
    put,
    random_layer,
    raw_bytes,
)

BIAS = f"{LAYER}.bias"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a good checkpoint in one file."""
    return make_checkpoint(tmp_path / "c")


def check(path: Path) -> None:
    with CheckpointReader(path) as reader:
        validate(reader)


def refused(path: Path, says: str) -> str:
    with pytest.raises(CheckpointError, match=says) as caught:
        check(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def set_value(part: str, dtype: Any, at: Any, value: Any) -> Callable[[Raw], None]:
    def edit(raw: Raw) -> None:
        array = array_of(raw, f"{LAYER}.{part}", dtype)
        array[at] = value
        put(raw, f"{LAYER}.{part}", array)

    return edit


def cast(part: str, old: Any, new: Any, dtype: str) -> Callable[[Raw], None]:
    def edit(raw: Raw) -> None:
        array = array_of(raw, f"{LAYER}.{part}", old)
        put(raw, f"{LAYER}.{part}", array.astype(new), dtype)

    return edit


def shorten(part: str, dtype: Any) -> Callable[[Raw], None]:
    def edit(raw: Raw) -> None:
        put(raw, f"{LAYER}.{part}", array_of(raw, f"{LAYER}.{part}", dtype)[:-1])

    return edit


def drop(part: str) -> Callable[[Raw], None]:
    def edit(raw: Raw) -> None:
        del raw[f"{LAYER}.{part}"]

    return edit


def add(name: str, dtype: str, array: Any) -> Callable[[Raw], None]:
    def edit(raw: Raw) -> None:
        put(raw, name, array, dtype)

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (set_value("indices", np.uint16, 1, 60000), "indices holds 60000"),
        (set_value("indices", np.uint16, slice(None), 0), "not strictly increasing"),
        (set_value("indptr", np.int32, 0, 1), "indptr runs from 1"),
        (set_value("indptr", np.int32, 2, 10**9), "indptr decreases after row 2"),
        (set_value("indptr", np.int32, -1, 2), "indptr runs from 0 to 2"),
        (set_value("scales", np.float16, 3, np.nan), "scale 3 is not a finite number"),
        (set_value("scales", np.float16, 0, -np.inf), "scale 0 is not a finite number"),
        (set_value("qzeros", np.uint8, -1, 0xF0), "padding bits"),
        (set_value("shape", np.int64, 0, 6), "indptr has shape"),
        (set_value("shape", np.int64, 0, -1), "out of range"),
        (set_value("shape", np.int64, 1, 2**62), "out of range"),
        (set_value("shape", np.int64, 1, 72), "does not divide"),
        (cast("shape", np.int64, np.int32, "I32"), r"shape is not int64 \[2\]"),
        (cast("indptr", np.int32, np.int64, "I64"), "indptr has dtype int64"),
        (cast("indices", np.uint16, np.int32, "I32"), "indices has dtype int32"),
        (cast("scales", np.float16, np.float32, "F32"), "scales has dtype float32"),
        (cast("qweight", np.uint8, np.int8, "I8"), "qweight has dtype int8"),
        (cast("qzeros", np.uint8, np.int8, "I8"), "qzeros has dtype int8"),
        (shorten("shape", np.int64), r"shape is not int64 \[2\]"),
        (shorten("indptr", np.int32), "indptr has shape"),
        (shorten("indices", np.uint16), "has shape"),
        (shorten("qweight", np.uint8), "qweight has shape"),
        (shorten("scales", np.float16), "scales has shape"),
        (shorten("qzeros", np.uint8), "qzeros has shape"),
        (drop("shape"), f"lacks the tensor {LAYER}.shape"),
        (drop("indptr"), f"lacks the tensor {LAYER}.indptr"),
        (drop("indices"), f"lacks the tensor {LAYER}.indices"),
        (drop("qweight"), f"lacks the tensor {LAYER}.qweight"),
        (drop("scales"), f"lacks the tensor {LAYER}.scales"),
        (drop("qzeros"), "tensors say symmetric True"),
        (add(f"{LAYER}.qweight", "U8", np.zeros(8, np.uint8)), "qweight is not a matrix"),
        (add(f"{LAYER}.qweight", "U8", np.zeros((9, 0), np.uint8)), "its group size 0"),
        (add(f"{LAYER}.qweight", "U8", np.zeros((9, 4), np.uint8)), "say group_size 8"),
        (add(f"{LAYER}.weight", "F16", np.zeros((5, 64), np.float16)), "compressed and as"),
        (add(f"{LAYER}.weight", "F16", np.zeros(0, np.float16)), "compressed and as"),
        (add(f"{LAYER}.weight", "U8", np.zeros((0, 1), np.uint8)), "compressed and as"),
        (add(f"{LAYER}.input_rms", "F32", np.ones(63, np.float32)), "input_rms has shape"),
        (add(f"{LAYER}.input_rms", "F16", np.ones(64, np.float16)), "input_rms has dtype"),
        (add(f"{LAYER}.input_rms", "F32", np.arange(64.0, dtype=np.float32)), "input_rms 0 is not"),
        (add(f"{LAYER}.input_rms", "F32", np.full(64, np.inf, np.float32)), "input_rms 0 is not"),
        (add(BIAS, "F32", np.zeros(4, np.float32)), r"bias' in .* has shape \[4\], not \[5\]"),
        (add("x", "F64", np.zeros(4)), "'x' in .* has dtype float64"),
        (add("x", "I64", np.zeros(4, np.int64)), "'x' in .* has dtype int64"),
        (add("y.scales", "F16", np.zeros(4, np.float16)), "'y' in .* lacks the tensor y.shape"),
    ],
)
def test_a_broken_tensor_is_named(path: Path, edit: Callable[[Raw], None], says: str) -> None:
    check(path)
    file = path / "model.safetensors"
    raw = parse_raw(file)
    edit(raw)
    file.write_bytes(raw_bytes(raw))
    message = refused(path, says)
    assert "model.safetensors" in message


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_have_shapes_of_their_own(tmp_path: Path, bits: int) -> None:
    path = make_checkpoint(tmp_path / "c", bits=bits)
    check(path)
    file = path / "model.safetensors"
    good = parse_raw(file)
    nnz, width = good[f"{LAYER}.qweight"][1]
    assert width == 16 * bits // 8
    size = (nnz * bits + 7) // 8
    assert good[f"{LAYER}.qzeros"][1] == [size]
    edits = [
        (add(f"{LAYER}.qweight", "U8", np.zeros((nnz, width + 1), np.uint8)), "group.size"),
        (add(f"{LAYER}.qweight", "U8", np.zeros((nnz, 8), np.uint8)), "group.size"),
        (add(f"{LAYER}.qweight", "U8", np.zeros((nnz + 1, width), np.uint8)), "qweight has shape"),
        (add(f"{LAYER}.qzeros", "U8", np.zeros(size + 1, np.uint8)), "qzeros has shape"),
        (add(f"{LAYER}.qzeros", "U8", np.zeros((1, size), np.uint8)), "qzeros has shape"),
        (shorten("qzeros", np.uint8), "qzeros has shape"),
    ]
    if bits < 8:
        edits.append((set_value("qzeros", np.uint8, -1, 0x80), "padding bits"))
    for edit, says in edits:
        raw = dict(good)
        edit(raw)
        file.write_bytes(raw_bytes(raw))
        refused(path, says)


def test_a_truncated_file_is_named(path: Path) -> None:
    file = path / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        assert str(file) in refused(path, "is truncated")


def edit_config(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("update", "says"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"format_version": 7}, "format_version 7; this program reads 1"),
        ({"bits": 5}, "bits 5"),
        ({"bits": 3}, "its group size 21 is not a power of two"),
        ({"bits": 2}, "tensors say group_size 32, quantization_config says 16"),
        ({"bits": 8}, "tensors say group_size 8, quantization_config says 16"),
        ({"bits": 8, "group_size": 8}, "qzeros has shape"),
        ({"per_layer": {LAYER: {"bits": 2, "group_size": 32}}}, "qzeros has shape"),
        ({"group_size": 32}, "tensors say group_size 16, quantization_config says 32"),
        ({"symmetric": True}, "tensors say symmetric False"),
        ({"ignore": [LAYER]}, "ignore names .*, which is compressed"),
        ({"per_layer": {"other": {}}}, "per_layer names 'other', which is not a compressed"),
        ({"per_layer": {LAYER: {"group_size": 8}}}, "quantization_config says 8"),
        ({"surprise": 1}, "unknown field 'surprise'"),
    ],
)
def test_a_config_that_disagrees_is_refused(path: Path, update: dict[str, Any], says: str) -> None:
    edit_config(path, lambda config: config["quantization_config"].update(update))
    refused(path, says)


def test_a_tied_checkpoint_with_a_head_is_refused(path: Path) -> None:
    file = path / "model.safetensors"
    raw = parse_raw(file)
    put(raw, "lm_head.weight", np.zeros((7, 64), np.float16), "F16")
    file.write_bytes(raw_bytes(raw))
    check(path)
    edit_config(path, lambda config: config.update(tie_word_embeddings=True))
    refused(path, "'lm_head.weight', but config.json says tie_word_embeddings")


def test_config_json_must_be_readable(path: Path) -> None:
    file = path / "config.json"
    edit_config(path, lambda config: config.pop("quantization_config"))
    refused(path, "no quantization_config: this is not a GQSA checkpoint")
    assert not is_checkpoint(path)
    for text, says in (
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"a":1,"a":2}', "key 'a' twice"),
        ("[" * 100_000, "not valid JSON"),
    ):
        file.write_text(text)
        refused(path, says)
        assert not is_checkpoint(path)
    file.unlink()
    refused(path, r"Cannot read .*config\.json: No such file")
    assert not is_checkpoint(path)


def test_a_missing_directory_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no directory"):
        CheckpointReader(tmp_path / "nothing")
    assert not is_checkpoint(tmp_path / "nothing")


def test_missing_weights_are_named(path: Path) -> None:
    (path / "model.safetensors").unlink()
    refused(path, r"holds no model\.safetensors and no")


def test_an_oversized_json_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqsa_compiler.checkpoint.reader.MAX_JSON_BYTES", 10)
    refused(path, "larger than 10 bytes")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a good checkpoint in three shards."""
    return make_checkpoint(tmp_path / "s", shard_bytes=1)


def edit_index(path: Path, edit: Callable[[dict[str, str]], None]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00003.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "..safetensors",
        ".safetensors",
        "",
        "model.bin",
        "a\0.safetensors",
        "a\\b.safetensors",
        "-x.safetensors",
        "x" * 300 + ".safetensors",
        5,
        None,
        ["model.safetensors"],
    ],
)
def test_a_shard_outside_the_directory_is_not_opened(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({BIAS: name}))
    monkeypatch.setattr("gqsa_compiler.checkpoint.reader.SafetensorsFile", None)
    refused(sharded, "is not a plain .safetensors file name")


def test_shards_may_be_links_as_in_a_hub_cache(sharded: Path) -> None:
    shard = sharded / "model-00001-of-00003.safetensors"
    blob = sharded.parent / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)
    check(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    good = file.read_text()
    first, last = (f"model-0000{i}-of-00003.safetensors" for i in (1, 3))
    for edit, says in (
        (lambda m: m.update({BIAS: last}), f"places '{BIAS}' in {last}, which lacks it"),
        (lambda m: m.update({"ghost": first}), "places 'ghost'"),
        (lambda m: m.pop(f"{LAYER}.qzeros"), f"holds '{LAYER}.qzeros', against"),
        (lambda m: m.update({"g": "gone.safetensors"}), r"Cannot open .*gone\.safetensors"),
    ):
        file.write_text(good)
        edit_index(sharded, edit)
        refused(sharded, says)
    for text, says in (("{}", "no weight_map"), ('{"weight_map": []}', "no weight_map")):
        file.write_text(text)
        refused(sharded, says)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    shard = sharded / "model-00003-of-00003.safetensors"
    raw = parse_raw(shard)
    put(raw, BIAS, np.zeros(5, np.float32), "F32")
    shard.write_bytes(raw_bytes(raw))
    refused(sharded, f"holds '{BIAS}', against")


def test_a_missing_or_truncated_shard_is_named(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    assert str(shard) in refused(sharded, "truncated")
    shard.unlink()
    assert str(shard) in refused(sharded, "Cannot open")


def test_both_kinds_of_file_at_once_are_ambiguous(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(raw_bytes({}))
    refused(sharded, "holds both")


def test_a_broken_layer_among_good_ones_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c")
    file = path / "model.safetensors"
    raw = parse_raw(file)
    other = random_layer("model.layers.1.q", (3, 32), 16, density=1.0)
    put(raw, f"{other.name}.shape", np.array([3, 32]), "I64")
    put(raw, f"{other.name}.indptr", other.indptr, "I32")
    put(raw, f"{other.name}.indices", other.indices[::-1], "U16")
    put(raw, f"{other.name}.qweight", other.qweight, "U8")
    put(raw, f"{other.name}.scales", other.scales, "F16")
    put(raw, f"{other.name}.qzeros", other.qzeros, "U8")  # type: ignore[arg-type]
    file.write_bytes(raw_bytes(raw))
    refused(path, f"Layer '{other.name}' in .* not strictly increasing in row 0")
