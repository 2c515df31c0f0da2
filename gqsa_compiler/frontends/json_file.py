"""Read the JSON files of a model, which anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import ModelError

MAX_JSON_BYTES = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict

    Raises
    ------
    ModelError
        The file cannot be read, is too large, is not UTF-8, not JSON, nested beyond reason, or
        holds no object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {MAX_JSON_BYTES} bytes; it is not read.")
        fields = json.loads(text.decode("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return fields
