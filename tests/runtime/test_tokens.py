from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.tokens import StopStrings, TextDecoder, load_tokenizer
from tests.runtime.toy import VOCAB, make_tokenizer

TOKENIZER = make_tokenizer()


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """Words with a leading ▁ and bytes as <0x..>, as Llama 2's tokenizer has them."""
    tokens = ["<unk>", "▁the", "▁man", "s", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True)
    )
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence(
        [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    )
    return tokenizer


@given(st.text(max_size=30), st.text(max_size=10))
def test_streamed_text_is_the_text(text: str, context: str) -> None:
    """Every piece is whole characters, and the pieces together are the text."""
    decoder = TextDecoder(TOKENIZER, TOKENIZER.encode(context).ids)
    pieces = [decoder.push(i) for i in TOKENIZER.encode(text).ids]
    assert "".join(pieces) + decoder.flush() == text
    for piece in pieces:
        assert not piece.endswith("\N{REPLACEMENT CHARACTER}")
        assert piece.encode("utf-8").decode("utf-8") == piece


@given(st.lists(st.integers(0, VOCAB - 1), max_size=30))
def test_any_tokens_stream_as_they_decode(ids: list[int]) -> None:
    """Broken UTF-8 and special tokens included."""
    decoder = TextDecoder(TOKENIZER)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == TOKENIZER.decode(ids)


def test_half_a_character_is_held_until_it_is_whole() -> None:
    ids = TOKENIZER.encode("é€😀").ids
    decoder = TextDecoder(TOKENIZER)
    assert [decoder.push(i) for i in ids] == ["", "é", "", "", "€", "", "", "", "😀"]
    decoder.push(ids[0])
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.flush() == ""


def test_sentencepiece_spaces_and_bytes() -> None:
    tokenizer = sentencepiece_tokenizer()
    the, man, s = 1, 2, 3
    start = TextDecoder(tokenizer)
    assert [start.push(i) for i in (the, man, s)] == ["the", " man", "s"]
    continued = TextDecoder(tokenizer, [the])
    assert continued.push(man) == " man"
    euro = [4 + b for b in "€".encode()]
    assert [start.push(i) for i in (*euro, the)] == ["", "", "€", " the"]


def slow_cut(text: str, stops: list[str]) -> str:
    """The definition: character by character, end at the first stop string complete."""
    seen = ""
    for char in text:
        seen += char
        done = [stop for stop in stops if seen.endswith(stop)]
        if done:
            return seen[: -len(max(done, key=len))]
    return seen


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=5), max_size=8),
)
def test_stop_strings(stops: list[str], pieces: list[str]) -> None:
    """However the text is cut in pieces, and nothing emitted is ever part of a stop string."""
    cutter = StopStrings(stops)
    emitted = ""
    for i, piece in enumerate(pieces):
        emitted += cutter.push(piece)
        so_far = "".join(pieces[: i + 1])
        assert slow_cut(so_far, stops).startswith(emitted)
        if not cutter.stopped:
            held = so_far[len(emitted) :]
            assert not held or any(stop.startswith(held) for stop in stops)
    expected = slow_cut("".join(pieces), stops)
    assert cutter.stopped == any(stop in "".join(pieces) for stop in stops)
    assert emitted + cutter.flush() == expected


def test_missing_and_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"there is no .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    """Some models ship a tokenizer.json that truncates at 512 tokens."""
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("xyzxyzxyz").ids) == 9
    assert len(load_tokenizer(tmp_path).encode("xy").ids) == 2
