"""Token for token against Hugging Face's tokenizers, on every kind of tokenizer.json that models
of our families bring, and a sentence for every other.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as cuts

from tests.runtime.native.programs import Probe

ROOT = Path(__file__).parents[3]
# The patterns of the families' tokenizers; facts of the models, not of anybody's code.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
# The newest Unicode that every library here knows in full; characters assigned later are classes
# of their own to one and unassigned to the other.
_OLDEST_UNICODE = unicodedata.ucd_3_2_0


def _texts() -> list[str]:
    files = ["README.md", "LICENSE", "docs/compression.md", "tests/data/alice.txt", "Makefile",
             "runtime/params.py", "pyproject.toml"]  # fmt: skip
    return [(ROOT / name).read_text(encoding="utf-8") for name in files]


def _known(character: str) -> bool:
    category = unicodedata.category(character)
    return category != "Cs" and (
        category in ("Co", "Cc") or _OLDEST_UNICODE.category(character) != "Cn"
    )


def _random_texts(count: int) -> list[str]:
    """Text of all scripts: code points of Unicode 3.2, which no library disagrees about."""
    rng = random.Random(7)
    pool = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    pool = [c for c in pool if _known(c)]
    common = list(" \t\n\r'\"\u00a0\u2003\u3000\u0085abcdefgSTLMDRV0123456789.,;!é½٣")
    texts = []
    for _ in range(count):
        length = rng.randrange(1, 60)
        texts.append(
            "".join(rng.choice(common if rng.random() < 0.6 else pool) for _ in range(length))
        )
    return texts


def _train(tokenizer: Tokenizer, **options: Any) -> None:
    alphabet = options.pop("initial_alphabet", cuts.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False,
        **options,
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(), trainer)


def _byte_level(cut: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=parts.pop("ignore_merges", False)))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    _train(tokenizer)
    return tokenizer


def _split(pattern: str) -> Any:
    return cuts.Sequence(
        [
            cuts.Split(Regex(pattern), "isolated"),
            cuts.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentence_piece(metaspace: bool) -> Tokenizer:
    """SentencePiece as llama 2 (a normalizer) or as mistral and later (Metaspace) write it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.pre_tokenizer = cuts.Metaspace(prepend_scheme="first", split=True)  # for training
    byte_tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=[*byte_tokens, *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    if metaspace:
        tokenizer.pre_tokenizer = cuts.Metaspace(prepend_scheme="first", split=False)
    else:
        prefix = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(prefix)
        # Without the attribute's removal a cut would remain: the library cannot unset it.
        data = json.loads(tokenizer.to_str())
        data["pre_tokenizer"] = None
        # The trainer's byte tokens are ordinary ones, not special.
        tokenizer = Tokenizer.from_str(json.dumps(data))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def _gemma() -> Tokenizer:
    tokenizer = _sentence_piece(metaspace=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = cuts.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _stripped() -> Tokenizer:
    """GPT-2's with added tokens that take the spaces around them, and one that is normalised."""
    tokenizer = _byte_level(cuts.ByteLevel(add_prefix_space=True), normalizer=normalizers.NFKC())
    tokenizer.add_tokens([AddedToken("[MASK]", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("ﬁne", normalized=True), "[MASKED]"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.RobertaProcessing(("<s>", 3), ("<|im_end|>", 2)),
        ]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: _byte_level(cuts.ByteLevel(add_prefix_space=False)),
    "smollm2": lambda: _byte_level(
        cuts.Sequence([cuts.Digits(True), cuts.ByteLevel(add_prefix_space=False)])
    ),
    "llama3": lambda: _byte_level(_split(LLAMA3), ignore_merges=True),
    "qwen": lambda: _byte_level(_split(QWEN), normalizer=normalizers.NFC()),
    "digits": lambda: _byte_level(
        cuts.Sequence([cuts.Digits(False), cuts.ByteLevel(add_prefix_space=True)])
    ),
    "llama2": lambda: _sentence_piece(metaspace=False),
    "mistral": lambda: _sentence_piece(metaspace=True),
    "gemma": _gemma,
    "stripped": _stripped,
}
EDGES = [
    "", " ", "   ", "\n", " \n ", "a", "'S'T 'll 'LL I'M don't", "1234567890 12½ ٣٤", "é Å ﬁ ﬁne",
    "<|im_start|>user\nHi<|im_end|> <s> </s>", "  [MASK] [MASKED]  [MASK][MASK] x",
    "\u2028\u2029\x85",
    "<0x0A><0xFF>", "▁a ▁ b", "\u0000", "🦙🦙", "x" * 300, " " * 100 + "y",
]  # fmt: skip


@pytest.fixture(scope="session", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, str]:
    """Return a tokenizer of Hugging Face's library, and its file."""
    tokenizer = KINDS[request.param]()
    path = str(tmp_path_factory.mktemp("tokenizer") / f"{request.param}.json")
    tokenizer.save(path)
    return tokenizer, path


def assert_same(probe: Probe, tokenizer: Tokenizer, path: str, texts: list[str]) -> None:
    """Compare the tokens of texts, and the texts of these tokens."""
    for special in (True, False):
        for plain in (False, True):
            tokenizer.encode_special_tokens = plain
            wanted = [tokenizer.encode(text, add_special_tokens=special).ids for text in texts]
            got = probe.ask("encode", file=path, texts=texts, special=special, plain=plain)
            for text, ours, theirs in zip(texts, got, wanted, strict=True):
                assert ours == theirs, text
    tokenizer.encode_special_tokens = False
    for skip in (True, False):
        texts_back = [tokenizer.decode(ids, skip_special_tokens=skip) for ids in wanted]
        assert probe.ask("decode", file=path, ids=wanted, skip=skip) == texts_back


def test_tokens_of_texts(probe: Probe, pair: tuple[Tokenizer, str]) -> None:
    paragraphs = [part for text in _texts() for part in text.split("\n\n")]
    assert_same(probe, *pair, [*EDGES, *paragraphs])


def test_tokens_of_random_texts(probe: Probe, pair: tuple[Tokenizer, str]) -> None:
    assert_same(probe, *pair, _random_texts(400))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]).filter(_known)), max_size=20)
)
def test_tokens_of_generated_texts(
    probe: Probe, pair: tuple[Tokenizer, str], texts: list[str]
) -> None:
    assert_same(probe, *pair, texts)


def test_random_tokens_decode_alike(probe: Probe, pair: tuple[Tokenizer, str]) -> None:
    tokenizer, path = pair
    rng = random.Random(3)
    size = tokenizer.get_vocab_size() + 4  # some that do not exist
    ids = [[rng.randrange(size) for _ in range(rng.randrange(12))] for _ in range(500)]
    for skip in (True, False):
        wanted = [tokenizer.decode(each, skip_special_tokens=skip) for each in ids]
        assert probe.ask("decode", file=path, ids=ids, skip=skip) == wanted


@pytest.mark.slow
def test_tokens_of_wikitext(probe: Probe, pair: tuple[Tokenizer, str], wikitext: Path) -> None:
    text = wikitext.read_text(encoding="utf-8")
    assert_same(probe, *pair, [text[i : i + 5000] for i in range(0, len(text), 5000)])


def test_streaming_is_pythons(probe: Probe, pair: tuple[Tokenizer, str]) -> None:
    from gqsa_compiler.runtime.tokens import TextDecoder

    tokenizer, path = pair
    rng = random.Random(5)
    for _ in range(30):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(12)]
        decoder = TextDecoder(tokenizer, ids[:4])
        wanted = [decoder.push(token) for token in ids[4:]] + [decoder.flush()]
        got = probe.ask("stream", file=path, context=ids[:4], ids=ids[4:], stops=[])
        assert got["pieces"] == wanted


# What is not supported, by the words of the refusal.
REFUSED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "the model 'WordPiece'": lambda d: d["model"].update(type="WordPiece"),
    "the model 'Unigram'": lambda d: d["model"].update(type="Unigram"),
    "end_of_word_suffix": lambda d: d["model"].update(end_of_word_suffix="</w>"),
    "dropout": lambda d: d["model"].update(dropout=0.1),
    "the normalizer 'BertNormalizer'": lambda d: d.update(normalizer={"type": "BertNormalizer"}),
    "the normalizer 'Precompiled'": lambda d: d.update(normalizer={"type": "Precompiled"}),
    "the pre-tokenizer 'Whitespace'": lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
    "the decoder 'WordPiece'": lambda d: d.update(decoder={"type": "WordPiece"}),
    "the post-processor 'Other'": lambda d: d.update(post_processor={"type": "Other"}),
    "a single_word token": lambda d: d["added_tokens"][0].update(single_word=True),
}
DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model.vocab should be an object": lambda d: d["model"].update(vocab=[]),
    "that is no token id": lambda d: d["model"]["vocab"].update(a=-1),
    "twice": lambda d: d["model"]["vocab"].update(zzz=5),
    "which is no token": lambda d: d["model"]["merges"].append(["zz", "yy"]),
    "no pair": lambda d: d["model"]["merges"].append("lonely"),
    "unk_token": lambda d: d["model"].update(unk_token="nowhere"),
    "another id": lambda d: d["added_tokens"][0].update(id=7),
    "should be a list": lambda d: d.update(added_tokens={}),
    "should be text": lambda d: d.update(decoder={"type": 5}),
}


@pytest.fixture(scope="module")
def plain() -> str:
    """Return a tokenizer.json for the cases below to change."""
    text: str = KINDS["gpt2"]().to_str()
    return text


@pytest.mark.parametrize("words", [*REFUSED, *DAMAGED])
def test_what_is_refused(probe: Probe, plain: str, tmp_path: Path, words: str) -> None:
    data = json.loads(plain)
    {**REFUSED, **DAMAGED}[words](data)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    said = probe.error("encode", file=str(path), texts=[""])
    assert words in said
    assert str(path) in said
    if words in REFUSED:
        assert "run this artefact with the Python runtime" in said


@pytest.mark.parametrize(
    "pattern",
    ["^a", "a$", "a.b", "[[a]b]", "[a&&b]", r"\Ga", r"(?<name>a)", "(?m:a)", r"\p{L", "a{2}+",
     r"[\S]", "[", "(a", r"\1", r"[a-\p{L}"],
)  # fmt: skip
def test_patterns_that_are_refused(probe: Probe, pattern: str) -> None:
    assert "the pattern" in probe.error("split", pattern=pattern, text="a")


def test_a_pattern_that_takes_too_long(probe: Probe) -> None:
    said = probe.error("split", pattern=r"(?:a|a)*[bc]", text="a" * 60 + "d")
    assert "too many steps" in said


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'"x"', b"[" * 100_000])
def test_files_that_are_no_tokenizer(probe: Probe, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text)
    assert str(path) in probe.error("encode", file=str(path), texts=[""])


def test_version_of_the_reference() -> None:
    """What the comparisons above are with; other releases may differ in what they accept."""
    assert int(tokenizers.__version__.split(".")[1]) >= 21
