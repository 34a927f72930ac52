"""Training objectives beside their formulas, in numpy: values, and gradients by differences of those values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_problem import CLASSES, FEATURES

from mohs.defenses.training import Context, Room
from mohs.threat import Threat

Array = np.ndarray
Weights = list[Array]


def net(seed: int = 11) -> nn.Sequential:
    """Smooth, small and in double precision: what differences need."""
    made = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def batch(n: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in the box, points near them, labels."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(n, FEATURES, generator=generator, dtype=torch.float64)
    return (
        x,
        (x + 0.2 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1),
        torch.arange(n) % CLASSES,
    )


def weights(model: nn.Module) -> Weights:
    return [p.detach().numpy().copy() for p in model.parameters()]


def logits(w: Weights, x: Array) -> Array:
    return np.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]


def probabilities(w: Weights, x: Array, temperature: float = 1.0) -> Array:
    z = logits(w, x) / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def input_gradients(w: Weights, x: Array, y: Array) -> Array:
    """Of the cross-entropy, by the chain rule."""
    h = np.tanh(x @ w[0].T + w[1])
    back = (probabilities(w, x) - np.eye(CLASSES)[y]) @ w[2]
    return (back * (1 - h**2)) @ w[0]


def differences(f: Callable[[Weights], float], w: Weights, h: float = 1e-6) -> Weights:
    """The gradient of ``f`` by central differences."""
    found = [np.zeros_like(part) for part in w]
    for part, gradient in zip(w, found, strict=True):
        for at in np.ndindex(part.shape):
            kept = part[at]
            part[at] = kept + h
            up = f(w)
            part[at] = kept - h
            gradient[at] = (up - f(w)) / (2 * h)
            part[at] = kept
    return found


def room(text: str = "linf:0.1", seed: int = 3) -> Room:
    threat = Threat.parse(text)
    return Room(threat, threat.region.eps, seed)


def fixed(points: Tensor) -> Context:
    """A context in which every way to find points ends at the given ones."""
    return Context(lambda attack, x, y, **rest: points, 0.1, 0.0, room(), lambda make: points)


def agrees(objective: Any, context: Context, f: Callable[[Weights], float]) -> bool:
    """Are value and gradient of an objective those of a formula?"""
    model = net()
    x, _, y = batch()
    loss = objective.loss(model, x, y, context)
    assert loss.item() == pytest.approx(f(weights(model)), rel=1e-9)
    loss.backward()
    expected = differences(f, weights(model))
    return all(np.allclose(p.grad.numpy(), g, atol=1e-7) for p, g in zip(model.parameters(), expected, strict=True))
