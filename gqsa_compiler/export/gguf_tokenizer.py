"""A byte-level BPE tokenizer.json as GGUF's tokenizer fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends._transformers import gguf_tokenizer_splits
from gqsa_compiler.frontends.json_file import read_json

_PREFERRED = ("llama-bpe", "qwen2", "gpt-4o", "tekken")


def add_tokenizer(writer: Any, directory: Path, config: Mapping[str, Any], where: str) -> None:
    """Add a tokenizer.

    Parameters
    ----------
    writer : gguf.GGUFWriter
    directory : Path
        With ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``, as
        `ModelSource.save_tokenizer` writes them.
    config : mapping
        The model's configuration.
    where : str
        The model, for messages.

    Raises
    ------
    ModelError
        The tokenizer is of another kind than byte-level BPE, or cuts text in a way that GGUF has
        no name for.
    """
    parsed = read_json(directory / "tokenizer.json")
    bpe = parsed.get("model") or {}
    byte_level = bpe.get("type") == "BPE" and not bpe.get("byte_fallback")
    if not byte_level or parsed.get("normalizer") not in (None, {"type": "NFC"}):
        raise ModelError(
            f"{where} has a tokenizer that is no byte-level BPE ({bpe.get('type')}); gqsa does not "
            "export those to GGUF. Export the model with --to dense and use llama.cpp's converter."
        )
    vocabulary = {**bpe["vocab"]}
    special = {}
    for added in parsed.get("added_tokens") or ():
        vocabulary[added["content"]] = added["id"]
        special[added["id"]] = bool(added.get("special"))
    size = int(config["vocab_size"])
    tokens: list[str | None] = [None] * size
    for token, index in vocabulary.items():
        if not 0 <= index < size:
            raise ModelError(f"{where}: the token {token!r} has the id {index}, beyond {size}.")
        tokens[index] = token
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(parsed.get("pre_tokenizer"), where))
    # llama.cpp wants a text for every row of the embedding.
    writer.add_token_list([f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)])
    writer.add_token_types([_type(i, t, special) for i, t in enumerate(tokens)])
    writer.add_token_merges(merges)
    _add_special(writer, directory, config, parsed)


def split_name(pre_tokenizer: Any, where: str) -> str:
    """Return GGUF's name of the way in which text is cut before byte-pair encoding.

    Raises
    ------
    ModelError
        There is none that we know.
    """
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0].get("pretokenizers") or []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        known = gguf_tokenizer_splits()
        names = [name for name in (*_PREFERRED, *known) if known.get(name) == pattern]
        if names:
            return names[0]
    raise ModelError(
        f"{where} has a tokenizer that cuts text in a way that GGUF has no known name for "
        f"({' and '.join(map(str, kinds))}). Export the model with --to dense and use llama.cpp's "
        "converter."
    )


def _type(index: int, token: str | None, special: Mapping[int, bool]) -> int:
    from gguf import TokenType

    if token is None:
        return int(TokenType.UNUSED)
    if index not in special:
        return int(TokenType.NORMAL)
    return int(TokenType.CONTROL if special[index] else TokenType.USER_DEFINED)


def _add_special(
    writer: Any, directory: Path, config: Mapping[str, Any], parsed: Mapping[str, Any]
) -> None:
    generation = read_json(directory / "generation_config.json")
    ends = generation.get("eos_token_id") or []
    first = config.get("eos_token_id")
    eos = first if isinstance(first, int) else (ends[0] if ends else None)
    if eos is not None:
        writer.add_eos_token_id(eos)
        others = [index for index in ends if index != eos]
        if others:
            writer.add_eot_token_id(others[0])
    bos = generation.get("bos_token_id")
    if isinstance(bos, int):
        writer.add_bos_token_id(bos)
    pad = generation.get("pad_token_id")
    if isinstance(pad, int):
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(_adds_bos(parsed))
    template = directory / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _adds_bos(parsed: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a special token before a text."""
    post = parsed.get("post_processor") or {}
    steps = post.get("processors") or [post]
    return any(
        step.get("type") == "TemplateProcessing" and "SpecialToken" in (step["single"] or [{}])[0]
        for step in steps
    )
