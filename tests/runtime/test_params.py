from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gqsa_compiler.runtime import params
from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.params import map_params, write_params
from gqsa_compiler.runtime.schema import Parameter

DTYPES = ["float32", "float16", "bfloat16", "uint8", "int8", "uint16", "int32", "int64"]


def random_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 100, shape).astype(np.dtype(dtype))


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)), max_size=6
    ),
    st.sampled_from([64, 128, 1 << 18]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[str, list[int]]], reserve: int
) -> None:
    """Whatever is written, safetensors reads; a header larger than the reserve shifts the data."""
    path = tmp_path_factory.mktemp("params") / "p.safetensors"
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": random_array(rng, d, tuple(s)) for i, (d, s) in enumerate(specs)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(params, "_HEADER_RESERVE", reserve)
        patch.setattr(params, "_COPY_BLOCK", 100)
        entries = write_params(path, arrays.items())
    assert [(e.name, e.dtype, e.shape) for e in entries] == [
        (name, a.dtype.name, a.shape) for name, a in arrays.items()
    ]
    read = load_file(path)
    for (name, array), view in zip(arrays.items(), map_params(path, entries), strict=True):
        assert view.tobytes() == array.tobytes() == read[name].tobytes()
        assert view.nbytes == 0 or view.ctypes.data % 64 == 0
        assert read[name].shape == array.shape
    assert read.keys() - arrays.keys() == {n for n in read if n.startswith("_pad.")}


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, tuple[Parameter, ...]]:
    path = tmp_path / "p.safetensors"
    rng = np.random.default_rng(1)
    arrays = [("a", random_array(rng, "float32", (3, 5))), ("b", random_array(rng, "int8", (7,)))]
    return path, write_params(path, arrays)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode().ljust(size)
    path.write_bytes(raw[:8] + text + raw[8 + size :])


def test_mapping_is_private_to_the_process(file: tuple[Path, tuple[Parameter, ...]]) -> None:
    path, entries = file
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    view = map_params(path, entries)[0]
    view[:] = 0
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert map_params(path, entries)[0].any()


def test_wrong_hash(file: tuple[Path, tuple[Parameter, ...]]) -> None:
    path, entries = file
    raw = bytearray(path.read_bytes())
    raw[-64] ^= 1  # the first byte of b
    path.write_bytes(raw)
    with pytest.raises(ArtefactError, match=r"parameter b in .* is damaged"):
        map_params(path, entries)
    assert len(map_params(path, entries, verify=False)) == 2


@pytest.mark.parametrize("keep", [0, 4, 8, 1000, 1 << 18, (1 << 18) + 70])
def test_truncated(file: tuple[Path, tuple[Parameter, ...]], keep: int) -> None:
    path, entries = file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtefactError, match=r"truncated|cannot be mapped"):
        map_params(path, entries, verify=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.pop("a"), "has no parameter a"),
        (lambda h: h.update(a=3), "has no parameter a"),
        (lambda h: h["a"].update(dtype="F16"), r"F16 \[3, 5\], and the manifest says F32"),
        (lambda h: h["a"].update(shape=[5, 3]), r"F32 \[5, 3\], and"),
        (lambda h: h["a"].update(data_offsets=[-4, 56]), "broken offsets"),
        (lambda h: h["a"].update(data_offsets=[0, 64]), "broken offsets"),
        (lambda h: h["a"].update(data_offsets=[0.0, 60]), "broken offsets"),
        (lambda h: h["a"].update(data_offsets=None), "broken offsets"),
        (lambda h: h["a"].update(data_offsets=[4, 64]), "not aligned"),
        (lambda h: h["a"].update(data_offsets=[1 << 40, (1 << 40) + 60]), "beyond its end"),
    ],
)
def test_lying_header(
    file: tuple[Path, tuple[Parameter, ...]], change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    path, entries = file
    edit_header(path, change)
    with pytest.raises(ArtefactError, match=words):
        map_params(path, entries, verify=False)


@pytest.mark.parametrize("text", [b"{", b"[]", b"[" * 90_000, b"\xff"])
def test_damaged_header(file: tuple[Path, tuple[Parameter, ...]], text: bytes) -> None:
    path, entries = file
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + text.ljust((1 << 18) - 8) + raw[1 << 18 :])
    with pytest.raises(ArtefactError, match="damaged header"):
        map_params(path, entries)


def test_manifest_out_of_range(file: tuple[Path, tuple[Parameter, ...]]) -> None:
    path, entries = file
    with pytest.raises(ArtefactError, match="unknown dtype 'float4'"):
        map_params(path, [replace(entries[0], dtype="float4")])
    with pytest.raises(ArtefactError, match=r"there is no .*other"):
        map_params(path.with_name("other"), entries)


def test_writer_refuses_what_a_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    ok = np.zeros(3, ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="'a' is taken"):
        write_params(path, [("a", ok), ("a", ok)])
    with pytest.raises(ValueError, match="is taken"):
        write_params(path, [("_pad.1", ok)])
    with pytest.raises(ValueError, match="has the dtype"):
        write_params(path, [("a", np.zeros(3, "complex64"))])
    with pytest.raises(ValueError, match="has the dtype"):
        write_params(path, [("a", np.zeros(3, ">f4"))])


def test_a_parameter_that_the_manifest_does_not_list(
    file: tuple[Path, tuple[Parameter, ...]],
) -> None:
    """The compiled code would get too few arguments."""
    path, entries = file
    with pytest.raises(ArtefactError, match=f"has the parameter {entries[0].name}, which"):
        map_params(path, entries[1:])
