"""docs/format.md's example is what the writer writes, and its pseudocode decodes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler.checkpoint import (
    BSRLayer,
    CheckpointReader,
    CheckpointWriter,
    QuantizationConfig,
    pack_codes,
    to_dense,
    validate,
)
from gqsa_compiler.limits import BITS
from tests.checkpoint.helpers import array_of, parse_raw

DOC = Path(__file__).parents[2] / "docs" / "format.md"


def block(after: str, kind: str) -> str:
    """Return the first fenced block of a kind after a text."""
    text = DOC.read_text(encoding="utf-8")
    found = re.search(rf"```{kind}\n(.*?)\n```", text[text.index(after) :], re.DOTALL)
    assert found
    return found.group(1)


@pytest.fixture
def documented(tmp_path: Path) -> Path:
    """Return a directory with the document's files, byte for byte."""
    rows = block("`model.safetensors`, 534 bytes", "text").splitlines()
    content = b"".join(bytes.fromhex(row[10:57]) for row in rows)
    assert len(content) == 534
    path = tmp_path / "documented"
    path.mkdir()
    (path / "model.safetensors").write_bytes(content)
    (path / "config.json").write_text(block("## 6.", "json") + "\n")
    return path


@pytest.fixture
def matrix() -> np.ndarray:
    """Return the document's decoded matrix [2, 24]."""
    text = re.sub(r"row \d:", "", block("The whole matrix", "text"))
    return np.array(text.split(), np.float32).reshape(2, 24)


def test_the_reader_reads_it(documented: Path, matrix: np.ndarray) -> None:
    with CheckpointReader(documented) as reader:
        validate(reader)
        assert reader.layer_names == ("fc",)
        assert np.array_equal(to_dense(reader.layer("fc")), matrix)


def number(stream: np.ndarray, i: int, bits: int) -> int:
    """Read number i of a stream of bits as the document's pseudocode does."""
    b = i * bits
    word = int(stream[b // 8])
    if b % 8 + bits > 8:
        word += 256 * int(stream[b // 8 + 1])
    return (word >> b % 8) & (2**bits - 1)


@pytest.mark.parametrize("bits", BITS)
def test_the_pseudocode_reads_streams_of_all_bits(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, 19, dtype=np.uint8)
    stream = pack_codes(values, bits)
    assert [number(stream, i, bits) for i in range(19)] == values.tolist()


def test_the_three_bit_example_is_true() -> None:
    text = " ".join(DOC.read_text(encoding="utf-8").split())
    found = re.search(
        r"The codes ([\d, ]+) are `([\da-f ]+)`, and the zero points ([\d, ]+) are `([\da-f ]+)`",
        text,
    )
    assert found
    for values, packed in (found.group(1, 2), found.group(3, 4)):
        given = np.array(values.split(", "), np.uint8)
        assert pack_codes(given, 3).tobytes() == bytes.fromhex(packed)
    rows = [line.split()[1:] for line in block("**Three bits.**", "text").splitlines()]
    assert rows[0] == found.group(2).split()[::-1]
    assert rows[1] == [f"{int(byte, 16):08b}" for byte in rows[0]]
    assert [int(code, 2) for code in reversed(rows[2])] == [
        int(v) for v in found.group(1).split(", ")
    ]
    assert "".join(rows[2]) == "".join(rows[1])


def test_the_pseudocode_decodes_it(documented: Path, matrix: np.ndarray) -> None:
    raw = parse_raw(documented / "model.safetensors")
    n, k = array_of(raw, "fc.shape", np.int64)
    indptr = array_of(raw, "fc.indptr", np.int32)
    indices = array_of(raw, "fc.indices", np.uint16)
    qweight = array_of(raw, "fc.qweight", np.uint8)
    scales = array_of(raw, "fc.scales", np.float16)
    qzeros = array_of(raw, "fc.qzeros", np.uint8)
    decoded = np.zeros((n, k), np.float32)
    for r in range(n):
        for j in range(indptr[r], indptr[r + 1]):
            zero = number(qzeros, j, 4)
            for i in range(8):
                code = number(qweight[j], i, 4)
                decoded[r, int(indices[j]) * 8 + i] = (code - zero) * float(scales[j])
    assert np.array_equal(decoded, matrix)


def test_the_writer_writes_it(documented: Path, tmp_path: Path) -> None:
    layer = BSRLayer(
        name="fc",
        shape=(2, 24),
        group_size=8,
        indptr=np.array([0, 2, 3], np.int32),
        indices=np.array([0, 2, 1], np.uint16),
        qweight=np.array(
            [[0x98, 0xBA, 0x10, 0xF7], [0x00, 0x55, 0xAA, 0xFF], [0x21, 0x43, 0x65, 0x87]],
            np.uint8,
        ),
        scales=np.array([0.5, -0.25, 0.125], np.float16),
        qzeros=np.array([0x58, 0x01], np.uint8),
    )
    config = QuantizationConfig(group_size=8, ratio=0.5, producer="example 1")
    with CheckpointWriter(tmp_path / "o", {"architectures": ["LlamaForCausalLM"]}, config) as out:
        out.add_layer(layer)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "o" / file).read_bytes() == (documented / file).read_bytes()


def test_the_config_of_section_3_is_valid() -> None:
    value = json.loads(block("## 3.", "json"))
    assert QuantizationConfig.from_dict(value).to_dict().keys() == value.keys()
