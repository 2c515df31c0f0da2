"""What compression calibrates and trains on: the model's own text, text files or a data set.

Names are loaded when they are first used: what a user asked for is read without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gqsa_compiler.progress import Progress

if TYPE_CHECKING:
    from gqsa_compiler.compress.calibration.dataset import read_dataset
    from gqsa_compiler.compress.calibration.sampling import sample_text, sampling_dtype
    from gqsa_compiler.compress.calibration.spec import (
        CalibrationSpec,
        parse_calibration,
        parse_samples,
    )
    from gqsa_compiler.compress.calibration.text import read_calibration
    from gqsa_compiler.compress.calibration.tokens import calibration_tokens

__all__ = [
    "CalibrationSpec",
    "Progress",
    "calibration_tokens",
    "parse_calibration",
    "parse_samples",
    "read_calibration",
    "read_dataset",
    "sample_text",
    "sampling_dtype",
]

_MODULES = {
    "CalibrationSpec": "spec",
    "calibration_tokens": "tokens",
    "parse_calibration": "spec",
    "parse_samples": "spec",
    "read_calibration": "text",
    "read_dataset": "dataset",
    "sample_text": "sampling",
    "sampling_dtype": "sampling",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
