from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.manifest import Manifest, is_artefact
from tests.runtime.toy import edit_manifest

Change = Callable[[dict[str, Any]], Any]


def test_round_trip(artefact: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(artefact)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    data = json.loads((tmp_path / "manifest.json").read_text())
    assert (data["format"], data["format_version"]) == ("gqsa-artefact", 1)
    assert data["model"]["eos_token_ids"] == [0]
    assert data["kernels"][0]["config"] == {"tile": 4}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format="onnx"), "not the manifest of a GQSA artefact"),
        (lambda m: m.update(format_version=2), "version 2 and this runtime reads version 1"),
        (lambda m: m.update(format_version=True), "format version True"),
        (lambda m: m.update(format_version=1.0), "format version 1.0"),
        (lambda m: m.pop("format_version"), "format version None"),
        (lambda m: m.pop("target"), "has no target"),
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
        (lambda m: m.update(bytes_per_token=10**400), "bytes_per_token does not fit"),
        (lambda m: m.update(parameters_file="../x"), "not a plain name"),
        (lambda m: m["library"].update(file="/bin/sh"), "not a plain name"),
    ],
)
def test_what_does_not_fit_is_refused(copy: Path, change: Change, words: str) -> None:
    edit_manifest(copy, change)
    with pytest.raises(ArtefactError, match=words):
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
