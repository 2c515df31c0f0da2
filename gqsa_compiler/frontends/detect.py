"""Recognise checkpoints of other quantisers, so that an error can say what a file is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.json_file import read_json

_BY_METHOD = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "auto-round": "AutoRound",
    "autoround": "AutoRound",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "finegrained_fp8": "FP8",
    "mxfp4": "MXFP4",
    "modelopt": "ModelOpt",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "bitnet": "BitNet",
}

AMBIGUOUS = "GPTQ or AWQ"
"""What has the tensors of both, and no settings that tell."""

# A tensor's last name part -> the format that writes it. Checked in this order.
_BY_TENSOR = (
    ("g_idx", "GPTQ"),
    ("qweight", AMBIGUOUS),
    ("weight_packed", "compressed-tensors"),
    ("absmax", "bitsandbytes"),
    ("quant_map", "bitsandbytes"),
    ("SCB", "bitsandbytes"),
    ("weight_scale_inv", "FP8"),
    ("weight_scale", "compressed-tensors"),
    ("W_q", "HQQ"),
    ("codebooks", "AQLM"),
)


def foreign_config(config: dict[str, Any]) -> str | None:
    """Name the quantiser that ``config.json`` declares.

    Parameters
    ----------
    config : dict
        The parsed ``config.json``.

    Returns
    -------
    str or None
        ``"GPTQ"``, ``"AWQ"``, ...; None for a model that is not quantised, and for GQSA itself.
    """
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        method = str(quantization.get("quant_method", "")).lower()
        if method == "gqsa":
            return None
        if not method and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
            return "bitsandbytes"
        return _BY_METHOD.get(method, f"{method!r}-quantised" if method else "quantised")
    if isinstance(config.get("compression_config"), dict):
        return "compressed-tensors"
    if isinstance(config.get("quantization"), dict):
        return "MLX-quantised"
    return None


def foreign_files(directory: Path) -> str | None:
    """Name the quantiser or stack whose own configuration file lies in `directory`."""
    for name in ("quantize_config.json", "quant_config.json"):
        path = directory / name
        if path.is_file():
            try:
                fields = read_json(path)
            except ModelError:
                fields = {}
            # AutoAWQ says w_bit and q_group_size where AutoGPTQ says bits and group_size.
            is_awq = "w_bit" in fields or str(fields.get("quant_method", "")).lower() == "awq"
            return "AWQ" if is_awq else "GPTQ"
    if (directory / "mlc-chat-config.json").is_file():
        return "MLC-LLM"
    return None


def foreign_tensors(names: Iterable[str]) -> str | None:
    """Name the quantiser that writes tensors of these names, for checkpoints that do not say.

    Returns
    -------
    str or None
        The format; None when every name looks like a plain model's.
    """
    endings = {part for name in names for part in name.split(".")[-2:]}
    for ending, kind in _BY_TENSOR:
        if ending in endings:
            # EfficientQAT writes GPTQ's tensors and no configuration at all; g_idx settles it.
            return kind
    return None
