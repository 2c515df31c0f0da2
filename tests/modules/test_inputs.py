"""Calibration inputs: .npz files of strangers, and what a graph takes."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.onnx.graph import GraphTensor
from gqsa_compiler.modules import inputs
from gqsa_compiler.modules.inputs import check_inputs, read_inputs

IDS = GraphTensor("ids", "int64", ("batch", "length"))
SCALE = GraphTensor("scale", "float32", ("batch", 1))
BOUNDS = {"batch": (1, 4), "length": (2, 16)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_as_numpy_writes_them(save: Callable[..., None], tmp_path: Path) -> None:
    arrays = {
        "ids": np.arange(6).reshape(2, 3),
        "scale": np.asfortranarray(np.random.default_rng(0).random((3, 2), np.float32)),
        "on": np.array([True, False]),
        "one": np.float64(3),
        "none": np.zeros((0, 4)),
    }
    save(tmp_path / "a.npz", **arrays)
    save(tmp_path / "b.npz", ids=np.arange(3))
    first, second = read_inputs([tmp_path / "a.npz", str(tmp_path / "b.npz")])
    assert list(first) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(first[name], array)
        assert first[name].dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(second["ids"], np.arange(3))


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _zip(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def _boast(array: np.ndarray, said: bytes, boasted: bytes) -> bytes:
    content = _npy(array)
    assert said in content
    return content.replace(said, boasted)


class _Evil:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "not a zip file"),
        (_zip(a__npy=_npy(np.arange(4)))[:-30], "zip"),
        (_zip(readme=b"hello"), "'readme' in it is no array"),
        (_zip(a__npy=b"hello"), "magic"),
        (_zip(a__npy=_npy(np.arange(4))[:40]), "EOF"),
        (_zip(a__npy=_npy(np.arange(4))[:-3]), "another size than its header says"),
        (_zip(a__npy=_npy(np.arange(4)) + b"more"), "another size than its header says"),
        (_zip(a__npy=_boast(np.arange(4), b"(4,)", b"(9999999999,)")), "header"),
        (_zip(a__npy=_npy(np.array(["text"]))), "not numbers"),
        (_zip(a__npy=_npy(np.array([1j]))), "not numbers"),
        (_zip(a__npy=_npy(np.zeros(1, [("x", "f4")]))), "not numbers"),
        (_zip(a__npy=_npy(np.array([_Evil()], dtype=object)[:0])), "not numbers"),
        (_zip(a__pkl=pickle.dumps(_Evil())), "'a.pkl' in it is no array"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"x.npz cannot be read as an .npz file: .*{message}"):
        read_inputs([path])


def test_what_is_too_large_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        np.savez_compressed(tmp_path / f"{name}.npz", ids=np.zeros(1000, np.int8))
    monkeypatch.setattr(inputs, "_MOST_BYTES", 2000)
    assert len(read_inputs([tmp_path / "a.npz"])) == 1
    with pytest.raises(ModelError, match=r"b.npz .* take 1128 bytes; .* 2000 bytes in all"):
        read_inputs([tmp_path / "a.npz", tmp_path / "b.npz"])
    with pytest.raises(UsageError, match="There is no file"):
        read_inputs([tmp_path / "c.npz"])


def test_calls_are_given_the_inputs_dtypes() -> None:
    call = {"scale": np.ones((2, 1)), "ids": np.ones((2, 5), np.int32)}
    (found,) = check_inputs([IDS, SCALE], BOUNDS, [call])
    assert list(found) == ["ids", "scale"]
    assert (found["ids"].dtype, found["scale"].dtype) == (np.int64, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"ids": np.ones((2, 5), int)}, "call 2: the graph takes ids, scale, each once; given are"),
        ({"ids": 0, "scale": 0, "x": 0}, "given are ids, scale, x"),
        ({"ids": np.ones((2, 5)), "scale": 0}, "input ids must be int64, not float64"),
        ({"ids": np.ones(5, int), "scale": 0}, "input ids has 1 axes, not 2"),
        ({"ids": np.ones((5, 5), int), "scale": 0}, "axis 0 of .* size 5; it must be 1 to 4"),
        ({"ids": np.ones((2, 1), int), "scale": 0}, "axis 1 of .* size 1; it must be 2 to 16"),
        (
            {"ids": np.ones((2, 5), int), "scale": np.ones((3, 1))},
            "axis 0 of input scale has size 3; it must be 2",
        ),
        (
            {"ids": np.ones((2, 5), int), "scale": np.ones((2, 2))},
            "axis 1 of input scale has size 2; it must be 1",
        ),
    ],
)
def test_calls_that_do_not_fit_are_named(call: dict[str, Any], message: str) -> None:
    right = {"ids": np.ones((1, 2), int), "scale": np.ones((1, 1))}
    with pytest.raises(UsageError, match=f"Calibration inputs, call 2: .*{message}|{message}"):
        check_inputs([IDS, SCALE], BOUNDS, [right, call])


def test_without_calls_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(UsageError, match="no calibration inputs"):
        check_inputs([IDS], BOUNDS, [])
