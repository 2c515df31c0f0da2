"""Calibration tokens from wherever they were asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from gqsa_compiler.compress.calibration.dataset import read_dataset
from gqsa_compiler.compress.calibration.sampling import (
    chat_start,
    sample_text,
    sampling_dtype,
)
from gqsa_compiler.compress.calibration.spec import CalibrationSpec
from gqsa_compiler.compress.calibration.text import read_calibration
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import (
    build_model,
    load_parameters,
    load_tokenizer,
    stored_dtype,
)
from gqsa_compiler.progress import Progress


def calibration_tokens(
    spec: CalibrationSpec,
    source: ModelSource,
    bos_token_id: int | None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Make the token sequences that a model is calibrated and trained on.

    Parameters
    ----------
    spec : CalibrationSpec
    source : ModelSource
        The dense model: its tokenizer reads text, and it writes text itself.
    bos_token_id : int or None
        The model's beginning-of-text token, for sampled text.
    progress : callable, optional
        Called with (stage, done, total).
    device : torch.device or str
        Where the model writes text; it is there whole, in 16 bits or as it is stored.

    Returns
    -------
    int64 [samples, length]
        On the CPU.

    Raises
    ------
    UsageError
        A text or data set cannot be read or is too short.
    ModelError
        The model cannot be read, or what it computes is not finite.
    """
    tokenizer = load_tokenizer(source)
    if spec.source == "sampled":
        assert spec.samples is not None, "CalibrationSpec wants a number for sampled text"
        if progress is not None:
            progress("sampling calibration text", 0, spec.samples * spec.sequence_length)
        device = torch.device(device)
        model = build_model(source, sampling_dtype(stored_dtype(source), device))
        load_parameters(model, "", source)
        return sample_text(
            model.to(device),
            bos_token_id,
            spec.samples,
            spec.sequence_length,
            spec.seed,
            progress,
            chat_start(tokenizer),
        )
    if spec.source == "dataset":
        return read_dataset(spec, tokenizer, progress)
    if progress is not None:
        progress("reading calibration text", 0, 1)
    return read_calibration(
        spec.paths, tokenizer, spec.samples, spec.sequence_length, exact=spec.exact
    )
