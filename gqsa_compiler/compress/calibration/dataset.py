"""Calibration sequences from a Hugging Face data set, read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqsa_compiler.compress.calibration.spec import DATASET_FILES, EXTRA, CalibrationSpec
from gqsa_compiler.compress.calibration.text import start_tokens, too_short
from gqsa_compiler.errors import UsageError
from gqsa_compiler.progress import Progress

POOL = 8
"""Sequences read for each one that is chosen, so that they come from many documents."""

ROWS = 64
"""Rows tokenised together."""


def read_dataset(spec: CalibrationSpec, tokenizer: Any, progress: Progress | None = None) -> Tensor:
    """Choose token sequences from a data set.

    Its files are taken in an order that the seed gives and are read only as far as needed: until
    there are `POOL` times the sequences asked for. The seed chooses among those. Documents are
    joined by the tokenizer's end-of-text token, if it has one, and then cut; a row that ends with
    a line break goes on in the next row, as in data sets that store texts line by line.

    Parameters
    ----------
    spec : CalibrationSpec
        Of source ``dataset``.
    tokenizer : transformers.PreTrainedTokenizerBase
        If it begins texts with a special token, so does every sequence.
    progress : callable, optional
        Called with (stage, sequences read, sequences to read).

    Returns
    -------
    int64 [samples, length]
        Fewer if the data set has fewer and the spec is not exact.

    Raises
    ------
    UsageError
        The package `datasets` is missing, the data set cannot be found or read, the column with
        the text is not clear, or there are too few tokens.
    """
    assert spec.samples is not None, "CalibrationSpec wants a number for a data set"
    start = start_tokens(tokenizer)
    body = spec.sequence_length - len(start)
    most = POOL * spec.samples
    pool: list[Tensor] = []
    tokens: list[int] = []
    total = 0
    with _quiet():
        for ids in _documents(spec, tokenizer):
            tokens += ids
            total += len(ids)
            whole = len(tokens) // body * body
            pool += torch.tensor(tokens[:whole]).view(-1, body)
            del tokens[:whole]
            if progress is not None:
                progress("reading calibration data", min(len(pool), most), most)
            if len(pool) >= most:
                break
    least = spec.samples if spec.exact else 1
    if len(pool) < least:
        name = f"The {spec.describe()}"
        raise too_short(name, total, len(pool), least, spec.sequence_length, body)
    generator = torch.Generator().manual_seed(spec.seed)
    chosen = torch.randperm(min(len(pool), most), generator=generator)[: spec.samples]
    rows = torch.stack([pool[index] for index in chosen.tolist()])
    return torch.cat([torch.tensor(start).expand(len(rows), -1).to(rows.dtype), rows], dim=1)


def _documents(spec: CalibrationSpec, tokenizer: Any) -> Iterator[list[int]]:
    """Yield the tokens of a few documents at a time, end-of-text tokens included."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = _texts(spec)
    while texts := list(islice(rows, ROWS)):
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ids: list[int] = []
        for text, part in zip(texts, encoded, strict=True):
            ids += part if text.endswith("\n") else [*part, *end]
        yield ids


def _texts(spec: CalibrationSpec) -> Iterator[str]:
    """Yield the texts of a data set that are not empty."""
    try:
        stream = _open(spec)
        field = spec.field
        checked = False
        for row in stream:
            if not checked:
                field = _text_column(spec, row, stream.features)
                checked = True
            text = row[field]
            if isinstance(text, str) and text:
                yield text
    except UsageError:
        raise
    except Exception as error:
        # `datasets` raises its own kinds, the hub's, the network's and those of every file
        # format; each means that the data set cannot be had, and its text says why.
        raise UsageError(f"The {spec.describe()} cannot be read: {_reason(error)}") from error


def _open(spec: CalibrationSpec) -> Any:
    """Open a data set as a stream of rows, its files in seeded order."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"Reading a data set needs the package datasets: {EXTRA}") from error

    name, arguments = spec.dataset, {"name": spec.config}
    path = Path(name).expanduser()
    if path.is_file():
        name, arguments["data_files"] = DATASET_FILES[path.suffix.lower()], str(path)
    elif path.is_dir():
        name = str(path)
    builder = datasets.load_dataset_builder(name, **arguments)
    if hasattr(builder.config, "keep_linebreaks"):
        # Plain text comes line by line.
        builder.config.keep_linebreaks = True
    stream = builder.as_streaming_dataset(split=spec.split)
    # A buffer of one row: rows stay in order, files do not.
    return stream.shuffle(seed=spec.seed, buffer_size=1)


def _text_column(spec: CalibrationSpec, row: dict[str, Any], features: Any) -> str:
    """Choose the column with the text: the one asked for, ``text``, or the only one of strings."""
    if features is None:
        strings = [name for name, value in row.items() if isinstance(value, str)]
    else:
        strings = [
            name
            for name, kind in features.items()
            if getattr(kind, "dtype", None) in ("string", "large_string")
        ]
    columns = f"its columns are {', '.join(row)}"
    if spec.field is not None:
        if spec.field not in row:
            raise UsageError(f"The {spec.describe()} has no column {spec.field!r}; {columns}.")
        if spec.field not in strings:
            raise UsageError(
                f"The column {spec.field!r} of the data set {spec.dataset} is not text; {columns}."
            )
        return spec.field
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        what = f"{len(strings)} columns of text" if strings else "no column of text"
        remedy = f"name one, e.g. hf:{spec.dataset},field={strings[0]}; " if strings else ""
        raise UsageError(f"The {spec.describe()} has {what}; {remedy}{columns}.")
    return strings[0]


def _reason(error: Exception) -> str:
    """Return an error's text in one line of bounded length, always ending in a stop."""
    text = " ".join(str(error).split()) or repr(error)
    text = text if len(text) <= 300 else f"{text[:300].rsplit(' ', 1)[0]} ..."
    return text if text.endswith(".") else f"{text}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off what `datasets` would write beside ours; what it says of errors we say."""
    try:
        from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
        from datasets.utils import logging
    except ImportError:  # whoever reads the data set says so
        yield
        return
    shown, level = is_progress_bar_enabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()
