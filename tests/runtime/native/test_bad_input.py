"""Damaged and foreign artefacts: an exit code and one sentence, never a crash."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.bundle import add_bundle
from gqsa_compiler.errors import ArtefactError
from gqsa_compiler.runtime import load
from gqsa_compiler.runtime.library import find_runtime
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.targets import parse_target
from tests.runtime.native.programs import Probe, Programs, refusal, run
from tests.runtime.toy import edit_manifest

Change = Callable[[dict[str, Any]], Any]


def _variant(**fields: Any) -> Change:
    return lambda data: data["variants"][0]["target"].update(fields)


def _table(*shape: int) -> Change:
    """Make a parameter the table of positions, which code reads up to the context's end."""
    return lambda data: data["parameters"][0].update(name="rope.cos_sin", shape=list(shape))


MANIFESTS: dict[str, tuple[Change, str]] = {
    "architecture": (_variant(arch="riscv64"), "riscv64"),
    "device": (_variant(device_type=2, kind="cuda"), "cannot drive"),
    "feature": (_variant(flags=["quantum"]), "lacks quantum"),
    "newer": (lambda d: d.update(format_version=4), "format version 4"),
    "version": (lambda d: d.update(format_version=True), "format version true"),
    "format": (lambda d: d.update(format="zip"), "not the manifest"),
    "key": (lambda d: d.update(extra=1), "unknown key 'extra'"),
    "missing": (lambda d: d.pop("memory"), "has no memory"),
    "type": (lambda d: d["model"].update(vocab_size="9"), "model.vocab_size should be"),
    "range": (lambda d: d["model"].update(vocab_size=2**63), "does not fit"),
    "zero": (lambda d: d["model"].update(prefill_chunk=0), "must be positive"),
    "large": (lambda d: d["model"].update(context_length=2**40), "must be at most"),
    "hidden": (lambda d: d["model"].update(hidden_size=0), "hidden_size is 0 and must be positive"),
    "wide": (lambda d: d["model"].update(hidden_size=2**24 + 1), "must be at most 16777216"),
    "free": (lambda d: d["kv_cache"].update(bytes_per_token=0), "bytes_per_token is 0 and must be"),
    "costly": (
        lambda d: d["kv_cache"].update(bytes_per_token=2**40 + 1),
        "kv_cache.bytes_per_token is 1099511627777 and must be at most 1099511627776",
    ),
    "positions": (
        _table(95, 32),
        "parameter 'rope.cos_sin' has 95 rows, fewer than the context of 96 tokens.",
    ),
    "no positions": (_table(), "has 0 rows, fewer than the context of 96 tokens."),
    "less than none": (_table(-(2**63), 32), "has -9223372036854775808 rows, fewer than"),
    "enough positions": (_table(96, 32), "params.safetensors has no parameter"),
    "batch": (lambda d: d["model"].update(max_batch=17), "max_batch is 17"),
    "page": (lambda d: d["kv_cache"].update(page_size=12), "multiple of 8"),
    "vocabulary": (lambda d: d["model"].update(vocab_size=999), "no parameter has that many"),
    "path": (lambda d: d.update(parameters_file="../params"), "not a plain name"),
    "none": (lambda d: d.update(variants=[]), "lists 0 variants"),
    "twice": (lambda d: d.update(parameters_file="model.so"), "twice"),
    "no file": (lambda d: d.update(parameters_file="gone"), "incomplete"),
    "hash": (lambda d: d["variants"][0]["library"].update(sha256="0" * 64), "damaged"),
    "parameter": (lambda d: d["parameters"][0].update(sha256="0" * 64), "damaged"),
    "shape": (lambda d: d["parameters"][0].update(shape=[-1, 5]), "another dtype or shape"),
    "dtype": (lambda d: d["parameters"][0].update(dtype="int3"), "unknown dtype"),
    "added": (lambda d: d["parameters"].pop(), "does not list"),
    "tvm": (lambda d: d["versions"].update(tvm="0.11.0"), "apache-tvm '0.11.0'"),
    "ffi": (lambda d: d["versions"].update(tvm_ffi="0.9.0"), "apache-tvm-ffi '0.9.0'"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(programs: Programs, copy: Path, name: str) -> None:
    change, words = MANIFESTS[name]
    edit_manifest(copy, change)
    assert words in refusal(run(programs, copy, "-p", "the"), 1)


def test_a_key_that_stands_twice(programs: Programs, copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace("{", '{"format": "x",', 1))
    assert "stands twice" in refusal(run(programs, copy, "-p", "the"), 1)


def test_what_is_no_artefact(programs: Programs, tmp_path: Path) -> None:
    assert "does not exist" in refusal(run(programs, tmp_path / "gone", "-p", "the"), 2)
    assert "not a compiled artefact" in refusal(run(programs, tmp_path, "-p", "the"), 2)


@pytest.mark.parametrize("size", [0, 1, 20, 4000])
@pytest.mark.parametrize("file", ["manifest.json", "tokenizer.json", "params.safetensors"])
def test_truncated_files(programs: Programs, copy: Path, file: str, size: int) -> None:
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: min(size, len(data) // 2)])
    assert file in refusal(run(programs, copy, "-p", "the"), 1)


@pytest.mark.parametrize("file", ["tokenizer.json", "params.safetensors", "model.so"])
def test_missing_files(programs: Programs, copy: Path, file: str) -> None:
    (copy / file).unlink()
    assert file in refusal(run(programs, copy, "-p", "the"), 1)


@pytest.mark.parametrize("file", ["tokenizer.json", "params.safetensors", "model.so"])
def test_pipes_and_devices_are_no_files(programs: Programs, copy: Path, file: str) -> None:
    """Nobody writes into the pipe, and the device has no end."""
    (copy / file).unlink()
    os.mkfifo(copy / file)
    assert "it is not a file" in refusal(run(programs, copy, "-p", "the"), 1)
    (copy / file).unlink()
    (copy / file).symlink_to("/dev/zero")
    assert "it is not a file" in refusal(run(programs, copy, "-p", "the"), 1)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json",
                                  "chat_prompt.json"])  # fmt: skip
@pytest.mark.parametrize("text", ["[]", "{", '{"temperature": "warm", "do_sample": true, "x": 1}'])
def test_damaged_settings(programs: Programs, copy: Path, file: str, text: str) -> None:
    (copy / file).write_text(text)
    done = run(programs, copy, "-p", "the", "--max-tokens", "1")
    if file == "tokenizer_config.json" and "warm" in text:
        assert done.returncode == 0  # a setting that the runtime does not read
    else:
        assert file in refusal(done, 1)


LIBRARIES = ["libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so"]


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.99])
def test_a_truncated_bundle(programs: Programs, copy: Path, name: str, share: float) -> None:
    add_bundle(copy, parse_target("cpu"))
    path = copy / "lib" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    done = run(programs, copy, "-p", "the", "--max-tokens", "1")
    # Debugging tables at a library's end are no part of what runs.
    if done.returncode != 0 or share < 0.9:
        assert name in refusal(done, 1)


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_incomplete_bundle(programs: Programs, copy: Path, name: str) -> None:
    add_bundle(copy, parse_target("cpu"))
    (copy / "lib" / name).unlink()
    assert name in refusal(run(programs, copy, "-p", "the"), 1)


def test_a_bundle_for_another_machine(programs: Programs, copy: Path) -> None:
    add_bundle(copy, parse_target("cpu"))
    path = copy / "lib" / LIBRARIES[1]
    data = bytearray(path.read_bytes())
    data[18:20] = (8).to_bytes(2, "little")  # MIPS
    path.write_bytes(data)
    assert "another kind of machine" in refusal(run(programs, copy, "-p", "the"), 1)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_damaged_bundle(programs: Programs, copy: Path, name: str) -> None:
    """One bit, where no header is: the hashes find it, here and in Python."""
    add_bundle(copy, parse_target("cpu"))
    path = copy / "lib" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = refusal(run(programs, copy, "-p", "the"), 1)
    assert f"{name} is damaged: its SHA-256 is not that in SHA256SUMS" in said
    if name != "libtvm_ffi.so":  # Python has its own
        with pytest.raises(ArtefactError, match=f"{name} is damaged"):
            find_runtime(copy, Manifest.read(copy))


def test_a_library_that_the_sums_do_not_list(programs: Programs, copy: Path) -> None:
    add_bundle(copy, parse_target("cpu"))
    sums = copy / "lib" / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[1:]))
    assert "does not list libtvm_runtime.so" in refusal(run(programs, copy, "-p", "the"), 1)


def test_a_bundle_without_sums(programs: Programs, copy: Path) -> None:
    """As releases before wrote it."""
    add_bundle(copy, parse_target("cpu"))
    (copy / "lib" / "SHA256SUMS").unlink()
    assert run(programs, copy, "-p", "the", "--max-tokens", "1").returncode == 0
    assert len(find_runtime(copy, Manifest.read(copy))) == 2


def test_code_that_is_linked_into_another_program(programs: Programs, copy: Path) -> None:
    edit_manifest(copy, lambda d: d["variants"][0]["library"].update(file="gqsa-run"))
    said = refusal(run(programs, copy, "-p", "the"), 1)
    assert f"in a program of its own: run {copy / 'gqsa-run'}" in said
    with pytest.raises(ArtefactError, match="in a program of its own"):
        load(copy)


# Whether each is accepted; the two runtimes have to agree.
GENERATION_CONFIGS: dict[str, bool] = {
    "{}": True,
    '{"temperature": null, "top_k": null, "do_sample": null, "eos_token_id": null}': True,
    '{"top_k": 50.0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}': True,
    '{"top_k": 1e30}': True,
    '{"top_k": 1000000000000000000000000000000}': True,
    '{"top_k": 5.5}': False,
    '{"top_k": "5"}': False,
    '{"top_k": true}': False,
    '{"top_k": [5]}': False,
    '{"top_p": "0.9"}': False,
    '{"min_p": false}': False,
    '{"repetition_penalty": {}}': False,
    '{"temperature": "warm"}': False,
    '{"temperature": NaN}': False,
    '{"temperature": Infinity}': False,
    '{"do_sample": 1}': False,
    '{"do_sample": "true"}': False,
    '{"eos_token_id": [0, 3]}': True,
    '{"eos_token_id": -1}': True,
    '{"eos_token_id": 99999999999999999999}': False,
    '{"eos_token_id": "0"}': False,
    '{"eos_token_id": true}': False,
    '{"eos_token_id": [0, null]}': True,
    '{"eos_token_id": [0, [1]]}': False,
    '{"eos_token_id": 1.0}': False,
    "[" * 100_000: False,
    "\ufeff{}": False,
}


@pytest.mark.parametrize("text", GENERATION_CONFIGS, ids=lambda text: text[:60])
def test_generation_configs_as_in_python(programs: Programs, copy: Path, text: str) -> None:
    (copy / "generation_config.json").write_text(text, encoding="utf-8")
    done = run(programs, copy, "-p", "the", "--max-tokens", "1")
    if GENERATION_CONFIGS[text]:
        assert done.returncode == 0, done.stderr.decode()
        load(copy).close()
    else:
        assert "generation_config.json" in refusal(done, 1)
        with pytest.raises(ArtefactError, match=r"generation_config\.json"):
            load(copy)


@pytest.mark.parametrize("words", [[], ["--no-verify"]])
def test_threads_that_cannot_start(programs: Programs, artefact: Path, words: list[str]) -> None:
    """A stack larger than the address space: the system refuses every thread."""
    command = [str(programs.run), str(artefact), "-p", "the", "--max-tokens", "1", *words]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -s 4000000 && ulimit -v 3000000 && exec "$@"', "sh", *command],
        capture_output=True, check=False,
    )  # fmt: skip
    assert "A thread cannot be started" in refusal(done, 1)


def test_no_runtime_library(programs: Programs, copy: Path, tmp_path: Path) -> None:
    done = run(programs, copy, "-p", "the", GQSA_RUNTIME=str(tmp_path / "nowhere"))
    assert "libtvm_ffi.so" in refusal(done, 1)


def test_a_library_that_is_no_model(programs: Programs, copy: Path) -> None:
    source = copy / "empty.c"
    source.write_text("int nothing;\n")
    subprocess.run(["cc", "-shared", "-o", str(copy / "model.so"), str(source)], check=True)
    digest = hashlib.sha256((copy / "model.so").read_bytes()).hexdigest()
    edit_manifest(copy, lambda d: d["variants"][0]["library"].update(sha256=digest))
    assert "not a compiled model" in refusal(run(programs, copy, "-p", "the"), 1)


def test_a_library_that_cannot_be_loaded(programs: Programs, copy: Path) -> None:
    """The sentence has the library's own name, not the one that the loader was given."""
    source = copy / "broken.c"
    source.write_text("extern int gone;\nint *here = &gone;\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(copy / "model.so"), source], check=True)
    digest = hashlib.sha256((copy / "model.so").read_bytes()).hexdigest()
    edit_manifest(copy, lambda d: d["variants"][0]["library"].update(sha256=digest))
    done = run(programs, copy, "-p", "the", "-v")
    said = refusal(done, 1)
    assert f"{copy / 'model.so'} cannot be loaded: " in said
    assert "undefined symbol: gone" in said
    assert "/./" not in done.stderr.decode()
    assert f"{copy}//" not in done.stderr.decode()


def test_a_cache_beyond_memory(programs: Programs, copy: Path) -> None:
    edit_manifest(copy, lambda d: d["model"].update(context_length=1 << 23))  # 2 GB
    command = [str(programs.run), str(copy), "-p", "the", "--max-tokens", "1"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 1000000; exec "$@"', "sh", *command],
        capture_output=True, check=False,
    )  # fmt: skip
    assert "smaller context" in refusal(done, 1)


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header, data[8 + size :]


def _write(path: Path, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


HEADERS: dict[str, tuple[Change, str]] = {
    "negative": (lambda e: e.update(data_offsets=[-64, 0]), "broken offsets"),
    "beyond": (
        lambda e: e.update(data_offsets=[x + (1 << 40) for x in e["data_offsets"]]),
        "beyond its end",
    ),
    "turned": (lambda e: e.update(data_offsets=e["data_offsets"][::-1]), "broken offsets"),
    "unaligned": (
        lambda e: e.update(data_offsets=[x + 4 for x in e["data_offsets"]]),
        "not aligned",
    ),
    "three": (lambda e: e.update(data_offsets=[0, 1, 2]), "broken offsets"),
    "dtype": (lambda e: e.update(dtype="F8"), "another dtype"),
    "overflow": (lambda e: e.update(shape=[2**32, 2**32]), "another dtype or shape"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers(probe: Probe, copy: Path, name: str) -> None:
    change, words = HEADERS[name]
    path = copy / "params.safetensors"
    header, body = _header(path)
    change(header["embed.weight"])
    _write(path, header, body)
    said = probe.error("manifest", directory=str(copy))
    assert words in said
    assert "params.safetensors" in said


def test_a_shape_that_overflows(probe: Probe, copy: Path) -> None:
    """Manifest and header agree on sizes whose product wraps around to that of the data."""
    shape = [2**32, 2**32, 4]
    edit_manifest(copy, lambda d: d["parameters"][1].update(shape=shape))
    path = copy / "params.safetensors"
    header, body = _header(path)
    name = json.loads((copy / "manifest.json").read_text())["parameters"][1]["name"]
    header[name].update(shape=shape, data_offsets=[0, 0])
    _write(path, header, body)
    assert "broken offsets" in probe.error("manifest", directory=str(copy))


def test_a_whole_artefact_is_accepted(probe: Probe, artefact: Path) -> None:
    assert probe.ask("manifest", directory=str(artefact)) == {"name": "toy", "variants": 1}
