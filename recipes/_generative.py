"""What the recipes of the bundled generative nets share: the images, and what is done with a net once it is trained."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mohs.data import load
from mohs.models.generative import save_generative

DATA = "idx:/usr/share/datasets/fashion-mnist"
HOLDOUT = 500
"""Of the training images, so many of the last are watched and not trained on."""


def images() -> tuple[Tensor, Tensor]:
    """(to train on, to watch)."""
    x = load(DATA, split="train").x
    return x[:-HOLDOUT], x[-HOLDOUT:]


def main(
    about: str | None, steps: int, made: Callable[[int], tuple[nn.Module, Mapping[str, Any]]],
    name: str, arch: str, settings: Mapping[str, int], summary: str,
) -> None:  # fmt: skip
    """Train and measure (``made``: steps to the net and its figures), and bundle where the command line says so."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--bundle", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    net, numbers = made(given.steps)
    print(numbers, sum(p.numel() for p in net.parameters()), "weights")
    if given.bundle:
        print(save_generative(net, name, arch=arch, settings=settings, recipe=summary, numbers=numbers))
