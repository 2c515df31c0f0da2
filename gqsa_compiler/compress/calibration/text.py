"""Calibration sequences from text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqsa_compiler.errors import UsageError


def read_calibration(
    paths: Path | Sequence[Path],
    tokenizer: Any,
    samples: int | None,
    length: int,
    *,
    exact: bool = True,
) -> Tensor:
    """Cut UTF-8 texts into token sequences, evenly spread over all of them together.

    A sequence never spans two files; what is left at a file's end is not used.

    Parameters
    ----------
    paths : Path or sequence of Path
    tokenizer : transformers.PreTrainedTokenizerBase
        If it begins texts with a special token, so does every sequence.
    samples : int or None
        None takes every sequence there is.
    length : int
        Tokens of a sequence.
    exact : bool
        Fewer sequences than `samples` are an error; otherwise all there are, at least one.

    Returns
    -------
    int64 [samples, length]

    Raises
    ------
    UsageError
        A file cannot be read, is not UTF-8 text, or all have too few tokens.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    texts = [_read(path) for path in paths]
    start = start_tokens(tokenizer)
    body = length - len(start)
    tokens = 0
    windows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += len(ids)
        windows += (ids[at : at + body] for at in range(0, len(ids) - body + 1, body))
    least = samples if samples is not None and exact else 1
    if len(windows) < least:
        raise too_short(_name(paths), tokens, len(windows), least, length, body)
    count = min(samples or len(windows), len(windows))
    return torch.tensor([start + windows[i * len(windows) // count] for i in range(count)])


def start_tokens(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token in a list, if the tokenizer begins texts with it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


def too_short(
    name: str, tokens: int, windows: int, samples: int, length: int, body: int
) -> UsageError:
    """Build the error for a text of too few tokens; it says what would fit.

    Parameters
    ----------
    name : str
        Of the text, as the beginning of the sentence.
    tokens, windows : int
        What it has: tokens, and whole sequences.
    samples, length : int
        What was asked for.
    body : int
        Tokens of a sequence that come from the text.
    """
    if not windows:
        return UsageError(
            f"{name} has {tokens} tokens, fewer than one sequence of {length}; use a longer text "
            "or a smaller --sequence-length."
        )
    return UsageError(
        f"{name} has {tokens} tokens; {samples} samples of {length} need {samples * body}. Use a "
        f"longer text or fewer samples (--samples {windows})."
    )


def _name(paths: Sequence[Path]) -> str:
    if len(paths) == 1:
        return f"The calibration file {paths[0]}"
    return f"The calibration text in {len(paths)} files ({paths[0]} to {paths[-1]})"


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"The calibration file {path} is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise UsageError(
            f"The calibration file {path} cannot be read: {error.strerror}."
        ) from error
    if "\0" in text:
        raise UsageError(
            f"The calibration file {path} is not text (it has a zero byte at {text.index(chr(0))})."
        )
    return text
