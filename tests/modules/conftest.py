"""A module of every kind of layer, compressed and compiled once for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gqsa_compiler.modules import ModuleOptions, compile_module, compress_module
from gqsa_compiler.modules.result import ModuleReport
from gqsa_compiler.report import CompileReport


class Net(nn.Module):
    """Patches, a grouped 1 x 1 convolution, attention, a gated layer, and one that does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 32, 4, 4)
        self.mix = nn.Conv2d(32, 64, 1, groups=2)
        self.norm = nn.LayerNorm(64)
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.kept = nn.Linear(64, 24)
        self.odd = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, 5] for images [batch, 4, 16, 16]."""
        y = self.mix(self.patch(x)).flatten(2).transpose(1, 2)
        z = self.norm(y)
        heads = [
            layer(z).unflatten(-1, (2, 32)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        attended = nn.functional.scaled_dot_product_attention(*heads)
        y = y + attended.transpose(1, 2).flatten(2)
        y = y + self.down(nn.functional.gelu(self.up(y)))
        result: Tensor = self.odd(self.kept(y.mean(1)))
        return result


@dataclass(frozen=True, eq=False)
class Made:
    """What the fixture has made."""

    net: Net
    x: Tensor
    report: ModuleReport
    compiled: CompileReport
    checkpoint: Path
    artefact: Path


def batch_shapes() -> Any:
    """Let the first size of the one input vary."""
    return ({0: torch.export.Dim("batch", min=1, max=8)},)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Compress and compile a `Net`."""
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(8, 4, 16, 16)
    folder = tmp_path_factory.mktemp("module")
    report = compress_module(
        net, (x,), "w4s30g16", folder / "checkpoint",
        dynamic_shapes=batch_shapes(), ignore=("kep*",), outputs=("scores",),
    )  # fmt: skip
    compiled = compile_module(
        folder / "checkpoint", folder / "artefact", ModuleOptions(activations="float32")
    )
    return Made(net, x, report, compiled, folder / "checkpoint", folder / "artefact")
