"""Convolutional networks: batch norms, pooling and what goes with them, over images and signals."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gqsa_compiler.checkpoint import CheckpointReader, to_dense
from gqsa_compiler.errors import ModelError
from gqsa_compiler.modules import ModuleOptions, compile_module, compress_module
from gqsa_compiler.runtime import load_module


class Residual(nn.Module):
    """An inverted residual, as MobileNet has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.depth = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.depth_norm = nn.BatchNorm2d(2 * width, affine=False)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of `x`."""
        y = functional.relu6(self.norm(self.expand(x)))
        y = functional.hardswish(self.depth_norm(self.depth(y)))
        return x + functional.leaky_relu(self.project(y), 0.1)


class Net(nn.Module):
    """Every kind of pooling over an image, and over a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.body = Residual(32)
        self.signal = nn.Conv1d(32, 32, 1)
        self.signal_norm = nn.BatchNorm1d(32)
        self.pools = nn.Sequential(nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(2))
        self.whole = nn.AdaptiveAvgPool2d(1)
        self.parts = nn.AdaptiveAvgPool2d((2, 4))
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return [batch, 16], [batch, 32, 2, 4] and [batch, 32, 2] of images [batch, 3, 32, 32]."""
        y = functional.max_pool2d(self.body(functional.softplus(self.stem(x))), 3, 1, 1)
        y = functional.avg_pool2d(y, 2, padding=1, count_include_pad=False)[:, :, :8, :8]
        signal = self.pools(self.signal_norm(self.signal(y.flatten(2))))
        return self.head(self.whole(y).flatten(1)), self.parts(y), signal


SPARSE = ["body.expand", "body.project", "head", "signal"]


def trained(net: nn.Module) -> nn.Module:
    """Give batch norms statistics and factors other than those they begin with."""
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2.0)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 2.0)
                nn.init.normal_(layer.bias, std=0.3)
    return net.eval()


def test_convolutional_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = trained(Net()), torch.randn(4, 3, 32, 32)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4)},)
    report = compress_module(net, (x,), "w4s30g16", tmp_path / "c", dynamic_shapes=shapes)
    assert sorted(layer.name for layer in report.layers) == SPARSE
    compiled = compile_module(tmp_path / "c", tmp_path / "a", ModuleOptions(activations="float32"))
    assert {use.layer for use in compiled.kernels if "bsr" in use.kernel} == set(SPARSE)
    decoded = copy.deepcopy(net)
    with CheckpointReader(tmp_path / "c") as reader, torch.no_grad():
        for name in SPARSE:
            weight = decoded.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(torch.from_numpy(to_dense(reader.layer(name))).reshape(weight.shape))
    with load_module(tmp_path / "a") as module:
        for batch in (1, 4):
            wanted = [part.detach().numpy() for part in decoded(x[:batch])]
            found = module(x[:batch].numpy())
            for part, want in zip(found, wanted, strict=True):
                np.testing.assert_allclose(part, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.AdaptiveAvgPool2d(3), "Pooling an axis of 8 to 3 parts is not supported."),
        (nn.Softplus(beta=2.0), "softplus whose beta is not 1"),
    ],
)
def test_what_cannot_be_written(layer: nn.Module, message: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(16, 16, 1), layer)
    with pytest.raises(ModelError, match=message):
        compress_module(net, (torch.randn(2, 16, 8, 8),), "w4s30g16", tmp_path / "c")
    assert not (tmp_path / "c").exists()
