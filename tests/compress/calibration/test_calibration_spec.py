"""What a user may ask to calibrate on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.compress.calibration import (
    CalibrationSpec,
    parse_calibration,
    parse_samples,
)
from gqsa_compiler.compress.calibration import spec as spec_module
from gqsa_compiler.errors import UsageError

NUMBERS: dict[str, Any] = {"samples": 8, "sequence_length": 16, "seed": 3}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("text", encoding="utf-8")
    return path


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "find_spec", lambda _name: object())


def test_the_default_is_sampled() -> None:
    spec = parse_calibration([], **NUMBERS)
    assert spec == parse_calibration(["sampled"], **NUMBERS)
    assert spec == CalibrationSpec(samples=8, sequence_length=16, seed=3)
    assert spec.to_dict() == {"source": "sampled", **NUMBERS}
    assert spec.local_paths == ()


def test_files(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.txt"
    other.write_text("text", encoding="utf-8")
    spec = parse_calibration([str(text), str(other)], **{**NUMBERS, "samples": None})
    assert spec.source == "text"
    assert spec.paths == spec.local_paths == (text, other)
    assert spec.samples is None
    assert spec.describe() == f"{text}, {other}"
    fields = json.loads(json.dumps(spec.to_dict()))
    assert fields["paths"] == [str(text), str(other)]
    # The text is cut without chance: another seed is the same request.
    assert "seed" not in fields


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("value", "fields"),
    [
        ("hf:owner/name", {"dataset": "owner/name"}),
        (
            "hf:Salesforce/wikitext,config=wikitext-2-raw-v1, split=validation",
            {
                "dataset": "Salesforce/wikitext",
                "config": "wikitext-2-raw-v1",
                "split": "validation",
            },
        ),
        ("hf:squad,field=context", {"dataset": "squad", "field": "context"}),
    ],
)
def test_data_sets(value: str, fields: dict[str, str]) -> None:
    spec = parse_calibration([value], **NUMBERS)
    assert spec == CalibrationSpec(source="dataset", **fields, **NUMBERS)  # type: ignore[arg-type]
    assert all(part in spec.describe() for part in fields.values())
    assert json.loads(json.dumps(spec.to_dict()))["seed"] == 3
    assert spec.local_paths == ()


@pytest.mark.usefixtures("_installed")
def test_local_data_sets_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse_calibration([f"hf:{tmp_path}"], **NUMBERS)
    assert spec.local_paths == (tmp_path,)
    monkeypatch.chdir(tmp_path.parent)
    beside = parse_calibration([f"hf:{tmp_path.name}"], **NUMBERS)
    assert beside.to_dict() == spec.to_dict()


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["missing.txt"], r"missing.txt does not exist; .* hf:NAME"),
        (["{dir}"], "is a directory; name its files, or .* hf:"),
        (["{text}", "{text}"], "is named twice"),
        (["{text}", "sampled"], "not several of them"),
        (["hf:a/b", "hf:c/d"], "not several of them"),
        (["hf:"], "names no data set"),
        (["hf:a/b,splt=train"], "'splt=train' in .* is not understood; write hf:NAME"),
        (["hf:a/b,split="], "is not understood"),
        (["hf:a/b,split=x,split=y"], "is not understood"),
        (["hf:./missing"], "The data set missing does not exist"),
        (["hf:{text}"], r"a text file is named without hf:"),
        (["{table}"], "is a table, not plain text; .* hf:"),
    ],
)
def test_refuses(values: list[str], message: str, text: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text("{}", encoding="utf-8")
    places = {"dir": tmp_path, "text": text, "table": table}
    with pytest.raises(UsageError, match=message):
        parse_calibration([value.format(**places) for value in values], **NUMBERS)


def test_says_how_to_install_what_data_sets_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"pip install gqsa-compiler\[data\]"):
        parse_calibration(["hf:owner/name"], **NUMBERS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "at least 1 sample, not 0"),
        ({"sequence_length": 1}, "at least 2 tokens, not 1"),
        ({"samples": None}, "Sampled text has no whole"),
        ({"samples": None, "source": "dataset", "dataset": "a/b"}, "A data set has no whole"),
    ],
)
def test_refuses_numbers(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrationSpec(**fields)


def test_samples() -> None:
    assert parse_samples("all") is None
    assert parse_samples("12") == 12
    for wrong in ("0", "-3", "1.5", "many", ""):
        with pytest.raises(UsageError, match="at least 1, or all"):
            parse_samples(wrong)


def test_reading_a_request_loads_no_pytorch() -> None:
    code = (
        "import sys; from gqsa_compiler.compress.calibration import parse_calibration; "
        "parse_calibration([], samples=1, sequence_length=2, seed=0); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "datasets"}
