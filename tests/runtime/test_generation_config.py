"""Types in generation_config.json; native/test_bad_input.py compares the native runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler.runtime.errors import ArtefactError
from gqsa_compiler.runtime.generation_config import check_generation_config

PATH = Path("DIR") / "generation_config.json"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": None, "do_sample": None, "eos_token_id": None},
        {"top_k": 50.0, "top_p": 1, "min_p": 0, "do_sample": True, "eos_token_id": [1, 2]},
        {"transformers_version": "5.0", "eos_token_id": 7},
        {"eos_token_id": [7, None]},
    ],
)
def test_what_models_bring(config: dict[str, Any]) -> None:
    check_generation_config(config, PATH)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"temperature": "warm"}, "temperature should be a number"),
        ({"top_p": True}, "top_p should be a number"),
        ({"top_k": 5.5}, "top_k should be a whole number"),
        ({"top_k": float("inf")}, "top_k should be a whole number"),
        ({"do_sample": 1}, "do_sample should be true or false"),
        ({"eos_token_id": "0"}, "eos_token_id should be a token id"),
        ({"eos_token_id": [0, [1]]}, "eos_token_id should be a token id"),
        ({"eos_token_id": 1 << 70}, "eos_token_id should be a token id"),
    ],
)
def test_other_types(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ArtefactError, match=words) as caught:
        check_generation_config(config, PATH)
    assert str(PATH) in str(caught.value)
