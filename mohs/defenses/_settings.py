"""What defenses ask of their settings and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mohs.errors import ModelError, UsageError


def unit(x: Tensor) -> Tensor:
    """``x`` clipped to [0, 1], for what knows no other values; noise of a defense around it may lead a little outside.

    Raises:
        ModelError: values so far outside that these are no images in [0, 1].
    """
    if x.numel() and not -1 <= float(x.detach().amin()) <= float(x.detach().amax()) <= 2:
        raise ModelError(
            f"This defense needs inputs in [0, 1]; got values from {float(x.detach().amin()):g} to "
            f"{float(x.detach().amax()):g}. Put it where inputs are in [0, 1], before any normalisation, and attack in that box."
        )
    return x.clamp(0, 1)


def images(x: Tensor, name: str) -> Tensor:
    """``x`` itself, if it is a batch of images [B, C, H, W]."""
    if x.dim() != 4:
        raise ModelError(
            f"{name} works on images [B, C, H, W]; got inputs of shape {tuple(x.shape)}. Give the data that shape and flatten "
            "inside the model."
        )
    return x


def number(
    value: float,
    name: str,
    low: float,
    high: float = math.inf,
    *,
    whole: bool = False,
    above: bool = False,
    below: bool = False,
) -> None:
    """Refuse a setting that is not a (whole) number from ``low`` to ``high``; ``above``: nor ``low`` itself; ``below``: nor ``high``.

    Raises:
        UsageError: it is not.
    """
    kinds = (int,) if whole else (int, float)
    good = type(value) in kinds and math.isfinite(value) and low <= value <= high and not (above and value == low)
    good = good and not (below and value == high)
    if not good:
        kind = "a whole number" if whole else "a number"
        least = f"above {low:g}" if above else f"at least {low:g}"
        most = "" if math.isinf(high) else f" and below {high:g}" if below else f" and at most {high:g}"
        raise UsageError(f"{name} must be {kind} {least}{most}; got {value!r}.")


def by_image(function: Callable[[Any], Any], x: Tensor) -> Tensor:
    """A function of numpy images [C, H, W] in [0, 1], float64, on each of ``x``, as a tensor like ``x`` without a graph."""
    done = [function(image) for image in x.detach().cpu().double().numpy()]
    value = torch.from_numpy(np.stack(done)) if done else torch.zeros(x.shape)
    return value.to(x.device, x.dtype)


def numpy_generator() -> np.random.Generator:
    """A numpy generator whose seed is drawn from torch's, which alone decides what is random in a model."""
    return np.random.default_rng(int(torch.randint(1 << 62, ()).item()))
