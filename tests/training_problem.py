"""A problem small enough to train on in a blink: three blobs in the unit cube."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohs.data import Dataset
from mohs.defenses.training import Adam, Natural, Recipe, train
from mohs.evaluation.training import perturb
from mohs.models import weights_hash

__all__ = ["CLASSES", "FEATURES", "blobs", "mixed_net", "never", "perturb", "recipe", "run", "same"]

FEATURES, CLASSES = 6, 3


def blobs(n: int = 90, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    centres = torch.eye(CLASSES).repeat(1, FEATURES // CLASSES) * 0.5 + 0.25
    x = (centres[y] + 0.1 * torch.randn(n, FEATURES, generator=generator)).clamp(0, 1)
    return Dataset(x, y, name="blobs")


def recipe(objective: Any = None, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "tiny", "data": "blobs", "net": "linear", "objective": objective or Natural(), "epochs": 2, "batch": 16,
        "optimiser": Adam(lr=0.05), "holdout": 10, "net_options": {"d": FEATURES, "k": CLASSES},
    }  # fmt: skip
    return Recipe(**{**settings, **changes})


def never(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("no attack was to be run")


def mixed_net() -> nn.Module:
    """Batch statistics and dropout: all that a careless loop gets wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(FEATURES, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, CLASSES)
        )


def run(tmp_path: Path, objective: Any = None, *, how: Any = perturb, out: str = "run", **changes: Any) -> Any:
    options = {
        k: changes.pop(k) for k in list(changes) if k in ("watch", "progress", "model", "resume", "seed", "data")
    }
    options.setdefault("data", blobs())
    return train(recipe(objective, **changes), perturb=how, out=tmp_path / out, device="cpu", **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return weights_hash(a) == weights_hash(b)
