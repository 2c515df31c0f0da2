"""What determines a compression's result: a run only goes on with work of the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gqsa_compiler.compress.calibration import CalibrationSpec
from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.tokenizer import TOKENIZER_FILES
from gqsa_compiler.progress import Progress

STAGE = "checking the model"

_CHUNK = 1 << 24
_DIGITS = 16


def run_settings(
    source: ModelSource,
    recipe: dict[str, Any],
    spec: CalibrationSpec,
    progress: Progress,
    **others: Any,
) -> dict[str, Any]:
    """Return all that the result depends on, as JSON types.

    Where the model and the output lie is not among it, nor is the number of threads: that only
    changes the last bits of sums, and a machine that is busy now may be free tomorrow.

    Parameters
    ----------
    source : ModelSource
    recipe : dict
        As `recipe_to_dict` gives it.
    spec : CalibrationSpec
    progress : callable
        Called with (stage, MiB read, MiB in all).
    **others
        More settings.

    Raises
    ------
    ModelError, UsageError
        A file of the model, or a calibration text, cannot be read.
    """
    settings = {
        "model": source.name,
        "files": model_digests(source, progress),
        "config": source.config,
        "recipe": recipe,
        "calibration": spec.to_dict(),
    }
    if texts := text_digests(spec):
        settings["texts"] = texts
    return {**settings, **others}


def model_digests(source: ModelSource, progress: Progress) -> dict[str, str]:
    """Hash the files of a model that matter.

    Whole, not in samples: a model may be fine-tuned in a few layers, or damaged in a few bytes.
    They are read at the disk's speed, and a compression reads them several times more.

    Returns
    -------
    dict of str to str
        The beginning of a SHA-256 by file name.
    """
    files = [source.path] if source.path.is_file() else _directory_files(source.path)
    done = 0

    def seen(count: int) -> None:
        nonlocal done
        done += count
        progress(STAGE, done >> 20, total >> 20)

    try:
        total = sum(path.stat().st_size for path in files)
        return {path.name: _digest(path, seen) for path in files}
    except OSError as error:
        raise ModelError(f"{source.path} cannot be read: {error.strerror or error}.") from error


def text_digests(spec: CalibrationSpec) -> dict[str, str]:
    """Hash the calibration texts; a pipe, which can be read only once, is left out."""
    try:
        return {
            str(path.resolve()): _digest(path, lambda _: None)
            for path in spec.paths
            if path.is_file()
        }
    except OSError as error:
        raise UsageError(
            f"The calibration file {error.filename} cannot be read: {error.strerror or error}."
        ) from error


def _directory_files(directory: Path) -> list[Path]:
    weights = sorted(directory.glob("*.safetensors"))
    tokenizer = [directory / name for name in TOKENIZER_FILES]
    return [*weights, *(path for path in tokenizer if path.is_file())]


def _digest(path: Path, seen: Callable[[int], None]) -> str:
    value = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            value.update(data)
            seen(len(data))
    return value.hexdigest()[:_DIGITS]
