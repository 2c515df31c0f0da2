"""Calibration sequences from data sets on this machine."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqsa_compiler.compress.calibration import (
    CalibrationSpec,
    calibration_tokens,
    parse_calibration,
    read_dataset,
)
from gqsa_compiler.compress.calibration import dataset as dataset_module
from gqsa_compiler.errors import UsageError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import load_tokenizer
from tests.tiny_models import EOS_TOKEN_ID, make_tiny

datasets = pytest.importorskip("datasets", reason="the extra [data] is not installed")

DOCUMENTS = [f"document {n}: " + " ".join(str(n) for _ in range(20)) for n in range(40)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny("llama", tmp_path_factory.mktemp("tiny") / "m")))


@pytest.fixture(scope="module")
def tokenizer(source: ModelSource) -> Any:
    return load_tokenizer(source)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _spec(dataset: Path | str, **fields: Any) -> CalibrationSpec:
    numbers = {"samples": 4, "sequence_length": 16, "seed": 0}
    return CalibrationSpec(source="dataset", dataset=str(dataset), **{**numbers, **fields})


def _write_jsonl(directory: Path) -> None:
    _jsonl(directory / "rows.jsonl", [{"text": text, "id": n} for n, text in enumerate(DOCUMENTS)])


def _write_parquet(directory: Path) -> None:
    rows = {"text": DOCUMENTS, "id": list(range(len(DOCUMENTS)))}
    datasets.Dataset.from_dict(rows).to_parquet(str(directory / "rows.parquet"))


def _write_csv(directory: Path) -> None:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_csv(str(directory / "rows.csv"))


def _stream(tokenizer: Any, texts: list[str]) -> list[int]:
    """Join documents as the data set's reader should."""
    ids = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS_TOKEN_ID]
    return ids


def _windows(ids: list[int], length: int) -> list[list[int]]:
    return [ids[at : at + length] for at in range(0, len(ids) // length * length, length)]


@pytest.mark.parametrize(
    "write", [_write_jsonl, pytest.param(_write_parquet, marks=pytest.mark.slow), _write_csv]
)
def test_documents_are_joined_and_cut(
    write: Callable[[Path], None], tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    expected = _windows(_stream(tokenizer, DOCUMENTS), 16)
    whole = read_dataset(_spec(folder, samples=len(expected)), tokenizer)
    assert whole.dtype == torch.int64
    assert sorted(whole.tolist()) == sorted(expected)
    assert whole.tolist() != expected  # the order is the seed's
    file = next(folder.iterdir())
    assert torch.equal(read_dataset(_spec(file, samples=len(expected)), tokenizer), whole)


def test_plain_text_keeps_its_line_breaks(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    text = "\n\n".join(DOCUMENTS) + "\n"
    (folder / "a.txt").write_text(text, encoding="utf-8")
    ids = [
        token
        for line in text.splitlines(keepends=True)
        for token in tokenizer(line, add_special_tokens=False)["input_ids"]
    ]
    expected = _windows(ids, 16)
    whole = read_dataset(_spec(folder, samples=len(expected)), tokenizer)
    assert sorted(whole.tolist()) == sorted(expected)
    assert EOS_TOKEN_ID not in whole


def test_only_as_much_is_read_as_needed(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_jsonl(tmp_path)
    monkeypatch.setattr(dataset_module, "ROWS", 1)
    seen: list[tuple[str, int, int]] = []
    tokens = read_dataset(_spec(tmp_path, samples=2), tokenizer, lambda *step: seen.append(step))
    assert seen[-1] == ("reading calibration data", 16, 16)
    pool = _windows(_stream(tokenizer, DOCUMENTS), 16)[:16]
    assert all(window in pool for window in tokens.tolist())
    assert len(seen) < len(DOCUMENTS)


def test_the_seed_decides(tokenizer: Any, tmp_path: Path) -> None:
    for part in range(4):
        rows = [{"text": text} for text in DOCUMENTS[part::4]]
        _jsonl(tmp_path / f"{part}.jsonl", rows)
    first = read_dataset(_spec(tmp_path), tokenizer)
    assert torch.equal(first, read_dataset(_spec(tmp_path), tokenizer))
    assert not torch.equal(first, read_dataset(_spec(tmp_path, seed=1), tokenizer))


def test_every_sequence_begins_as_the_tokenizer_begins_texts(tmp_path: Path) -> None:
    class Starting:
        bos_token_id = 1
        eos_token_id = None

        def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> Any:
            if isinstance(text, str):
                return {"input_ids": [1, 9]}
            return {"input_ids": [[10] * len(part) for part in text]}

    _write_jsonl(tmp_path)
    tokens = read_dataset(_spec(tmp_path), Starting())
    assert tokens.shape == (4, 16)
    assert tokens[:, 0].tolist() == [1] * 4
    assert (tokens[:, 1:] == 10).all()


def test_splits_and_columns(tokenizer: Any, tmp_path: Path) -> None:
    _jsonl(tmp_path / "train.jsonl", [{"body": "train " * 40, "n": 1}] * 3)
    _jsonl(tmp_path / "test.jsonl", [{"body": "other " * 40, "n": 1}] * 3)
    train = read_dataset(_spec(tmp_path), tokenizer)  # the one column of text
    test = read_dataset(_spec(tmp_path, split="test", field="body"), tokenizer)
    assert "train" in tokenizer.decode(train[0])
    assert "other" in tokenizer.decode(test[0])


def test_empty_rows_are_left_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": text} for document in DOCUMENTS for text in (document, "", None)]
    _jsonl(tmp_path / "rows.jsonl", rows)
    expected = _windows(_stream(tokenizer, DOCUMENTS), 16)
    whole = read_dataset(_spec(tmp_path, samples=len(expected)), tokenizer)
    assert sorted(whole.tolist()) == sorted(expected)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, r"2 columns of text; name one, .*,field=a; .* are a, b\."),
        ([{"a": 1}], {}, "no column of text; its columns are a"),
        ([{"text": "x"}], {"field": "body"}, "no column 'body'; its columns are text"),
        ([{"text": "x", "n": 1}], {"field": "n"}, "column 'n' .* is not text"),
        ([{"text": "x"}], {"split": "test"}, r"cannot be read: .*train"),
        ([{"text": "x"}], {"config": "small"}, "cannot be read: .*small"),
        ([{"text": "x"}], {}, "fewer than one sequence of 16"),
        ([{"text": "word " * 30}], {"samples": 99}, r"99 samples of 16 need 1584\. .*--samples "),
    ],
)
def test_refuses(
    rows: list[dict[str, Any]],
    fields: dict[str, Any],
    message: str,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    _jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match=message) as caught:
        read_dataset(_spec(tmp_path, **fields), tokenizer)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", b"PAR1 this is not one"),
        ("rows.jsonl", b'{"text": "cut'),
        ("rows.jsonl", b"\xff\xfe\x00\x01"),
        ("rows.jsonl", b""),
        ("image.bin", b"\x00\x01"),
        (None, b""),
    ],
)
def test_refuses_damaged_data(
    name: str | None, content: bytes, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if name is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match="The data set") as caught:
        read_dataset(_spec(folder), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_hub_name_that_cannot_be_reached(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"data set nobody/nothing, .* cannot be read: ") as caught:
        read_dataset(_spec("nobody/nothing"), tokenizer)
    assert "\n" not in str(caught.value)


def test_says_what_to_install(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **rest: Any) -> Any:
        if name.split(".")[0] == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=r"pip install gqsa-compiler\[data\]"):
        read_dataset(_spec("owner/name"), tokenizer)


def test_leaves_the_progress_bars_as_they_were(tokenizer: Any, tmp_path: Path) -> None:
    _write_jsonl(tmp_path)
    before = datasets.is_progress_bar_enabled()
    read_dataset(_spec(tmp_path), tokenizer)
    assert datasets.is_progress_bar_enabled() == before


def test_a_spec_reads_a_data_set(source: ModelSource, tokenizer: Any, tmp_path: Path) -> None:
    _write_jsonl(tmp_path)
    spec = parse_calibration(
        [f"hf:{tmp_path},split=train,field=text"], samples=3, sequence_length=16, seed=1
    )
    assert torch.equal(calibration_tokens(spec, source, 1), read_dataset(spec, tokenizer))
