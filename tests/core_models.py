"""Small classifiers for the tests of the core, with what is known about them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(rows: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(rows, *shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


class Linear(nn.Module):
    """logits = x W + b with W [D, K]; one logit [N] where ``K`` is None."""

    def __init__(
        self, features: int, classes: int | None = 3, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        g = seeded(seed)
        self.one = classes is None
        self.weight = nn.Parameter(torch.randn(features, classes or 1, generator=g, dtype=torch.float64).to(dtype))
        self.bias = nn.Parameter(0.1 * torch.randn(classes or 1, generator=g, dtype=torch.float64).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ self.weight + self.bias
        return z.squeeze(1) if self.one else z


class RowByRow(nn.Module):
    """A ReLU net that computes every row alone in freshly aligned memory: its bits cannot depend on the place in the batch."""

    def __init__(self, features: int, classes: int = 4, hidden: int = 16, seed: int = 0) -> None:
        super().__init__()
        g = seeded(seed)
        self.first = nn.Parameter(torch.randn(features, hidden, generator=g) / math.sqrt(features))
        self.second = nn.Parameter(torch.randn(hidden, classes, generator=g) / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1).unbind(0)
        return torch.cat([torch.relu(r.clone().unsqueeze(0) @ self.first) @ self.second for r in rows])


class Counting(nn.Module):
    """Counts the rows that pass, forwards and backwards."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards, self.shapes = net, 0, 0, set()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.shapes.add(tuple(x.shape))
        z = self.net(x)
        if z.requires_grad:
            z.register_hook(self._count)
        return z

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


def balanced(net: nn.Sequential, typical: Tensor) -> nn.Sequential:
    """Move the last bias so that every class occurs, and small changes matter."""
    with torch.no_grad():
        net[-1].bias -= net(typical).mean(0)
    return net


def relu_net(shape: tuple[int, ...], classes: int = 4, hidden: int = 16, seed: int = 0) -> nn.Sequential:
    """Flatten, Linear, ReLU, Linear, weights from a seed and not from the global generator."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.ReLU(), nn.Linear(hidden, classes))
    g = seeded(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(p.shape[-1]))
    return balanced(net.eval(), inputs(256, *shape, seed=99))


def conv_net(seed: int = 0) -> nn.Sequential:
    """1 x 12 x 12 to 5 classes, with batch normalisation in eval mode."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(288, 5)
    )  # fmt: skip
    g = seeded(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.5))
        net[1].running_mean.uniform_(-0.1, 0.1, generator=g)
        net[1].running_var.uniform_(0.5, 1.5, generator=g)
    return balanced(net.eval(), inputs(256, 1, 12, 12, seed=99))
