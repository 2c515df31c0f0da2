"""The types of `generation_config.json`, checked when an artefact is loaded.

The native runtime checks the same (native/src/model.cpp): a file that one takes the other takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gqsa_compiler.runtime.errors import ArtefactError

GENERATION_CONFIG = "generation_config.json"
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


def check_generation_config(config: Mapping[str, Any], path: Path) -> None:
    """Check the fields that the runtime reads; null is as good as nothing.

    Ranges are checked when text is generated, since a caller may give other values.

    Raises
    ------
    ArtefactError
        A field has another type than Hugging Face's `generate` takes.
    """
    for name in _NUMBERS:
        if not _is_number(config.get(name)):
            raise _wrong(path, name, "a number")
    top_k = config.get("top_k")
    if not _is_number(top_k) or (isinstance(top_k, float) and not top_k.is_integer()):
        raise _wrong(path, "top_k", "a whole number")
    if not isinstance(config.get("do_sample"), bool | None):
        raise _wrong(path, "do_sample", "true or false")
    eos = config.get("eos_token_id")
    for token in eos if isinstance(eos, list) else (eos,):
        if token is None:
            continue
        if not isinstance(token, int) or isinstance(token, bool) or abs(token) >> 63:
            raise _wrong(path, "eos_token_id", "a token id or a list of them")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _wrong(path: Path, name: str, rule: str) -> ArtefactError:
    return ArtefactError(f"{path}: {name} should be {rule}.")
