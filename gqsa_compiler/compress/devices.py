"""Where a compression computes, and in what dtype."""

from __future__ import annotations

import torch

from gqsa_compiler.compress.gemm import multiplies_bfloat16
from gqsa_compiler.errors import UsageError


def choose_device(name: str) -> torch.device:
    """Return the device of a name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    UsageError
        The name is another one, or there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("compression runs on CPUs and on CUDA GPUs")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"There is no device {name!r} ({reason}); use auto or cpu.") from error
    return device


def training_dtype(device: torch.device) -> torch.dtype:
    """Return what products are computed in while training: bfloat16 where it is quick."""
    if device.type == "cuda":
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        quick = multiplies_bfloat16()
    return torch.bfloat16 if quick else torch.float32
