"""Convolutions as products: patches, 1 x 1 and groups; the others stay dense and say why."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gqsa_compiler.checkpoint import CheckpointReader, to_dense
from gqsa_compiler.modules import ModuleOptions, compile_module, compress_module
from gqsa_compiler.runtime import load_module


class Signals(nn.Module):
    """Convolutions of every kind, over a signal and over an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv1d(8, 32, 4, stride=4)
        self.point = nn.Conv1d(32, 64, 1, groups=2, bias=False)
        self.depth = nn.Conv1d(64, 64, 3, groups=64, padding=1)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.mix = nn.Conv2d(16, 32, 1)
        self.four = nn.Conv2d(32, 32, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, 32, 2, 2] for signals [batch, 8, 64]."""
        y = torch.relu(self.depth(self.point(self.patch(x))))
        image = y.reshape(-1, 64, 4, 4)[:, :16]
        result: Tensor = self.four(torch.relu(self.mix(self.wide(image))))
        return result


SPARSE = ["four", "mix", "patch", "point"]


def unfolded(weight: np.ndarray, groups: int) -> np.ndarray:
    """Cut the blocks on the diagonal out of a block-diagonal matrix."""
    rows, columns = (size // groups for size in weight.shape)
    return np.concatenate(
        [weight[i * rows :][:rows, i * columns :][:, :columns] for i in range(groups)]
    )


def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Signals().eval(), torch.randn(4, 8, 64)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4)},)
    report = compress_module(net, (x,), "w4s30g16", tmp_path / "c", dynamic_shapes=shapes)
    assert sorted(layer.name for layer in report.layers) == SPARSE
    dense = {layer.name: layer.reason for layer in report.dense}
    assert dense == {
        "depth": "groups of 16 do not divide its 3 inputs",
        "wide": "a convolution whose windows overlap",
    }
    compiled = compile_module(tmp_path / "c", tmp_path / "a", ModuleOptions(activations="float32"))
    assert {use.layer for use in compiled.kernels if "bsr" in use.kernel} == set(SPARSE)
    decoded = copy.deepcopy(net)
    with CheckpointReader(tmp_path / "c") as reader, torch.no_grad():
        for name in SPARSE:
            layer = decoded.get_submodule(name)
            weight = unfolded(to_dense(reader.layer(name)), layer.groups)
            layer.weight.copy_(torch.from_numpy(weight).reshape(layer.weight.shape))
        wanted = decoded(x).numpy()
    with load_module(tmp_path / "a") as module:
        np.testing.assert_allclose(module(x.numpy()), wanted, rtol=1e-4, atol=1e-5)
