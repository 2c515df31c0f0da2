"""Write a model's tokenizer, chat template and generation settings beside compiled weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.json_file import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def save_directory_tokenizer(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Write the tokenizer files of the model directory `source` into `target`.

    Parameters
    ----------
    source : Path
        A Hugging Face directory.
    target : Path
        An existing directory.
    config : dict
        The model's configuration; its EOS ids are part of the union.

    Raises
    ------
    ModelError
        `source` has no tokenizer, or one that transformers cannot convert.
    """
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{source} has no tokenizer (tokenizer.json or tokenizer.model).")
    if (source / "tokenizer.json").is_file():
        write_tokenizer(source, target, config)
        return
    # A sentencepiece or vocab.json tokenizer: transformers converts it to the fast format.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ModelError(f"{source}: transformers cannot load its tokenizer: {error}") from error
    save_transformers_tokenizer(tokenizer, target, config, _read_json(_generation(source)))


def save_transformers_tokenizer(
    tokenizer: Any, target: Path, config: dict[str, Any], generation: dict[str, Any]
) -> None:
    """Write a tokenizer that transformers has loaded.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    target : Path
        An existing directory.
    config, generation : dict
        The model's configuration and its generation settings (may be empty).
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.save_pretrained(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(
                f"The tokenizer {type(tokenizer).__name__} has no tokenizer.json form; "
                "gqsa needs one that the tokenizers library can run."
            )
        _generation(folder).write_text(json.dumps(generation), encoding="utf-8")
        write_tokenizer(folder, target, config)


def write_tokenizer(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Copy ``tokenizer.json`` and write the three files that go with it into `target`."""
    tokenizer_text = (source / "tokenizer.json").read_bytes()
    tokenizer = _read_json(source / "tokenizer.json")
    settings = _read_json(source / "tokenizer_config.json")
    generation = _read_json(_generation(source))
    template = chat_template(source, settings)

    settings.pop("chat_template", None)
    # The hub's Python code for a tokenizer is never run here.
    settings.pop("auto_map", None)
    generation["eos_token_id"] = eos_token_ids(config, generation, settings, tokenizer)
    for name in ("bos_token_id", "pad_token_id"):
        if generation.get(name) is None and config.get(name) is not None:
            generation[name] = config[name]

    (target / "tokenizer.json").write_bytes(tokenizer_text)
    _write_json(target / "tokenizer_config.json", settings)
    _write_json(_generation(target), generation)
    if template is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def chat_template(source: Path, settings: dict[str, Any]) -> str | None:
    """Find a model's chat template in the three places it may be.

    Parameters
    ----------
    source : Path
        The model directory.
    settings : dict
        Its ``tokenizer_config.json``.

    Returns
    -------
    str or None
        The template named ``default`` where there are several; None without one.
    """
    jinja = source / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    found = _read_json(source / "chat_template.json").get("chat_template")
    found = found or settings.get("chat_template")
    if isinstance(found, list):
        by_name = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = by_name.get("default")
    return found if isinstance(found, str) else None


def eos_token_ids(
    config: dict[str, Any],
    generation: dict[str, Any],
    settings: dict[str, Any],
    tokenizer: dict[str, Any],
) -> list[int]:
    """Return the sorted union of the end-of-sequence ids that a model's files name.

    Instruct models often end a turn with an id that only one of the files knows, so that
    generation would never stop with another's.
    """
    ids: set[int] = set()
    for fields in (config, generation):
        value = fields.get("eos_token_id")
        ids.update(v for v in (value if isinstance(value, list) else [value]) if type(v) is int)
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        found = token_id(tokenizer, token)
        if found is not None:
            ids.add(found)
    return sorted(ids)


def token_id(tokenizer: dict[str, Any], token: str) -> int | None:
    """Look up a token in a parsed ``tokenizer.json``; None when it is not there."""
    for added in tokenizer.get("added_tokens") or ():
        if added.get("content") == token:
            return int(added["id"])
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict):
        found = vocabulary.get(token)
        return None if found is None else int(found)
    if isinstance(vocabulary, list):  # Unigram: [piece, score] pairs
        return next((i for i, pair in enumerate(vocabulary) if pair[0] == token), None)
    return None


def _generation(directory: Path) -> Path:
    return directory / "generation_config.json"


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
