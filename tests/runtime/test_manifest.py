from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.manifest import Manifest, is_artefact
from tests.runtime.toy import edit_manifest

Change = Callable[[dict[str, Any]], Any]


def add_variant(manifest: dict[str, Any], file: str) -> None:
    """Add code for another target, in a file of that name."""
    first = manifest["variants"][0]
    target, library = {**first["target"], "name": "other"}, {**first["library"], "file": file}
    manifest["variants"].append({"target": target, "library": library})


def table(*shape: int) -> Change:
    """Make a parameter the table of positions, which code reads up to the context's end."""
    return lambda m: m["parameters"][0].update(name="rope.local.cos_sin", shape=list(shape))


def test_version_1_had_one_variant(copy: Path) -> None:
    expected = Manifest.read(copy)
    edit_manifest(copy, lambda m: m.update(format_version=1, **m.pop("variants")[0]))
    assert Manifest.read(copy) == expected
    edit_manifest(copy, lambda m: m.pop("target"))
    with pytest.raises(ArtefactError, match=r"has no variants\[0\]\.target"):
        Manifest.read(copy)


def test_a_manifest_of_absurd_size_is_not_read(copy: Path) -> None:
    with (copy / "manifest.json").open("r+b") as file:
        file.truncate(100_000_001)
    with pytest.raises(ArtefactError, match="100000001 bytes, and at most 100000000 are read"):
        Manifest.read(copy)


@pytest.mark.parametrize("name", ["manifest.json", "params.safetensors", "chat_template.jinja"])
def test_pipes_and_devices_are_no_files(copy: Path, name: str) -> None:
    """Nobody writes into the pipe, and the device has no end."""
    (copy / "elsewhere").symlink_to("nothing")
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    with pytest.raises(ArtefactError, match=rf"{name} is a pipe or a device and no file of an"):
        Manifest.read(copy)
    (copy / name).unlink()
    (copy / name).symlink_to("/dev/zero")
    with pytest.raises(ArtefactError, match=rf"{name} is a pipe or a device and no file of an"):
        Manifest.read(copy)


def test_round_trip(artefact: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(artefact)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    data = json.loads((tmp_path / "manifest.json").read_text())
    assert (data["format"], data["format_version"]) == ("gqsa-artefact", 2)
    assert data["model"]["eos_token_ids"] == [0]
    assert data["kernels"][0]["config"] == {"tile": 4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format="onnx"), "not the manifest of a GQSA artefact"),
        (lambda m: m.update(format_version=4), "version 4 and this runtime reads versions 1 to 3"),
        (lambda m: m.update(format_version=3), "version 3 has adapters, and no other has"),
        (lambda m: m.update(adapters=[]), "version 3 has adapters, and no other has"),
        (lambda m: m.update(format_version=True), "format version True"),
        (lambda m: m.update(format_version=1.0), "format version 1.0"),
        (lambda m: m.pop("format_version"), "format version None"),
        (lambda m: m.pop("variants"), "has no variants"),
        (lambda m: m.update(variants=[]), "lists 0 variants; 1 to 64 are allowed"),
        (lambda m: m.update(variants=m["variants"] * 65), "lists 65 variants"),
        (lambda m: m["variants"].append(m["variants"][0]), "names 'cpu' twice"),
        (lambda m: add_variant(m, file="model.so"), r"names 'model\.so' twice"),
        (lambda m: add_variant(m, file="params.safetensors"), "names 'params.safetensors' twice"),
        (lambda m: add_variant(m, file="../model.so"), "not a plain name"),
        (lambda m: m["variants"][0].pop("target"), r"has no variants\[0\]\.target"),
        (lambda m: m.update(target={}), "has the unknown key target"),
        (lambda m: m["model"].pop("prefill_chunk"), "has no model.prefill_chunk"),
        (lambda m: m["model"].update(rope="yes"), "unknown key model.rope"),
        (lambda m: m["model"].update(vocab_size="9"), "model.vocab_size should be int"),
        (lambda m: m["model"].update(vocab_size=True), "model.vocab_size should be int"),
        (lambda m: m["model"].update(prefill_chunk=0), "prefill_chunk is 0 and must be positive"),
        (lambda m: m["model"].update(prefill_chunk=2), "max_batch is 3 and must be at most"),
        (lambda m: m["kernels"][0].update(m="1-8"), r"unknown key kernels\[0\]\.m"),
        (lambda m: m["parameters"][0].update(shape=[1, "x"]), r"parameters\[0\].shape\[1\]"),
        (lambda m: m["parameters"].append(m["parameters"][0]), "lists a parameter twice"),
        (lambda m: m.update(parameters={}), "parameters should be a list"),
        (lambda m: m.update(parameters=[]), "no parameter has that many"),
        (lambda m: m["model"].update(vocab_size=10**7), "no parameter has that many"),
        (lambda m: m["model"].update(vocab_size=10**9), "vocab_size is 1000000000 and must be at"),
        (lambda m: m["model"].update(context_length=2**31 - 1), "context_length .* at most"),
        (lambda m: m["model"].update(context_length=10**30), "does not fit into 64 bits"),
        (lambda m: m["model"].update(prefill_chunk=10**9), "prefill_chunk .* at most"),
        (lambda m: m["kv_cache"].update(page_size=10**9), "page_size .* at most"),
        (lambda m: m["kv_cache"].update(page_size=1), "page_size is 1 and must be a multiple"),
        (lambda m: m["kv_cache"].update(page_size=3), "page_size is 3 and must be a multiple"),
        (lambda m: m["kv_cache"].update(bytes_per_token=0), "kv_cache.bytes_per_token is 0 and"),
        (lambda m: m["kv_cache"].update(bytes_per_token=-7), "bytes_per_token is -7 and must be p"),
        (lambda m: m["kv_cache"].update(bytes_per_token=2**40 + 1), "at most 1099511627776"),
        (lambda m: m["model"].update(hidden_size=0), "model.hidden_size is 0 and must be positive"),
        (lambda m: m["model"].update(hidden_size=-1), "model.hidden_size is -1 and must be posit"),
        (lambda m: m["model"].update(hidden_size=2**24 + 1), "hidden_size .* at most 16777216"),
        (table(95, 16), "'rope.local.cos_sin' has 95 rows, fewer than the context of 96 tokens"),
        (table(), r"cos_sin' has 0 rows, fewer than the context of 96 tokens\.$"),
        (table(-(2**63), 16), "has -9223372036854775808 rows, fewer"),
        (lambda m: m.update(bytes_per_token=10**400), "bytes_per_token does not fit"),
        (lambda m: m.update(parameters_file="../x"), "not a plain name"),
        (lambda m: m["variants"][0]["library"].update(file="/bin/sh"), "not a plain name"),
    ],
)
def test_what_does_not_fit_is_refused(copy: Path, change: Change, words: str) -> None:
    edit_manifest(copy, change)
    with pytest.raises(ArtefactError, match=words):
        Manifest.read(copy)


def test_a_context_may_be_shorter_than_its_tables(copy: Path) -> None:
    edit_manifest(copy, table(96, 16))
    assert Manifest.read(copy).parameters[0].shape == (96, 16)
    edit_manifest(copy, lambda m: m["model"].update(context_length=40))
    assert Manifest.read(copy).model.context_length == 40


def test_a_number_that_is_none_is_refused(copy: Path) -> None:
    edit_manifest(copy, lambda m: m["kernels"][0].update(sparsity=float("nan")))
    with pytest.raises(ArtefactError, match="cannot be read: NaN is not JSON"):
        Manifest.read(copy)


def test_a_doubled_key_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    text = path.read_text()
    for key in ("format_version", "vocab_size"):
        path.write_text(text.replace(f'"{key}":', f'"{key}": 7, "{key}":'))
        with pytest.raises(ArtefactError, match=f"'{key}' stands twice"):
            Manifest.read(copy)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '"x"', "\x00"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


def test_what_is_an_artefact(artefact: Path, tmp_path: Path) -> None:
    assert is_artefact(artefact)
    assert not is_artefact(tmp_path)
    assert not is_artefact(tmp_path / "nothing")


def test_missing_directory_and_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such directory"):
        Manifest.read(tmp_path / "nothing")
    with pytest.raises(ArtefactError, match="not a compiled artefact"):
        Manifest.read(tmp_path)
