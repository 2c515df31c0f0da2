"""Modules and inputs of PyTorch's that were computed wrongly, or failed with a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gqsa_compiler.errors import GqsaError, ModelError, UsageError
from gqsa_compiler.modules import compile_module, compress_module
from gqsa_compiler.runtime import load_module


class Positions(nn.Module):
    """Positions counted over what is no padding, as RoBERTa has them, and remainders."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 8)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        seen = (ids != 1).int()
        signed = ids - 20
        return (
            self.linear(x),
            torch.cumsum(seen, 1) * seen,
            torch.fmod(signed, 3),
            torch.remainder(signed, 3),
            torch.clamp(signed, min=0),
            torch.fmod(x, 0.3),
            torch.remainder(x, 0.3),
        )


def test_counts_and_remainders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Positions()
    given = torch.randn(4, 9, 32), torch.randint(0, 40, (4, 9))
    sizes = {
        0: torch.export.Dim("batch", min=1, max=8),
        1: torch.export.Dim("length", min=2, max=32),
    }
    compress_module(
        module, given, "w4s30g16", tmp_path / "ckpt", dynamic_shapes=(sizes, sizes)
    )  # fmt: skip
    compile_module(tmp_path / "ckpt", tmp_path / "out")
    with load_module(tmp_path / "out", threads=1) as compiled:
        for count, length in ((4, 9), (2, 30)):
            x, ids = torch.randn(count, length, 32), torch.randint(0, 40, (count, length))
            found, wanted = compiled(x.numpy(), ids.numpy()), module(x, ids)
            for one, other in list(zip(found, wanted, strict=True))[1:]:
                np.testing.assert_allclose(one, other.numpy(), atol=1e-6)


def test_a_module_of_halves_is_computed_in_float32(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(32, 8)).bfloat16()
    report = compress_module(
        module, (torch.randn(8, 32).bfloat16(),), "w4s30g16", tmp_path / "ckpt"
    )
    assert [layer.name for layer in report.layers] == ["0"]


def test_parts_of_a_convolution_may_be_too_small_for_any_scale(tmp_path: Path) -> None:
    module = nn.Conv2d(64, 8, 1, groups=2)
    with torch.no_grad():
        module.weight[4:] *= 1e-9
    report = compress_module(module, (torch.randn(1, 64, 3, 3),), "w4s30g16", tmp_path / "ckpt")
    assert len(report.layers) == 1
    with torch.no_grad():
        module.weight *= 1e-9
    with pytest.raises(ModelError, match=r"are at most .* scales in float16 make 0 of all below"):
        compress_module(module, (torch.randn(1, 64, 3, 3),), "w4s30g16", tmp_path / "other")


class Failing(nn.Linear):
    """What somebody's own module may do."""

    def forward(self, _x: Tensor) -> Tensor:
        raise RuntimeError("something\nis wrong")


LINEAR, X = nn.Sequential(nn.Linear(32, 8)), torch.zeros(4, 32)


@pytest.mark.parametrize(
    ("module", "given", "options", "kind", "words"),
    [
        (LINEAR, (torch.zeros(4, 30),), {}, ModelError, "cannot run on the inputs: mat1 and mat2"),
        (LINEAR, (), {}, ModelError, "cannot run on the inputs: .*missing 1 required"),
        (LINEAR, X, {}, UsageError, "example inputs should be a tuple"),
        (LINEAR, (X,), {"calibration": []}, UsageError, "no calibration inputs"),
        (LINEAR, (X,), {"calibration": [X]}, UsageError, "calibration inputs should be a tuple"),
        (Failing(32, 8), (X,), {}, ModelError, "Failing cannot run on the inputs: something"),
        (
            nn.Linear(30, 8),
            (torch.zeros(4, 30),),
            {},
            ModelError,
            "groups of 16 do not divide its 30 inputs",
        ),
        (LINEAR, (X,), {"ignore": "*"}, ModelError, "0: left dense on purpose"),
        (nn.ReLU(), (X,), {}, ModelError, "none at all"),
    ],
)
def test_refused_in_a_sentence(
    module: nn.Module,
    given: Any,
    options: dict[str, Any],
    kind: type[GqsaError],
    words: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=words) as found:
        compress_module(module, given, "w4s30g16", tmp_path / "ckpt", **options)
    assert "\n" not in str(found.value)
