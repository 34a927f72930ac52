"""Small models for the tests of the checks, healthy ones and some with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mohs.evaluation.checks import check
from mohs.records import Finding
from mohs.threat import Threat

SIDE = 8


def images(n: int = 96, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def linear(classes: int = 5) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, classes)))


def conv() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIDE - 2) ** 2, 5)))


def norm(track: bool = True) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4, track_running_stats=track),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(4 * (SIDE - 2) ** 2, 5),
        )
    )


class Wrapped(nn.Module):
    """A healthy net with something done to its input or output."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.net = linear() if net is None else net
        self.before, self.after = before or (lambda v: v), after or (lambda v: v)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


class Functional(nn.Module):
    """Dropout that no layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.net(x), 0.5, self.training)


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Flatten(), nn.Linear(SIDE * SIDE, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).detach())


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.round(x.detach().numpy() * 8) / 8)


class Needle(torch.autograd.Function):
    """Identity whose gradient is nan."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g * float("nan")


def found(
    model: nn.Module, threat: Threat | str = "linf:0.1", x: Tensor | None = None, y: Tensor | None = None,
    **settings: Any,
) -> dict[str, Finding]:  # fmt: skip
    x = images() if x is None else x
    if y is None:
        was = [m.training for m in model.modules()]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            answers = model.eval()(x.float())
        for m, training in zip(model.modules(), was):
            m.training = training
        y = answers.argmax(1) if answers.dim() == 2 and answers.shape[1] > 1 else (answers.flatten() > 0).long()
    return {f.id: f for f in check(model, (x, y), threat, **settings)}


def severities(findings: dict[str, Finding]) -> dict[str, str]:
    return {k: f.severity for k, f in findings.items() if f.severity != "ok"}
