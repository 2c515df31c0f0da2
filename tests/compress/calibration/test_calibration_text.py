"""Calibration sequences from text files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gqsa_compiler.compress.calibration import (
    CalibrationSpec,
    calibration_tokens,
    read_calibration,
)
from gqsa_compiler.errors import UsageError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import load_tokenizer
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny("llama", tmp_path_factory.mktemp("tiny") / "m")))


@pytest.fixture(scope="module")
def tokenizer(source: ModelSource) -> Any:
    return load_tokenizer(source)


def _write(path: Path, first: int, count: int) -> list[Path]:
    path.write_text(" ".join(map(str, range(first, first + count))), encoding="utf-8")
    return [path]


class StartingTokenizer:
    """Begins texts with token 1, as Llama's and Gemma's tokenizers do."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = [10 + ord(letter) % 50 for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def test_windows_are_spread_over_the_text(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    _write(text, 0, 1000)
    tokens = read_calibration(text, tokenizer, 4, 16)
    assert tokens.shape == (4, 16)
    whole = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert tokens[0].tolist() == whole[:16]
    last = 3 * (len(whole) // 16) // 4 * 16
    assert tokens[3].tolist() == whole[last : last + 16]


def test_windows_are_spread_over_several_files(tokenizer: Any, tmp_path: Path) -> None:
    paths = _write(tmp_path / "a.txt", 100, 60) + _write(tmp_path / "b.txt", 500, 300)
    windows = []
    for path in paths:
        ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        windows += [ids[at : at + 16] for at in range(0, len(ids) // 16 * 16, 16)]
    tokens = read_calibration(paths, tokenizer, 6, 16)
    assert tokens.tolist() == [windows[i * len(windows) // 6] for i in range(6)]
    # All of them, none across the files' border.
    assert read_calibration(paths, tokenizer, None, 16).tolist() == windows


def test_every_window_begins_as_the_tokenizer_begins_texts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 10, encoding="utf-8")
    tokens = read_calibration(text, StartingTokenizer(), 5, 11)
    assert tokens[:, 0].tolist() == [1] * 5
    assert (tokens[:, 1:] >= 10).all()
    assert len(read_calibration(text, StartingTokenizer(), None, 11)) == 10


def test_a_byte_order_mark_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("one two three " * 20, encoding="utf-8")
    marked.write_text("one two three " * 20, encoding="utf-8-sig")
    expected = read_calibration(plain, tokenizer, 2, 8)
    assert torch.equal(read_calibration(marked, tokenizer, 2, 8), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"The quick brown fox.", "fewer than one sequence of 64"),
        (b"The quick brown fox jumps. " * 30, r"Use a longer text or fewer samples \(--samples "),
        (b"\xff\xfe\x00bad", "is not UTF-8 text"),
        ("Ärger".encode("latin-1"), "is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x00\x00 text", "is not text"),
        (b"", "has 0 tokens"),
        (None, "cannot be read: No such file"),
    ],
)
def test_refuses_unusable_files(
    tokenizer: Any, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_calibration(path, tokenizer, 100, 64)
    assert str(path) in str(caught.value)


def test_says_what_would_fit(tokenizer: Any, tmp_path: Path) -> None:
    paths = _write(tmp_path / "a.txt", 100, 60) + _write(tmp_path / "b.txt", 500, 60)
    fitting = len(read_calibration(paths, tokenizer, None, 16))
    with pytest.raises(UsageError, match=r"in 2 files .*a\.txt.* 500 samples of 16") as caught:
        read_calibration(paths, tokenizer, 500, 16)
    assert f"--samples {fitting})" in str(caught.value)
    assert len(read_calibration(paths, tokenizer, fitting, 16)) == fitting
    with pytest.raises(UsageError, match="fewer than one sequence of 4096"):
        read_calibration(paths, tokenizer, None, 4096)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_refuses_a_file_it_may_not_read(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    _write(path, 0, 100)
    path.chmod(0)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        read_calibration(path, tokenizer, 2, 8)


def test_a_read_that_fails_is_named(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        read_calibration(tmp_path / "text.txt", tokenizer, 2, 8)


def test_a_spec_reads_all_of_a_text(source: ModelSource, tokenizer: Any, tmp_path: Path) -> None:
    paths = tuple(_write(tmp_path / "a.txt", 0, 200))
    spec = CalibrationSpec(source="text", paths=paths, samples=None, sequence_length=16)
    expected = read_calibration(paths, tokenizer, None, 16)
    assert torch.equal(calibration_tokens(spec, source, 1), expected)
